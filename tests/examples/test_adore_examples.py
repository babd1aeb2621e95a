"""What a controller is taught, against its definition, and the smoke runs of ADORE's examples."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from adore_cases import EXACT, PIECES, TableScorer, decoder, made, run, text
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from scrubjay import AdoreCache, AdoreConfig
from scrubjay.examples import sparse_tune, train_adore_controller
from scrubjay.examples.benchmarks import benchmark_adore, benchmark_adore_host
from scrubjay.examples.benchmarks.comparison import SIDES
from scrubjay.examples.data.corpus import train_tokenizer
from scrubjay.examples.learning import adore_training, sparse_tuning
from scrubjay.examples.learning.adore_training import smoke_model, windows
from scrubjay.examples.learning.attention_capture import PER_HEAD, Request, answering, attention_rows
from scrubjay.examples.learning.importance import agreed, attended, later_share, top, tuning_mask, within_horizon
from scrubjay.examples.measuring.measure import cache_nbytes
from scrubjay.examples.studies.real_tasks import sentences
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import named


def maps(model, ids):
    """(layers, B, H, T, T) of transformers' own."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(model(ids, output_attentions=True).attentions)


@pytest.mark.parametrize("layers", [(), (1,), (0, 2)], ids=str)
def test_rows_are_those_of_full_attention(layers):
    model, ids, at = decoder(dtype=torch.float32), text(2, 90), torch.tensor([0, 3, 40, 70, 89])
    found = attention_rows(model, ids, at, 5, ("mean", "max_head", "vote"), layers)
    assert model.config._attn_implementation == "sdpa"
    every = maps(model, ids)[list(layers or range(3))][:, :, :, at]
    assert (found["mean"] - every.mean((0, 2))).abs().max() < 1e-5
    assert (found["max_head"] - every.amax((0, 2))).abs().max() < 1e-5
    best = every.topk(5).indices
    votes = torch.zeros_like(every).scatter(-1, best, 1.0)
    votes = (votes * (torch.arange(90) <= at[:, None])).sum((0, 2))
    # a tie or a rounding at the fifth place may go either way
    assert (found["vote"] != votes).float().mean() < 0.01


def test_blocks_of_queries_are_one_pass(monkeypatch):
    model, ids, at = decoder(), text(2, 40), torch.arange(40)
    whole = attention_rows(model, ids, at, 5)["mean"]
    monkeypatch.setattr("scrubjay.examples.learning.attention_capture.BLOCK", 7)
    assert (attention_rows(model, ids, at, 5)["mean"] - whole).abs().max() < 1e-12
    assert (whole.sum(-1) - 1).abs().max() < 1e-12


def test_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="agg must be 'mean', 'max_head' or 'vote'; got 'sum'"):
        agreed(torch.ones(1, 1, 1, 1), torch.zeros(1, dtype=torch.long), "sum", 1)


def test_top_is_the_k_largest_up_to_the_query_the_newer_of_equals_first():
    a = torch.tensor([[[0.1, 0.5, 0.5, 0.9], [0.2, 0.2, 0.2, 0.0]]])
    assert top(a, torch.tensor([2, 3]), 2)[0].int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0]]
    assert top(a, torch.tensor([0, 1]), 2)[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]


def test_labels_within_a_horizon_and_shares_of_later_queries():
    at = torch.tensor([1, 2])
    y = torch.tensor([[[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 1]]]).bool()  # queries 1, 2 and 2, 3
    assert within_horizon(y, at, 2)[0].int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    y = torch.tensor([[[1, 1, 0, 0], [1, 0, 1, 0]]]).bool()
    share, count = later_share(y, at)
    assert share[0].tolist() == [1.0, 0.5, 1.0, 0.0]
    assert count.tolist() == [2, 2, 1, 0]


def test_tuning_mask_has_the_query_and_the_newest():
    y = torch.zeros(1, 2, 5, dtype=torch.bool)
    y[0, :, 0] = True
    assert tuning_mask(y, torch.tensor([2, 4]), 2)[0].int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 1, 1]]
    assert tuning_mask(y, torch.tensor([2, 4]), 0)[0].int().tolist() == [[1, 0, 1, 0, 0], [1, 0, 0, 0, 1]]


