"""ADORE's cache as users hold it: bytes, rows, files, forks, its place in a model, and what it refuses."""

import copy
import gc

import pytest
import torch
from adore_cases import EXACT, PIECES, SMALL, decoder, drawn_scores, follows, made, mask_of, run, text
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from scrubjay import AdoreCache
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import CACHE, named


@pytest.fixture
def model():
    return decoder()


def test_slots_and_released_tokens_are_the_tokens_of_each_row(model):
    ids, mask = text(3), torch.cat([mask_of((18, 11, 2), 18), torch.ones(3, 22, dtype=torch.long)], 1)
    _, tables = run(model, ids, PIECES, made(model), mask)
    for end, (slots, rebuilt) in zip(range(18, 39), tables, strict=True):
        for row in range(3):
            tokens = set(mask[row, :end].nonzero()[:, 0].tolist())
            held = [c for c in slots[row].tolist() if c >= 0]
            again = [c for c in rebuilt[row].tolist() if c >= 0]
            assert len(held) == len(set(held)) == min(7, len(tokens))
            assert set(held) <= tokens
            assert end - 1 in held, "the newest token is always cached"
            assert len(again) == len(set(again)) <= 3
            assert set(again) <= tokens - {end - 1}


def test_bytes_of_keys_and_values_are_constant_and_those_of_a_token_few():
    model, sizes = decoder(dtype=torch.float32), []
    controller = Controller(48, 16)
    for length in (300, 500, 1000):
        cache = AdoreCache(model, controller=controller, **SMALL)
        run(model, text(2, length), [length - 1, 1], cache)
        held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        room = -(-length // 256) * 256
        assert held == 3 * 2 * 2 * (7 + 1) * (12 + 12) * 4
        a_token = 4 + 4 + 1 + 16 * 4  # id, position, whether it is one, features
        a_row = 8 + 16 * 4 + 7 * 8  # count, state of the GRU, slots
        assert cache.nbytes == held + 2 * room * a_token + 2 * a_row + room * 16 * 4
        sizes.append(held)
    assert len(set(sizes)) == 1


def test_without_rebuilding_nothing_is_kept_to_run_again(model):
    cache = AdoreCache(model, cache_size=7, rebuild=0, controller="recency")
    run(model, text(), PIECES, cache)
    assert set(cache.history.tables) == {"positions", "real", "features"}
    assert cache.history["features"].numel() == 0


def test_a_step_writes_where_the_cache_is_and_returns_what_it_was_given(model):
    cache = made(model)
    run(model, text(), PIECES, cache)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    tables = {name: x.data_ptr() for name, x in cache.history.tables.items()}
    with torch.no_grad():
        out = model(text()[:, :1], **named(cache), output_hidden_states=True)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert {name: x.data_ptr() for name, x in cache.history.tables.items()} == tables
    assert out[CACHE] is cache
    assert out.logits.shape[1] == 1
    assert {x.shape for x in out.hidden_states} == {(1, 1, 48)}


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: numbers that are read, shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        masks = [x for x in (args[1] if name == "aten::index" else ()) if x is not None and x.dtype == torch.bool]
        if masks or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"):
            self.seen.append(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("flags", [{}, {"rebuild_commit": "swap", "position_mode": "compact"}, {"rebuild_gate": True}])
def test_a_step_does_not_wait_for_the_device_but_for_the_gate(flags):
    model, ids = decoder(dtype=torch.float32), text(2)
    mask = torch.cat([mask_of((18, 5), 18), torch.ones(2, 22, dtype=torch.long)], 1)
    cache = AdoreCache(model, controller=Controller(48, 16), **SMALL | flags)
    run(model, ids, [18] + [1] * 12, cache, mask)
    with torch.no_grad(), Waits() as waits:
        model(ids[:, 30:31], attention_mask=mask[:, :31], **named(cache))
    assert waits.seen == (["aten::_local_scalar_dense"] if "rebuild_gate" in flags else [])


def test_gradients_flow_through_slots_and_rebuilt_tokens(model):
    ids = text(2, 24)
    parameters = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(ids).logits.square().sum(), parameters)
    cache, total = made(model, rebuild=24), 0.0
    for piece in ids.split([10, 1, 1, 11, 1], 1):
        total = total + model(piece, **named(cache)).logits.square().sum()
    for one, other in zip(torch.autograd.grad(total, parameters), want, strict=True):
        assert (one - other).abs().max() < 1e-9 * other.abs().max()


def test_output_as_a_tuple_and_probabilities_lose_the_rebuilt_tokens_too():
    model = decoder(dtype=torch.float32, attn_implementation="eager")
    cache, ids = made(model), text()
    run(model, ids[:, :30], [18] + [1] * 12, cache)
    with torch.no_grad():
        hidden, kept, states, probabilities = model.model(
            input_ids=ids[:, 30:31], **named(cache), use_cache=True, output_hidden_states=True,
            output_attentions=True, return_dict=False,
        )  # fmt: skip
    assert hidden.shape == (1, 1, 48)
    assert kept is cache
    assert {x.shape for x in states} == {(1, 1, 48)}
    assert {x.shape for x in probabilities} == {(1, 4, 1, 7 + 3 + 1)}


@pytest.mark.parametrize("batch", [1, 3])
def test_hidden_states_of_a_step_lie_in_one_piece(model, batch):
    """A product of a view with frozen weights copies them for every row: in bfloat16 that was most of the step."""
    cache, ids = made(model), text(batch, 19)
    with torch.no_grad():
        model(ids[:, :18], **named(cache))
        hidden = model.model(ids[:, 18:], **named(cache)).last_hidden_state
    assert cache.last_rebuilt.shape[1] == 3
    assert hidden.stride() == torch.empty(hidden.shape).stride()


def test_eager_equals_sdpa(model):
    eager = decoder(attn_implementation="eager", dtype=torch.float32)
    ids, sdpa = text(3), decoder(dtype=torch.float32)
    mask = torch.cat([mask_of((18, 11, 2), 18), torch.ones(3, 20, dtype=torch.long)], 1)
    one, other = (run(m, ids, PIECES, made(m), mask)[0] for m in (eager, sdpa))
    assert (one - other)[mask.bool()].abs().max() < 1e-3  # float32 on logits up to 40: 7e-5 measured
    with torch.no_grad():
        full = eager(ids[:, :38], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    whole = run(eager, ids, PIECES, made(eager, cache_size=40), mask)[0]
    assert (whole - full)[mask.bool()].abs().max() < 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bfloat16_with_one_slot_stays_finite(family):
    model = decoder(family, dtype=torch.bfloat16)
    cache = AdoreCache(model, cache_size=1, rebuild=2, controller=Controller(48, 16))
    logits, _ = run(model, text(2), PIECES, cache, torch.cat([mask_of((18, 3), 18), torch.ones(2, 22).long()], 1))
    assert torch.isfinite(logits).all()
    assert cache.layers[0].keys.dtype == torch.bfloat16


def test_mistral_without_a_window_follows_the_law():
    gap, rebuilt_gap, _ = follows(decoder("mistral"), text()[0], PIECES, drawn_scores(), **SMALL)
    assert max(gap, rebuilt_gap) < EXACT


def test_turns_of_several_tokens_are_generated_as_one_conversation(model):
    first, more = text(2, 18), text(2, 5, seed=9)
    options = dict(max_new_tokens=8, do_sample=False)
    outs = []
    for suffix in (False, True):
        cache = made(model)
        turn = model.generate(first, **named(cache), **options)
        conversation = torch.cat([turn, more], 1)
        mask = torch.ones_like(conversation)
        given = conversation[:, cache.get_seq_length() :] if suffix else conversation
        out = model.generate(given, attention_mask=mask, **named(cache), **options)
        outs.append(out[:, -8:])
    assert torch.equal(*outs)
    by_hand = made(model)
    run(model, conversation, [18] + [1] * 7, by_hand)  # 18 + 8 - 1 columns: the last token is not in the cache
    with torch.no_grad():
        logits = model(conversation[:, 25:], **named(by_hand)).logits
    assert torch.equal(outs[0][:, 0], logits[:, -1].argmax(-1))


def test_sampling_is_decided_by_its_seed(model):
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(model.generate(text(2, 18), **named(made(model)), max_new_tokens=12, do_sample=True))
    assert torch.equal(*outs)


def test_a_prompt_in_pieces_is_run_as_chunked_prefill(model):
    ids, mask = text(2), mask_of((40, 40), 40)
    whole = made(model, prefill="chunked")
    with torch.no_grad():
        out = model(ids, attention_mask=mask, **named(whole), output_hidden_states=True)
    pieces = made(model)
    want, _ = run(model, ids, [7, 7, 7, 7, 7, 5], pieces, mask)
    assert (out.logits - want)[mask.bool()].abs().max() < EXACT
    assert [x.shape for x in out.hidden_states] == [(2, 40, 48)] * 4
    assert (model.lm_head(out.hidden_states[-1]) - out.logits).abs().max() < EXACT
    assert torch.equal(whole.slots, pieces.slots)
    assert (out.logits - run(model, ids, [40], made(model), mask)[0]).abs().max() > 1e-2
    options = dict(max_new_tokens=9, do_sample=False, attention_mask=mask)
    chunked = model.generate(ids, **named(made(model, prefill="chunked")), **options)
    assert torch.equal(chunked, model.generate(ids, **named(made(model)), prefill_chunk_size=7, **options))
    with pytest.raises(ValueError, match="cuts all rows at the same columns"):
        model(ids, attention_mask=mask_of((40, 3), 40), **named(made(model, prefill="chunked")))


def test_a_padded_row_keeps_its_own_first_tokens(model):
    """Sinks are counted in tokens, not in columns."""
    ids, mask = text(2), mask_of((40, 23), 40)
    settings = dict(sinks=2, cache_size=7, rebuild=3)
    both, _ = run(model, ids, PIECES, made(model, **settings), mask)
    alone, _ = run(model, ids[1:, 17:], [1] * 21, made(model, **settings))
    assert (both[1, 17:] - alone[0]).abs().max() < EXACT


def test_compact_positions_without_releases_are_the_original_ones(model):
    ids, mask = text(2), mask_of((40, 23), 40)
    one, other = (
        run(model, ids, [*PIECES, 2], made(model, cache_size=40, position_mode=mode), mask)[0]
        for mode in ("compact", "original")
    )
    assert (one - other)[mask.bool()].abs().max() < 1e-10  # keys are turned back and again: 3e-12 measured


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_compact_positions_number_what_is_attended(family):
    """One layer's keys depend on token and position alone, so a step is the model on the tokens that it attends."""
    model, ids = decoder(family, num_hidden_layers=1), text()
    logits, tables = run(model, ids, PIECES, made(model, position_mode="compact"))
    for column in range(18, 38):
        held, again = tables[column - 18][0][0], tables[column - 17][1][0]
        attended = torch.tensor([*sorted({*held.tolist(), *again.tolist()} - {-1}), column])
        with torch.no_grad():
            want = model(ids[:, attended]).logits[0, -1]
        assert (logits[0, column] - want).abs().max() < 1e-10
    original, _ = run(model, ids, PIECES, made(model))
    assert (logits - original).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [dict(), dict(store="embeds"), dict(store="embeds", prefill="chunked")], ids=str)
def test_embeddings_run_again_as_ids_do(model, settings):
    ids, embedding = text(2), model.get_input_embeddings()
    want, _ = run(model, ids, PIECES, made(model, prefill=settings.get("prefill", "full")))
    cache = made(model, **settings)
    with torch.no_grad():
        first = model(inputs_embeds=embedding(ids[:, :18]), **named(cache)).logits
        assert set(cache.history.tables) >= {"embeds"}
        rest = [model(ids[:, i : i + 1], **named(cache)).logits for i in range(18, 38)]
    assert torch.equal(torch.cat([first, *rest], 1), want)
    late = made(model)
    run(model, ids, PIECES[:-1], late)
    assert "ids" in late.history.tables
    with torch.no_grad():
        last = model(inputs_embeds=embedding(ids[:, 37:38]), **named(late)).logits
    if not settings:
        assert torch.equal(last, want[:, -1:])
    assert "ids" not in late.history.tables


def test_store_embeds_holds_them_from_the_first_token(model):
    cache = made(model, store="embeds")
    got, _ = run(model, text(), PIECES, cache)
    assert cache.history["embeds"].shape == (1, 38, 48)
    assert "ids" not in cache.history.tables
    assert torch.equal(got, run(model, text(), PIECES, made(model))[0])


def test_rows_repeat_and_select(model):
    ids, more = text(3, 30), text(3, 1, seed=8)
    for change, rows in (
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ):
        cache = made(model)
        run(model, ids, [18] + [1] * 12, cache)
        want = run(model, more, [1], copy.deepcopy(cache))[0][rows]
        change(cache)
        assert cache.batch_size == len(rows)
        assert (run(model, more[rows], [1], cache)[0] - want).abs().max() < EXACT


def test_reset_forgets(model):
    cache, ids = made(model), text(2)
    want, _ = run(model, ids, PIECES, cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size) == (0, -1)
    assert (run(model, ids[:1], PIECES, cache)[0] - want[:1]).abs().max() < EXACT


def test_a_copy_is_a_fork_that_shares_the_controller(model):
    cache, ids = AdoreCache(model, controller=Controller(48, 16), **SMALL), text(2, 50)
    run(model, ids, [18] + [1] * 12, cache)
    fork = copy.deepcopy(cache)
    want, _ = run(model, ids[:, 30:], [1] * 10, cache)
    assert fork.scorer is cache.scorer
    assert torch.equal(run(model, ids[:, 30:], [1] * 10, fork)[0], want)


def test_saved_and_loaded_goes_on_bit_for_bit(model, tmp_path):
    controller, ids = Controller(48, 16), text(2, 50)
    cache = AdoreCache(model, controller=controller, rebuild_every=5, **SMALL)
    run(model, ids, [18] + [1] * 11, cache)
    cache.save(tmp_path / "prompt.safetensors")
    loaded = AdoreCache.load(tmp_path / "prompt.safetensors", model, controller)
    assert loaded.settings == cache.settings
    assert loaded.get_seq_length() == 29
    assert torch.equal(run(model, ids[:, 29:], [1] * 9, loaded)[0], run(model, ids[:, 29:], [1] * 9, cache)[0])


def test_files_of_another_model_or_scorer_are_refused(model, tmp_path):
    file, cache = tmp_path / "prompt.safetensors", AdoreCache(model, controller="random", **SMALL)
    with pytest.raises(ValueError, match="empty"):
        cache.save(file)
    run(model, text(), PIECES, cache)
    cache.save(file)
    with pytest.raises(ValueError, match="made for another model"):
        AdoreCache.load(file, decoder(num_hidden_layers=2), "random")
    with pytest.raises(ValueError, match="made with a RandomPolicy, here is a Controller"):
        AdoreCache.load(file, model, Controller(48, 16))


@pytest.mark.parametrize("policy", ["recency", "streaming"])
def test_a_loaded_cache_has_the_settings_that_were_saved(model, policy, tmp_path):
    cache, ids = AdoreCache(model, controller=policy, cache_size=7, rebuild=0), text(2, 50)
    run(model, ids, [18] + [1] * 11, cache)
    cache.save(tmp_path / "c.safetensors")
    loaded = AdoreCache.load(tmp_path / "c.safetensors", model)
    assert loaded.settings == cache.settings
    assert loaded.settings.sinks == (4 if policy == "streaming" else 0)
    assert torch.equal(run(model, ids[:, 29:], [1] * 9, loaded)[0], run(model, ids[:, 29:], [1] * 9, cache)[0])


def test_a_model_with_a_living_cache_is_the_stock_model_for_other_caches(model):
    ids = text(2)
    with torch.no_grad():
        want = model(ids, **named(DynamicCache(config=model.config))).logits
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    cache = made(model)
    run(model, ids, PIECES, cache)
    with torch.no_grad():
        assert torch.equal(model(ids, **named(DynamicCache(config=model.config))).logits, want)
        assert torch.equal(model(ids).logits, want)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), generated)
    two = made(model)
    assert torch.equal(run(model, ids, PIECES, two)[0], run(model, ids, PIECES, made(model))[0])


@pytest.mark.parametrize("end", ["close", "with", "drop"])
def test_hooks_and_attention_are_as_they_were(model, end):
    before = (len(model.model._forward_hooks), len(model.model._forward_pre_hooks), model.config._attn_implementation)
    cache = made(model)
    run(model, text(), PIECES, cache)
    assert len(model.model._forward_hooks) == before[0] + 1
    if end == "close":
        cache.close()
    elif end == "with":
        with cache:
            pass
    else:
        gc.disable()  # no cycle may keep it
        del cache
        gc.enable()
    after = (len(model.model._forward_hooks), len(model.model._forward_pre_hooks), model.config._attn_implementation)
    assert after == before
