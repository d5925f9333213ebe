"""The picture of a diagnosis.

Import it yourself, `import equilibria.diagnosis.picture`: the library does without matplotlib, this module does not.
"""

import math

from equilibria.diagnosis.doctor import Diagnosis
from equilibria.diagnostics.plots import (
    COLOURS,
    GREY,
    MARKERS,
    plot_gradient_quality,
    plot_path_independence,
    plot_spectrum,
)
from equilibria.diagnostics.traces import Trace

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("equilibria.diagnosis.picture needs matplotlib: pip install 'equilibria[viz]'.") from error


def plot_diagnosis(diagnosis: Diagnosis) -> Figure:
    """Four panels: how each solver does, the spectrum, what several starts lead to, and the gradient's error.

    >>> figure = plot_diagnosis(eq.doctor(Cell(8), torch.randn(4, 8)))
    >>> figure.axes[0].get_xlabel()
    'evaluations of f'

    Args:
        diagnosis: from `eq.doctor`.

    Returns:
        The matplotlib Figure; panels of what could not be measured say so.
    """
    figure, panels = plt.subplots(2, 2, figsize=(10.5, 8), layout="constrained")
    solvers, spectrum, paths, gradient = panels.flat
    measured = diagnosis.measured
    if measured is None:
        for panel, title in zip(panels.flat, ("solvers", "spectrum", "starts", "gradient"), strict=True):
            _empty(panel, f"{title}: not measured")
    else:
        _solvers(solvers, measured.traces)
        if measured.spectrum is None or measured.paths is None:
            for panel in (spectrum, paths):
                _empty(panel, "no equilibrium was found")
        else:
            plot_spectrum(measured.spectrum, spectrum)
            plot_path_independence(measured.paths, paths)
        if measured.gradient is None:
            _empty(gradient, "no parameters to differentiate for")
        else:
            plot_gradient_quality(measured.gradient, gradient)
    causes = ", ".join(cause.name.lower().replace("_", " ") for cause in diagnosis.causes)
    figure.suptitle("healthy" + (f"; {causes}" if causes else "") if diagnosis.healthy else f"to change: {causes}")
    return figure


def _solvers(panel: Axes, traces: dict[str, Trace]) -> None:
    for k, (name, one) in enumerate(traces.items()):
        residual = one.residual.reshape(len(one.evaluations), -1).nan_to_num(0).amax(dim=1).tolist()
        points = [(x, y) for x, y in zip(one.evaluations.tolist(), residual, strict=True) if 0 < y < math.inf]
        if points:
            style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "markersize": 4}
            panel.plot(*zip(*points, strict=True), label=name, linewidth=1.2, markevery=0.1, **style)
    panel.set(xlabel="evaluations of f", ylabel="relative residual, worst sample", yscale="log")
    panel.legend(fontsize=8)


def _empty(panel: Axes, words: str) -> None:
    panel.text(0.5, 0.5, words, ha="center", va="center", color=GREY, transform=panel.transAxes)
    panel.set_axis_off()