@pytest.mark.parametrize("settings", [dict(rebuild=3), dict(rebuild=0), dict(rebuild=2, recent=3, sinks=2)], ids=str)
def test_attended_is_what_the_cache_attends(settings):
    model, ids = decoder(num_hidden_layers=1), text(1, 30)
    scores = torch.rand(30, 30, generator=torch.Generator().manual_seed(2))
    cache = AdoreCache(model, cache_size=6, controller=TableScorer(scores), **settings)
    logits, tables = run(model, ids, [1] * 30, cache)
    seen = attended(scores[None], 6, **settings)[0]
    for n in range(30):
        before = {*tables[n - 1][0][0].tolist()} if n else set()
        assert set(seen[n].nonzero()[:, 0].tolist()) == {n, *before, *tables[n][1][0].tolist()} - {-1}
    with torch.no_grad():  # one layer: keys depend on no choice, so the masked model is the run
        want = model(ids, attention_mask=seen[None, None]).logits
    assert (logits - want).abs().max() < EXACT


@pytest.mark.parametrize("mode", ["query", "distance", "static"])
@pytest.mark.parametrize("rebuild", [0, 3])
def test_a_cache_attends_what_its_controller_was_reported_to(mode, rebuild):
    """The scores of the report are those of use: the same text, one token at a time."""
    model, ids = decoder(), text(1, 40)
    controller = Controller(48, 16, mode).double()
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.mul_(4)  # apart, so that the order of two tokens turns on the current one
        scores = controller(model.get_input_embeddings()(ids), torch.arange(40))
    cache = AdoreCache(model, cache_size=6, rebuild=rebuild, controller=controller)
    _, tables = run(model, ids, [1] * 40, cache)
    seen = attended(scores, 6, rebuild)[0]
    for n in range(1, 40):
        held = {*tables[n - 1][0][0].tolist(), *tables[n][1][0].tolist(), n} - {-1}
        assert set(seen[n].nonzero()[:, 0].tolist()) == held
    assert len({tuple(sorted(slots[0].tolist())) for slots, _ in tables}) > 15


def test_static_controllers_learn_the_share_and_others_the_labels():
    model, ids, at = decoder(dtype=torch.float32), text(2, 40), torch.arange(8, 40, 3)
    for mode, agg, horizon in (("query", "mean", 1), ("distance", "vote", 4), ("static", "max_head", 1)):
        config = AdoreConfig(
            base_config=model.config, cache_size=9, label_k=8, score_mode=mode, label_agg=agg, label_horizon=horizon,
            rebuild=0,
        )  # fmt: skip
        labels = adore_training.labels_of(model, ids, at, config)
        assert labels.shape == (2, len(at), 40)
        counts = labels.sum(-1)
        assert (counts == 8).all() if horizon == 1 else ((counts >= 4).all() and (counts > 8).any())
        controller = Controller(48, 16, mode)
        loss = adore_training.loss_of(controller, model, ids, at, config, 1.0)
        loss.backward()
        assert 0.5 < loss.item() < 1.0  # near ln 2: nothing is learned yet
        assert all(p.grad is not None for p in controller.parameters())


@pytest.mark.parametrize("change", [dict(label_k=5), dict(label_agg="vote"), dict(label_agg="max_head"),
                                    dict(label_layers=[1]), dict(label_horizon=3)], ids=str)  # fmt: skip
def test_every_label_setting_changes_what_is_taught(change):
    model, ids, at = decoder(dtype=torch.float32), text(2, 40), torch.arange(8, 38, 3)
    one, other = (
        adore_training.labels_of(
            model, ids, at, AdoreConfig(**dict(base_config=model.config, cache_size=9, label_k=8) | changes)
        )
        for changes in ({}, change)
    )
    assert not torch.equal(one, other)


