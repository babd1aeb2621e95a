"""Batches of documents and padding that are drawn: letters are documents, dots are padding. In every row each document
has a letter of its own.
"""

import torch

FULL = ("aaaaaaaaabbbbbcccccccccc", "deeeeeeeeeeeeeffffffffff")
AFTER = ("aaaaaaaaabbbbb..........", "cccccccccccccccccccccc..")
BEFORE = ("..........aaaaaaaaabbbbb", "..cddddddddddddddddddddd")
AROUND = ("..aaaaa...aab..ccccccc..", "........................", "dddddddddd..eeeeeeeefggg")
SAME = ("aaaaaaaabbbbbbbbbbcccccc", "ddddddddeeeeeeeeeeffffff")
ROWS = ("aaaaaaaaaaaaa...........", "..........bbbbbbbb..bbbb", "cccccccccccccccccccccccc")
LOW = torch.finfo(torch.bfloat16).min
NOTATIONS = {
    "numbers": lambda mask: mask,
    "bytes": lambda mask: mask.byte(),
    "True": lambda mask: mask.bool(),
    "floats": lambda mask: mask.float(),
    "added": lambda mask: torch.where(mask > 0, 0.0, -torch.inf),
    "added lowest": lambda mask: torch.where(mask > 0, 0.0, LOW).to(torch.bfloat16),
}


def real(rows):
    """(B, T) 1 for tokens."""
    return torch.tensor([[letter != "." for letter in row] for row in rows]).long()


def numbers(rows, padding=-1):
    """(B, T) document numbers, from 1 in each row."""
    found = [
        [sorted(set(row) - {"."}).index(letter) + 1 if letter != "." else padding for letter in row] for row in rows
    ]
    return torch.tensor(found)


def positions(rows, padding=0):
    """(B, T) in each document."""
    return torch.tensor(
        [[row[:i].count(letter) if letter != "." else padding for i, letter in enumerate(row)] for row in rows]
    )


def offsets(rows):
    """(D + 1,) int32 over all columns, padding part of the document before it, or one of its own."""
    flat = "".join(rows)
    starts = [i for i, letter in enumerate(flat) if i == 0 or letter not in (".", flat[:i].rstrip(".")[-1:])]
    return torch.tensor([*starts, len(flat)], dtype=torch.int32)


def places(rows):
    """For each document its row and columns."""
    letters = sorted({letter for row in rows for letter in row} - {"."})
    at = {x: next(r for r, row in enumerate(rows) if x in row) for x in letters}
    return {x: (r, [i for i, letter in enumerate(rows[r]) if letter == x]) for x, r in at.items()}
