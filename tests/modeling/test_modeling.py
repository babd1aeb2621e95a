"""The contract of every model: all ways through it are the same function."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache
from zoo import VOCAB, ZOO, relative, tokens, trainable

from scrubjay.modeling import base

# fp32: worst of 20 seeds over the zoo was 9e-7; the bounds are those of the contract
BOUND = {torch.float32: 2e-5, torch.float64: 1e-10}
SPLITS = {
    "token by token": [1] * 150,
    "prefill and steps": [140] + [1] * 10,
    "pieces": [70, 1, 5, 64, 10],
    "1 + 149": [1, 149],
}


@torch.no_grad()
def through(model, ids, pieces, **kwargs):
    """Logits of ids given to a cache piece by piece."""
    cache, logits = None, []
    for piece in ids.split(pieces, 1):
        out = model(piece, cache=cache, use_cache=True, **kwargs)
        cache = out.cache
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_any_split_equals_one_pass(entry, dtype, split):
    model, ids = entry.build(dtype), tokens(3, 150)
    with torch.no_grad():
        whole = model(ids).logits
    assert relative(through(model, ids, SPLITS[split]), whole) < BOUND[dtype]


def test_segments_of_a_long_prompt_equal_one_pass(entry, monkeypatch):
    model, ids = entry.build(torch.float64), tokens(2, 100)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    want = model(ids, attention_mask=mask).logits  # gradients wanted: one pass
    monkeypatch.setattr(base, "SEGMENT", 16)
    with torch.no_grad():
        cached, plain = (model(ids, attention_mask=mask, use_cache=use) for use in (True, False))
    for out in (cached, plain):
        assert relative(out.logits[mask.bool()], want[mask.bool()]) < 1e-10
    assert cached.cache.get_seq_length() == 100
    step = {"attention_mask": torch.cat([mask, mask[:, -1:]], 1), "cache": cached.cache}
    whole = model(torch.cat([ids, ids[:, :1]], 1), attention_mask=step["attention_mask"]).logits[:, -1]
    assert relative(model(ids[:, :1], **step).logits[:, 0], whole) < 1e-10


def test_left_padding_changes_nothing(entry):
    model, ids = entry.build(), tokens(3, 40)
    lengths = (40, 23, 1)
    mask = torch.stack([torch.arange(40) >= 40 - n for n in lengths]).long()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for row, n in enumerate(lengths):
            alone = model(ids[row : row + 1, 40 - n :]).logits
            assert relative(logits[row, 40 - n :], alone[0]) < 2e-5


@pytest.mark.parametrize("pattern", ["right", "interior", "random", "a row of padding"])
def test_padding_anywhere_with_a_cache_equals_the_row_without_it(entry, pattern):
    model, ids = entry.build(torch.float64), tokens(3, 60)
    column = torch.arange(40)
    first = {
        "right": torch.stack([column < n for n in (40, 31, 2)]),
        "interior": torch.stack([(column < 5) | (column >= n) for n in (5, 20, 39)]),
        "random": torch.rand(3, 40) > 0.4,
        "a row of padding": torch.stack([column >= n for n in (0, 39, 40)]),
    }[pattern]
    second = torch.rand(3, 20) > 0.3
    mask = torch.cat([first, second, torch.ones(3, 1, dtype=torch.bool)], 1)
    ids = torch.cat([ids, tokens(3, 1, seed=2)], 1)
    with torch.no_grad():
        cache, logits = None, []
        for a, b in ((0, 40), (40, 60), (60, 61)):
            out = model(ids[:, a:b], attention_mask=mask[:, :b].long(), cache=cache, use_cache=True)
            cache = out.cache
            logits.append(out.logits)
        logits = torch.cat(logits, 1)
        for row in range(3):
            alone = model(ids[row][mask[row]][None]).logits[0]
            assert relative(logits[row][mask[row]], alone) < 1e-10


def test_a_later_token_changes_no_earlier_logit(entry):
    model, ids = entry.build(), tokens(2, 80)
    changed = ids.clone()
    changed[:, 50] = (changed[:, 50] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :50], after[:, :50])
    assert not torch.equal(before[:, 50:], after[:, 50:])


PACKED = {
    "position_ids": lambda n: {"position_ids": torch.cat([torch.arange(i) for i in n])[None]},
    "cu_seq_lens_q": lambda n: {"cu_seq_lens_q": torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32)},
    "seq_idx": lambda n: {
        "seq_idx": torch.cat([torch.full((i,), d, dtype=torch.int32) for d, i in enumerate(n)])[None]
    },
}


@pytest.mark.parametrize("how", PACKED)
def test_packed_documents_equal_separate_ones_gradients_included(entry, how):
    model, ids, lengths = entry.build(torch.float64), tokens(1, 100), (30, 1, 5, 64)
    model.train(not entry.samples)
    packed = model(ids, labels=ids, **PACKED[how](lengths))
    weights = torch.randn_like(packed.logits)
    grads = torch.autograd.grad((packed.logits * weights).sum(), trainable(model))
    separate = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    expected = torch.autograd.grad((separate * weights).sum(), trainable(model))
    assert packed.cache is None
    assert relative(packed.logits, separate) < 1e-10
    assert max(relative(a, b) for a, b in zip(grads, expected, strict=True)) < 1e-9


def test_packed_rows_of_a_batch_equal_separate_documents(entry):
    model, ids = entry.build(torch.float64), tokens(2, 20)
    positions = torch.stack([torch.cat([torch.arange(7), torch.arange(13)]), torch.arange(20)])
    with torch.no_grad():
        logits = model(ids, position_ids=positions).logits
        parts = [model(x).logits[0] for x in (ids[:1, :7], ids[:1, 7:], ids[1:])]
    assert relative(logits.flatten(0, 1), torch.cat(parts)) < 1e-10


def test_saved_and_loaded_is_bit_equal(entry, tmp_path):
    model, ids = entry.build(), tokens(2, 30)
    model.save_pretrained(tmp_path)
    loaded, report = entry.model.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)


ISOLATED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "scrubjay":
            raise ImportError("scrubjay is blocked here")
sys.meta_path.insert(0, Blocked())
import json, torch
from transformers import AutoModel, AutoModelForCausalLM
folder, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids, want = torch.load(folder + "/logits.pt")
with torch.no_grad():
    assert torch.equal(model(ids).logits, want)
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
model.save_pretrained(again)
second = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(second(ids).logits, want)
assert torch.equal(second.generate(ids, max_new_tokens=5, do_sample=False), generated)
assert type(AutoModel.from_pretrained(again, trust_remote_code=True)).__name__ == type(model.model).__name__
assert "scrubjay" not in sys.modules
print(json.dumps(generated.tolist()))
"""


