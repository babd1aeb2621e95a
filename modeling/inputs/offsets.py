"""Offsets of packed documents whose values nobody may look at before the call runs."""

import torch


def asserted_offsets(offsets, length, device, others=None, position_ids=None) -> torch.Tensor:
    """(D + 1,) int64 offsets of one row's documents, whose number is a shape. What `read_columns` refuses by looking at
    values is asserted when the program runs: offsets over all `length` columns, `others` that are the same, and
    positions (1, T) that restart nowhere else.
    """
    offsets = offsets.to(device, torch.int64).flatten()
    fits = (offsets[0] == 0) & (offsets[-1] == length) & (offsets.diff() >= 0).all()
    torch._assert_async(fits, "cu_seq_lens_q must rise from 0 to batch * length, padding included.")
    if others is not None:
        same = (offsets == others.to(device)).all()
        torch._assert_async(same, "cu_seq_lens_q and cu_seq_lens_k disagree: pass the former, or both alike.")
    if position_ids is not None:
        document = torch.searchsorted(offsets, torch.arange(length, device=device), right=True)
        goes_on = (position_ids.to(device)[0].diff() > 0) | (document.diff() != 0)
        wanted = "cu_seq_lens_q and position_ids disagree about where documents start. Pass one of them."
        torch._assert_async(goes_on.all(), wanted)
    return offsets
