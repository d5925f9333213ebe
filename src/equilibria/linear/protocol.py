"""What a linear solver is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from equilibria.linear.krylov import Operator


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
        self, operator: Operator, b: Tensor, rtol: float, level: float, max_steps: int, agree: Callable[[bool], bool]
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
