"""What rows say together: means with their spread, differences by pairs, and which rate of learning to take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scipy.special import stdtrit

from onelayer.experiments.experiment import Row


class Paired(NamedTuple):
    """Mean of the differences by pairs, with the 95% interval of Student's t; the interval is NaN for one pair."""

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        if self.pairs < 2:
            return f"{self.mean:+.3f} (one pair)"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired(rows: Iterable[Row], task: str, arm: str, other: str, name: str = "score") -> Paired | None:
    """What an arm has more than another on a task, seed by seed; `None` where no seed has both.

    >>> rows = [{"task": "t", "arm": a, "seed": s, "stage": "measure", "score": v}
    ...         for a, s, v in (("one", 0, 1.0), ("one", 1, 2.0), ("two", 0, 1.5), ("two", 1, 2.7))]
    >>> print(paired(rows, "t", "two", "one"))
    +0.600 [-0.671, +1.871]

    Args:
        rows: of the experiment; those that chose settings are left out.
        task: of both arms.
        arm, other: what is compared.
        name: of the number.
    """
    by_seed: dict[int, dict[str, float]] = {}
    for row in measured(rows, task):
        by_seed.setdefault(row["seed"], {})[row["arm"]] = row.get(name, math.nan)
    gaps = [found[arm] - found[other] for found in by_seed.values() if arm in found and other in found]
    if not gaps:
        return None
    if len(gaps) == 1 or not all(map(math.isfinite, gaps)):
        return Paired(statistics.fmean(gaps), math.nan, math.nan, len(gaps))
    mean = statistics.fmean(gaps)
    half = float(stdtrit(len(gaps) - 1, 0.975)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Paired(mean, mean - half, mean + half, len(gaps))


def measured(rows: Iterable[Row], task: str | None = None, arm: str | None = None) -> list[Row]:
    """The rows that are results, of a task or an arm where one is named.

    >>> measured([{"task": "t", "arm": "a", "stage": "choose"}])
    []
    """
    return [
        row for row in rows if row["stage"] == "measure" and task in (None, row["task"]) and arm in (None, row["arm"])
    ]


def rank_correlation(values: Sequence[float], others: Sequence[float]) -> float:
    """Spearman's coefficient: the correlation of ranks, ties in the middle of theirs.

    >>> round(rank_correlation([1.0, 2.0, 3.0, 4.0], [9.0, 3.0, 3.0, 0.0]), 3)
    -0.949
    """
    return statistics.correlation(_ranks(values), _ranks(others))


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation.

    >>> spread([1.0, 2.0]), spread([1.0])
    ('1.500 ± 0.707', '1.000')
    """
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
