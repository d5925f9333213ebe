"""Copy memory: ten symbols to be recalled after a long wait, by an equilibrium and by those that went before it."""

from onelayer.experiments.copying.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
