"""Plots of what the diagnostics measure.

Import it yourself, `import equilibria.diagnostics.plots`: the library does without matplotlib, this module does not.
"""

import math
from collections.abc import Mapping

import torch

from equilibria.diagnostics.gradients import GradientQuality
from equilibria.diagnostics.paths import PathIndependence
from equilibria.diagnostics.spectral import Spectrum
from equilibria.diagnostics.traces import Trace
from equilibria.status import Status

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle
    from matplotlib.ticker import MaxNLocator, NullFormatter
except ImportError as error:
    raise ImportError("equilibria.diagnostics.plots needs matplotlib: pip install 'equilibria[viz]'.") from error

# Okabe and Ito (2008): told apart by readers of every colour vision. Markers and lines differ as well.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS, MARKERS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY), "osD^vP"
GREY = "#6B6B6B"

# Equilibria further apart than this are drawn as different ones: well above what tolerances leave between two answers.
DISTINCT = 0.01


def plot_trace(trace: Trace, ax: Axes | None = None) -> Axes:
    """Residual of each sample against evaluations of `f`, on a logarithmic scale.

    >>> history = eq.diagnostics.trace(torch.cos, torch.zeros(3, 1))
    >>> plot_trace(history).get_xlabel()
    'evaluations of f'

    Args:
        trace: from `eq.diagnostics.trace`.
        ax: where to draw; None makes a new figure.

    Returns:
        The matplotlib Axes drawn on. Residuals of 0 are left out, as a logarithm has no place for them.
    """
    ax = _axes(ax)
    evaluations = trace.evaluations.tolist()
    curves = trace.residual.reshape(len(evaluations), -1).T.tolist()
    converged = trace.solution.converged.flatten().tolist()
    # Many samples are a cloud: thinner, and lighter where few of them run.
    width, opacity, dot = (1.6, 0.9, 5) if len(curves) <= 8 else (0.9, max(0.2, 12 / len(curves)), 3)
    for curve, good in zip(curves, converged, strict=True):
        points = [(x, y) for x, y in zip(evaluations, curve, strict=True) if math.isfinite(y) and y > 0]
        if not points:
            continue
        style, colour = ("-", BLUE) if good else ("--", VERMILLION)
        ax.plot(*zip(*points, strict=True), style, color=colour, linewidth=width, alpha=opacity)
        ax.plot(*points[-1], marker="o" if good else "X", color=colour, markersize=dot, zorder=3, clip_on=False)
    handles = []
    if any(converged):
        handles.append(Line2D([], [], color=BLUE, marker="o", markersize=5, label="converged"))
    if not all(converged):
        handles.append(Line2D([], [], color=VERMILLION, linestyle="--", marker="X", markersize=5, label="failed"))
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="evaluations of f", ylabel="relative residual")
    return _tidy(ax, handles)


def plot_spectrum(spectrum: Spectrum, ax: Axes | None = None, rtol: float = 1e-3) -> Axes:
    """Ritz values in the complex plane, with the unit circle inside which plain iteration converges.

    >>> A = torch.diag(torch.tensor([0.9, -0.5, 0.1]))
    >>> plot_spectrum(eq.diagnostics.spectrum(lambda z: z @ A, torch.zeros(1, 3))).get_xlabel()
    'real part'

    Args:
        spectrum: from `eq.diagnostics.spectrum`; all samples are drawn together.
        ax: where to draw; None makes a new figure.
        rtol: Ritz values whose residual is larger than this, relative to the largest of their sample, are drawn hollow:
            they have not converged to eigenvalues.

    Returns:
        The matplotlib Axes drawn on.
    """
    ax = _axes(ax, (5.0, 4.8))
    known = ~torch.isnan(spectrum.residuals)
    sizes = torch.where(known, spectrum.values.abs(), 0)
    radius = sizes.amax(dim=-1, keepdim=True) if sizes.shape[-1] else sizes
    settled = known & (spectrum.residuals <= rtol * radius)
    ax.add_patch(Circle((0, 0), 1, fill=False, edgecolor=GREY, linewidth=1.2, linestyle="--"))
    ax.axhline(0, color=GREY, linewidth=0.5, alpha=0.5, zorder=0)
    ax.axvline(0, color=GREY, linewidth=0.5, alpha=0.5, zorder=0)
    for chosen, fill in ((known & ~settled, "none"), (settled, BLUE)):
        points = spectrum.values[chosen]
        edge = GREY if fill == "none" else "none"
        ax.scatter(
            points.real.tolist(), points.imag.tolist(), s=26, facecolors=fill, edgecolors=edge, linewidths=0.7, zorder=3
        )
    reach = 1.12 * max(1.0, float(sizes.max()) if sizes.numel() else 1.0)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="real part", ylabel="imaginary part")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    handles = [Line2D([], [], color=GREY, linestyle="--", linewidth=1.2, label="unit circle")]
    if bool(settled.any()):
        handles.append(_dot(BLUE, "o", "eigenvalue"))
    if bool((known & ~settled).any()):
        handles.append(_dot(GREY, "o", "not converged", hollow=True))
    return _tidy(ax, handles)


