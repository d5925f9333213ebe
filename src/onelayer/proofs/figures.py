"""The drawings of the page, in the page's own colours: how dark a cell is survives the printer, its hue need not."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch, Rectangle

from onelayer.proofs.limits import Blocks, Curve, Filling, Film, Reach
from onelayer.proofs.record import Record
from onelayer.report.drawing import (
    FIRST,
    GRID,
    INK,
    SECOND,
    THIRD,
    WIDE,
    canvas,
    legend_above,
    logarithmic,
    positive,
    svg,
)

_SQUARE = (4.7, 4.4)  # inches
_PIXEL = 4  # of an activation, in pixels of the film
_ROUNDING = 1e-16  # the smallest error that a heat map tells from nothing


def draw(record: Record) -> dict[str, str] | None:
    """Every figure of the page.

    >>> draw(Record())
    {}

    Args:
        record: what was measured.

    Returns:
        SVG by name.
    """
    drawings: dict[str, str] = {}
    if record.blocks is not None:
        drawings["blocks"] = _blocks(record.blocks)
    if record.filling is not None:
        drawings["filling"] = _filling(record.filling)
    if record.film is not None:
        drawings["film"] = _film(record.film)
    if record.convergence is not None:
        drawings["convergence"] = _convergence(*record.convergence)
    if record.reach is not None:
        drawings["reach"] = _reach(record.reach)
    return drawings


def _blocks(found: Blocks) -> str:
    """The matrix, entry by entry, with the borders of its blocks."""
    figure, axes = canvas(_SQUARE)
    largest = max((abs(value) for row in found.matrix for value in row), default=0.0) or 1.0
    entries = {
        (i, j): (FIRST if value > 0 else SECOND, abs(value) / largest)
        for i, row in enumerate(found.matrix)
        for j, value in enumerate(row)
        if value != 0
    }
    borders = [0, *accumulate(found.widths)]
    for border in borders:
        axes.axhline(border, color=GRID, linewidth=0.8, zorder=0)
        axes.axvline(border, color=GRID, linewidth=0.8, zorder=0)
    _cells(axes, entries, edge="none")
    middles = [(low + high) / 2 for low, high in pairwise(borders)]
    names = [str(i + 1) for i in range(len(middles))]
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names)
    axes.set(xlabel="from the activations of layer", ylabel="to those of layer", aspect="equal")
    axes.set(xlim=(0, len(found.matrix)), ylim=(len(found.matrix), 0))
    return svg(figure, "blocks")


def _filling(found: Filling) -> str:
    """Errors of the stages, a row for each number of updates."""
    rows, columns = len(found.errors), len(found.stages)
    figure, axes = canvas(_SQUARE)
    shades = {
        (i, j): (FIRST, _shade(error)) for i, row in enumerate(found.errors) for j, error in enumerate(row) if error > 0
    }
    exact = {(i, j): (FIRST, 0.0) for i in range(rows) for j in range(columns) if (i, j) not in shades}
    _cells(axes, shades | exact, edge=GRID)
    axes.set(xlim=(0, columns), ylim=(rows, 0), ylabel="updates of all activations")
    ticks = range(0, rows, max(rows // 8, 1))
    axes.set_yticks([i + 0.5 for i in ticks], [str(i) for i in ticks])
    _number(axes, columns, "activations of layer")
    marks = [Patch(facecolor=to_rgba(FIRST, _shade(e)), edgecolor=GRID, label=label) for e, label in _LEVELS]
    axes.legend(handles=marks, loc="lower left", bbox_to_anchor=(0, 1), ncols=5, handlelength=1, columnspacing=0.9)
    return svg(figure, "filling")


def _film(found: Film) -> str:
    """Pictures of the stages, a row each, after each number of updates, a column each."""
    rows, columns = len(found.stages), len(found.frames)
    size, gap = 8 * _PIXEL, 2  # of a picture in pixels, and between two
    sheet = np.full((rows * (size + gap), columns * (size + gap)), np.nan)
    for j, frame in enumerate(found.frames):
        for i, picture in enumerate(frame):
            pixels = np.array(picture)
            repeated = np.kron(pixels, np.ones((size // len(pixels), size // len(pixels[0]))))
            top, left = i * (size + gap), j * (size + gap)
            sheet[top : top + repeated.shape[0], left : left + repeated.shape[1]] = repeated
    figure, axes = canvas((WIDE[0], 1.0 + WIDE[0] * 0.88 * rows / columns))
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, extent=(0, columns, rows, 0), interpolation="none")
    inner = size / (size + gap)
    frames = [
        Rectangle((j, i), inner, inner) for j, row in enumerate(found.exact) for i, exact in enumerate(row) if exact
    ]
    axes.add_collection(PatchCollection(frames, facecolors="none", edgecolors=SECOND, linewidths=1.6))
    axes.set_yticks([i + 0.5 for i in range(rows)], found.stages)
    axes.set_xticks([j + 0.5 for j in range(columns)], [str(j) for j in range(columns)])
    axes.set(xlabel="updates of all activations", ylabel="stage")
    _plain(axes)
    return svg(figure, "film")


# Errors whose shades a heat map names.
_LEVELS = ((1.0, "error 1 or more"), (1e-8, "1e-8"), (_ROUNDING, "1e-16"), (0.0, "exact"))


def _shade(error: float) -> float:
    """How dark an error is drawn: 1 from 1 on, a tenth at rounding, nothing for none at all."""
    if error <= 0 or math.isnan(error):
        return 0.0
    digits = math.log10(max(min(error, 1.0), _ROUNDING)) / math.log10(_ROUNDING)
    return 1 - 0.9 * digits


def _convergence(apart: list[Curve], together: Curve) -> str:
    """Residuals against all evaluations so far, layer after layer and all at once."""
    figure, axes = canvas(WIDE)
    shown: list[float] = []
    for curve in [*apart, together]:
        evaluations, residuals = positive(curve.evaluations, curve.residuals)
        shown += residuals
        if curve is together:
            axes.plot(evaluations, residuals, color=FIRST, linewidth=2.2, label="all in one")
            continue
        label = "one layer after the other" if curve is apart[0] else None
        axes.plot(evaluations, residuals, color=SECOND, linewidth=1.5, linestyle=(0, (5, 1.5)), label=label)
        ends = (evaluations[-1], residuals[-1])
        axes.annotate(curve.name, ends, xytext=(-8, 2), textcoords="offset points", color=INK, fontsize=8.5, ha="right")
    logarithmic(axes, shown)
    axes.set(xlabel="evaluations so far", ylabel="relative residual")
    axes.set_xlim(left=0)
    legend_above(axes)
    return svg(figure, "convergence")


def _reach(found: Reach) -> str:
    """Shares of the true gradient that truncated gradients give each layer."""
    layers = len(found.shares)
    figure, axes = canvas(_SQUARE)
    _cells(
        axes,
        {(i, j): (THIRD, min(share, 1.0)) for i, row in enumerate(found.shares) for j, share in enumerate(row)},
        edge=GRID,
    )
    axes.set(xlim=(0, layers), ylim=(layers, 0), aspect="equal", ylabel="steps differentiated, k")
    ticks = range(0, layers, max(layers // 6, 1))
    axes.set_yticks([i + 0.5 for i in ticks], [str(i + 1) for i in ticks])
    _number(axes, layers, "gradient of layer")
    return svg(figure, "reach")


def _number(axes: Axes, columns: int, name: str) -> None:
    ticks = range(0, columns, max(columns // 6, 1))
    axes.set_xticks([j + 0.5 for j in ticks], [str(j + 1) for j in ticks])
    axes.set_xlabel(name)


def _cells(axes: Axes, cells: dict[tuple[int, int], tuple[str, float]], edge: str) -> None:
    """A square in row i and column j of a colour, as dark as its share."""
    squares = [Rectangle((j, i), 1, 1) for i, j in cells]
    faces = [to_rgba(color, share) for color, share in cells.values()]
    axes.add_collection(PatchCollection(squares, facecolors=faces, edgecolors=edge, linewidths=0.5))
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
