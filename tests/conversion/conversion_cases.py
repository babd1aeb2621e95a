"""What tests of Mamba-2 conversions share: small published layouts, their meaning to the judge, and comparisons.

The layouts are written by `examples/benchmarks/published_layouts.py`, by hand. The judge is the float64 recurrence of
`recurrences.py`, which is fed here by a translation of its own: nothing comes from the tables of the library.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from recurrences import ssd_logits
from safetensors.torch import load_file

from scrubjay import SSDForCausalLM
from scrubjay.examples.benchmarks.published_layouts import write_codestral, write_familiar, write_mamba_ssm

BOUND = 1e-4  # float32 logits of scale 10 against the recurrence in float64; the worst of these tests was 1.2e-5
SMALL = dict(d=32, L=2, V=48, P=16, N=8, G=1, K=4)
# what a params.json does not say is as in the published model
MISTRAL = dict(d=64, L=2, V=40, P=64, N=128, G=2, K=4)


def mamba_ssm(folder, **changes):
    return write_mamba_ssm(folder, SMALL, **dict(pad=16, unpadded=37) | changes)


def grouped(folder):
    """mamba_ssm with groups, biases and another state size, in 16 bits."""
    return write_mamba_ssm(folder, SMALL | dict(G=4, N=6, bias=True), torch.bfloat16)


def transformers(folder, **changes):
    return write_familiar(folder, SMALL | dict(G=2), **dict(tied=False, eos_token_id=5) | changes)


def tied(folder):
    return write_familiar(folder, SMALL, torch.float16)


def fla(folder, **changes):
    return write_familiar(folder, SMALL, fla=True, **dict(tied=False) | changes)


def codestral(folder):
    return write_codestral(folder, MISTRAL)


# name: (how to write it, its layout)
CASES = {
    "mamba_ssm": (mamba_ssm, "mamba_ssm"),
    "mamba_ssm, grouped": (grouped, "mamba_ssm"),
    "transformers": (transformers, "transformers"),
    "transformers, tied": (tied, "transformers"),
    "fla": (fla, "fla"),
    "codestral": (codestral, "codestral"),
}


def meaning(tensors):
    """Their tensors by the names that the recurrence reads."""
    out = {}
    for name, tensor in tensors.items():
        ours = name.removeprefix("model.")
        if ours == "backbone.norm_f.weight":
            ours = "model.norm.weight"
        elif ours.startswith("backbone.embedding"):
            ours = "model.embed_tokens.weight"
        elif ours.startswith("backbone.layers."):
            ours = "model" + ours.removeprefix("backbone")
        out[ours] = tensor.float()
    out.setdefault("lm_head.weight", out["model.embed_tokens.weight"])
    return out


def judge(tensors, ids):
    """(B, T, V) logits in float64 of a checkpoint as it was written."""
    weights = meaning(tensors)
    first = {name.removeprefix("model.layers.0.mixer."): x for name, x in weights.items() if ".layers.0.mixer." in name}
    inner, heads = first["norm.weight"].shape[0], first["A_log"].shape[0]
    vocab, hidden = weights["model.embed_tokens.weight"].shape
    wide = (first["conv1d.weight"].shape[0] - inner) // 2
    groups = {8: 1, 24: 4, 16: 2, 256: 2}[wide]  # of the cases above
    sizes = SimpleNamespace(
        num_hidden_layers=2,
        layer_norm_epsilon=1e-5,
        num_heads=heads,
        head_dim=inner // heads,
        state_size=wide // groups,
        n_groups=groups,
        expand=2,
        hidden_size=hidden,
        conv_kernel=4,
        time_step_limit=(0.0, float("inf")),
    )
    assert vocab >= int(ids.max())
    return ssd_logits(weights, sizes, ids)


def prompt(tensors, length=21):
    vocab = next(x.shape[0] for name, x in tensors.items() if "embedding" in name)
    return torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(3))


def load_whole(folder, **more):
    """Our model of a folder, in float32, with every tensor found."""
    model, info = SSDForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **more)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(kind), (kind, info[kind])
    return model.eval()


def stored(folder):
    """All tensors of a folder, read by torch or safetensors themselves."""
    tensors = {}
    for file in sorted(Path(folder).iterdir()):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif file.suffix == ".bin":
            tensors |= torch.load(file, weights_only=True)
    return tensors


def assert_same(got, want):
    """Same names, dtypes, shapes and bits."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
