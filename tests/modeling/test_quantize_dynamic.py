"""torch's own quantizers find the projections: one looks for `torch.nn.Linear` by exact type."""

import pytest
import torch
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear
from torch.ao.quantization import quantize_dynamic
from torch.utils.flop_counter import FlopCounterMode
from zoo import relative, tokens

from scrubjay.kernels import linear as products
from scrubjay.modeling.layers import project

# torch announces that all of this will move to torchao
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other:UserWarning"),
]


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "head tied"])
def test_every_projection_is_quantized(entry, tied, tmp_path):
    model, ids = entry.build(tie_word_embeddings=tied), tokens(2, 12)
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    keys, want = set(model.state_dict()), model(ids).logits
    small = quantize_dynamic(model, {nn.Linear})
    assert {name for name, module in small.named_modules() if isinstance(module, DynamicLinear)} == names
    assert not any(isinstance(module, nn.Linear) for module in small.modules())
    # the worst of 8 seeds was 0.08, and 0.21 where a gate chose other tokens
    assert relative(small(ids).logits, want) < (0.35 if entry.samples else 0.15)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert small.generate(ids, **options).shape == (2, 17)
    assert torch.equal(model(ids).logits, want)  # and the model is as it was
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert torch.equal(entry.model.from_pretrained(tmp_path)(ids).logits, want)


def plain_and_hooked():
    layer, seen = nn.Linear(8, 8), []
    yield layer, seen
    layer.register_forward_hook(lambda *call: seen.append("forward"))
    yield layer, seen
    layer = nn.Linear(8, 8)
    layer.register_full_backward_hook(lambda *call: seen.append("backward"))
    yield layer, seen


def test_what_acts_on_a_layers_call_acts_on_its_projection(monkeypatch):
    """Where the faster product is taken it stands in for a call that does nothing else."""
    monkeypatch.setattr(products, "WORTH_IT", 0)
    if not products.wins(torch.zeros(2, 8), torch.zeros(8, 8)):
        pytest.skip("this torch has no oneDNN")
    called = []
    monkeypatch.setattr(
        "scrubjay.modeling.layers.multiplied", lambda *operands: called.append(1) or products.linear(*operands)
    )
    x = torch.randn(4, 8, requires_grad=True)
    for layer, seen in plain_and_hooked():
        called.clear()
        y = project(layer, x)
        y.sum().backward()
        assert torch.allclose(y, nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-6)
        assert bool(called) != bool(seen)  # the product or the hook
    called.clear()
    layer = nn.Linear(8, 8)
    with FlopCounterMode(display=False):  # watches all modules
        project(layer, x)
    assert not called
    layer.forward = lambda x: 2 * x
    assert torch.equal(project(layer, x), 2 * x)
