"""Newton's method."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.linear import GMRES, LinearSolver
from equilibria.options import check_fraction, check_integer, check_part
from equilibria.problem import Evaluation, Problem
from equilibria.status import Agree

# A step is accepted when it lowers the residual by this part of what the linear model promises (Armijo's condition).
SUFFICIENT = 1e-4
# The line search gives up below this step length: no descent is left at the precision of f.
SHORTEST = 1e-8


class Memory(NamedTuple):
    """The point that each sample searches from, its direction, and the length on trial."""

    base: Tensor  # (batch, n)
    size: Tensor  # (batch,), norm of the residual there
    direction: Tensor  # (batch, n)
    length: Tensor  # (batch,)


@dataclass(frozen=True)
class Newton:
    """Newton's method with a line search for each sample, matrix-free.

    >>> eq.fixed_point(torch.cos, torch.zeros(1, 1, dtype=torch.float64), solver=eq.Newton()).steps
    tensor([9])

    The direction d solves J d = -g by products with the Jacobian alone; then the length is halved until the residual
    falls. A direction takes one differentiable evaluation of f besides its products, which is counted among the
    evaluations. Where the Jacobian is singular a step of plain iteration stands in.

    Args:
        linear_solver: of the direction; `eq.GMRES()`, or `eq.Dense()` for small systems.
        linear_rtol: relative residual to which a direction is solved for; the error falls by about it at each step.
        max_products: products with the Jacobian allowed for one direction.

    Sources: Dembo, Eisenstat and Steihaug (1982); Knoll and Keyes (2004).
    """

    linear_solver: LinearSolver = GMRES()  # noqa: RUF009 (a frozen dataclass)
    linear_rtol: float = 1e-4
    max_products: int = 100

    def __post_init__(self) -> None:
        check_part("linear_solver", self.linear_solver, ("solve",), "eq.GMRES()")
        check_fraction("linear_rtol", self.linear_rtol)
        check_integer("max_products", self.max_products, 1)

    def init(self, problem: Problem, z: Tensor, previous: Memory | None = None) -> None:
        return None

    def step(self, problem: Problem, evaluation: Evaluation, memory: Memory | None) -> tuple[Tensor, Memory]:
        if torch.is_grad_enabled():
            raise ValueError(
                "Newton cannot be unrolled, since its directions come from solves of their own: differentiate its "
                "solution by eq.Implicit(), or unroll eq.Broyden()."
            )
        z, residual = evaluation.z, evaluation.residual
        size = torch.linalg.vector_norm(residual, dim=1)
        if memory is None:
            accepted = torch.ones_like(size, dtype=torch.bool)
            memory = Memory(z, size, torch.zeros_like(z), torch.ones_like(size))
        else:
            enough = size <= (1 - SUFFICIENT * memory.length) * memory.size  # False where size is NaN
            accepted = enough | ((memory.length < SHORTEST) & torch.isfinite(size))
        base = torch.where(accepted[:, None], z, memory.base)
        # Also where every sample only halves: else the steps of one would tell whether another has moved.
        fresh = self._direction(problem, base, torch.where(accepted[:, None], residual, 0), evaluation.agree)
        direction = torch.where(accepted[:, None], fresh, memory.direction)
        length = torch.where(accepted, 1, memory.length / 2)
        memory = Memory(base, torch.where(accepted, size, memory.size), direction, length)
        return base + length[:, None] * direction, memory

    def _direction(self, problem: Problem, z: Tensor, residual: Tensor, agree: Agree) -> Tensor:
        jacobian = problem.linearize(z)
        problem.evaluations += 1
        level = min(problem.level, 0.05 * self.linear_rtol)  # a direction may be as rough as its products
        found = self.linear_solver.solve(
            lambda d: d - jacobian.product(d), residual, self.linear_rtol, level, self.max_products, agree
        )
        usable = torch.isfinite(found.x).all(dim=1) & (found.residual < 1)
        return torch.where(usable[:, None], found.x, residual)
