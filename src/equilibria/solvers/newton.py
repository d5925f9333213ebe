"""Newton's method."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.linear import GMRES, LinearSolver
from equilibria.options import check_integer, check_part
from equilibria.problem import Evaluation, Problem

# A step is accepted when it lowers the residual by this part of what the linear model promises (Armijo's condition).
SUFFICIENT = 1e-4
# The line search gives up below this step length: no descent is left at the precision of f.
SHORTEST = 1e-8


class Memory(NamedTuple):
    """The point that each sample searches from, its direction, and the step length on trial; (batch, n) and (batch,)."""

    base: Tensor | None
    size: Tensor | None
    direction: Tensor | None
    length: Tensor | None


@dataclass(frozen=True)
class Newton:
    """Newton's method with a line search for each sample, matrix-free.

    >>> eq.fixed_point(torch.cos, torch.zeros(1, 1, dtype=torch.float64), solver=eq.Newton()).steps
    tensor([6])

    The direction d solves J d = -g, by products with the Jacobian alone, to an accuracy that grows with convergence
    (Eisenstat and Walker's second choice); then the length is halved until the residual falls. Each direction takes one
    differentiable evaluation of f besides the products, which is counted among the evaluations.

    Args:
        linear_solver: of the direction; `eq.GMRES()`, or `eq.Dense()` for small systems.
        max_products: products with the Jacobian allowed for one direction.

    Sources: Dembo, Eisenstat and Steihaug (1982); Eisenstat and Walker (1996); Knoll and Keyes (2004).
    """

    linear_solver: LinearSolver = GMRES()
    max_products: int = 100

    def __post_init__(self) -> None:
        check_part("linear_solver", self.linear_solver, ("solve",), "eq.GMRES()")
        check_integer("max_products", self.max_products, 1)

    def init(self, problem: Problem, z: Tensor, previous: Memory | None = None) -> Memory:
        return Memory(None, None, None, None)

    def step(self, problem: Problem, evaluation: Evaluation, memory: Memory) -> tuple[Tensor, Memory]:
        z, residual = evaluation.z, evaluation.residual
        size = torch.linalg.vector_norm(residual, dim=1)
        if memory.base is None or memory.size is None or memory.direction is None or memory.length is None:
            accepted = torch.ones_like(size, dtype=torch.bool)
            base, direction, length = z, torch.zeros_like(z), torch.ones_like(size)
            before = size
        else:
            before = memory.size
            enough = size <= (1 - SUFFICIENT * memory.length) * before  # False where size is NaN
            accepted = enough | (memory.length < SHORTEST)
            base = torch.where(accepted[:, None], z, memory.base)
            direction, length = memory.direction, torch.where(accepted, 1, memory.length / 2)
        if bool(accepted.any()):
            fresh = self._direction(problem, z, torch.where(accepted[:, None], residual, 0), size, before)
            direction = torch.where(accepted[:, None], fresh, direction)
        size = torch.where(accepted, size, before)
        return base + length[:, None] * direction, Memory(base, size, direction, length)

    def _direction(self, problem: Problem, z: Tensor, residual: Tensor, size: Tensor, before: Tensor) -> Tensor:
        jacobian = problem.linearize(z)
        problem.evaluations += 1
        # One accuracy for the batch would couple its samples: scale each system instead, so that the same tolerance
        # means each sample's own.
        forcing = torch.where(size < before, 0.9 * (size / before) ** 2, 0.1).clamp(1e-6, 0.1)
        found = self.linear_solver.solve(
            lambda d: d - jacobian.product(d), residual, 1e-6, problem.level, self.max_products, bool
        )
        usable = torch.isfinite(found.x).all(dim=1) & (found.residual < 1)
        # Where the system has no solution the residual itself is the step of plain iteration.
        return torch.where(usable[:, None], found.x, residual)
