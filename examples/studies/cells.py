"""What a laboratory does: cells, and rates that are tuned before they are reported.

A cell is one training: a study, a model, a seed, a learning rate and settings, all that decides its result.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, eq=False)
class Cell:
    """One training. Two cells are the same if all that decides their result is.

    Args:
        study: name of the study.
        model: name of the model, also its row in tables and its colour in figures.
        seed: of the weights and the data.
        rate: learning rate.
        settings: the rest, as JSON can hold it: sizes, steps, switches.
    """

    study: str
    model: str
    seed: int
    rate: float
    settings: Mapping = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "rate", float(self.rate))
        object.__setattr__(self, "settings", json.loads(json.dumps(dict(self.settings), sort_keys=True)))

    @property
    def key(self) -> str:
        """All that decides the result, as one string."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def name(self) -> str:
        """As people read it and as `--only` searches it: `recall ssd pairs=32 state_size=16 rate=0.003 seed=1`."""
        settings = (f"{name}={value}" for name, value in self.settings.items())
        return " ".join([self.study, self.model, *settings, f"rate={self.rate:g}", f"seed={self.seed}"])

    def __eq__(self, other):
        return isinstance(other, Cell) and self.key == other.key

    def __hash__(self):
        return hash(self.key)


def cell_of(record: dict) -> Cell:
    """The cell that a record on disk is of."""
    return Cell(**record["cell"])


@dataclass(frozen=True)
class Tuning:
    """Rates are tried on seeds of their own; the best is run on the seeds that are reported.

    Args:
        rates: the grid, the same for every model.
        seeds: on which the grid is tried.
        reported: other seeds.
        score: what the mean over `seeds` is taken of, of a result; the rate with the highest is taken, and of equals
            the lower rate. A rate at which a cell failed is not taken.
    """

    rates: Sequence[float]
    seeds: Sequence[int]
    reported: Sequence[int]
    score: Callable[[dict], float]

    def __post_init__(self):
        if set(self.seeds) & set(self.reported):
            raise ValueError(f"Seeds for tuning must not be reported; got {self.seeds} and {self.reported}.")

    def trials(self, study: str, model: str, settings: Mapping) -> list[Cell]:
        """The grid."""
        return [Cell(study, model, seed, rate, settings) for seed in self.seeds for rate in self.rates]

    def best(self, study: str, model: str, settings: Mapping, records: Iterable[dict]) -> float | None:
        """The rate that is taken; None while the grid is not done, or where every rate failed."""
        known = {cell_of(record): record for record in records}
        trials = self.trials(study, model, settings)
        if not all(cell in known for cell in trials):
            return None
        scores = {}
        for rate in sorted(self.rates):
            results = [known[cell].get("result") for cell in trials if cell.rate == rate]
            if all(result is not None for result in results):
                scores[rate] = statistics.fmean(self.score(result) for result in results)
        return max(scores, key=lambda rate: scores[rate]) if scores else None

    def cells(
        self, study: str, model: str, settings: Mapping, records: Iterable[dict], *, guess: bool = False
    ) -> list[Cell]:
        """The grid, and once it is done the reported seeds at the best rate.

        Args:
            guess: until then, them at the middle of the grid: a plan has to count them.
        """
        rate = self.best(study, model, settings, records)
        if rate is None and guess:
            rate = sorted(self.rates)[len(self.rates) // 2]
        reported = [] if rate is None else [Cell(study, model, seed, rate, settings) for seed in self.reported]
        return self.trials(study, model, settings) + reported

    def results(self, study: str, model: str, settings: Mapping, records: Iterable[dict]) -> list[dict]:
        """Results of the reported seeds, as far as they are there."""
        records = list(records)
        rate = self.best(study, model, settings, records)
        known = {cell_of(record): record for record in records if "result" in record}
        cells = [] if rate is None else [Cell(study, model, seed, rate, settings) for seed in self.reported]
        return [known[cell]["result"] for cell in cells if cell in known]
