"""The gradients of all adjoints beside the exact one, at set tolerances and spectral radii."""

from onelayer.experiments.gradients.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
