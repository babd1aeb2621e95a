"""The study of ADORE: its caches are those of use, its table says what its records say."""

from dataclasses import replace

import pytest
import torch
from adore_cases import decoder, made, text

from scrubjay import AdoreCache, RecycledCache
from scrubjay.examples.data.corpus import train_tokenizer
from scrubjay.examples.learning.attention_capture import attention_rows
from scrubjay.examples.learning.importance import attended, top
from scrubjay.examples.studies import releasing
from scrubjay.examples.studies.real import answered
from scrubjay.examples.studies.real_tasks import Sample, sentences
from scrubjay.examples.studies.releasing_caches import Oracle, Watched, compared, filled, kept, read
from scrubjay.examples.studies.releasing_models import MODES, Workshop
from scrubjay.examples.studies.releasing_tables import beyond, verdict
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import named

N, GIVEN = 30, 12


@pytest.fixture(scope="module")
def model():
    return decoder(dtype=torch.float32)


@pytest.fixture(scope="module")
def samples():
    return [Sample(row[:N], forced=row[N:]) for row in text(2, N + GIVEN).tolist()]


@torch.no_grad()
def test_one_pass_has_the_losses_of_full_attention_and_what_it_looks_at(model, samples):
    known = read(model, samples)
    ids = torch.tensor([one.prompt + one.forced for one in samples])
    assert (known.logits - model(ids).logits[:, N - 1 : -1]).abs().max() < 1e-4
    rows = attention_rows(model, ids[:, :-1], torch.arange(N - 1, N + GIVEN - 1), 5)["mean"]
    assert (known.attention - rows).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("rebuild", [0, 3])
def test_a_cache_that_is_filled_goes_on_as_one_that_has_read(rebuild, model, samples):
    known, controller = read(model, samples), Controller(48, 16, "bilinear")
    found = []
    for full in (True, False):
        cache = AdoreCache(model, cache_size=7, rebuild=rebuild, controller=controller)
        if full:
            first = model(known.prompt, **named(cache)).logits[:, -1]
        else:
            filled(cache, model, known.prompt, known.keys_values)
        assert cache.get_seq_length() == N
        found.append(answered(model, None, cache, first, samples)["losses"])
    assert found[0] == pytest.approx(found[1], abs=2e-4)
    assert found[0] != pytest.approx(answered(model, None, made(model), first, samples)["losses"], abs=1e-2)


@torch.no_grad()
def test_all_tokens_attended_are_full_attention_and_few_are_not(model, samples):
    controllers = {"bilinear": Controller(48, 16, "bilinear")}
    many = compared(model, None, samples, controllers, N + GIVEN, 2, 5)
    few = compared(model, None, samples, controllers, 7, 2, 5)
    kinds = ("bilinear", "bilinear guarded", "oracle", "oracle guarded")
    names = ["newest", "StreamingLLM", *(f"{kind}, R = {r}" for kind in kinds for r in (0, 2))]
    assert list(many) == list(few) == ["full", *names]
    for name in names:
        assert many[name]["losses"] == pytest.approx(many["full"]["losses"], abs=2e-4)
        assert (many[name]["mass"], many[name]["recall"]) == pytest.approx((1.0, 1.0), abs=1e-4)
        assert few[name]["losses"] != pytest.approx(few["full"]["losses"], abs=1e-2)
        assert 0 < few[name]["mass"] < 0.98
    for rebuilt in (0, 2):
        mass = {name: few[name]["mass"] for name in names}
        assert mass[f"oracle, R = {rebuilt}"] > max(mass["newest"], mass["StreamingLLM"], mass["bilinear, R = 0"])


