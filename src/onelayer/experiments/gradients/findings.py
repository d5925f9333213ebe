"""What the rows of `onelayer compare gradients` say: tables, claims and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equilibria as eq
from onelayer.experiments.experiment import FAILED, Claim, Drawing, Row, Table
from onelayer.experiments.plots import curves
from onelayer.experiments.statistics import measured, rank_correlation

IMPLICITS = {f"Implicit to {rtol:g}": rtol for rtol in (1e-1, 3e-2, 1e-2, 1e-4, 1e-8)}
APPROXIMATE: dict[str, eq.Adjoint] = {
    "OneStep": eq.OneStep(),
    **{f"Neumann, {terms} terms": eq.Neumann(terms) for terms in (2, 4, 8, 16)},
    **{f"Phantom, {steps} steps of 0.5": eq.Phantom(steps, 0.5) for steps in (4, 8)},
}
UNROLLED = "Unrolled"
EXACTEST = "Implicit to 1e-08"
DRAWN = ("Implicit to 0.01", "OneStep", "Neumann, 4 terms", "Neumann, 16 terms", EXACTEST)
DRAWN += ("Phantom, 4 steps of 0.5", "Phantom, 8 steps of 0.5", UNROLLED)

CONSTANT = 1.0  # of the law: relative error of the adjoint state <= CONSTANT * condition number of I - J * tolerance
FALLING = -0.5  # rank correlation that counts as falling
AGREES = 1e-3
TYPICAL = 0.9  # the radius at which tolerances are told, or the nearest to it


class _Point(NamedTuple):
    """What one adjoint gave on one cell at one tolerance."""

    row: Row
    found: Row

    def number(self, group: str, what: str) -> float:
        return self.found[group][what]


def _points(rows: Sequence[Row], adjoint: str | None = None, tolerance: float | None = None) -> list[_Point]:
    return [
        _Point(row, found)
        for row in measured(rows)
        if FAILED not in row
        for found in row["found"]
        if adjoint in (None, found["adjoint"]) and tolerance in (None, found["tolerance"])
    ]


def _all(rows: Sequence[Row], name: str) -> list[float]:
    return sorted({row[name] for row in measured(rows) if FAILED not in row})


def _tasks(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in measured(rows) if FAILED not in row))


def _tolerances(rows: Sequence[Row]) -> list[float]:
    return sorted({point.found["tolerance"] for point in _points(rows)}, reverse=True)


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Whether errors of `Implicit` obey their law, approximations worsen as the radius rises, and `Unrolled` agrees."""
    if not _points(rows):
        return []
    tightest = _tolerances(rows)[-1]
    found = []
    for name, rtol in IMPLICITS.items():
        points = _points(rows, name, tightest)
        ratios = [point.number("adjoint state", "error") / (point.row["condition"] * rtol) for point in points]
        if ratios:
            asked = f"{name}: relative error of the adjoint state at most {CONSTANT:g} x cond(I - J) x {rtol:g}"
            told = f"{max(ratios):.2f} x at most, {statistics.median(ratios):.2f} x in the median of {len(ratios)}"
            found.append(Claim(asked, told, max(ratios) <= CONSTANT))
    errors = {name: _worst(rows, name, tightest) for name in IMPLICITS}
    asked = "The worst error of Implicit falls with its tolerance at every step"
    told = ", ".join(f"{errors[name]:.1e}" for name in IMPLICITS)
    found.append(
        Claim(asked, told, all(a > b for a, b in zip(errors.values(), list(errors.values())[1:], strict=False)))
    )
    ranks = {}
    for task in _tasks(rows):
        for name in APPROXIMATE:
            own = [point for point in _points(rows, name, tightest) if point.row["task"] == task]
            values = [point.number("parameters", "cosine") for point in own]
            if len(set(values)) > 1:
                ranks[task, name] = rank_correlation([point.row["radius"] for point in own], values)
    if ranks:
        (task, name), most = max(ranks.items(), key=lambda item: item[1])
        asked = f"Cosines of all approximations fall as the radius rises, on every cell (rank correlation <= {FALLING})"
        told = f"{min(ranks.values()):.2f} to {most:.2f}, the last for {name} on {task}"
        found.append(Claim(asked, told, most <= FALLING))
    worst = _worst(rows, UNROLLED, tightest)
    asked = f"Unrolled agrees with the exact gradient within {AGREES:g} where the forward tolerance is {tightest:g}"
    looser = [f"{_worst(rows, UNROLLED, t):.1e} at {t:g}" for t in _tolerances(rows)[-3:-1]]
    found.append(Claim(asked, f"{worst:.1e} at most ({', '.join(looser)})", worst <= AGREES))
    return found


def _worst(rows: Sequence[Row], adjoint: str, tolerance: float) -> float:
    errors = [point.number("parameters", "error") for point in _points(rows, adjoint, tolerance)]
    return max(errors, default=math.nan)


def tables(rows: Sequence[Row]) -> list[Table]:
    """The cells, cosines by radius, errors by tolerance, and costs."""
    if not _points(rows):
        return []
    radii, tolerances, names = _all(rows, "wanted"), _tolerances(rows), [*IMPLICITS, *APPROXIMATE, UNROLLED]
    typical = min(radii, key=lambda radius: abs(radius - TYPICAL))
    found = [_cells(rows)]
    for task in _tasks(rows):
        own = [row for row in rows if row["task"] == task]
        told = []
        for name in names:
            line = [name]
            for radius in radii:
                here = [p for p in _points(own, name, tolerances[-1]) if p.row["wanted"] == radius]
                groups = ("parameters", "inputs")
                line.append(" / ".join(_mean([p.number(group, "cosine") for p in here]) for group in groups))
            told.append(line)
        note = (
            f"Forward to {tolerances[-1]:g}, so that what is missing is the adjoint's own; means over the seeds, for "
            "parameters / inputs."
        )
        columns = ("adjoint", *(f"radius {radius:g}" for radius in radii))
        found.append(Table(f"Cosine to the exact gradient: {task}", columns, told, note))
        there = [row for row in own if row.get("wanted") == typical]
        told = [[name, *(_middle(_points(there, name, tolerance)) for tolerance in tolerances)] for name in names]
        note = f"At radius {typical:g}: median over the seeds, the worst in brackets; for parameters."
        columns = ("adjoint", *(f"forward {tolerance:g}" for tolerance in tolerances))
        found.append(Table(f"Relative error against forward tolerance: {task}", columns, told, note))
    return [*found, _costs(rows, names, typical, min(tolerances, key=lambda t: abs(math.log10(t) + 4)))]


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f}" if values else ""


