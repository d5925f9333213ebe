"""Solves under `torch.func` transforms and forward-mode differentiation."""

from equilibria.functional.levels import in_front, peel, transformed
from equilibria.functional.solve import Result, solve_transformed

__all__ = ["Result", "in_front", "peel", "solve_transformed", "transformed"]
