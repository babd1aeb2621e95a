"""What an attention_mask says, in whichever convention it is written: which columns are tokens, of which document."""

import torch

HIDDEN = -1e3  # an additive mask's value from here on hides a column: its exponential is 0 in every dtype
MASKS = (
    "1 for tokens and 0 for padding, True and False, the numbers of documents from 1 on and 0 for padding, or what is "
    "added to scores: 0 for tokens (so floats that are 0 everywhere), -inf or the dtype's lowest number for padding"
)
NUMBERS = 2**31  # of documents are below it: what is larger is none


def read_mask(mask: torch.Tensor, look: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, M) bool, which columns are tokens; and (B, M) int64 document numbers where the mask has them, or None.

    `look`: whether values may be looked at, else they are asserted when the call runs.

    Raises:
        ValueError: a mask of no convention of `MASKS`, or of two.
    """
    if mask.dtype == torch.bool:
        return mask, None
    mask = _comparable(mask)
    zero, floats = mask == 0, mask.is_floating_point()
    ones, additive = (zero | (mask == 1)).all(), (zero | (mask <= HIDDEN)).all() & floats
    if not look:
        wanted = "attention_mask must be of 1 and 0, or of what is added to scores, when a program is traced."
        torch._assert_async(ones | additive, wanted)
        return zero ^ (ones & ~additive), None
    whole = (mask == mask.round()) & (mask.float() < NUMBERS) if floats else True
    counted = ((mask >= 0) & mask.isfinite() & whole).all()
    ones, additive, counted = torch.stack([ones, additive, counted]).tolist()
    if additive:  # also floats of 0 alone: as 1 and 0 they would say that there is no token
        return zero, None
    if ones:
        return ~zero, None
    if counted:
        return ~zero, mask.long()
    values = mask.unique()
    raise ValueError(f"attention_mask must hold {MASKS}; got {values[:4].tolist()}{' ...' if len(values) > 4 else ''}.")


def _comparable(mask):
    """The mask in a dtype that torch compares."""
    if mask.is_complex():
        raise ValueError(f"attention_mask must hold {MASKS}; got {mask.dtype}.")
    if mask.is_floating_point():
        return mask.float() if mask.itemsize == 1 else mask
    return mask if mask.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32) else mask.long()
