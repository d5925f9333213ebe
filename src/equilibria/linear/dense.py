"""A direct solve, for small systems."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.linear.krylov import Operator
from equilibria.linear.protocol import LinearSolution
from equilibria.norms import residual_size
from equilibria.options import check_integer
from equilibria.status import Agree, Status


@dataclass(frozen=True)
class Dense:
    """Builds the matrix of every sample by one product a column, and solves by LU with pivoting.

    >>> A = torch.tensor([[2.0, 1.0], [-1.0, 3.0]])
    >>> b = torch.tensor([[3.0, 2.0], [0.0, 7.0]])
    >>> eq.Dense().solve(lambda x: x @ A.T, b, rtol=1e-4, level=1e-6, max_steps=2, agree=bool).x
    tensor([[ 1.,  1.],
            [-1.,  2.]])

    A singular system is reported as `BREAKDOWN`, and as no solution. The products are not held to `max_steps`: their
    number is the size of the state, which `max_size` bounds.

    Args:
        max_size: largest size of a sample's state; the matrices take its square in memory for each sample.
    """

    max_size: int = 1024

    def __post_init__(self) -> None:
        check_integer("max_size", self.max_size, 1)

    def solve(
        self, operator: Operator, b: Tensor, rtol: float, level: float, max_steps: int, agree: Agree
    ) -> LinearSolution:
        batch, n = b.shape
        if n > self.max_size:
            raise ValueError(
                f"Dense(max_size={self.max_size}) cannot hold a system of {n} unknowns a sample: use eq.GMRES(), or "
                "raise max_size if the memory is there."
            )
        units = torch.eye(n, dtype=b.dtype, device=b.device)
        columns = [operator(unit.expand(batch, n)) for unit in units]
        matrix = torch.stack(columns, dim=2) if columns else b.new_zeros(batch, 0, 0)
        scale = torch.linalg.vector_norm(b, dim=1)
        finite = torch.isfinite(matrix).all(dim=2).all(dim=1)
        matrix = torch.where(finite[:, None, None], matrix, units)  # LAPACK refuses a whole batch for one NaN
        x, info = torch.linalg.solve_ex(matrix, b[:, :, None])
        sound = finite & (info == 0) & torch.isfinite(x).all(dim=2).all(dim=1)
        x = torch.where(sound[:, None, None], x, 0)
        size = residual_size(b - (matrix @ x)[:, :, 0], x[:, :, 0])
        met = sound & (size <= max(rtol, level) * scale)
        status = torch.where(met, Status.CONVERGED, Status.BREAKDOWN)
        status = torch.where(finite, status, Status.NONFINITE)
        status = torch.where(scale == 0, Status.CONVERGED, status)
        x = torch.where((scale == 0)[:, None], 0, x[:, :, 0])
        error = torch.where(scale == 0, 0, size / torch.where(scale == 0, 1, scale))
        return LinearSolution(x, status, torch.full_like(status, n), error, n)
