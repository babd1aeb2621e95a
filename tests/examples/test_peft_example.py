"""examples/qlora.py and the instructions that it makes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hub_server import HubServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from scrubjay.examples import qlora
from scrubjay.examples.data.corpus import load_corpus, train_tokenizer
from scrubjay.examples.data.docstrings import pairs_of
from scrubjay.examples.measuring.qlora_memory import load

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

# the adapter as a stranger has it, against the merged model
STRANGER = """
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
tuned = AutoPeftModelForCausalLM.from_pretrained("jay/tuned-lora", trust_remote_code=True)
merged = AutoModelForCausalLM.from_pretrained("jay/tuned", trust_remote_code=True)
ids = torch.arange(5, 40)[None]
with torch.no_grad():
    print(float((tuned.eval()(input_ids=ids).logits - merged.eval()(input_ids=ids).logits).abs().max()))
"""


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
    assert (tmp_path / "results" / "qlora.png").stat().st_size > 10_000
    assert record["command"].startswith("python examples/qlora.py --smoke")
    loss = record["loss"]
    assert loss["adapter on 4 bits"] < loss["base in 4 bits"]
    gain = loss["base in 4 bits"] - loss["adapter on 4 bits"]
    assert loss["base in float32"] - loss["merged into float32"] == pytest.approx(gain, rel=0.2)  # 4 % apart here
    sides = record["memory"]["base"]
    assert sides["4 bits"]["weights"] < 0.5 * sides["float32"]["weights"]
    assert sides["4 bits"]["adapter"] == sides["float32"]["adapter"] == 4 * 2 * record["adapter"]["parameters"]
    assert record["adapter"]["bytes"] == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    printed = capsys.readouterr().out
    assert all(name in printed for name in loss)

    card = (tmp_path / "merged" / "README.md").read_text()
    assert "by LoRA of rank" in card
    assert f"| {round(loss['merged into float32'], 3)} |" in card
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = tokenizer("def f(self):", return_tensors="pt").input_ids
    with torch.no_grad():
        assert (merged(ids).logits - base(ids).logits).abs().max() > 1e-3
    assert any(isinstance(module, Linear4bit) for module in load(str(tmp_path / "base"), 4).modules())


@pytest.mark.slow
def test_what_is_pushed_is_all_that_a_stranger_needs(tmp_path):
    """Merged model, base and adapter on a Hub; a second process loads the adapter by its name alone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with HubServer() as hub:
        own = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": hub.token,
        }
        for command in (
            ["-m", "scrubjay.examples.qlora", "--smoke", "--kind", "ssd", "--output", "out", "--push", "jay/tuned"],
            ["-c", STRANGER],
        ):
            done = subprocess.run(
                [sys.executable, *command], cwd=tmp_path, env=kept | own, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr[-3000:]
        files = {name: repository.commits[repository.find("main")] for name, repository in hub.repositories.items()}
    whole = {"model.safetensors", "modeling_ssd.py", "tokenizer.json", "README.md"}
    assert whole <= set(files["jay/tuned"]) & set(files["jay/tuned-base"])
    adapter = json.loads(files["jay/tuned-lora"]["adapter_config.json"].content)
    assert adapter["base_model_name_or_path"] == "jay/tuned-base"
    about = files["jay/tuned-lora"]["README.md"].content.decode()
    assert "\nbase_model: jay/tuned-base\n" in about  # and no path
    assert "\n- base_model:adapter:jay/tuned-base\n" in about
    card = files["jay/tuned"]["README.md"].content.decode()
    assert "by LoRA of rank 4 on 4 bits" in card
    assert "python examples/qlora.py --smoke --kind ssd" in card
    difference = float(done.stdout.split()[-1])
    assert difference < 1e-4  # 5e-7 here


def test_a_text_without_examples_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(qlora, "instructions", lambda *given: [])
    with pytest.raises(ValueError, match="0 examples to train on and 0 to test on fit into 256 tokens"):
        qlora.main(["--smoke", "--kind", "ssd", "--output", str(tmp_path)])
