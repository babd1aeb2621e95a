"""Where a computation runs: the only place in the library that chooses a path."""

import functools
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from scrubjay.kernels.triton_tools import interpreted, triton, works

BACKENDS = ("torch", "triton")
IN_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)  # what is computed in float32


def traced() -> bool:
    """Whether torch.compile or torch.export reads this call, to which the values of tensors say nothing."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def exported() -> bool:
    """Whether torch.export reads this call. What it writes down runs without this library, for tensors of other values
    and lengths, and leaves those that it is given as they are: so no kernel of ours, no loop over time, no work in
    place on a state."""
    return torch.compiler.is_exporting()


def compiled() -> bool:
    """Whether torch.compile reads this call. What it writes runs beside this library and may call operators of ours,
    for which values and lengths are known when it runs."""
    return traced() and not exported()


def choose(backend: str | None, op: str, *tensors: torch.Tensor, fused: bool | Callable[[], bool] = False) -> str:
    """Name the path that `op` takes for these operands: "torch" or "triton".

    Args:
        backend: None chooses by device; "torch" and "triton" are obeyed or refused, never replaced in silence.
        op: name of the operation, for the error.
        tensors: the operands whose device decides.
        fused: whether `op` has a Triton kernel that covers this call, or a function that says so, asked where it
            matters.

    Raises:
        ValueError: an unknown name, or a request that cannot be met, with the reason.
    """
    if backend is None and tensors[0].device.type == "cpu":
        return "torch"
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be None or one of {BACKENDS}; got {backend!r}.")
    devices = sorted({t.device.type for t in tensors})
    fused = (fused() if callable(fused) else fused) and not exported()
    if backend == "triton":
        if not fused:
            raise ValueError(f"{op} has no Triton kernel for this call. Pass backend=None to let it choose.")
        if triton is None:
            raise ValueError(
                f"{op}: backend='triton' needs Triton, which is not installed: pip install 'scrubjay[gpu]'. "
                "Pass backend=None to let it choose."
            )
        if devices != ["cuda"] and not (devices == ["cpu"] and interpreted()):
            raise ValueError(
                f"{op}: backend='triton' was asked for but the operands are on {devices}; the kernel needs cuda. "
                "Pass backend=None to let it choose."
            )
        return "triton"
    wanted = backend is None and fused and triton is not None and devices == ["cuda"]
    # torch.compile, whose own code for a GPU is Triton's, must not trace the question.
    return "triton" if wanted and (traced() or works()) else "torch"


def one_token(x: torch.Tensor) -> bool:
    """Whether `x` (B, 1, ...) is one token of each row, on a CPU, without a gradient, and nothing watches: there every
    call of PyTorch costs as much as its arithmetic, so layers take the fewest (one_token.py)."""
    if x.shape[1] != 1 or torch.is_grad_enabled() or type(x) is not torch.Tensor or x.dtype not in IN_FLOAT32:
        return False
    return x.device.type == "cpu" and not (watched() or traced() or torch.is_autocast_enabled("cpu"))


def watched() -> bool:
    """Whether a trace, a forward-mode derivative or torch.func takes part in calls. PyTorch's own are known to all
    three, those that write into a given memory or belong to another library are not."""
    return torch.jit.is_tracing() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def without_autocast(function):
    """Run `function`, which gives each product its own dtype, with autocast off: it would lower the state's products.

    Under autocast a backward pass on the CPU would run in it too.
    """

    @functools.wraps(function)
    def exact(*args, **kwargs):
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        # entering and leaving a context costs more than one token's norm; "meta", which computes nothing, has none
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return exact


def alike(*tensors):
    """The tensors in the widest dtype among them, itself where all have one."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]
