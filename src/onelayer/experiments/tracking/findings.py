"""What the rows of state tracking say: accuracy beyond the lengths trained on, by position and by evaluations."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from onelayer.experiments.arms import EQUILIBRIUM, ONE_LAYER
from onelayer.experiments.experiment import FAILED, Claim, Drawing, Findings, Row, Table
from onelayer.experiments.learning import cost_table, is_cut_off, score_table
from onelayer.experiments.plots import curves
from onelayer.experiments.statistics import measured, spread
from onelayer.experiments.tracking.setup import TASKS, Settings, arms_of, deep, long_trained, words_of

TRACKS, FAILS = 0.9, 0.6  # accuracies that are asked for
APART = 0.01  # by which the accuracy may change with the start of the solves


def tell(settings: Settings, rows: Sequence[Row]) -> Findings:
    """Accuracy beyond the lengths that were trained on, by position and by evaluations."""
    arms = list(arms_of(settings, TASKS[0]))
    claims = [claim for task in TASKS for claim in _claims(settings, rows, task)]
    own = [row for row in measured(rows, arm=EQUILIBRIUM) if FAILED not in row]
    if own:
        share = statistics.fmean(row["forward"]["at_cap"] for row in own)
        scored = statistics.fmean(row["scored"]["evaluations"]["at_cap"] for row in own)
        told = f"{share:.1%} in training, {scored:.1%} where scored"
        claims.append(Claim("At most 5% of the solves at the cap", told, not is_cut_off(own)))
    if not any(FAILED not in row for row in measured(rows)):
        return Findings(claims=claims)
    drawings = {}
    for name, (label, points) in _PICTURES.items():
        drawn = [EQUILIBRIUM] if name == "evaluations" else arms
        logarithmic = ("x",) if name == "evaluations" else ()
        figure = curves(rows, TASKS, drawn, points, (label, "accuracy"), logarithmic, limits=(0, 1.02))
        if figure is not None:
            drawings[name] = Drawing(
                f"Accuracy against {label}", _CAPTIONS[name].format(beyond=settings.beyond), figure
            )
    tables = [
        _accuracies(settings, rows, arms),
        score_table(rows, arms, EQUILIBRIUM, what=f"error on {settings.beyond}"),
        _evaluations(rows, settings.beyond),
        cost_table(rows, arms),
    ]
    return Findings(tables, claims, drawings)


def _claims(settings: Settings, rows: Sequence[Row], task: str) -> list[Claim]:
    # A training that diverged has tracked nothing.
    found = {
        arm: [1 - row.get("score", 1.0) for row in measured(rows, task, arm)]
        for arm in (EQUILIBRIUM, ONE_LAYER, deep(settings), long_trained(settings))
    }
    claims = []
    for arm, accuracies in found.items():
        if not accuracies:
            continue
        low, high = min(accuracies), max(accuracies)
        mean = f"{statistics.fmean(accuracies):.3f} on average"
        if arm == EQUILIBRIUM:
            asked = f"{task}: {arm} above {TRACKS} on {settings.beyond}, every seed"
            claims.append(Claim(asked, f"{mean}, {low:.3f} at worst", low > TRACKS))
        else:
            asked = f"{task}: {arm} below {FAILS} there, every seed"
            claims.append(Claim(asked, f"{mean}, {high:.3f} at best", high < FAILS))
    pairs = [
        (row["from_elsewhere"], 1 - row["score"]) for row in measured(rows, task, EQUILIBRIUM) if FAILED not in row
    ]
    if pairs:
        apart = max(abs(one - other) for one, other in pairs)
        asked = f"{task}: the same accuracy, within {APART}, from random states as from zeros"
        claims.append(Claim(asked, f"{apart:.4f} apart at most", apart <= APART))
    return claims


def _accuracies(settings: Settings, rows: Sequence[Row], arms: Sequence[str]) -> Table:
    edges = sorted({0, settings.shortest, settings.longest, settings.scored_from, settings.tested})
    parts = list(itertools.pairwise(edges))
    told = []
    for task in TASKS:
        chance = f"{1 / words_of(settings, task).elements:.3f}"
        for arm in arms:
            found = [row["by_position"] for row in measured(rows, task, arm) if FAILED not in row]
            means = [[statistics.fmean(one[i:j]) for one in found] for i, j in parts]
            if found:
                told.append([task, arm, chance, *(spread(values) for values in means)])
    columns = ("task", "arm", "chance", *(f"{i + 1} to {j}" for i, j in parts))
    letters = (
        "all 60 elements" if settings.all_letters else "a cycle of five points and one of three, which generate it"
    )
    note = (
        f"Mean ± sd over the seeds, on {settings.words} words of {settings.tested} letters. Trained on words of "
        f"{settings.shortest} to {settings.longest} with a target at each letter. Words of A5 are made of {letters}; "
        "targets are all 60."
    )
    return Table("Accuracy by position", columns, told, note)


def _evaluations(rows: Sequence[Row], beyond: str) -> Table:
    told = []
    for task in TASKS:
        found = [row["by_evaluations"] for row in measured(rows, task, EQUILIBRIUM) if "by_evaluations" in row]
        for points in zip(*found, strict=False):
            residual = f"{statistics.fmean(point[2] for point in points):.1e}"
            told.append([task, str(points[0][0]), spread([point[1] for point in points]), residual])
    columns = ("task", "evaluations allowed", f"accuracy on {beyond}", "relative residual")
    note = (
        "On a quarter of the words. A solve that is stopped returns the state of its smallest residual, which may be "
        "an early one. The residual is the median over the words, and of that the mean over the seeds."
    )
    return Table("Accuracy by allowed evaluations", columns, told, note)


_STRIDE = 4  # letters whose accuracy is one point of a picture


def _against_position(row: Row) -> list[tuple[float, float]]:
    found = row["by_position"]
    starts = range(0, len(found), _STRIDE)
    return [(k + (_STRIDE + 1) / 2, statistics.fmean(found[k : k + _STRIDE])) for k in starts]


def _against_evaluations(row: Row) -> list[tuple[float, float]]:
    return [(point[0], point[1]) for point in row.get("by_evaluations", [])]


def _against_time(row: Row) -> list[tuple[float, float]]:
    return [(point[1], 1 - point[2]) for point in row["curve"]]


_PICTURES = {
    "position": ("position", _against_position),
    "evaluations": ("allowed evaluations", _against_evaluations),
    "time": ("CPU seconds of training", _against_time),
}
_CAPTIONS = {
    "position": "The mean over the seeds in a band from the worst seed to the best, four letters a point. Chance is "
    "1/2 for parity and 1/60 for A5.",
    "evaluations": "Of the equilibrium, on {beyond}, by the state of the smallest residual within so many evaluations.",
    "time": "On {beyond} while training, by the time of the training on one thread.",
}
