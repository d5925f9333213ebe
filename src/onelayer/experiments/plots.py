"""Pictures that several experiments share."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from onelayer.experiments.experiment import FAILED, Row
from onelayer.experiments.statistics import measured
from onelayer.report.drawing import FIRST, GRID, INK, MUTED, SECOND, THIRD, WIDE, canvas

# One look for each arm, in the order in which an experiment names them; the equilibrium comes first.
LOOKS: tuple[dict[str, Any], ...] = (
    {"color": FIRST, "linestyle": "-"},
    {"color": SECOND, "linestyle": "-"},
    {"color": THIRD, "linestyle": "-"},
    {"color": MUTED, "linestyle": "-"},
    {"color": FIRST, "linestyle": "--"},
    {"color": SECOND, "linestyle": "--"},
    {"color": THIRD, "linestyle": "--"},
    {"color": INK, "linestyle": ":"},
)

Points = Callable[[Row], Sequence[tuple[float, float]]]


def curves(
    rows: Sequence[Row],
    tasks: Sequence[str],
    arms: Sequence[str],
    points: Points,
    labels: tuple[str, str],
    logarithmic: tuple[str, ...] = (),
    limits: tuple[float, float] | None = None,
) -> Figure | None:
    """A panel a task: the mean over the seeds of each arm, in a band from the lowest seed to the highest.

    Args:
        rows: of the experiment.
        tasks, arms: panels and curves, in this order.
        points: `(x, y)` of a row; the mean is taken where the k-th point of all seeds is there.
        labels: of the axes.
        logarithmic: axes that are, of `"x"` and `"y"`.
        limits: of the vertical axis.

    Returns:
        The figure; `None` where there is nothing to draw.
    """
    tasks = [task for task in tasks if any(FAILED not in row for row in measured(rows, task))]
    if not tasks:
        return None
    figure, first = canvas(WIDE)
    first.remove()
    grid = figure.subplots(1, len(tasks), sharey=limits is not None, squeeze=False)[0]
    for axes, task in zip(grid, tasks, strict=True):
        _dress(axes)
        for arm, look in zip(arms, LOOKS, strict=False):
            own = [points(row) for row in measured(rows, task, arm) if FAILED not in row]
            _band(axes, [found for found in own if found], arm, look)
        if "x" in logarithmic:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if "y" in logarithmic:
            axes.set_yscale("log")
        if limits is not None:
            axes.set_ylim(*limits)
        axes.set_title(task, fontsize=9, color=INK, loc="right")
        axes.set_xlabel(labels[0])
    grid[0].set_ylabel(labels[1])
    _legend(figure, grid[0])
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    """Names the arms above all panels, whose widths it must not change."""
    rows = -(-len(axes.get_legend_handles_labels()[1]) // 4)
    layout = figure.get_layout_engine()
    if rows and isinstance(layout, ConstrainedLayoutEngine):
        layout.set(rect=(0, 0, 1, 0.98 - 0.055 * rows))
        legend = axes.legend(
            loc="upper left",
            bbox_to_anchor=(0, 1),
            bbox_transform=figure.transFigure,
            ncols=4,
            handlelength=1.2,
            columnspacing=0.9,
            handletextpad=0.5,
        )
        legend.set_in_layout(False)


def _band(axes: Axes, runs: Sequence[Sequence[tuple[float, float]]], arm: str, look: Mapping[str, Any]) -> None:
    columns = list(zip(*runs, strict=False))
    if not columns:
        return
    x = [statistics.fmean(point[0] for point in column) for column in columns]
    values = [[point[1] for point in column] for column in columns]
    axes.plot(x, [statistics.fmean(column) for column in values], label=arm, linewidth=1.6, **look)
    axes.fill_between(
        x, [min(column) for column in values], [max(column) for column in values], color=look["color"], alpha=0.15, lw=0
    )


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=3, which="both")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9)
