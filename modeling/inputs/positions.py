"""Positions that generate() counts and the model counts itself."""

import torch

from scrubjay.modeling.inputs.columns import tokens_first


def without_positions(prepared: dict, seen: int) -> dict:
    """A step of generation's inputs without position_ids that only say that each row goes on with one text.

    Those that say something else, or of a cache that has `seen` columns that a text starts, are left for forward to
    refuse. A compiled forward cannot look at them.
    """
    positions, mask = prepared.get("position_ids"), prepared.get("attention_mask")
    if positions is None or positions.ndim != 2 or positions.shape[1] < 2:
        return prepared
    goes_on = torch.ones_like(positions[:, 1:], dtype=torch.bool)
    if mask is not None:
        if mask.ndim != 2 or mask.shape[0] != positions.shape[0] or mask.shape[1] < positions.shape[1]:
            return prepared
        real = mask[:, -positions.shape[1] :] > 0
        order = tokens_first(real)
        positions, goes_on = positions.gather(1, order), real.gather(1, order)[:, 1:]
    one_text = ((positions.diff(dim=1) > 0) | ~goes_on).all()
    if not bool(one_text & (positions[:, 0] > 0).all() if seen else one_text):
        return prepared
    return {name: value for name, value in prepared.items() if name != "position_ids"}
