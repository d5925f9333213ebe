"""Measurements on equilibria; `equilibria.diagnostics.plots`, which needs matplotlib, draws them."""

from equilibria.diagnostics.gradients import GradientQuality, gradient_quality
from equilibria.diagnostics.normality import non_normality
from equilibria.diagnostics.paths import PathIndependence, path_independence
from equilibria.diagnostics.singular import operator_norm
from equilibria.diagnostics.spectral import Spectrum, spectral_radius, spectrum
from equilibria.diagnostics.traces import Trace, trace

__all__ = [
    "GradientQuality",
    "PathIndependence",
    "Spectrum",
    "Trace",
    "gradient_quality",
    "non_normality",
    "operator_norm",
    "path_independence",
    "spectral_radius",
    "spectrum",
    "trace",
]
