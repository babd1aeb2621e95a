"""AdamW for everything, or Muon for the matrices inside of a model and AdamW for the rest.

Muon (https://kellerjordan.github.io/posts/muon/; the size of its step: arXiv:2502.16982), of a weight W (m, n) with
gradient G:

    B <- mu B + (1 - mu) G
    U  = f^5(X / |X|)               X = mu B + (1 - mu) G        f(X) = a X + (b A + c A^2) X,  A = X X^T
    W <- (1 - lr wd) W - 0.2 sqrt(max(m, n)) lr U

f drives every singular value towards 1, so the step turns W in all directions alike. 0.2 sqrt(max(m, n)) makes its
entries about as large as AdamW's are: one learning rate, and one weight decay, serve both.

torch.optim.Muon takes the same step with f in bfloat16, whose products many processors have to emulate; here f is in
the weights' dtype.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from scrubjay.examples.learning.recipe import Recipe

OPTIMIZERS = ("adamw", "muon")
GATES = {"mem_gate_proj", "ch_gate_down", "ch_gate_up", "gate"}  # Rodimus' and Taipan's: AdamW's
A, B, C = 3.4445, -4.7750, 2.0315
EPS = 1e-7


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's; weight decay on matrices only, as each model of the zoo knows which of its parameters are.

    Raises:
        ValueError: an optimizer of another name.
    """
    if recipe.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {OPTIMIZERS}; got {recipe.optimizer!r}.")
    inner = inner_matrices(model) if recipe.optimizer == "muon" else []
    taken = {id(parameter) for parameter in inner}
    groups = [
        {**group, "params": [parameter for parameter in group["params"] if id(parameter) not in taken]}
        for group in decay_groups(model, recipe.weight_decay)
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=recipe.learning_rate, betas=recipe.betas, fused=True
    )
    if not inner:
        return adamw
    rate = recipe.matrix_rate * recipe.learning_rate
    return InTurn(Muon(inner, lr=rate, weight_decay=recipe.weight_decay), adamw)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Every parameter that is trained, in the group of those that decay or of those that do not.

    A model of the zoo says itself which are spared; of others vectors are, and decay rates (`A_log`, a matrix in
    Mamba-1).
    """
    if hasattr(model, "weight_decay_groups"):
        return model.weight_decay_groups(weight_decay)
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim < 2 or name.endswith("A_log") else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def inner_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """Weights of linear layers that are trained, without the head (which may be the embedding) and without gates."""
    outer = {
        id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    }
    layers = (
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not GATES.intersection(name.split("."))
    )
    return [layer.weight for layer in layers if layer.weight.requires_grad and id(layer.weight) not in outer]


class Muon(torch.optim.Optimizer):
    """See above. Parameters are matrices."""

    def __init__(self, params, lr: float, *, momentum: float = 0.95, weight_decay: float = 0.1, iterations: int = 5):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = _evaluated(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._turn(weight, group)
        return loss

    def _turn(self, weight, group):
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        average, mu = state["momentum_buffer"], group["momentum"]
        average.lerp_(weight.grad, 1 - mu)
        turn = orthogonal(weight.grad.lerp(average, mu), group["iterations"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(turn, alpha=-0.2 * max(weight.shape) ** 0.5 * group["lr"])


def orthogonal(x: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """f^iterations(x / |x|): singular vectors as they are, singular values of 0.01 |x| and more between 0.6 and 1.3."""
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x  # X X^T is the smaller product
    x = x / x.norm().clamp(min=EPS)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


class InTurn(torch.optim.Optimizer):
    """Several optimizers, each for groups of its own, that a schedule, a Trainer and a checkpoint see as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = [(part, len(part.param_groups)) for part in parts]
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        loss, start = _evaluated(closure), 0
        for part, size in self.parts:
            # each time: loading a checkpoint puts new groups and a new state in their place
            part.param_groups, part.state = self.param_groups[start : start + size], self.state
            part.step()
            start += size
        return loss


def _evaluated(closure):
    """What a closure returns, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