def plot_path_independence(paths: PathIndependence, ax: Axes | None = None) -> Axes:
    """Relative distance of every pair of equilibria, sample by sample.

    >>> paths = eq.diagnostics.path_independence(torch.cos, torch.zeros(3, 1))
    >>> plot_path_independence(paths).get_xlabel()
    'sample'

    Args:
        paths: from `eq.diagnostics.path_independence`.
        ax: where to draw; None makes a new figure.

    Returns:
        The matplotlib Axes drawn on. Pairs that agree to the last bit lie on the lower edge; samples with starts that
        did not converge have a cross above, with the number of those starts.
    """
    ax = _axes(ax)
    floor = torch.finfo(paths.distances.dtype).eps / 10
    starts = paths.status.shape[-1]
    pairs = paths.distances.reshape(-1, starts, starts)
    failed = (paths.status != Status.CONVERGED).reshape(-1, starts).sum(dim=1).tolist()
    first, second = torch.triu_indices(starts, starts, offset=1)
    same, other = [], []
    for sample, distances in enumerate(pairs[:, first, second].tolist()):
        for k, distance in enumerate(distances):
            if math.isfinite(distance):
                # Side by side, so that equal distances do not hide each other.
                place = sample + 0.5 * ((k + 0.5) / len(distances) - 0.5), max(distance, floor)
                (other if distance > DISTINCT else same).append(place)
    for points, colour, marker in ((same, BLUE, "o"), (other, VERMILLION, "D")):
        if points:
            ax.scatter(*zip(*points, strict=True), s=18, color=colour, marker=marker, alpha=0.6, linewidths=0, zorder=3)
    # Crosses stand in a strip above every possible distance, which is at most 2.
    for sample, count in enumerate(failed):
        if count:
            ax.plot(sample, 20, "x", color=GREY, markersize=6)
            ax.annotate(str(count), (sample, 20), (5, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_yscale("log")
    ax.set(ylim=(floor / 3, 60), xlim=(-0.5, len(pairs) - 0.5))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set(xlabel="sample", ylabel="relative distance of two equilibria")
    handles = []
    if same:
        handles.append(_dot(BLUE, "o", f"agree to {DISTINCT:g}"))
    if other:
        handles.append(_dot(VERMILLION, "D", "differ"))
    if any(failed):
        handles.append(_dot(GREY, "x", "starts that did not converge"))
    return _tidy(ax, handles)


def plot_gradient_quality(quality: GradientQuality | Mapping[str, GradientQuality], ax: Axes | None = None) -> Axes:
    """Relative error of each tensor's gradient, with its cosine beside it, for one adjoint or several.

    >>> a = torch.tensor([[0.5]], requires_grad=True)
    >>> quality = eq.diagnostics.gradient_quality(
    ...     lambda z: a * torch.cos(z), torch.zeros(1, 1), adjoint=eq.OneStep(), parameters={"a": a})
    >>> plot_gradient_quality({"one step": quality}).get_xlabel()
    'relative error of the gradient'

    Args:
        quality: from `eq.diagnostics.gradient_quality`; several by name, all of the same tensors.
        ax: where to draw; None makes a new figure.

    Returns:
        The matplotlib Axes drawn on. Errors of 0 lie on the left edge; those that are NaN are left out.
    """
    several = {"": quality} if isinstance(quality, GradientQuality) else dict(quality)
    names = next(iter(several.values())).names
    if any(other.names != names for other in several.values()):
        raise ValueError("These gradient qualities are of different tensors: draw each on axes of its own.")
    ax = _axes(ax, (6.4, 1.4 + 0.24 * len(names) * max(2, len(several))))
    floor = torch.finfo(torch.float64).eps
    handles = []
    for k, (label, one) in enumerate(several.items()):
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        offset = (k - (len(several) - 1) / 2) * 0.8 / len(several)
        for row, (error, cosine) in enumerate(zip(one.relative_error.tolist(), one.cosine.tolist(), strict=True)):
            if math.isfinite(error):
                place = (max(error, floor), row + offset)
                ax.plot(*place, marker, color=colour, markersize=6, zorder=3, clip_on=False)
                text = "" if math.isnan(cosine) else f"cos {cosine:.3f}"
                note = ax.annotate(text, place, (6, 0), textcoords="offset points", va="center", fontsize=7.5)
                note.set(color=GREY, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})
        handles.append(_dot(colour, marker, label))
    ax.set_xscale("log")
    errors = torch.cat([one.relative_error for one in several.values()])
    errors = errors[torch.isfinite(errors)].clamp(min=floor)
    if len(errors):
        ax.set_xlim(min(0.02, float(errors.min()) / 4), max(4.0, float(errors.max()) * 10))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    ax.axvline(1, color=GREY, linewidth=0.9, linestyle=":")
    ax.set_xlabel("relative error of the gradient")
    return _tidy(ax, handles if len(several) > 1 or "" not in several else [])


def _dot(colour: str, marker: str, label: str, hollow: bool = False) -> Line2D:
    face = "none" if hollow else colour
    return Line2D([], [], linestyle="", marker=marker, markersize=5, color=colour, markerfacecolor=face, label=label)


def _axes(ax: Axes | None, size: tuple[float, float] = (6.4, 4.0)) -> Axes:
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _tidy(ax: Axes, handles: list[Line2D]) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
    ax.set_axisbelow(True)
    if handles:
        # Above the axes, where it hides no data.
        ax.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3,
            frameon=False,
            fontsize=9,
            borderaxespad=0.2,
            handletextpad=0.4,
            columnspacing=1.4,
        )
    return ax
