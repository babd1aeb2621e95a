"""Released tokens that come back from host memory: the law, what is exact, and what lies where."""

import copy
import pickle

import pytest
import torch
from adore_cases import (
    EXACT,
    HOST,
    PIECES,
    SMALL,
    Recorder,
    decoder,
    drawn_scores,
    follows,
    gap_after_reordering,
    made,
    mask_of,
    on_host,
    run,
    text,
)

from scrubjay import AdoreCache, AdoreConfig, AdoreForCausalLM
from scrubjay.configuration import configuration_adore
from scrubjay.configuration.configuration_adore import AdoreSettings
from scrubjay.modeling.caches.host_rows import CHUNK, HostRows
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import named

FLAGS = {
    "as it is": {},
    "swap": {"rebuild_commit": "swap"},
    "every third": {"rebuild_every": 3},
    "gate and swap": {"rebuild_gate": True, "rebuild_commit": "swap"},
    "release before": {"release_before": True},
    "all at once": dict(rebuild_commit="swap", release_before=True, rebuild_every=2, recent=2, sinks=1),
}


@pytest.fixture(params=["llama", "qwen3"])
def family(request):
    return decoder(request.param)


@pytest.fixture
def model():
    return decoder()


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("pieces", [PIECES, [4, 1, 1, 9, 1, 6, 1, 1, 12]], ids=["steps", "turns"])
def test_a_run_is_one_dense_pass_in_which_every_token_runs_once(family, flags, pieces):
    gap, back_gap, law = follows(family, text()[0], pieces, drawn_scores(), **HOST | FLAGS[flags])
    assert max(gap, back_gap) < EXACT
    assert len(law.instances) == sum(pieces)
    assert any(law.rebuilt)


def test_each_flag_changes_the_run_and_so_does_the_host(model):
    """Or the check above would prove nothing about it."""
    seen = [run(model, text(), PIECES, on_host(model, **flags))[0] for flags in FLAGS.values()]
    seen += [run(model, text(), PIECES, made(model, **more))[0] for more in ({}, {"rebuild": 0})]
    for i, one in enumerate(seen):
        assert all((one - other).abs().max() > 1e-2 for other in seen[:i])