def test_each_head_attends_its_own_top_k_and_k_of_all_is_full_attention():
    model, ids = decoder(), text(2, 30)
    with torch.no_grad():
        full = model(ids).logits
        with answering(model, PER_HEAD, Request(None, 30)):
            assert (model(ids).logits - full).abs().max() < EXACT
        with answering(model, PER_HEAD, Request(None, 3, recent=2)):
            few = model(ids).logits
        assert (few[:, :3] - full[:, :3]).abs().max() < EXACT  # no more than k tokens: nothing is left out
        assert (few - full).abs().max() > 1e-2
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("scope", ["uniform", "per_head"])
def test_the_sparse_loss_of_every_token_is_the_plain_loss(scope):
    model, ids = decoder(), text(2, 30)
    for k, same in ((30, True), (3, False)):
        config = AdoreConfig(base_config=model.config, cache_size=30, label_k=k, mask_scope=scope)
        gap = abs(sparse_tuning.sparse_loss(model, ids, config) - model(ids, labels=ids).loss)
        assert (gap < 1e-6) == same


@pytest.mark.parametrize("scope", ["uniform", "per_head"])
def test_checkpointing_gives_the_gradients_of_sparse_tuning(scope):
    """The second run of a layer, in the backward pass, has to attend what the first one did."""
    model, ids = smoke_model().double().train(), text(2, 40)
    config = AdoreConfig(base_config=model.config, cache_size=8, label_k=4, mask_scope=scope)
    grads = []
    for _ in range(2):
        sparse_tuning.backward(model, ids, config)
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("mode", ["query", "bilinear", "static"])
def test_train_adore_controller_smoke(mode, tmp_path):
    record = train_adore_controller.main(
        ["--smoke", "--score-mode", mode, "--rebuild", "3", "--out", str(tmp_path / "c")]
    )
    assert len(record["losses"]) == 4
    rules = record["heldout"]
    assert list(rules) == ["controller", "oracle", "recency", "sinks and recency", "H2O"]
    assert rules["oracle"]["recall"] == pytest.approx(1.0)
    for numbers in rules.values():
        assert 0 < numbers["mass"] <= rules["oracle"]["mass"] + 1e-6 < 1
        assert 0 < numbers["recall"] <= 1
    assert json.loads((tmp_path / "c" / "report.json").read_text())["heldout"] == rules
    controller = Controller.load(tmp_path / "c")
    assert (controller.score_mode, controller.sizes["label_k"]) == (mode, 8)


def test_a_model_with_adapters_is_its_own_decoder_with_them():
    model = decoder()
    ids = text(2)
    plain, _ = run(model, ids, PIECES, made(model))
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    cache = made(adapted)
    tuned, _ = run(adapted, ids, PIECES, cache)
    assert (tuned - plain).abs().max() > 1e-2
    merged = adapted.merge_and_unload()
    assert (run(merged, ids, PIECES, made(merged))[0] - tuned).abs().max() < EXACT


# peft asks transformers for a name that 5.23 deprecates
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("scope", ["uniform", "per_head"])
def test_sparse_tune_smoke(scope, tmp_path):
    record = sparse_tune.main(["--smoke", "--control", "--mask-scope", scope, "--out", str(tmp_path / "a")])
    assert record["control"]["full"] != record["after"]["full"] != record["before"]["full"]
    assert len(record["losses"]) == 3
    assert record["before"]["sparse"] != record["after"]["sparse"]
    tuned = PeftModel.from_pretrained(smoke_model(), tmp_path / "a").eval()
    trained = [p for name, p in tuned.named_parameters() if "lora_B" in name]
    assert trained
    assert all(p.abs().max() > 0 for p in trained)