def _middle(points: Sequence[_Point]) -> str:
    errors = [point.number("parameters", "error") for point in points]
    return f"{statistics.median(errors):.1e} ({max(errors):.1e})" if errors else ""


def _cells(rows: Sequence[Row]) -> Table:
    told = []
    for task in _tasks(rows):
        for radius in _all(rows, "wanted"):
            own = [row for row in measured(rows, task) if FAILED not in row and row["wanted"] == radius]
            if own:
                measures = [sorted(row[name] for row in own) for name in ("radius", "norm", "condition")]
                forms = (".4f", ".2f", ".3g")
                told.append(
                    [f"{task}, radius {radius:g}", str(len(own))]
                    + [
                        f"{values[0]:{form}} to {values[-1]:{form}}"
                        for values, form in zip(measures, forms, strict=True)
                    ]
                )
    there = [row for row in measured(rows) if FAILED not in row]
    notes = [
        f"{row['task']}, {row['arm']}, seed {row['seed']}: {row[FAILED]}" for row in measured(rows) if FAILED in row
    ]
    redrawn = sum(row["redrawn"] > 0 for row in there)
    if redrawn:
        notes.append(f"{redrawn} of {len(there)} are of weights drawn anew, since the first had no such radius.")
    columns = ("cell", "seeds", "measured radius", "2-norm of J", "cond(I - J)")
    return Table("The cells at their equilibria", columns, told, " ".join(notes))


def _costs(rows: Sequence[Row], names: Sequence[str], radius: float, tolerance: float) -> Table:
    told = []
    for name in names:
        line = [name]
        for task in _tasks(rows):
            own = [
                p.found for p in _points(rows, name, tolerance) if (p.row["task"], p.row["wanted"]) == (task, radius)
            ]
            counts = ("evaluations", "differentiable", "products")
            line.append(" + ".join(f"{statistics.fmean(found[what] for found in own):.1f}" for what in counts if own))
        told.append(line)
    note = (
        "Means of evaluations forward + differentiable evaluations + products with the transposed Jacobian. Unrolled "
        "makes its evaluations with graphs, and pulls the gradient back through each. Neumann and Implicit evaluate "
        "once to attach the gradient and once in backward."
    )
    return Table(
        f"What it takes at radius {radius:g}, forward to {tolerance:g}", ("adjoint", *_tasks(rows)), told, note
    )


def drawings(rows: Sequence[Row]) -> dict[str, Drawing]:
    """Cosine against radius and tolerance, and error against tolerance."""
    if not _points(rows):
        return {}
    tightest, radii = _tolerances(rows)[-1], _all(rows, "wanted")
    typical = min(radii, key=lambda radius: abs(radius - TYPICAL))

    def by_radius(points: Sequence[_Point]) -> list[tuple[float, float]]:
        own = [p for p in points if p.found["tolerance"] == tightest]
        return sorted((p.row["wanted"], p.number("parameters", "cosine")) for p in own)

    def by_tolerance(what: str) -> Callable[[Sequence[_Point]], list[tuple[float, float]]]:
        def pick(points: Sequence[_Point]) -> list[tuple[float, float]]:
            own = [p for p in points if p.row["wanted"] == typical]
            return sorted((-math.log10(p.found["tolerance"]), p.number("parameters", what)) for p in own)

        return pick

    views = {
        "radius": (
            *("Cosine against spectral radius", by_radius, ("spectral radius", "cosine"), ()),
            f"Gradients of the parameters, forward to {tightest:g}; the mean over the seeds in a band from the lowest "
            "to the highest. A truncated gradient turns away from the exact one as the block contracts less.",
        ),
        "tolerance": (
            *(
                "Cosine against forward tolerance",
                by_tolerance("cosine"),
                ("digits of the forward solve", "cosine"),
                (),
            ),
            f"At radius {typical:g}. Two or three digits forward are all that most approximations can use.",
        ),
        "error": (
            "Relative error against forward tolerance",
            by_tolerance("error"),
            ("digits of the forward solve", "relative error"),
            ("y",),
            f"At radius {typical:g}. An implicit gradient falls with the forward error until its own tolerance is "
            "reached; one that is unrolled falls later, and with leaps.",
        ),
    }
    found = {}
    for name, (title, pick, labels, logarithmic, caption) in views.items():
        flat = [
            {"task": task, "arm": adjoint, "seed": seed, "stage": "measure", "points": pick(points)}
            for (task, adjoint, seed), points in _grouped(rows).items()
        ]
        figure = curves(flat, _tasks(rows), DRAWN, lambda row: row["points"], labels, logarithmic)
        if figure is not None:
            found[name] = Drawing(title, caption, figure)
    return found


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str, int], list[_Point]]:
    found: dict[tuple[str, str, int], list[_Point]] = {}
    for point in _points(rows):
        found.setdefault((point.row["task"], point.found["adjoint"], point.row["seed"]), []).append(point)
    return found
