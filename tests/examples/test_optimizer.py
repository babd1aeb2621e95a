"""Which parameter is whose, Muon's step against its equations and torch's, and that two optimizers pass for one."""

import io

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from scrubjay.examples.learning.optimizer import A, B, C, InTurn, Muon, inner_matrices, make_optimizer, orthogonal
from scrubjay.examples.learning.recipe import MODELS, Recipe
from scrubjay.examples.learning.training import Windows, build_model, schedule, train

SPARED = ("A_log", "D", "dt_bias", "bias", "mem_gate_bias", "residual_weight")  # last parts of names that never decay


def small(name, **changes):
    torch.manual_seed(0)
    recipe = Recipe.of(name, **{"hidden_size": 64, "num_hidden_layers": 2, "length": 32, **changes})
    return build_model(name, recipe, vocab_size=50, eos_token_id=0), recipe


def learn(model, optimizer, steps, seed=0):
    """Steps on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(50, (2, 32), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_one_group_and_only_matrices_decay(name, optimizer):
    model, recipe = small(name, optimizer=optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = []
    for group in make_optimizer(model, recipe).param_groups:
        seen += [names[parameter] for parameter in group["params"]]
        decays = group["weight_decay"] > 0
        assert all(parameter.ndim >= 2 for parameter in group["params"]) or not decays
        assert not (decays and any(names[parameter].split(".")[-1] in SPARED for parameter in group["params"]))
    assert sorted(seen) == sorted(names.values())


@pytest.mark.parametrize("name", MODELS)
def test_muon_has_the_matrices_between_embedding_and_head_but_no_gate_and_no_convolution(name):
    model, recipe = small(name, optimizer="muon")
    names = {parameter: name for name, parameter in model.named_parameters()}
    first, *rest = make_optimizer(model, recipe).param_groups
    assert "momentum" in first
    assert not any("momentum" in group for group in rest)
    found = {names[parameter].removesuffix(".weight").split(".", 3)[-1] for parameter in first["params"]}
    mixer = {"mixer.fc", "mixer.in_proj", "mixer.out_proj"}
    attention = {f"attn.{part}_proj" for part in "qkvo"}
    expected = {
        "rodimus_plus": mixer | attention | {"ffn.fc", "ffn.out_proj"},
        "rodimus": mixer,
        "ssd": {"mixer.in_proj", "mixer.out_proj"},
        "llama": {f"self_attn.{part}_proj" for part in "qkvo"}
        | {f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    }
    if name in expected:
        assert found == expected[name]
    assert all(parameter.ndim == 2 for parameter in first["params"])
    assert not any(word in each for each in found for word in ("embed", "head", "conv", "ch_gate", "mem_gate"))
    assert len(first["params"]) == len(inner_matrices(model)) >= 2 * model.config.num_hidden_layers


def test_parameters_that_are_not_trained_are_nobodys():
    model, recipe = small("ssd", optimizer="muon")
    frozen = model.model.layers[0].mixer.in_proj.weight.requires_grad_(False)
    assert not any(
        frozen is parameter for group in make_optimizer(model, recipe).param_groups for parameter in group["params"]
    )


def test_another_optimizer_is_refused():
    model, recipe = small("llama", optimizer="sgd")
    with pytest.raises(ValueError, match=r"must be one of \('adamw', 'muon'\); got 'sgd'"):
        make_optimizer(model, recipe)


def written_step(w, gradients, lr, mu, wd):
    """The header of optimizer.py in float64 numpy, by singular values: f acts on each of them alone."""
    average = np.zeros_like(w)
    for g in gradients:
        average = mu * average + (1 - mu) * g
        u, s, v = np.linalg.svd(mu * average + (1 - mu) * g, full_matrices=False)
        s = s / np.sqrt((s**2).sum())
        for _ in range(5):
            s = A * s + B * s**3 + C * s**5
        w = (1 - lr * wd) * w - lr * 0.2 * max(w.shape) ** 0.5 * (u * s) @ v
    return w


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7), (1, 6)])
def test_steps_equal_the_equations_in_float64(shape):
    rng = np.random.default_rng(0)
    start, *gradients = (rng.standard_normal(shape) for _ in range(4))
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    muon = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.3)
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient)
        muon.step()
    np.testing.assert_allclose(weight.detach().numpy(), written_step(start, gradients, 0.1, 0.9, 0.3), rtol=1e-9)


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32)])
def test_steps_are_those_of_torch_but_for_its_bfloat16(shape):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    settings = {"lr": 0.1, "momentum": 0.95, "weight_decay": 0.1}
    pair = Muon([ours], **settings), torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    moved = (ours - 1).norm()
    assert (ours - theirs).norm() < 0.05 * moved  # measured: 0.0106


def test_what_is_turned_is_nearly_orthogonal():
    torch.manual_seed(0)
    for shape in ((64, 256), (256, 64), (48, 48)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values[values > 0.3].min() > 0.6
        assert values.max() < 1.3
        assert (values > 0.6).float().mean() > 0.9  # a square Gaussian has a few very small ones
    assert not orthogonal(torch.zeros(3, 4)).any()


def test_a_checkpoint_goes_on_as_if_nothing_had_happened():
    model, recipe = small("rodimus_plus", optimizer="muon")
    optimizer = make_optimizer(model, recipe)
    learn(model, optimizer, 2)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    learn(model, optimizer, 2, seed=1)

    again, _ = small("rodimus_plus")
    other = make_optimizer(again, recipe)
    held = torch.load(io.BytesIO(file.getvalue()))
    again.load_state_dict(held["model"])
    other.load_state_dict(held["optimizer"])
    learn(again, other, 2, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))
    assert len(other.state) == len(list(again.parameters()))


def test_a_schedule_reaches_every_group_and_ends_at_zero():
    model, recipe = small("llama", optimizer="muon")
    optimizer = make_optimizer(model, recipe)
    scheduler = LambdaLR(optimizer, schedule(recipe, 10))
    for _ in range(10):
        learn(model, optimizer, 1)
        scheduler.step()
    assert isinstance(optimizer, InTurn)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0] * 3
    before = [parameter.clone() for parameter in model.parameters()]
    learn(model, optimizer, 1)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))


def test_a_step_returns_the_loss_of_its_closure():
    weight, bias = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))
    optimizer = InTurn(Muon([weight], lr=0.1), torch.optim.AdamW([bias], lr=0.1))

    def closure():
        optimizer.zero_grad()
        loss = (weight.sum(0) * bias).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6
    assert optimizer.step(closure).item() < 6


def test_the_trainer_learns_with_it_under_clipping_and_in_bfloat16(tmp_path):
    for bfloat16 in (False, True):
        model, recipe = small("rodimus_plus", optimizer="muon", batch_size=4, learning_rate=0.01)
        data = Windows(np.arange(4000) % 50, 32)
        log = train(model, data, recipe, 25, bfloat16=bfloat16, output=tmp_path, show=False)
        assert log.losses[-1] < log.losses[0] - 1
