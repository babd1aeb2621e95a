"""examples/qlora.py and the instructions that it makes."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from scrubjay import SSDForCausalLM
from scrubjay.examples import qlora
from scrubjay.examples.corpus import load_corpus, train_tokenizer
from scrubjay.examples.docstrings import pairs_of
from scrubjay.examples.qlora_memory import load

pytestmark = [
    pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear:UserWarning"),  # measured by the example
]

SOURCE = '''
class Box:
    @property
    def side(self):
        """How long an edge of the box is,
        in metres.

        Not rounded.
        """
        # from the volume
        return self.volume ** (1 / 3)

    def only_a_docstring(self):
        """Says something and does nothing at all."""

    async def wait(self): pass

def short():
    """Too short."""
    return 1
'''


def test_instructions_are_functions_and_what_they_are_said_to_do():
    assert pairs_of([SOURCE, SOURCE, "def broken(:"]) == [
        {
            "prompt": """def side(self):
    # from the volume
    return self.volume ** (1 / 3)

# What side does:
""",
            "completion": "How long an edge of the box is, in metres.\n",
        }
    ]


def test_the_standard_library_has_enough_of_them_and_shares_none_with_what_is_held_out():
    corpus = load_corpus().limited(1 << 21, 1 << 20)
    trained, heldout = pairs_of(corpus.train), pairs_of(corpus.heldout)
    assert len(trained) > 400
    assert len(heldout) > 200
    assert all(pair["completion"].rstrip() not in pair["prompt"] for pair in heldout)
    both = {(pair["prompt"], pair["completion"]) for pair in trained} & {tuple(pair.values()) for pair in heldout}
    assert len(both) < 0.02 * len(heldout)  # a few helpers stand in two files of the library


def test_the_loss_is_that_of_the_completion_alone():
    tokenizer = train_tokenizer(["some words of text"] * 50, 300)
    rows = {}

    class Uniform(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, use_cache, logits_to_keep):
            rows[input_ids.shape[1]] = logits_to_keep
            logits = torch.zeros(1, input_ids.shape[1], 300)
            answer = input_ids[0, -logits_to_keep + 1 :]
            logits[0, -logits_to_keep:-1].scatter_(1, answer[:, None], 5.0)
            return type("Output", (), {"logits": logits[:, -logits_to_keep:]})

    pairs = [{"prompt": "some words", "completion": "of text"}, {"prompt": "text", "completion": "words"}]
    want = -torch.tensor([5.0] + [0.0] * 299).log_softmax(0)[0]
    assert qlora.docstring_loss(Uniform(), tokenizer, pairs) == pytest.approx(float(want), abs=1e-5)
    sizes = {len(tokenizer(p["prompt"]).input_ids): len(tokenizer(p["completion"]).input_ids) for p in pairs}
    assert rows == {prompt + answer + 1: answer + 2 for prompt, answer in sizes.items()}


@pytest.mark.slow
def test_qlora_smoke(tmp_path, capsys):
    record = qlora.main(["--smoke", "--output", str(tmp_path), "--out", str(tmp_path / "results" / "qlora.json")])
    assert json.loads((tmp_path / "results" / "qlora.json").read_text()) == record
    assert record["command"].startswith("python examples/qlora.py --smoke")
    loss = record["loss"]
    assert loss["adapter on 4 bits"] < loss["base in 4 bits"]
    assert loss["merged into float32"] == pytest.approx(
        loss["adapter on 4 bits"], abs=0.02
    )  # 0.001 here: 4 bits' share
    sides = record["memory"]["base"]
    assert sides["4 bits"]["weights"] < 0.5 * sides["float32"]["weights"]
    assert sides["4 bits"]["adapter"] == sides["float32"]["adapter"] == 4 * 2 * record["adapter"]["parameters"]
    assert record["adapter"]["bytes"] == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    printed = capsys.readouterr().out
    assert all(name in printed for name in loss)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = tokenizer("def f(self):", return_tensors="pt").input_ids
    with torch.no_grad():
        assert (merged(ids).logits - base(ids).logits).abs().max() > 1e-3
    assert any(isinstance(module, Linear4bit) for module in load(str(tmp_path / "base"), 4).modules())


def test_a_push_publishes_the_merged_model_and_the_adapter(tmp_path, monkeypatch):
    """Under which names; that a push works is tested with a Hub."""
    pushed = []
    for kind in (SSDForCausalLM, PreTrainedTokenizerFast, PeftModel):
        monkeypatch.setattr(kind, "push_to_hub", lambda self, name: pushed.append((type(self).__name__, name)))
    monkeypatch.setattr(qlora, "memory", lambda run, base: {"base": {"float32": {}, "4 bits": {}}})
    qlora.main(["--smoke", "--kind", "ssd", "--output", str(tmp_path), "--push", "someone/model"])
    (model, *rest), (tokenizer, *_), (adapter, *where) = pushed
    assert (model, *rest) == ("SSDForCausalLM", "someone/model")
    assert "Tokenizer" in tokenizer
    assert (adapter, *where) == ("PeftModelForCausalLM", "someone/model-lora")


def test_a_text_without_examples_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(qlora, "instructions", lambda *given: [])
    with pytest.raises(ValueError, match="0 examples to train on and 0 to test on fit into 256 tokens"):
        qlora.main(["--smoke", "--kind", "ssd", "--output", str(tmp_path)])