def test_saved_folder_runs_where_the_library_is_absent_and_saves_itself_whole(entry, tmp_path):
    model, ids = entry.build(), tokens(2, 30)
    folder, again = tmp_path / "model", tmp_path / "again"
    model.save_pretrained(folder)
    with torch.no_grad():
        torch.save((ids, model(ids).logits), folder / "logits.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-c", ISOLATED, str(folder), str(again)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout) == model.generate(ids, max_new_tokens=5, do_sample=False).tolist()
    assert {p.name for p in again.iterdir()} == {p.name for p in folder.iterdir()} - {"logits.pt"}


def test_remote_code_is_refused_without_trust(entry, tmp_path):
    entry.build().save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(text | {"model_type": "a_type_that_nobody_registered"}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)


def test_auto_classes_find_the_installed_model(entry, tmp_path):
    entry.build().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is entry.model.config_class
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is entry.model
    assert type(AutoModel.from_pretrained(tmp_path)) is entry.model.model_class


def test_hidden_states_embeds_and_logits_to_keep(entry):
    model, ids = entry.build(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        out = model(ids, attention_mask=mask, output_hidden_states=True)
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
        assert torch.equal(embedded.logits, out.logits)
        for keep in (3, torch.tensor([2, 19]), torch.arange(20) > 15):
            kept = model(ids, attention_mask=mask, logits_to_keep=keep).logits
            want = out.logits[:, -3:] if isinstance(keep, int) else out.logits[:, keep]
            assert relative(kept, want) < 2e-5
        assert isinstance(model(ids, return_dict=False), tuple)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_keeps_states_and_decays_in_float32(entry, dtype, tmp_path):
    entry.build().save_pretrained(tmp_path)
    model = entry.model.from_pretrained(tmp_path, dtype=dtype)
    strict = set(model._keep_in_fp32_modules_strict)
    kept = [set(name.split(".")) & strict for name, p in model.named_parameters() if p.dtype == torch.float32]
    assert all(kept)
    assert set().union(*kept) == strict
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if set(name.split(".")) & strict)
    ids = tokens(2, 40)
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache
        if entry.recurrent:
            held = [(name, x.dtype) for layer in cache.layers for name, x in layer.tensors().items()]
            assert {at for name, at in held if name == "state"} == {torch.float32}
            assert {at for name, at in held if name in ("conv", "keys", "values")} == {dtype}
        split, whole = through(model, ids, [20] + [1] * 20), model(ids).logits
        exact = entry.model.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
    # bfloat16 keeps 8 bits: both paths stray from float32 alike (measured up to 2e-2), and from each other no more
    assert relative(whole, exact) < 5e-2
    assert relative(split, exact) < 5e-2


