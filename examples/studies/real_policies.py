"""The caches that are compared on a pretrained model, all with one budget of keys."""

import hashlib
import json
from pathlib import Path

from scrubjay.modeling.decoder.controller import SIZES, WEIGHTS

POLICIES = {
    "full": {"policy": "full"},
    "StreamingLLM": {"policy": "streaming"},
    "H2O": {"policy": "h2o"},
    "SnapKV": {"policy": "snapkv"},
    "TOVA": {"policy": "tova"},
    "Quest": {"policy": "quest", "full_layers": (0, 1)},  # as published
    "Recycled, S = 10": {"policy": "recycled", "stride": 10},
    "Recycled, S = 5": {"policy": "recycled", "stride": 5},
    "Recycled, dynamic": {"policy": "recycled", "schedule": "dynamic"},
    "Low rank, R = 16": {"policy": "lowrank", "rank": 16},
    "Low rank, R = 32": {"policy": "lowrank", "rank": 32},
}
LOW, FEW = {"policy": "lowrank", "rank": 16}, {"policy": "recycled", "stride": 5}
HELD = {
    "full, 8 bits": {"policy": "full", "hold_bits": 8},
    "full, 4 bits": {"policy": "full", "hold_bits": 4},
    "Low rank, R = 16, host": LOW | {"hold": "host"},
    "Low rank, R = 16, 8 bits": LOW | {"hold_bits": 8},
    "Low rank, R = 16, 4 bits": LOW | {"hold_bits": 4},
    "Recycled, S = 5, host": FEW | {"hold": "host"},
    "Recycled, S = 5, 4 bits": FEW | {"hold_bits": 4},
    "Recycled, S = 5, 4 bits, exact ones on the host": FEW | {"hold": "host", "hold_bits": 4},
}
ADORE = {  # of an `AdoreCache` that holds R tokens fewer than the budget
    "ADORE, R = 0": {"rebuild": 0},
    "ADORE, R = 8": {"rebuild": 8},
    "ADORE, R = 8 from the host": {"rebuild": 8, "rebuild_from": "host"},
}
LAYERS = {  # of SmolLM2-135M, which calibration on text had chosen, and which on the questions (real_calibrate.py)
    "lowrank in 8 of 30 layers": {"policy": "lowrank", "choosing_layers": (5, 7, 8, 14, 15, 17, 18, 23)},
    "lowrank in 6 of 30 layers, R = 32": {"policy": "lowrank", "rank": 32, "choosing_layers": (7, 8, 14, 17, 18, 23)},
}
OWN_PROMPT = ("H2O",)  # needs what every query of the prompt attended, and so reads it itself
ABLATIONS = {
    "all keys, every step chooses: R = 64": {"policy": "lowrank", "rank": 64},
    "R = 8": {"policy": "lowrank", "rank": 8},
    "R = 24": {"policy": "lowrank", "rank": 24},
    "R = 16, mean over heads": {"policy": "lowrank", "rank": 16, "group_reduce": "mean"},
    "Recycled, S = 2": {"policy": "recycled", "stride": 2},
    "Recycled, S = 3": {"policy": "recycled", "stride": 3},
    "Recycled, S = 10, no pooling": {"policy": "recycled", "stride": 10, "pool_kernel": 1},
    "Recycled, S = 10, mean over heads": {"policy": "recycled", "stride": 10, "group_reduce": "mean"},
    "Recycled, S = 10, first two layers in full": {"policy": "recycled", "stride": 10, "full_layers": (0, 1)},
    "Recycled, dynamic, queries after rotary": {"policy": "recycled", "schedule": "dynamic", "qsim_space": "post"},
    "Recycled, dynamic, threshold .95": {"policy": "recycled", "schedule": "dynamic", "threshold": 0.95},
    "Quest, pages of 4": {"policy": "quest", "full_layers": (0, 1), "page": 4},
    "SnapKV, a window of 1": {"policy": "snapkv", "window": 1},
}


def named_by(controller: str) -> str:
    """What cells call the controller of a folder: its kind of scores, and what tells its weights from others."""
    folder = Path(controller)
    mode = json.loads((folder / SIZES).read_text(encoding="utf-8"))["score_mode"]
    return f"{mode} {hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:8]}"
