"""What decides how a demo run learns and what it measures."""

from dataclasses import dataclass, replace

SHORT = (1_000, 2_000, 4_000, 8_000, 16_000)  # contexts of a hybrid: the time to read one is quadratic

# About 5M parameters each at the width below. Rates: the best of 2e-3, 4e-3, 8e-3 and 16e-3 that
# `python examples/studies/language.py` found for each, with models of that size and windows and batches as here.
MODELS: dict[str, dict] = {
    "rodimus_plus": {"num_hidden_layers": 4, "learning_rate": 4e-3},
    "rodimus": {"num_hidden_layers": 7, "learning_rate": 8e-3},
    "ssd": {"num_hidden_layers": 8, "learning_rate": 4e-3},
    "ssd-hybrid": {"num_hidden_layers": 8, "learning_rate": 4e-3, "contexts": SHORT},
    "taipan": {"num_hidden_layers": 7, "learning_rate": 4e-3},
    "llama": {"num_hidden_layers": 5, "learning_rate": 4e-3},
}
# For a run of at most QUICK_MINUTES on two cores: about 0.6M parameters each. What counts in two minutes is how much
# text a model sees (examples/results/demo_2.json says how much that was). Optimizer and rates of each are the best of
# the same trials of a third of that time, of one seed, then of all of it, of three (`demo_search.py --table`), with
# Muon only where it is worth 0.02 bits per byte there: to Llama.
QUICK_MINUTES = 8
QUICK_SIZES = {"hidden_size": 128, "vocab_size": 2048, "learning_rate": 12e-3}
QUICK: dict[str, dict] = {
    "rodimus_plus": {"num_hidden_layers": 1},
    "rodimus": {"num_hidden_layers": 2},
    "ssd": {"num_hidden_layers": 2},
    "ssd-hybrid": {"num_hidden_layers": 2, "contexts": SHORT},
    "taipan": {"num_hidden_layers": 2},
    "llama": {"num_hidden_layers": 2, "optimizer": "muon", "learning_rate": 24e-3, "matrix_rate": 0.25},
}


@dataclass(frozen=True)
class Recipe:
    """Sizes, optimisation and measurement of one run. Lengths are in tokens unless they say bytes or seconds.

    Args:
        learning_rate: peak; it rises linearly over `warmup` of the steps and falls linearly to 0 over the last `decay`.
        optimizer: "adamw", or "muon" for the matrices between embedding and head (`learning/optimizer.py`).
        matrix_rate: Muon's learning rate over AdamW's.
        max_epochs: the run ends early rather than read the training text more often than this (a GPU would).
        max_steps: None lets the time budget decide.
        precision: "bfloat16" (autocast), "float32", or "fastest", which times both on this machine.
        num_evals: times the held-out loss is looked at while training, on one window in `glance`.
        heldout_bytes: slice of the held-out text that the model and every baseline are scored on at the end.
        contexts: lengths at which the cache is weighed; the last one is also what is fed through the model.
    """

    num_hidden_layers: int
    learning_rate: float
    hidden_size: int = 256
    vocab_size: int = 4096
    batch_size: int = 8
    length: int = 128
    warmup: float = 0.05
    decay: float = 0.8
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    optimizer: str = "adamw"
    matrix_rate: float = 1.0
    max_grad_norm: float = 1.0
    max_epochs: float = 6.0
    max_steps: int | None = None
    precision: str = "fastest"
    num_evals: int = 5
    glance: int = 24
    train_bytes: int = 1 << 30
    heldout_bytes: int = 1 << 20
    contexts: tuple[int, ...] = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 100_000)
    new_tokens: int = 64

    @classmethod
    def of(cls, model: str, **changes) -> "Recipe":
        """The recipe of a model of `MODELS`, with some fields changed."""
        return cls(**{**MODELS[model], **changes})

    @classmethod
    def quick(cls, model: str, **changes) -> "Recipe":
        """The recipe of a model of `QUICK`, with some fields changed."""
        return cls(**{**QUICK_SIZES, **QUICK[model], **changes})

    @classmethod
    def within(cls, model: str, minutes: float, **changes) -> "Recipe":
        """The recipe of a run of so many minutes."""
        return (cls.quick if minutes <= QUICK_MINUTES else cls.of)(model, **changes)

    def smoke(self) -> "Recipe":
        """The same run, small enough to end within seconds on a CPU."""
        return replace(
            self,
            hidden_size=64,
            num_hidden_layers=2,
            vocab_size=512,
            batch_size=min(self.batch_size, 4),
            length=min(self.length, 64),
            max_steps=8,
            num_evals=2,
            glance=4,
            train_bytes=1 << 18,
            heldout_bytes=1 << 15,
            contexts=(1_000, 2_000, 4_000),
            new_tokens=8,
        )
