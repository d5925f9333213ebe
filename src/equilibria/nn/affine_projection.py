"""The projection onto the solutions of a linear system."""

import math

import torch
from torch import Tensor, nn

from equilibria.nn.held import check_broadcast, check_input, hold, shown, working_dtype
from equilibria.precision import precise


class AffineProjection(nn.Module):
    """The nearest solution of A z = b.

    >>> eq.nn.AffineProjection(torch.ones(1, 2), torch.tensor([3.0]))(torch.tensor([[1.0, 0.0]]))
    tensor([[2.0000, 1.0000]])

    Args:
        A: a tensor or `nn.Parameter` of shape (m, n) or (..., m, n); its rows may depend on each other. One
            pseudo-inverse is made at each call.
        b: a tensor or `nn.Parameter` of shape (m,) or (..., m), in the range of A. Gradient flows into both, that into
            an A of lower rank for changes that keep the rank.

    Returns:
        From (..., n) the same shape and dtype; computed in float32 at least. A row that is not finite, or whose A and b
        have come to contradict each other since construction, becomes NaN, with zero gradient.

    Raises:
        TypeError, ValueError: A or b, or an input, makes no sense, or A z = b has no solution.

    Source: Golub and Pereyra (1973), for the derivative of a pseudo-inverse.
    """

    A: Tensor
    b: Tensor

    def __init__(self, A: Tensor, b: Tensor) -> None:
        super().__init__()
        for name, value in (("A", A), ("b", b)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a floating tensor, not {value!r:.60}.")
            hold(self, name, value)
        if A.ndim < 2 or b.ndim < 1 or b.shape[-1] != A.shape[-2] or A.shape[-1] == 0:
            raise ValueError(
                f"A and b must be of shapes (..., m, n) and (..., m), not {tuple(A.shape)} and {tuple(b.shape)}."
            )
        dtype = working_dtype(A, b)
        with torch.no_grad(), precise(A):
            solvable = _solvable(A.to(dtype), b.to(A.device, dtype))[2]
        if not bool(solvable.all()):
            raise ValueError(
                "A z = b has no solution: take away the rows that contradict others, and entries not finite."
            )

    def forward(self, x: Tensor) -> Tensor:
        """`x`, of shape (..., n), projected."""
        check_input(x)
        if x.shape[-1] != self.A.shape[-1]:
            raise ValueError(f"The last dimension must be {self.A.shape[-1]}, as A has columns, not {x.shape[-1]}.")
        check_broadcast("A", self.A[..., 0, :] if self.A.shape[-2] else self.A.sum(-2), x.shape)
        check_broadcast("b", self.b.sum(-1), x.shape[:-1])
        dtype = working_dtype(x, self.A, self.b)
        with precise(x):
            wide, b = x.to(dtype), self.b.to(dtype)
            finite = wide.isfinite().all(-1, keepdim=True)
            A, inverse, solvable = _solvable(self.A.to(dtype), b)
            ok = finite & solvable
            z, b = torch.where(ok, wide, 0), torch.where(solvable, b, 0)
            for _ in range(2):  # the second pass takes away the rounding of the first
                gap = torch.einsum("...mn,...n->...m", A, z) - b
                z = z - torch.einsum("...nm,...m->...n", inverse, gap)
            return torch.where(ok, z, math.nan).to(x.dtype)

    def extra_repr(self) -> str:
        return f"A={shown(self.A)}, b={shown(self.b)}"


def _solvable(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A where it is finite, its pseudo-inverse, and for each b, with a last dimension of 1, whether A z = b has one."""
    finite = A.isfinite().all(-1).all(-1)
    A = torch.where(finite[..., None, None], A, 0)
    inverse = torch.linalg.pinv(A)
    plain, b = A.detach(), b.detach()
    z = torch.einsum("...nm,...m->...n", inverse.detach(), b)
    gap = torch.linalg.vector_norm(torch.einsum("...mn,...n->...m", plain, z) - b, dim=-1)
    size = torch.linalg.matrix_norm(plain) * torch.linalg.vector_norm(z, dim=-1) + torch.linalg.vector_norm(b, dim=-1)
    return A, inverse, (finite & (gap <= torch.finfo(A.dtype).eps ** 0.5 * size))[..., None]
