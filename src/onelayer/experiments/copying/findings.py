"""Copy memory: what the rows say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from onelayer.experiments.arms import EQUILIBRIUM
from onelayer.experiments.copying.setup import GRU, LSTM, SYMBOLS, Settings, arms, memoryless, task
from onelayer.experiments.experiment import FAILED, Claim, Drawing, Findings, Row, Table
from onelayer.experiments.learning import cost_table, is_cut_off, score_table
from onelayer.experiments.plots import curves
from onelayer.experiments.statistics import measured

TENTH, HALF = 0.1, 0.5  # of the memoryless loss, which the equilibrium is to be below and the recurrent ones above
RECALL = 0.99


def tell(settings: Settings, rows: Sequence[Row]) -> Findings:
    """Losses, recall and cost, and whether the equilibrium remembers where recurrent networks do not."""
    if not measured(rows):
        return Findings()
    names = arms(settings)
    apart = score_table(rows, names, EQUILIBRIUM, "decades", "log10 of the share of the memoryless loss")
    tables = [_losses(settings, rows), apart, cost_table(rows, names)]
    return Findings(tables, _claims(settings, rows), _drawings(settings, rows))


def _claims(settings: Settings, rows: Sequence[Row]) -> list[Claim]:
    claims = []
    for delay in settings.delays:
        name, least = task(delay), memoryless(delay)
        own = measured(rows, name, EQUILIBRIUM)
        if own:
            losses, recalls = ([row.get(what, math.nan) for row in own] for what in ("score", "recall"))
            asked = f"{name}: the equilibrium's loss is below a tenth of the memoryless loss with every seed"
            claims.append(Claim(asked, f"{_span(losses)} of {least:.3g}", all(x < TENTH * least for x in losses)))
            asked = f"{name}: the equilibrium recalls more than {RECALL:.0%} of the symbols with every seed"
            claims.append(Claim(asked, f"{min(recalls):.2%} at least", all(x > RECALL for x in recalls)))
        recurrent = {arm: [row.get("score", math.nan) for row in measured(rows, name, arm)] for arm in (LSTM, GRU)}
        if all(recurrent.values()):
            asked = f"{name}: LSTM and GRU stay above half of the memoryless loss with every seed"
            told = ", ".join(f"{arm} {_span(found)}" for arm, found in recurrent.items())
            # One that diverged has not remembered either.
            stays = not any(x <= HALF * least for found in recurrent.values() for x in found)
            claims.append(Claim(asked, f"{told} of {least:.3g}", stays))
    solved = [row for row in measured(rows, arm=EQUILIBRIUM) if FAILED not in row]
    if solved:
        share = max(statistics.fmean(_at_cap(row, where) for row in solved) for where in ("trained", "scored"))
        claims.append(Claim("At most 5% of the solves at the cap", f"{share:.1%}", not is_cut_off(solved)))
    return claims


def _at_cap(row: Row, where: Literal["trained", "scored"]) -> float:
    return row["forward"]["at_cap"] if where == "trained" else row["scored"]["evaluations"]["at_cap"]


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def _losses(settings: Settings, rows: Sequence[Row]) -> Table:
    told = []
    for name in dict.fromkeys(row["task"] for row in measured(rows)):
        for arm in arms(settings):
            own = [row for row in measured(rows, name, arm) if FAILED not in row]
            if own:
                losses, recalls = [row["score"] for row in own], [row["recall"] for row in own]
                share = statistics.fmean(losses) / memoryless(own[0]["delay"])
                found = (f"{statistics.fmean(losses):.2g}", _span(losses), f"{share:.2%}")
                told.append(
                    [name, arm, str(len(own)), *found, f"{statistics.fmean(recalls):.2%}", f"{min(recalls):.2%}"]
                )
    columns = ("task", "arm", "seeds", "loss, nats", "lowest to highest", "of the memoryless", "recalled", "at least")
    longer = f" They had {settings.more} times as many updates as the others." if settings.more > 1 else ""
    note = (
        "Mean cross entropy over all positions of sequences held back, and the share of the ten symbols that are named "
        f"right, of which {1 / SYMBOLS:.1%} are by chance. T is the wait between the symbols and the answer. The LSTM, "
        f"the GRU and the TCN are as large as the equilibrium.{longer}"
    )
    return Table("Loss and recall", columns, told, note)


def _drawings(settings: Settings, rows: Sequence[Row]) -> dict[str, Drawing]:
    names, tasks = arms(settings), [task(delay) for delay in settings.delays]
    drawings = {}
    for name, column, label in (("updates", 0, "updates"), ("time", 1, "CPU seconds of training")):
        figure = curves(
            rows,
            tasks,
            names,
            lambda row, column=column: [(point[column], point[2]) for point in row["curve"]],
            (label, "loss, nats"),
            ("y",),
        )
        if figure is not None:
            there = [delay for delay in settings.delays if any(FAILED not in r for r in measured(rows, task(delay)))]
            for axes, delay in zip(figure.axes, there, strict=True):
                axes.axhline(memoryless(delay), linewidth=0.8, color="#888888", zorder=0)
            drawings[name] = Drawing(f"Loss against {label}", _CAPTIONS[name], figure)
    along = _along(rows)
    figure = curves(along, [_ALL], names, lambda row: row["losses"], ("T", "share of the memoryless loss"), ("x", "y"))
    if figure is not None:
        drawings["delay"] = Drawing("Loss against the wait", _CAPTIONS["delay"], figure)
    return drawings


_ALL = "after training"


def _along(rows: Sequence[Row]) -> list[Row]:
    """A row for each arm and seed, with what was left of the memoryless loss at each delay."""
    found: dict[tuple[str, int], Row] = {}
    for row in sorted((row for row in measured(rows) if FAILED not in row), key=lambda row: row["delay"]):
        own = {"task": _ALL, "arm": row["arm"], "seed": row["seed"], "stage": "measure", "losses": []}
        losses = found.setdefault((row["arm"], row["seed"]), own)["losses"]
        losses.append((row["delay"], row["score"] / memoryless(row["delay"])))
    return list(found.values())


_CAPTIONS = {
    "updates": "On sequences held back, on the way: the mean over the seeds in a band from the best to the worst. The "
    "grey line is the memoryless loss, that of one who knows when symbols are asked for and remembers none.",
    "time": "The same against the time of the training on one thread.",
    "delay": "What is left of the memoryless loss at the end of the training, at each wait T; 1 remembers nothing.",
}
