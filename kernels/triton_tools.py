"""What every Triton kernel needs: the import, which may fail, a launch, and where chunks lie in packed documents.

A kernel file is imported on machines without Triton too: it takes `tl`, `triton` and `jit` from here.
"""

import functools
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=None)


@functools.cache
def works() -> bool:
    """Whether Triton reaches this machine's GPU. Where it does not, a warning says why, once.

    At its first use Triton compiles its driver, with a C compiler and Python's headers: many machines lack one of them.
    """
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # of Triton, of the compiler, of the system
        reason = f"{type(error).__name__}: {error}"
        text = "Triton is installed and does not work here, so PyTorch's operations run in place of the kernels."
        warnings.warn(f"{text} Triton needs a C compiler, such as gcc, and Python's headers. {reason}", stacklevel=2)
        return False
    return True


def jit(function):
    """`triton.jit`; without Triton the function as it is, which then cannot be launched."""
    return function if triton is None else triton.jit(function)


def tile_side(size, least=16):
    """The power of two from `size` on: the side of a tile. `tl.dot` takes none below 16."""
    return max(least, 1 << (size - 1).bit_length())


@jit
def append(xs, x):
    """In a kernel: a tuple with one more."""
    return xs + (x,)  # noqa: RUF005 - Triton does not know (*xs, x)


def interpreted():
    """Whether Triton runs kernels in its interpreter, on the CPU (it was imported with TRITON_INTERPRET=1)."""
    return triton is not None and triton.knobs.runtime.interpret


def dot_dtype(x):
    """Triton dtype in which products of tensors like `x` are formed (they are added up in float32): that of x, for the
    tensor cores. The interpreter multiplies bfloat16 as if it were integers: there it is float32."""
    if interpreted() or x.dtype == torch.float32:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]


def precision():
    """`input_precision` of float32 products: three TF32 products have float32's accuracy at a third of their rate;
    without tensor cores ("ieee") such a kernel spills its registers. AMD has no such mode."""
    return "ieee" if torch.version.hip else "tf32x3"


def launch(kernel, grid, *args, **meta):
    """Run `kernel` on the device of its first tensor, which need not be the current one. An empty grid runs nothing.

    Products are fused with additions unless `meta` says otherwise: Triton's own default changes with its version.
    """
    if min(grid) == 0:
        return
    device = next(x.device for x in args if isinstance(x, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _run(kernel, grid, args, {"enable_fp_fusion": True} | meta)


def _run(kernel, grid, args, meta):
    kernel[grid](*args, **meta)


class Chunks(NamedTuple):
    """Where chunks lie, in the axis (B * T) of all steps. All int32, on the device.

    row: (n,) state row (batch row or document) of each chunk. start, stop: (n,) its steps; equal in a chunk that does
    not exist (n is an upper bound, so that nothing waits for the device). first: (rows + 1,) index of the first chunk
    of each state row, and their number.
    """

    row: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    first: torch.Tensor


def chunk_table(cu_seqlens, batch, length, size, device):
    """Chunks of at most `size` steps that cover the documents (cu_seqlens, (D + 1,)) or the batch's rows (None)."""
    if cu_seqlens is None:
        bounds = torch.arange(batch + 1, device=device) * length
        n = batch * -(-length // size)
    else:
        bounds = cu_seqlens.to(device=device, dtype=torch.int64)
        n = length // size + len(bounds) - 1
    counts = (bounds.diff() + size - 1) // size
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    at = torch.arange(n, device=device)
    row = torch.searchsorted(first, at, right=True).sub_(1).clamp_(0, len(bounds) - 2)
    stop = bounds[row + 1]
    start = torch.minimum(bounds[row] + (at - first[row]) * size, stop)
    return Chunks(*(x.int() for x in (row, start, torch.minimum(start + size, stop), first)))
