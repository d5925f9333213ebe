"""State tracking: words whose state a recurrent network can carry along, and no network of a fixed depth."""

from onelayer.experiments.tracking.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
