"""Solves under `torch.func` transforms and forward-mode differentiation."""

from equilibria.functional.solve import Result, solve_transformed

__all__ = ["Result", "solve_transformed"]
