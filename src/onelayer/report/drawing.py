"""What the drawings of all pages share: a canvas, and SVG that takes its colours and fonts from the page around it.

This and the modules of drawings that use it are those of the application that import matplotlib.
"""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Stand-ins that the page's own colours replace, so that one drawing serves light and dark pages.
INK, MUTED, GRID = "#010203", "#020304", "#030405"
FIRST, SECOND, THIRD = "#040506", "#050607", "#060708"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FIRST: "first", SECOND: "second", THIRD: "third"}

WIDE, NARROW = (9.6, 4.0), (4.7, 3.2)  # inches


def canvas(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, in the style of the pages.

    >>> figure, axes = canvas(NARROW)

    Args:
        size: width and height in inches, `WIDE` or `NARROW`.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=3)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure, axes


def logarithmic(axes: Axes, values: list[float]) -> None:
    """Makes the vertical axis logarithmic, over the range of some positive values.

    >>> logarithmic(canvas(NARROW)[1], [1e-8, 1.0])
    """
    low, high = min(values), max(values)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.4, high * 1.4)
    # Over a short range the powers of ten alone leave an axis with one number or none.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def legend_above(axes: Axes) -> None:
    """Names the curves above the frame, where no curve runs; nothing where none has a name.

    >>> legend_above(canvas(NARROW)[1])
    """
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=4, handlelength=1.2, columnspacing=0.9, handletextpad=0.5
        )


def positive(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """What a logarithmic axis can show; a residual of exactly 0 is a solve that had nothing to do.

    >>> positive([1, 2], [0.5, 0.0])
    ([1], [0.5])
    """
    points = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
    return [step for step, _ in points], [value for _, value in points]


def svg(figure: Figure, name: str) -> str:
    """The drawing as an SVG element whose colours are variables of the page.

    >>> svg(canvas(NARROW)[0], "empty")[:4]
    '<svg'

    Args:
        figure: what is drawn.
        name: of the drawing, unique in its page, where several stand.
    """
    for axes in figure.axes:
        legend = axes.get_legend()
        if legend is not None:
            legend.set_frame_on(False)
            for text in legend.get_texts():
                text.set(color=INK, fontsize=8.5)
    drawing = io.StringIO()
    # Text stays text, and the salt makes ids unlike those of the page's other drawings, and the same every time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None})
    drawn = drawing.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", drawn)
    drawn = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", drawn)
    for color, variable in _VARIABLES.items():
        drawn = drawn.replace(color, f"var(--{variable})")
    # Ids are unique within one drawing only, and the page holds several.
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
