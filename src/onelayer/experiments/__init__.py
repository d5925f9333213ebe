"""Claim B, measured: whether equilibrium models do as well as explicit ones, at constant memory in depth."""

from typing import Any

from onelayer.experiments import blocks, language, tracking
from onelayer.experiments.experiment import Experiment
from onelayer.experiments.running import compare

EXPERIMENTS: dict[str, Experiment[Any]] = {
    module.EXPERIMENT.name: module.EXPERIMENT for module in (blocks, language, tracking)
}

__all__ = ["EXPERIMENTS", "compare"]
