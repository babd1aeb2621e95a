"""Tables and figures of the study of a pretrained model (real.py)."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results" / "real.json"


def show(records, out, args):
    pass