@torch.no_grad()
def test_streaming_is_that_of_the_other_cache_with_as_many_keys(model, samples):
    found = compared(model, None, samples, {}, 9, 2, 5)["StreamingLLM"]
    with RecycledCache(model, policy="streaming", budget=9 + 2 + 1) as cache:
        first = model(torch.tensor([one.prompt for one in samples]), **named(cache)).logits[:, -1]
        assert answered(model, None, cache, first, samples)["losses"] == pytest.approx(found["losses"], abs=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("rebuild", [0, 3])
def test_what_a_step_attended_is_what_the_rules_say(rebuild, model):
    """From an empty cache, one token at a time, by the oracle."""
    ids = text(2, 40)
    a = attention_rows(model, ids, torch.arange(40), 6)["mean"]
    cache = Watched(model, cache_size=6, rebuild=rebuild, controller=Oracle(a, 0))
    for n in range(40):
        model(ids[:, n : n + 1], **named(cache))
    seen = attended(a, 6, rebuild)
    for n in range(1, 40):
        for row in range(2):
            assert {*cache.steps[n - 1][row].tolist(), n} - {-1} == set(seen[row, n].nonzero()[:, 0].tolist())
    known = read(model, [Sample(row[:1], forced=[*row[1:], 0]) for row in ids.tolist()])
    assert (known.attention - a).abs().max() < 1e-6
    found, at = kept(known, cache.steps, 6), torch.arange(1, 40)
    assert found["mass"] == pytest.approx((a * seen)[:, 1:].sum(-1).mean().item(), abs=1e-4)
    best = top(a[:, 1:], at, 6)
    assert found["recall"] == pytest.approx(((best & seen[:, 1:]).sum(-1) / best.sum(-1)).mean().item(), abs=1e-4)


def test_the_oracle_knows_better_than_a_shifted_one(model, samples):
    known = read(model, samples)
    mass = []
    for rows in (known.attention, known.attention.roll(1, 1)):
        with filled(Watched(model, cache_size=6, rebuild=2, controller=Oracle(rows, N - 1)), model, known.prompt,
                    known.keys_values) as cache, torch.no_grad():  # fmt: skip
            answered(model, None, cache, known.logits[:, 0], known.samples)
            mass.append(kept(known, cache.steps, 5)["mass"])
    assert mass[0] > mass[1] + 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("model"), train_tokenizer([" ".join(sentences())[:60_000]], 1500)
    decoder(dtype=torch.float32, vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The study's smoke run on a tiny model, and again, and its times."""
    place = tmp_path_factory.mktemp("study")
    flags = ["--smoke", "--model", str(folder), "--dtype", "float32", "--threads", "1"]
    flags += ["--out", str(place / "r.json"), "--kept", str(place / "kept")]
    return flags, releasing.main(flags)


def test_the_study_runs_and_goes_on(run, folder, capsys):
    flags, records = run
    assert [one.get("error") for one in records] == [None] * len(records)
    parts = [one["cell"]["settings"]["part"] for one in records]
    assert (parts.count("tune"), parts.count("teach"), parts.count("measure")) == (3, 3, 9)
    capsys.readouterr()
    assert len(releasing.main(flags)) == len(records)
    printed = capsys.readouterr().out
    assert "done in" not in printed
    assert "nats more, 192 tokens" in printed
    timed = releasing.main([*flags, "--speed", "--lengths", "256"])
    assert [one.get("error") for one in timed] == [None] * (len(records) + 3)
    printed = capsys.readouterr().out
    assert "| ADORE, R = 8 |" in printed
    assert "nats a token beside full attention (decoder tuned with full attention)" in printed


def test_what_is_trained_is_used_and_made_again_where_it_is_missing(run, folder):
    flags, _ = run
    kept_in = releasing.parse(flags).kept
    shop = Workshop(str(folder), "float32", kept_in, releasing.SMOKE)
    losses = shop.teaching("sparse")
    assert set(losses) == set(MODES)
    assert len(losses["query"]) == releasing.SMOKE.teach_steps
    assert {mode: one.score_mode for mode, one in shop.controllers("sparse").items()} == {mode: mode for mode in MODES}
    weights = [shop.decoder(tuning).model.layers[0].mlp.up_proj.weight.clone() for tuning in ("none", "sparse", "full")]
    assert all((a - b).abs().max() > 1e-5 for a, b in zip(weights, [*weights[1:], weights[0]], strict=True))
    (report,) = kept_in.glob("*/float32/sparse/controllers/*/report.json")
    report.unlink()
    again = shop.teaching("sparse")
    assert all(again[mode] == pytest.approx(losses[mode]) for mode in MODES)


def stopping(after):
    """`clip_grad_norm_` that ends the run after so many calls."""
    clip, count = torch.nn.utils.clip_grad_norm_, [0]

    def clipped(*args):
        count[0] += 1
        if count[0] > after:
            raise KeyboardInterrupt
        return clip(*args)

    return clipped


@pytest.mark.parametrize(("what", "groups"), [("tuning", 1), ("teaching", 2)])
def test_a_training_that_was_stopped_goes_on_to_the_same_end(what, groups, folder, tmp_path, monkeypatch, capsys):
    recipe, ends = replace(releasing.SMOKE, tune_steps=5, teach_steps=5, tune_batch=2), []
    for stops in (False, True):
        shop = Workshop(str(folder), "float32", tmp_path / str(stops), recipe)
        if what == "teaching":
            shop.decoder("sparse")
        if stops:
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.utils, "clip_grad_norm_", stopping(3 * groups))
                with pytest.raises(KeyboardInterrupt):
                    getattr(shop, what)("sparse")
            capsys.readouterr()
            assert len([*(tmp_path / str(stops)).rglob("stopped.pt")]) == 1
            shop = Workshop(str(folder), "float32", tmp_path / str(stops), recipe)
        report = getattr(shop, what)("sparse")
        assert not [*(tmp_path / str(stops)).rglob("stopped.pt")]
        assert ("step     3 " in capsys.readouterr().out) != stops
        ends.append(report["losses"] + list(report["heldout"].values()) if what == "tuning" else report["query"])
    assert len(ends[0]) in (5, 7)
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def record(tuning, length, **losses):
    settings = {"part": "measure", "tuning": tuning, "kind": "text", "length": length, "cache_size": 9, "rebuild": 2}
    result = {name.replace("_", ", R = "): {"losses": [loss], "scores": []} for name, loss in losses.items()}
    cell = {"study": "releasing", "model": "m", "seed": 0, "rate": 0.0, "settings": settings}
    return {"cell": cell, "result": result, "cpu_seconds": 1, "machine": {"cpu": "x"}}


def test_the_last_line_is_computed_from_the_longest_prompts():
    records = [
        record("none", 512, full=3.0, StreamingLLM=3.0, bilinear_2=2.0),
        record("none", 1024, full=3.0, StreamingLLM=3.5, bilinear_2=3.25, bilinear_0=3.375),
        record("full", 1024, full=2.5, StreamingLLM=2.75, bilinear_2=2.625, oracle_2=2.5),
    ]
    assert verdict(records[:2], "m") == (
        "After 1024 tokens ADORE by the best learned scores (bilinear, R = 2, 11 keys, decoder as published) is not "
        "timed yet, at +0.250 nats a token beside full attention (decoder as published); StreamingLLM with as many "
        "keys (decoder as published) is not timed yet, at +0.500."
    )
    names = {"full": 30, "StreamingLLM": 10, "ADORE, R = 2": 20, "ADORE, R = 0": 5}
    for rows, count in ((8, 8), ("equal memory", 16)):
        result = {name: {"ms": ms, "rows": 8 if ms == 30 else count, "nbytes": 1} for name, ms in names.items()}
        timed = record("none", 1024)
        timed["cell"]["settings"] = {"part": "speed", "length": 1024, "rows": rows}
        records.append(timed | {"result": result})
    said = verdict(records, "m")
    assert "(bilinear, R = 2, 11 keys, decoder tuned with full attention)" in said
    times = "1.50 times (batch 8), 3.00 times (equal memory) as fast as full attention without copies"
    assert f"is {times}, at +0.125 nats a token beside full attention (decoder tuned with full attention);" in said
    assert said.endswith("6.00 times (equal memory) as fast as full attention without copies, at +0.250.")
    assert verdict([], "m") == "Nothing is measured yet."
    assert beyond({"losses": [2.0, 3.0]}, {"losses": [1.0, 1.0]}) == [1.0, 2.0]


def test_prompts_that_a_cache_could_hold_are_refused(capsys):
    with pytest.raises(SystemExit):
        releasing.parse(["--lengths", "200"])
    assert "got [200]" in capsys.readouterr().err
