"""The plots of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from onelayer.report.drawing import (
    FIRST,
    INK,
    MUTED,
    NARROW,
    SECOND,
    THIRD,
    WIDE,
    canvas,
    legend_above,
    logarithmic,
    positive,
    svg,
)
from onelayer.report.record import Record, by_allowed_evaluations, series

_POINTS = 1200  # more than a curve shows at this size


def draw(record: Record) -> dict[str, str] | None:
    """Every figure that the run has the numbers for.

    >>> draw(Record("run", {}, [{"step": 1, "peak_memory_bytes": 2**30}], [], {}, [])).keys()
    dict_keys(['memory'])

    Args:
        record: what the run wrote down.

    Returns:
        SVG by name, to be placed in a page that defines the colours as CSS variables.
    """
    drawings = {
        "loss": _loss(record),
        "residual": _residual(record),
        "evaluations": _evaluations_in_training(record),
        "histogram": _histogram(record),
        "allowed": _allowed_evaluations(record),
        "convergence": _convergence(record),
        "memory": _memory(record),
    }
    return {name: drawing for name, drawing in drawings.items() if drawing is not None}


def _loss(record: Record) -> str | None:
    """Bits per byte of training and validation against the byte models of order 0, 1 and 2."""
    steps, bits = series(record.train, "bits_per_byte")
    validation_steps, validation_bits = series(record.validation, "bits_per_byte")
    if not bits and not validation_bits:
        return None
    figure, axes = canvas(WIDE)
    if bits:
        axes.plot(*_thin(steps, bits), color=FIRST, alpha=0.25, linewidth=0.8)
        axes.plot(*_thin(steps, _smooth(bits)), color=FIRST, linewidth=1.8, label="training, running mean")
    if validation_bits:
        axes.plot(validation_steps, validation_bits, "o", color=SECOND, markersize=4.5, label="validation")
    bars = {f"order {order}": record.number("ngrams", order) for order in ("0", "1", "2")}
    bars = {name: value for name, value in bars.items() if value is not None}
    shown = [*_smooth(bits)[len(bits) // 20 :], *validation_bits[len(validation_bits) // 20 :], *bars.values()]
    low, high = min(shown), max(shown)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    _name_lines(axes, bars)
    axes.set(xlabel="training step", ylabel="bits per byte")
    legend_above(axes)
    return svg(figure, "loss")


def _residual(record: Record) -> str | None:
    """Relative residual of the forward and backward solves against the training step."""
    figure, axes = canvas(NARROW)
    shown: list[float] = []
    for key, color, name in (("residual", FIRST, "forward"), ("backward_residual", THIRD, "backward")):
        steps, values = positive(*series(record.train, key))
        if values:
            logs = _smooth([math.log(value) for value in values])
            axes.plot(*_thin(steps, values), color=color, alpha=0.2, linewidth=0.7)
            axes.plot(*_thin(steps, [math.exp(value) for value in logs]), color=color, linewidth=1.6, label=name)
        shown += values
    steps, values = positive(*series(record.validation, "residual"))
    if values:
        axes.plot(steps, values, "o", color=SECOND, markersize=3.5, label="validation")
    shown += values
    if not shown:
        return None
    logarithmic(axes, shown + _tolerance(axes, record))
    axes.set(xlabel="training step", ylabel="relative residual")
    legend_above(axes)
    return svg(figure, "residual")


def _tolerance(axes: Axes, record: Record) -> list[float]:
    """Draws the tolerance of the forward solve, where the run names one."""
    tolerance = record.setting("model", "rtol")
    if tolerance is None or tolerance <= 0:
        return []
    axes.axhline(tolerance, color=MUTED, linewidth=1, linestyle=":", label="tolerance")
    return [tolerance]


def _evaluations_in_training(record: Record) -> str | None:
    """Mean evaluations of the block in the forward and backward solves against the training step."""
    figure, axes = canvas(NARROW)
    drawn = False
    for key, color, name in (("evaluations_forward", FIRST, "forward"), ("evaluations_backward", THIRD, "backward")):
        steps, values = series(record.train, key)
        if any(values):
            drawn = True
            axes.plot(*_thin(steps, values), color=color, alpha=0.2, linewidth=0.7)
            axes.plot(*_thin(steps, _smooth(values)), color=color, linewidth=1.6, label=name)
    if not drawn:
        return None
    axes.set_ylim(bottom=0)
    axes.set(xlabel="training step", ylabel="evaluations in a solve")
    legend_above(axes)
    return svg(figure, "evaluations")


def _histogram(record: Record) -> str | None:
    """How many solves of the evaluation took how many evaluations of the block."""
    solves = record.histogram()
    if not solves:
        return None
    figure, axes = canvas(NARROW)
    total = sum(solves.values())
    axes.bar(list(solves), [100 * count / total for count in solves.values()], width=0.85, color=FIRST)
    mean = record.number("evaluations", "mean")
    if mean is not None:
        axes.axvline(mean, color=SECOND, linewidth=1.4, label=f"mean {mean:.1f}")
    cap = record.setting("model", "eval_max_steps")
    # The cap is drawn where it belongs to the picture: a cap far to the right would squeeze the bars.
    if cap is not None and cap <= 1.6 * max(solves):
        axes.axvline(cap, color=MUTED, linewidth=1, linestyle=":", label=f"cap {cap:.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="evaluations in a solve", ylabel="% of the solves")
    legend_above(axes)
    return svg(figure, "histogram")


def _allowed_evaluations(record: Record) -> str | None:
    """Bits per byte on validation when a solve is allowed so many evaluations and no more."""
    steps, bits = by_allowed_evaluations(record, "bits_per_byte")
    if not bits:
        return None
    figure, axes = canvas(NARROW)
    axes.plot(steps, bits, "o-", color=FIRST, markersize=4, linewidth=1.6, label="cut off there")
    converged = record.number("bits_per_byte")
    if converged is not None:
        axes.axhline(converged, color=SECOND, linewidth=1.4, linestyle="--", label=f"converged: {converged:.2f}")
    _doubling(axes, steps)
    axes.set(xlabel="evaluations allowed", ylabel="bits per byte")
    legend_above(axes)
    return svg(figure, "allowed")


def _convergence(record: Record) -> str | None:
    """Relative residual on validation when a solve is allowed so many evaluations and no more."""
    steps, residuals = positive(*by_allowed_evaluations(record, "residual"))
    if not residuals:
        return None
    figure, axes = canvas(NARROW)
    axes.plot(steps, residuals, "o-", color=FIRST, markersize=4, linewidth=1.6, label="cut off there")
    _doubling(axes, steps)
    logarithmic(axes, residuals + _tolerance(axes, record))
    axes.set(xlabel="evaluations allowed", ylabel="relative residual")
    legend_above(axes)
    return svg(figure, "convergence")


def _memory(record: Record) -> str | None:
    """Peak memory against the training step."""
    steps, peaks = series(record.train, "peak_memory_bytes")
    if not any(peaks):
        return None
    figure, axes = canvas(NARROW)
    axes.plot(*_thin(steps, [peak / 2**20 for peak in peaks]), color=FIRST, linewidth=1.6)
    axes.set_ylim(0, 1.25 * max(peaks) / 2**20)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set(xlabel="training step", ylabel="peak memory, MiB")
    return svg(figure, "memory")


def _doubling(axes: Axes, steps: list[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [f"{step:.0f}" for step in steps])
    axes.xaxis.set_minor_locator(NullLocator())


def _name_lines(axes: Axes, lines: dict[str, float]) -> None:
    """Horizontal lines named at their right end, the names pushed apart where lines lie close."""
    low, high = axes.get_ylim()
    gap = 0.05 * (high - low)
    at = -math.inf
    for name, value in sorted(lines.items(), key=lambda line: line[1]):
        axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        at = max(value, at + gap)
        axes.annotate(
            f"{name}: {value:.2f}",
            (1, at),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=8.5,
            annotation_clip=False,
        )


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over about a fortieth of the values, centred so that it does not lag behind a steep start."""
    half = len(values) // 80
    sums = [0.0, *accumulate(values)]
    ends = [(max(i - half, 0), min(i + half + 1, len(values))) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def _thin(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Means of neighbours, where a curve has more points than can be seen."""
    size = -(-len(values) // _POINTS)
    if size <= 1:
        return steps, values
    starts = range(0, len(values), size)
    pieces = [(steps[i : i + size], values[i : i + size]) for i in starts]
    return [sum(s) / len(s) for s, _ in pieces], [sum(v) / len(v) for _, v in pieces]
