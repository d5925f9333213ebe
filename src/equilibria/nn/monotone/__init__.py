"""Monotone operator equilibrium networks."""

from equilibria.nn.monotone.layer import MonotoneDEQ
from equilibria.nn.monotone.operators import MonotoneConv2d, MonotoneLinear

__all__ = ["MonotoneConv2d", "MonotoneDEQ", "MonotoneLinear"]
