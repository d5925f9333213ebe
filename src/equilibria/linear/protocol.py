"""What a linear solver is."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from equilibria.linear.krylov import Operator
from equilibria.norms import residual_size
from equilibria.status import Agree, Status


@dataclass(frozen=True)
class LinearSolution:
    """The solution of A x = b for each sample.

    Attributes:
        x: (batch, n).
        status, steps, residual: per sample, as in `equilibria.Solution`; the residual is relative to b, the steps are
            products with A.
        products: calls of the operator for the whole batch.
    """

    x: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    products: int


@runtime_checkable
class LinearSolver(Protocol):
    """Solves A x = b per sample, given products with A alone."""

    def solve(
        self, operator: Operator, b: Tensor, rtol: float, level: float, max_steps: int, agree: Agree
    ) -> LinearSolution:
        """Start from x = b and stop a sample where |A x - b| <= rtol |b|.

        Args:
            operator: x -> A x, on (batch, n), sample by sample.
            b: (batch, n), finite; samples of zeros are solved by zeros.
            rtol: relative tolerance.
            level: relative residual that the rounding of the operator alone explains.
            max_steps: products allowed.
            agree: makes ranks that share collectives stop together.
        """
        ...


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, (batch,)."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]


def finish(
    operator: Operator, b: Tensor, x: Tensor, rtol: float, level: float, steps: Tensor, products: int, otherwise: Tensor
) -> LinearSolution:
    """Measure the residual of what is returned by one more product: a recurrence for it drifts, and hides a breakdown.

    Args:
        operator, b, rtol, level: as for `LinearSolver.solve`.
        x: (batch, n), the solution found.
        steps: products of each sample so far; `products` those of the batch.
        otherwise: the status of each sample if it has not converged.
    """
    scale = torch.linalg.vector_norm(b, dim=1)
    x = torch.where((scale == 0)[:, None], 0, x)
    size = torch.where(scale == 0, 0, residual_size(b - operator(x), x))
    error = size / torch.where(scale == 0, 1, scale)
    status = torch.where((otherwise == Status.MAX_STEPS) & (error <= level), Status.STALLED, otherwise)
    status = torch.where(torch.isfinite(error), status, Status.NONFINITE)
    status = torch.where(size <= rtol * scale, Status.CONVERGED, status)
    return LinearSolution(x, status, steps + 1, error, products + 1)
