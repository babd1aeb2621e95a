"""Functions that torch.compile calls as one operator each, where reading them would write a loop over time into the
graph, anew for each length, or break it where a size is a value of a tensor.

    operator = Operator("name", function, shapes, gradients)
    outputs = operator(tensors, integers, floats)        lists; a list of tensors, as function(the same) gives

`function` gets tensors or None, writes to none of them and returns others. It runs when the program does, where values
are known; of the compiler's tensors, which have none, `shapes(tensors, integers)` makes a list of the same shapes and
dtypes. `gradients(tensors, integers, floats, douts)` gives a gradient, or None, for each of `tensors`; without it they
are autograd's, through `function` run once more. Differentiable once.

torch keeps operators by name, one table for a process, and several copies of this file may be in it: the library's, and
one of each folder of a checkpoint that brought its own. Each has a namespace, so that a program calls the code of the
model that it was made of.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence

import torch

ARGUMENTS = "Tensor[] tensors, bool[] given, SymInt[] integers, float[] floats"
Tensors = Sequence[torch.Tensor | None]


def _library() -> torch.library.Library:
    """The operators of this copy of the file, in a namespace that no other has; the same one in each process that
    imports the same, so that a compiler finds what it kept on disk."""
    digest = hashlib.sha256(__name__.encode()).hexdigest()[:12]
    for copy in itertools.count():
        try:
            return torch.library.Library(f"scrubjay_{digest}_{copy}", "DEF")
        except RuntimeError:  # a module of this name was here before; there may be programs that call its operators
            continue
    raise AssertionError("itertools.count ends nowhere")


_OWN = _library()


class Operator:
    """`function` as torch's operator `name`; see the header of the file."""

    def __init__(self, name: str, function: Callable, shapes: Callable, gradients: Callable | None = None):
        self.function, self.shapes, self.gradients = function, shapes, gradients
        self.call = self._define(name, f"({ARGUMENTS}) -> Tensor[]", self._run, self._empty)
        backward = f"({ARGUMENTS}, Tensor[] douts, bool[] wanted) -> Tensor[]"
        self.back = self._define(f"{name}_backward", backward, self._run_back, self._empty_back)
        torch.library.register_autograd(f"{_OWN.ns}::{name}", self._backward, setup_context=self._keep, lib=_OWN)

    def __call__(self, tensors: Tensors, integers: Sequence[int] = (), floats: Sequence[float] = ()):
        given = [x is not None for x in tensors]
        return self.call([x for x in tensors if x is not None], given, list(integers), list(floats))

    @staticmethod
    def _define(name, schema, run, empty):
        _OWN.define(name + schema)
        _OWN.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_OWN.ns}::{name}", empty, lib=_OWN)
        return getattr(getattr(torch.ops, _OWN.ns), name).default

    def _run(self, tensors, given, integers, floats):
        with torch.no_grad():
            return [x.contiguous() for x in self.function(_placed(tensors, given), integers, floats)]

    def _empty(self, tensors, given, integers, floats):
        return list(self.shapes(_placed(tensors, given), integers))

    def _run_back(self, tensors, given, integers, floats, douts, wanted):
        if self.gradients is not None:
            with torch.no_grad():
                grads = self.gradients(_placed(tensors, given), integers, floats, douts)
                grads = [grad for grad, here in zip(grads, given, strict=True) if here]
            return [grad.contiguous() for grad, asked in zip(grads, wanted, strict=True) if asked]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(asked) for x, asked in zip(tensors, wanted, strict=True)]
            outs = self.function(_placed(leaves, given), integers, floats)
        pairs = [(out, dout) for out, dout in zip(outs, douts, strict=True) if out.requires_grad]
        reached, douts = zip(*pairs, strict=True)
        asked = [x for x in leaves if x.requires_grad]
        grads = torch.autograd.grad(reached, asked, douts, allow_unused=True, materialize_grads=True)
        return [grad.contiguous() for grad in grads]

    def _empty_back(self, tensors, given, integers, floats, douts, wanted):
        like = torch.contiguous_format
        return [torch.empty_like(x, memory_format=like) for x, asked in zip(tensors, wanted, strict=True) if asked]

    @staticmethod
    def _keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs[0])
        ctx.others = inputs[1:]

    def _backward(self, ctx, douts):
        wanted = list(ctx.needs_input_grad[0])
        grads = iter(self.back(list(ctx.saved_tensors), *ctx.others, list(douts), wanted))
        # torch takes an empty list for one of tensors, and wants it back
        return [next(grads) if asked else None for asked in wanted], *(None if other else [] for other in ctx.others)


def _placed(tensors, given):
    """One tensor, or None, in each place."""
    left = iter(tensors)
    return [next(left) if here else None for here in given]
