"""The largest singular value of the Jacobian at a point."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equilibria.diagnostics.jacobian import LOOK, fixed_start, jacobian_at, warn_missed
from equilibria.linear import Basis
from equilibria.options import check_integer, check_positive
from equilibria.problem import Linearization


def operator_norm(
    f: Callable[..., Any], z: Any, *args: Any, rtol: float = 1e-3, max_steps: int = 100, batch_dims: int = 1
) -> Tensor:
    """Largest singular value of df/dz at `z`, for each sample: how much one step can stretch an error.

    >>> A = torch.tensor([[0.5, 3.0], [0.0, 0.5]])  # both eigenvalues 0.5
    >>> eq.diagnostics.operator_norm(lambda z: z @ A.T, torch.zeros(1, 2))
    tensor([3.0811])

    `f` contracts near `z`, in the Euclidean norm, where it is below 1. The bidiagonalisation of Golub, Kahan and
    Lanczos from a fixed start, all vectors kept orthogonal, one product with J and one with its transpose a step.

    Args:
        f, z, args: as for `eq.diagnostics.spectral_radius`.
        rtol: relative accuracy asked of the Ritz value.
        max_steps: pairs of products allowed; memory grows with them. Exact where they reach the size of the state.
        batch_dims: as for `eq.fixed_point`.

    Returns:
        Float tensor per sample, of the shape of the batch dimensions; NaN for samples whose Jacobian is not finite.

    Warns:
        ConvergenceWarning: for samples that miss `rtol` within `max_steps`.

    Source: Golub and Kahan (1965); Golub and Van Loan (2013), Matrix computations, section 10.4.
    """
    check_positive("rtol", rtol)
    check_integer("max_steps", max_steps, 1)
    layout, jacobian = jacobian_at(f, z, args, batch_dims)
    sigma, missed = leading_singular_value(jacobian, rtol, max_steps)
    warn_missed("operator_norm", missed, rtol, max_steps)
    return sigma.to(layout.dtype).reshape(layout.batch_shape)


def leading_singular_value(jacobian: Linearization, rtol: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """It for each sample, float64, NaN where the Jacobian is not finite; and which samples missed."""
    image = jacobian.image
    batch, n = image.shape
    missed = torch.ones(batch, dtype=torch.bool, device=image.device)
    broken = torch.zeros_like(missed)
    sigma = torch.zeros_like(missed, dtype=torch.float64)
    if n == 0 or batch == 0:
        return sigma, broken
    limit = min(max_steps, n)
    right, left = Basis(fixed_start(image)), None
    # J times the right basis is the left basis times this; upper triangular, and bidiagonal but for rounding.
    projected = image.new_zeros(batch, limit, limit, dtype=torch.float64)
    for k in range(limit):
        product = jacobian.product(right[k])
        broken = broken | ~torch.isfinite(product).all(dim=1)
        product = torch.where(broken[:, None], 0, product)
        if left is None:
            alpha = torch.linalg.vector_norm(product, dim=1)
            left = Basis(torch.where(alpha[:, None] > 0, product / alpha[:, None], 0))
        else:
            column, alpha = left.extend(product)
            projected[:, :k, k] = column.double()
        projected[:, k, k] = alpha.double()
        transposed = jacobian.transposed_product(left[k])
        broken = broken | ~torch.isfinite(transposed).all(dim=1)
        _, beta = right.extend(torch.where(broken[:, None], 0, transposed))
        if (k + 1) % LOOK and k + 1 < limit:
            continue
        vectors, values, _ = torch.linalg.svd(projected[:, : k + 1, : k + 1])
        # How far the leading triplet is from one of the Jacobian itself: all that is left is along the next vector.
        distance = vectors[:, -1, 0].abs() * beta.double()
        sigma = torch.where(missed, values[:, 0], sigma)
        missed = missed & (distance > rtol * values[:, 0]) & (k + 1 < n)
        if not bool((missed & ~broken).any()):
            break
    return torch.where(broken, torch.nan, sigma), missed & ~broken
