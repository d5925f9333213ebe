"""Claim B, measured: whether equilibrium models do as well as explicit ones, at constant memory in depth."""

from typing import Any

from onelayer.experiments import blocks, copying, gradients, language, memory, restarts, tracking
from onelayer.experiments.experiment import Experiment
from onelayer.experiments.running import compare

_ALL = (memory, gradients, tracking, blocks, language, copying, restarts)  # in the order of docs/results.md
EXPERIMENTS: dict[str, Experiment[Any]] = {module.EXPERIMENT.name: module.EXPERIMENT for module in _ALL}

__all__ = ["EXPERIMENTS", "compare"]
