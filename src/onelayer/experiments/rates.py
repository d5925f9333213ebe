"""Rates of learning: which of several each arm takes, chosen on a seed that is not among those told."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from onelayer.experiments.experiment import Row, Trial


def best_rate(rows: Iterable[Row], task: str, arm: str, rates: Sequence[float], name: str = "score") -> float | None:
    """The rate of learning with the smallest mean number on the seeds that choose; `None` until all of them are there.

    >>> rows = [{"task": "t", "arm": "a", "stage": "choose", "rate": r, "score": s} for r, s in ((0.1, 2), (0.3, 1))]
    >>> best_rate(rows, "t", "a", (0.1, 0.3)), best_rate(rows, "t", "a", (0.1, 0.3, 1.0))
    (0.3, None)

    Args:
        rows: of the experiment; a row without the number is of a training that diverged, and loses.
        task, arm: for which a rate is wanted.
        rates: those tried; one alone needs no rows.
        name: of the number.
    """
    if len(rates) == 1:
        return rates[0]
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["stage"] == "choose" and (row["task"], row["arm"]) == (task, arm):
            found.setdefault(row["rate"], []).append(row.get(name, math.inf))
    if any(rate not in found for rate in rates):
        return None
    return min(rates, key=lambda rate: statistics.fmean(found[rate]))


def with_chosen_rates(
    rows: Sequence[Row],
    tasks: Sequence[str],
    arms: Sequence[str],
    seeds: int,
    rates: Sequence[float],
    units: int,
    choose_on: Sequence[str] | None = None,
    name: str = "score",
) -> list[Trial]:
    """Trials that choose a rate of learning for each arm, on a seed of their own, and then those that are told.

    >>> [trial.stage for trial in with_chosen_rates([], ["t"], ["one"], seeds=3, rates=(0.1, 0.3), units=10)]
    ['choose', 'choose']

    Args:
        rows: that are there already.
        tasks, arms: all pairs of them are tried.
        seeds: of the trials that are told, from 0.
        rates: to choose from.
        units: of work in a trial.
        choose_on: for each task, the one that its rates are chosen on; `None` for each on its own.
        name: of the number that is to be small.
    """
    trials: list[Trial] = []
    for task, chooser in zip(tasks, choose_on or tasks, strict=True):
        for arm in arms:
            rate = best_rate(rows, chooser, arm, rates, name)
            if len(rates) > 1:
                tried = [Trial(chooser, arm, _CHOOSING_SEED, value, "choose", units) for value in rates]
                trials += [trial for trial in tried if trial not in trials]
            if rate is not None:
                trials += [Trial(task, arm, seed, rate, "measure", units) for seed in range(seeds)]
    return trials


def with_rate_of(
    rows: Sequence[Row], task: str, other: str, arms: Sequence[str], seeds: int, rates: Sequence[float], units: int
) -> list[Trial]:
    """Trials of arms that take the rate of learning which another arm has chosen; none until it has.

    >>> with_rate_of([], "t", "one", ["one, longer"], seeds=1, rates=(0.1,), units=80)[0].rate
    0.1

    Args:
        rows: that are there already.
        task: of all of them.
        other: the arm that has chosen.
        arms: that take its rate.
        seeds: of the trials, from 0.
        rates: that it chose from.
        units: of work in a trial.
    """
    rate = best_rate(rows, task, other, rates)
    return [Trial(task, arm, seed, rate, units=units) for arm in arms for seed in range(seeds) if rate is not None]


_CHOOSING_SEED = 1000
