"""The plot of test-time compute against quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from onelayer.errors import UsageError
from onelayer.files import check_target, written
from onelayer.quality import Quality
from onelayer.report.drawing import NARROW, canvas
from onelayer.report.record import CAP_LIMIT

# A file of its own has no page to take its colours from.
_BLUE, _GREY, _PALE = "#2f6fb3", "#6b7280", "#e5e7eb"


def check_plot(path: Path) -> None:
    """Makes sure that a plot can be written there, before the work that it is to show.

    >>> check_plot(Path("quality.png"))

    Raises:
        UsageError: the ending names no format, there is no such folder, or nobody may write in it.
    """
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise UsageError(f"{path} has no ending that names a format for plots: take .png, .svg or .pdf.")
    check_target(path)


def plot_compute(found: Sequence[Quality], path: Path) -> None:
    """Draws bits per byte against the evaluations of the block that solves took.

    >>> rows = [Quality(n, float(min(n, 9)), 0.5 / n, float(n < 9), 2 + 3 / n, 5.0, 100, 100) for n in (1, 2, 4, 8, 16)]
    >>> plot_compute(rows, Path("quality.png"))

    Args:
        found: measurements of one equilibrium model on one text; a hollow point is a network of fixed depth, where
            more than 5% of the solves hit the cap.
        path: of the drawing; its ending names the format.

    Raises:
        UsageError: as `check_plot`.
    """
    check_plot(path)
    points = sorted(
        (row.evaluations, row.bits_per_byte, row.share_at_cap or 0.0) for row in found if row.evaluations is not None
    )
    figure, axes = canvas(NARROW)
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=_BLUE, linewidth=1.6, zorder=2)
    for hollow, label in ((False, "equilibrium"), (True, "cut off: a K-step network")):
        chosen = [(x, y) for x, y, share in points if (share > CAP_LIMIT) == hollow]
        if chosen:
            face = "white" if hollow else _BLUE
            axes.plot(*zip(*chosen, strict=True), "o", color=_BLUE, markerfacecolor=face, markersize=5, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="evaluations of the block in a solve, mean", ylabel="bits per byte")
    axes.tick_params(colors=_GREY)
    axes.grid(axis="y", color=_PALE, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8.5)
    with written(path, "make room on the disk"):
        figure.savefig(path, dpi=200)