def test_a_controller_for_a_folder_or_a_model_by_name(tmp_path, monkeypatch):
    """As `--model smollm2`, whose folder is known, does it: from a folder, and the controller knows which."""
    folder, tokenizer = tmp_path / "model", train_tokenizer([" ".join(sentences())[:60_000]], 800)
    decoder(dtype=torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(train_adore_controller, "folder_of", lambda name: {"smollm2": str(folder)}[name])
    flags = ["--model", "smollm2", "--score-mode", "bilinear", "--dtype", "float32", "--out", str(tmp_path / "c")]
    flags += ["--length", "64", "--steps", "2", "--batch-size", "1", "--queries", "4", "--eval-texts", "1"]
    flags += ["--cache-size", "12", "--rebuild", "2"]
    (tmp_path / "text.txt").write_text(" ".join(sentences()) * 4)
    record = train_adore_controller.main([*flags, "--text", str(tmp_path / "text.txt")])
    assert len(record["losses"]) == 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    controller = Controller.load(tmp_path / "c")
    assert (controller.score_mode, controller.sizes["base_model"]) == ("bilinear", model.config.name_or_path)
    with AdoreCache(model, controller=controller, cache_size=12, rebuild=2) as cache:
        model.generate(torch.arange(20)[None], **named(cache), max_new_tokens=3, do_sample=False)
        assert cache.last_rebuilt.shape == (1, 2)


@pytest.mark.parametrize("example", [train_adore_controller, sparse_tune])
def test_a_model_has_to_be_named(example, capsys):
    with pytest.raises(SystemExit):
        example.main([])
    assert "--model is needed" in capsys.readouterr().err


def test_what_cannot_be_measured_or_cut_is_refused(capsys):
    with pytest.raises(SystemExit):
        train_adore_controller.main(["--model", "some", "--length", "200"])
    assert "got 200, 192 and 8" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has 9 tokens, more than length = 9 are needed"):
        windows(np.arange(9), 9, 1, np.random.default_rng(0), "cpu")


def test_benchmark_adore_measures_the_rows_it_names():
    sizes = benchmark_adore.SMALL
    full, ours = benchmark_adore.full_cache(sizes), benchmark_adore.adore_cache(sizes)
    assert full.get_seq_length() == ours.get_seq_length() == sizes.context
    assert cache_nbytes(full) == 2 * 2 * sizes.batch * 4 * (sizes.context + sizes.steps * sizes.passes) * 8 * 4
    for equal_memory, rows in ((False, sizes.batch), (True, 1)):  # at this size ours weighs more
        work = benchmark_adore.decode(sizes, 1, equal_memory)
        assert [work[side]() for side in SIDES] == [sizes.batch * sizes.steps, rows * sizes.steps]


@pytest.mark.parametrize(("every", "rebuilt"), [(1, [3, 3, 3, 3]), (4, [3, 0, 0, 0]), (benchmark_adore.NEVER, [0] * 4)])
def test_benchmark_adore_rebuilds_as_often_as_its_row_says(every, rebuilt):
    sizes = replace(benchmark_adore.SMALL, steps=1)
    cache, widths = benchmark_adore.adore_cache(sizes, every), []
    step = benchmark_adore.steps(sizes, cache, 1)
    for _ in range(8):
        step()
        widths.append(cache.last_rebuilt.shape[1])
    first = widths.index(max(widths))
    assert widths[first : first + 4] == rebuilt
    assert benchmark_adore.has_read(sizes).get_seq_length() == sizes.context  # the copy alone has gone on


def test_benchmark_adore_host_measures_all_ways_beside_each_other(tmp_path, capsys):
    result = benchmark_adore_host.main(["--smoke", "--repetitions", "2", "--out", str(tmp_path / "host.json")])
    assert json.loads((tmp_path / "host.json").read_text()) == json.loads(json.dumps(result))
    assert {"command", "commit", "machine", "versions", "sizes"} <= set(result)
    sizes = benchmark_adore.SMALL
    rows = {(row["batch"], row["name"]): row for row in result["rows"]}
    names = [name for batch, name in rows if batch == 1]
    assert names == ["full attention", "R = 0", "R = 3 run again", "R = 3 from the host"]
    for (batch, name), row in rows.items():
        assert len(row["samples"]) == 2
        pairs = 2 * 4 * 2 * 8 * 4 * batch * sizes.context if name.endswith("host") else 0  # layers, heads, k and v
        assert row["bytes"]["host"] == pairs, "each row has tokens of its own there"
    assert "batch 8, R = 3 from the host" in capsys.readouterr().out


def test_benchmark_adore_holds_a_constant_number_of_keys():
    *_, line = benchmark_adore.lines(benchmark_adore.SMALL)
    record = line.measure(2)
    assert record["scrubjay"] == record["peer"] == 2 * 2 * 4 * (8 + 1) * 8 * 4  # layers, k and v, heads, slots and one
