"""The study of what `calibrate` promises: its texts, one cell, its table."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scrubjay.examples.data.corpus import train_tokenizer
from scrubjay.examples.studies import real_calibrate
from scrubjay.examples.studies.real_tasks import sentences
from scrubjay.modeling.decoder.controller import Controller

ROWS, LENGTH = 4, 1024


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(sentences())[:60_000]], 1500)


@pytest.mark.parametrize("text", real_calibrate.TEXTS)
def test_rows_differ_and_labels_are_their_tokens(tokenizer, text):
    ids, labels = real_calibrate.rows_of(text, tokenizer, ROWS, LENGTH)
    assert ids.shape == (ROWS, LENGTH)
    assert len({tuple(row.tolist()) for row in ids}) == ROWS
    if text == "questions":
        counted = labels != -100
        assert torch.equal(labels[counted], ids[counted])
        assert bool(counted[:, -63:].any(1).all())
        digits = tokenizer.decode(ids[0][counted[0]]).replace(" ", "")
        assert digits.isdigit()
        assert len(digits) > 7 * 6
    else:
        assert labels is None
        decoded = tokenizer.decode(ids.flatten()[:200])
        assert decoded
        assert ("def " in tokenizer.decode(ids.flatten())) == (text == "source")


def test_a_cell_says_what_was_chosen_or_why_nothing_was(tokenizer, tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer), initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(real_calibrate, "PROMISES", (5.0, -5.0))
    monkeypatch.setattr(real_calibrate, "TEXTS", ("documentation",))
    out = tmp_path / "real_calibrate.json"
    smoke = ["--model", str(tmp_path / "model"), "--dtype", "float32", "--smoke", "--threads", "1"]
    records = real_calibrate.main([*smoke, "--out", str(out), "--only", "a stride"])
    kept, refused = (record["result"] for record in records)
    assert kept["settings"].keys() == {"stride", "budget"}
    assert kept["held_out"][0] <= 5
    assert refused["refused"].startswith("No candidate stays within -5.0 nats")
    assert json.loads(out.read_text()) == records
    Controller(32, 16).save(tmp_path / "controller")
    scored = ["--controller", str(tmp_path / "controller"), "--only", "cache=ADORE controller=query .*promise=5"]
    (adore,) = real_calibrate.main([*smoke, *scored])
    assert adore["result"]["settings"].keys() == {"rebuild", "cache_size"}
    lines = real_calibrate.table(records).splitlines()
    assert "1 of 1 promises were kept" in lines[-1]
    assert lines[2].startswith("| 5.0 | documentation | Recycled, a stride | stride")
    assert "none of the candidates" in lines[3]