BAD = {
    "no input": (dict(), "exactly one of input_ids"),
    "an empty sequence": (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), "at least one"),
    "flat ids": (dict(input_ids=torch.zeros(3, dtype=torch.long)), r"\(batch, length\); got \(3,\)"),
    "a mask of another length": (
        dict(input_ids=tokens(2, 5), attention_mask=torch.ones(2, 6)),
        r"\(2, 5\); got \(2, 6\)",
    ),
    "a 4-D mask": (dict(input_ids=tokens(2, 5), attention_mask=torch.ones(2, 1, 5, 5)), "attention_mask must be a"),
    "narrow embeddings": (dict(inputs_embeds=torch.zeros(1, 4, 3)), r"\(1, 4, 3\)"),
    "offsets that do not cover": (dict(input_ids=tokens(1, 5), cu_seq_lens_q=torch.tensor([0, 4])), "rise from 0 to"),
    "positions of another length": (
        dict(input_ids=tokens(1, 5), position_ids=torch.arange(4)[None]),
        "position_ids must",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(entry, case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        entry.build()(**arguments)


def test_a_cache_of_keys_and_values_is_refused(recurrent):
    with pytest.raises(ValueError, match="got DynamicCache"):
        recurrent.build()(tokens(2, 5), cache=DynamicCache())


def test_parallel_plans_name_modules_that_exist(entry):
    from fnmatch import fnmatch

    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    model = entry.build()
    names = [name for name, _ in model.model.named_modules()]
    for config in {e.name: e.config() for e in ZOO if e.model is entry.model}.values():
        for pattern, style in config.base_model_tp_plan.items():
            assert style in ALL_PARALLEL_STYLES
            optional = any(part in pattern for part in (".attn.", ".ffn.", ".mlp."))
            assert optional or any(fnmatch(name, pattern) for name in names), pattern
    for name in model._no_split_modules:
        assert any(type(module).__name__ == name for module in model.modules())


def test_layers_kept_on_disk_give_the_same(entry, tmp_path):
    """accelerate loads an offloaded layer's weights when its own module runs, so nothing may read them from outside."""
    model, ids = entry.build(), tokens(2, 30)
    model.save_pretrained(tmp_path / "model")
    placed = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    placed |= {f"model.layers.{i}": "cpu" for i in range(model.config.num_hidden_layers)}
    placed |= {"model.layers.1": "disk", "lm_head": "cpu"}
    loaded = entry.model.from_pretrained(tmp_path / "model", device_map=placed, offload_folder=tmp_path / "offload")
    assert all(weight.device.type == "meta" for weight in loaded.model.layers[1].parameters())
    with torch.no_grad():
        assert relative(loaded(ids).logits, model(ids).logits) < 2e-5
        assert relative(through(loaded, ids, [10] + [1] * 20), model(ids).logits) < 2e-5
