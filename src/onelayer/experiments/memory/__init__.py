"""Memory and time of a training step against effective depth, and what a trained equilibrium takes of both."""

from onelayer.experiments.memory.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