@pytest.mark.parametrize("cache_size", [1, 16])
@pytest.mark.parametrize("commit", ["discard", "swap"])
def test_bringing_every_released_token_back_is_full_attention(family, cache_size, commit):
    ids, mask = text(3), mask_of((40, 31, 24), 40)
    with torch.no_grad():
        full = family(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    for pieces in ([*PIECES, 2], [1] * 40, [3, 20, 17]):
        cache = on_host(family, cache_size=cache_size, rebuild=40, rebuild_commit=commit)
        assert (run(family, ids, pieces, cache, mask)[0] - full)[mask.bool()].abs().max() < EXACT


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache_size", [1, 7])
def test_it_generates_as_full_attention(model, cache_size, beams):
    ids, options = text(3, 18), dict(max_new_tokens=14, do_sample=False, num_beams=beams)
    options["attention_mask"] = mask_of((18, 11, 2), 18)
    want = model.generate(ids, **options)
    cache = AdoreCache(model, controller="random", cache_size=cache_size, rebuild=40, rebuild_from="host")
    assert torch.equal(model.generate(ids, **named(cache), **options), want)
    few = AdoreCache(model, controller="random", cache_size=cache_size, rebuild=2, rebuild_from="host")
    assert not torch.equal(model.generate(ids, **named(few), **options), want)


def test_padded_rows_equal_lone_rows_after_reordering(family):
    assert gap_after_reordering(family, rebuild_from="host") < EXACT


def test_the_model_runs_on_the_new_tokens_alone():
    model = decoder(dtype=torch.float32, attn_implementation="eager")
    cache, ids = on_host(model), text()
    run(model, ids[:, :30], [18] + [1] * 12, cache)
    lengths = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda layer, args: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        out = model(ids[:, 30:31], **named(cache), output_attentions=True)
    handle.remove()
    assert lengths == [1]
    assert {x.shape for x in out.attentions} == {(1, 4, 1, 7 + 3 + 1)}
    assert set(cache.history.tables) == {"host", "positions", "real", "features"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("commit", ["discard", "swap"])
def test_compact_positions_number_what_is_attended(family, commit):
    """One layer's keys depend on token and position alone, so a step is the model on the tokens that it attends."""
    model, ids = decoder(family, num_hidden_layers=1), text()
    logits, tables = run(model, ids, PIECES, on_host(model, position_mode="compact", rebuild_commit=commit))
    for column in range(18, 38):
        held, again = tables[column - 18][0][0], tables[column - 17][1][0]
        attended = torch.tensor([*sorted({*held.tolist(), *again.tolist()} - {-1}), column])
        with torch.no_grad():
            want = model(ids[:, attended]).logits[0, -1]
        assert (logits[0, column] - want).abs().max() < 1e-10  # keys are turned back and again


def test_what_lies_where_and_what_a_planner_is_told():
    model, room = decoder(dtype=torch.float32), 512
    controller, pair = Controller(48, 16), 3 * 2 * (12 + 12) * 4
    for source in ("model", "host"):
        cache = AdoreCache(model, controller=controller, rebuild_from=source, **SMALL)
        assert cache.nbytes_by_place == {"device": 0, "host": 0}
        run(model, text(2, 300), [299, 1], cache)
        a_token, a_row = (
            4 + 4 + 1 + 16 * 4,
            8 + 16 * 4 + 7 * 8,
        )  # id or number, position, is one, features; state, slots
        places = cache.nbytes_by_place
        assert places["device"] == 2 * pair * (7 + 1) + 2 * room * a_token + 2 * a_row + room * 16 * 4
        assert places["host"] == (0 if source == "model" else pair * len(cache.layers[0].host.table))
        assert sum(places.values()) == cache.nbytes
    assert cache.layers[0].host.length == 600
    assert 600 <= len(cache.layers[0].host.table) <= 600 * 1.5 + CHUNK


@pytest.mark.parametrize("source", ["model", "host"])
def test_row_bytes_are_what_the_cache_holds(source):
    sizes = dict(hidden_size=48, num_hidden_layers=2, vocab_size=97, num_attention_heads=4, controller_hidden=16)
    model = AdoreForCausalLM(AdoreConfig(**sizes, **SMALL, label_k=5, rebuild_from=source)).eval()
    once, each = AdoreCache.row_bytes(model.config, model.dtype)
    held = []
    for length in (256, 512):  # no room ahead on the device
        cache = AdoreCache(model)
        run(model, text(2, length), [length], cache)
        pair = cache.nbytes_by_place["host"] // max(1, sum(len(x.host.table) for x in cache.layers if x.host))
        ahead = sum(len(x.host.table) - x.host.length for x in cache.layers if x.host)
        held.append(cache.nbytes - pair * ahead - cache._table.nbytes)
    assert held == [2 * (once + each * length) for length in (256, 512)]


def test_scores_of_fixed_order_are_warned_of(model, monkeypatch):
    said = []
    monkeypatch.setattr(configuration_adore.logger, "warning_once", said.append)
    AdoreCache(model, controller="recency", **HOST)
    assert "a cache of 10 attends" in said[0]
    assert "at the price of bringing 3 tokens from the host in every step" in said[0]


def test_without_rebuilding_nothing_lies_on_the_host(model):
    cache = on_host(model, rebuild=0)
    run(model, text(), PIECES, cache)
    assert cache.nbytes_by_place["host"] == 0
    assert set(cache.history.tables) == {"positions", "real", "features"}


def test_the_table_grows_by_half_and_copies_little(model):
    rows, places = HostRows(), set()
    with torch.no_grad():
        for i in range(3000):
            rows.append(torch.full((1, 2, 1, 3), float(i)), torch.full((1, 2, 1, 3), -float(i)))
            places.add(len(rows.table))
    assert len(places) < 8
    assert torch.equal(rows.tensor()[:, 1, 0], torch.arange(3000.0))
    assert torch.equal(rows.tensor()[:, 1, 5], -torch.arange(3000.0))


def test_beams_move_nothing_on_the_host_and_rows_that_leave_are_given_back(model):
    cache, ids = on_host(model), text(3, 30)
    run(model, ids, [18] + [1] * 12, cache)
    tables = [layer.host.table.data_ptr() for layer in cache.layers]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    assert [layer.host.table.data_ptr() for layer in cache.layers] == tables
    held = cache.nbytes_by_place["host"]
    cache.batch_select_indices(torch.tensor([5]))
    assert cache.nbytes_by_place["host"] < held / 3
    assert {layer.host.length for layer in cache.layers} == {30}


def test_rows_repeat_select_and_are_forgotten(model):
    ids, more = text(3, 30), text(3, 6, seed=8)
    for change, rows in (
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ):
        cache = on_host(model)
        run(model, ids, [18] + [1] * 12, cache)
        want = run(model, more, [1] * 6, copy.deepcopy(cache))[0][rows]
        change(cache)
        assert (run(model, more[rows], [1] * 6, cache)[0] - want).abs().max() < EXACT
        cache.reset()
        assert cache.nbytes_by_place["host"] == 0
    want = run(model, ids, [18] + [1] * 12, on_host(model))[0]
    assert torch.equal(run(model, ids, [18] + [1] * 12, cache)[0], want)


def test_copies_pickles_and_files_go_on_bit_for_bit(model, tmp_path):
    controller, ids = Controller(48, 16).double(), text(2, 50)
    cache = AdoreCache(model, controller=controller, **HOST)
    run(model, ids, [18] + [1] * 11, cache)
    cache.save(tmp_path / "prompt.safetensors")
    others = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    others[1].attach(model, controller)
    others.append(AdoreCache.load(tmp_path / "prompt.safetensors", model, controller))
    want = run(model, ids[:, 29:], [1] * 15 + [6], cache)[0]
    for other in others:
        assert other.settings == cache.settings
        assert torch.equal(run(model, ids[:, 29:], [1] * 15 + [6], other)[0], want)


def test_turns_are_generated_as_one_conversation(model):
    first, more, outs = text(2, 18), text(2, 5, seed=9), []
    options = dict(max_new_tokens=8, do_sample=False)
    for suffix in (False, True):
        cache = on_host(model)
        conversation = torch.cat([model.generate(first, **named(cache), **options), more], 1)
        given = conversation[:, cache.get_seq_length() :] if suffix else conversation
        out = model.generate(given, attention_mask=torch.ones_like(conversation), **named(cache), **options)
        outs.append(out[:, -8:])
    assert torch.equal(*outs)


def test_a_prompt_in_pieces_or_of_embeddings(model):
    ids, embedding = text(2), model.get_input_embeddings()
    want, _ = run(model, ids, [7, 7, 7, 7, 7, 5], on_host(model))
    with torch.no_grad():
        chunked = model(ids, **named(on_host(model, prefill="chunked"))).logits
        cache = on_host(model)
        pieces = [model(inputs_embeds=embedding(x), **named(cache)).logits for x in ids.split(7, 1)]
    assert (chunked - want).abs().max() < EXACT
    assert torch.equal(torch.cat(pieces, 1), want)


def test_gradients_flow_through_what_comes_back(model):
    ids = text(2, 24)
    parameters = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(ids).logits.square().sum(), parameters)
    cache, total = on_host(model, rebuild=24), 0.0
    for piece in ids.split([10, 1, 1, 11, 1], 1):
        total = total + model(piece, **named(cache)).logits.square().sum()
    for one, other in zip(torch.autograd.grad(total, parameters), want, strict=True):
        assert (one - other).abs().max() < 1e-9 * other.abs().max()
    assert torch.isfinite(run(model, ids, [1] * 4, copy.deepcopy(cache))[0]).all()


def test_inference_mode_autocast_and_bfloat16(model):
    ids, cache = text(2), on_host(model)
    want = run(model, ids, PIECES, on_host(model))[0]
    with torch.inference_mode():
        first, _ = run(model, ids[:, :28], [18] + [1] * 10, cache)
    rest, _ = run(model, ids[:, 28:38], [1] * 10, cache)  # what inference mode made is written outside of it
    assert torch.equal(torch.cat([first, rest], 1), want)
    for dtype in (torch.bfloat16, torch.float32):
        low = decoder(dtype=dtype)
        cache = AdoreCache(low, controller=Controller(48, 16), **HOST)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            assert torch.isfinite(run(low, ids, PIECES, cache)[0]).all()
        assert torch.isfinite(run(low, ids, [1, 1], cache)[0]).all()


def test_a_layer_is_sent_for_before_the_one_ahead_of_it_has_ended(model, monkeypatch):
    cache, order = on_host(model), []
    run(model, text(), PIECES, cache)
    number = {id(layer.host): i for i, layer in enumerate(cache.layers)}

    def noting(name, original):
        def noted(self, *args):
            order.append((name, number[id(self)]))
            return original(self, *args)

        return noted

    for name in ("fetch", "fetched"):
        monkeypatch.setattr(HostRows, name, noting(name, getattr(HostRows, name)))
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: order.append(("runs", 1)))
    run(model, text()[:, :1], [1], cache)
    handle.remove()
    sent = [("fetch", 0), ("fetched", 0), ("fetch", 1), ("runs", 1), ("fetched", 1), ("fetch", 2), ("fetched", 2)]
    assert order == sent


@pytest.mark.parametrize("settings", [dict(rebuild_mask="full"), dict(store="embeds")], ids=str)
def test_what_speaks_of_running_again_is_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"{name}='{value}' means nothing with rebuild_from='host': .* Leave {name}"):
        AdoreSettings(rebuild_from="host", **settings)
    with pytest.raises(ValueError, match=r"rebuild_from must be one of \('model', 'host'\); got 'disk'"):
        AdoreSettings(rebuild_from="disk")


@pytest.mark.gpu
def test_pinned_memory_and_a_second_stream_change_nothing():
    ids, mask = text(2), torch.cat([mask_of((18, 5), 18), torch.ones(2, 20, dtype=torch.long)], 1)
    logits = []
    for device in ("cpu", "cuda"):
        model = decoder(dtype=torch.float64).to(device)
        scorer = drawn_scores()
        scorer.scores = scorer.scores.to(device)
        cache = Recorder(model, controller=scorer, **HOST | {"rebuild_commit": "swap"})
        logits.append(run(model, ids.to(device), PIECES, cache, mask.to(device))[0].cpu())
    assert cache.layers[0].host.table.is_pinned()
    assert (logits[0] - logits[1])[mask.bool()].abs().max() < 1e-9  # other orders of the same float64 sums
