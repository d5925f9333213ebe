"""What restarts and evaluations at test are told as: comparisons within an arm, tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from onelayer.experiments.experiment import Drawing, Row, Table
from onelayer.experiments.plots import curves
from onelayer.experiments.statistics import Paired, measured, paired, spread

Number = Callable[[Row], float | None]

WAYS = {
    "residual": "smallest residual",
    "steps": "fewest evaluations",
    "vote": "majority",
    "any": "any is right",
}


def apart(rows: Sequence[Row], arm: str, numbers: Mapping[str, Number]) -> list[Row]:
    """Numbers of the rows of an arm, each as the score of an arm of its own, so that they can be compared by pairs.

    >>> row = {"task": "t", "arm": "a", "seed": 0, "stage": "measure", "zeros": 0.5}
    >>> apart([row], "a", {"from zeros": lambda row: row["zeros"]})
    [{'task': 'a', 'arm': 'from zeros', 'seed': 0, 'stage': 'measure', 'score': 0.5}]

    Args:
        rows: of the experiment.
        arm: whose numbers.
        numbers: by name; where one is `None`, its row is left out.
    """
    return [
        {"task": arm, "arm": name, "seed": row["seed"], "stage": row["stage"], "score": number(row)}
        for row in measured(rows, arm=arm)
        for name, number in numbers.items()
        if number(row) is not None
    ]


def gap(rows: Sequence[Row], arm: str, more: Number, less: Number) -> Paired | None:
    """How much larger one number of the rows of an arm is than another, seed by seed."""
    return paired(apart(rows, arm, {"more": more, "less": less}), arm, "more", "less")


def from_starts(count: int, how: str = "residual") -> Number:
    """Share of the puzzles that a row solved from so many starts."""
    return lambda row: dict(row["restarts"])[count][how]


def within(budget: int) -> Number:
    """Share of the puzzles that a row solved within so many evaluations."""
    return lambda row: dict(row["depth"])[budget]


def starts_table(rows: Sequence[Row], arms: Sequence[str], counts: Sequence[int], max_steps: int) -> Table:
    """Puzzles solved against the number of starts, by how an answer is chosen.

    Args:
        rows: of the experiment.
        arms: of equilibria.
        counts: of starts.
        max_steps: evaluations that a solve may take.
    """
    told = []
    for arm in arms:
        own = measured(rows, arm=arm)
        for count in counts if own else ():
            shares = [spread([dict(row["restarts"])[count][way] for row in own]) for way in WAYS]
            told.append([arm, str(count), *shares])
    note = (
        f"Share of the test's puzzles, mean ± sd over the seeds, of all {max(counts)} starts in groups of so many; a "
        f"solve may take {max_steps} evaluations. Whether any is right needs someone who knows."
    )
    return Table("Solved from so many starts", ("arm", "starts", *WAYS.values()), told, note)


def paths_table(rows: Sequence[Row], arms: Sequence[str]) -> Table:
    """Whether the start matters to each arm, and how well its residual tells right from wrong."""
    numbers: dict[str, Number] = {
        "solved from zeros": lambda row: row["zeros"],
        "from one random start": from_starts(1),
        "two starts agree": lambda row: row["agreement"]["pairs"],
        "all starts agree": lambda row: row["agreement"]["samples"],
        "area of the residual": lambda row: row["area"],
        "area of the evaluations": lambda row: row["steps_area"],
    }
    told = []
    for arm in arms:
        found = apart(rows, arm, numbers)
        if found:
            told.append([arm, *(spread([row["score"] for row in found if row["arm"] == name]) for name in numbers)])
    note = (
        "Agreeing starts give the same answer in every cell, right or wrong. The area is how often a right answer has "
        "a smaller residual, or took fewer evaluations, than a wrong one, over all puzzles and starts of a seed, ties "
        "half; 0.5 is chance."
    )
    return Table("Whether the start matters, and what the residual knows", ("arm", *numbers), told, note)


def depth_table(rows: Sequence[Row], arms: Sequence[str], budgets: Sequence[int], max_steps: int) -> Table:
    """Puzzles solved against the evaluations allowed at test.

    Args:
        rows: of the experiment.
        arms: those without budgets are left out.
        budgets: of evaluations.
        max_steps: evaluations that a solve might take in training.
    """
    told = []
    for arm in arms:
        own = [row for row in measured(rows, arm=arm) if "depth" in row]
        if own:
            told.append([arm, *(spread([dict(row["depth"])[budget] for row in own]) for budget in budgets)])
    note = (
        f"Solved from one start, zeros or random as in training, which allowed {max_steps} evaluations. Of N "
        "evaluations the last measures the residual, so N - 1 applications stand behind the answer; the tied network "
        "is applied N times."
    )
    return Table("Solved within so many evaluations", ("arm", *map(str, budgets)), told, note)


def drawings(rows: Sequence[Row], task: str, arms: Sequence[str], solving: Sequence[str]) -> dict[str, Drawing]:
    """Puzzles solved against starts and against evaluations, and what was unsolved on the way of the training.

    Args:
        rows: of the experiment.
        task: of all of them.
        arms: in the order in which they are told.
        solving: those that are equilibria, a panel each.
    """
    ways = [
        {"task": row["arm"], "arm": name, "seed": row["seed"], "stage": row["stage"]}
        | {"points": [(count, shares[way]) for count, shares in row["restarts"]]}
        for row in measured(rows)
        if "restarts" in row
        for way, name in WAYS.items()
    ]
    lowest = min((share for row in ways for _, share in row["points"]), default=0.0)
    figures = {
        "starts": curves(
            *(ways, solving, list(WAYS.values()), lambda row: row["points"], ("starts", "puzzles solved")),
            logarithmic=("x",),
            limits=(max(lowest - 0.05, 0.0), 1.0),
        ),
        "depth": curves(
            *(rows, [task], arms, lambda row: row.get("depth", [])),
            ("evaluations allowed", "puzzles solved"),
            logarithmic=("x",),
        ),
        "time": curves(
            *(rows, [task], arms, lambda row: [(spent, unsolved) for _, spent, unsolved in row["curve"]]),
            ("CPU seconds of training", "unsolved puzzles"),
        ),
    }
    return {name: Drawing(*_TOLD[name], figure) for name, figure in figures.items() if figure is not None}


_TOLD = {
    "starts": (
        "Solved from so many starts",
        "By how one of their answers is chosen: the smallest residual, the fewest evaluations, the answer that most "
        "starts give, or by someone who knows the right one. The mean over the seeds "
        "in a band from the worst to the best.",
    ),
    "depth": (
        "Solved within so many evaluations",
        "From one start, zeros or random as in training; the tied network is applied so many times.",
    ),
    "time": (
        "Unsolved on the way",
        "Against the time of the training on one thread, from one start at the test's tolerance.",
    ),
}
