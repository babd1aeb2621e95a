"""Folders in few bits where scrubjay is absent."""

import torch
from processes import without_scrubjay
from zoo import ZOO, tokens

from scrubjay import quantize

STRANGER = """
import torch
from transformers import AutoModelForCausalLM
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    quantizer = type(model.hf_quantizer)
    assert quantizer.__module__.startswith("transformers_modules."), quantizer
    with torch.no_grad():
        logits = model(torch.load("ids.pt")).logits
    print(name, torch.equal(logits, torch.load(f"{name}.pt")), model.model.embed_tokens.bits)
    assert model.generate(torch.load("ids.pt"), max_new_tokens=3, do_sample=False).shape[1] > 9
    model.save_pretrained(f"{name}-again")
    again = AutoModelForCausalLM.from_pretrained(f"{name}-again", trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), again.buffers(), strict=True))
"""


def test_folders_in_few_bits_load_where_scrubjay_is_absent(tmp_path):
    ids = tokens(2, 9)
    torch.save(ids, tmp_path / "ids.pt")
    for place, entry in enumerate(ZOO):
        model = quantize(
            entry.build(hidden_size=64, **{"n_groups": 2} if entry.name == "ssd" else {}), (4, 8)[place % 2]
        )
        model.save_pretrained(tmp_path / entry.name)
        with torch.no_grad():
            torch.save(model(ids).logits, tmp_path / f"{entry.name}.pt")
    said = without_scrubjay(STRANGER, tmp_path, *(entry.name for entry in ZOO))
    assert [line for line in said if line.split()[0] in {entry.name for entry in ZOO}] == [
        f"{entry.name} True {(4, 8)[place % 2]}" for place, entry in enumerate(ZOO)
    ]
