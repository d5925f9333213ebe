"""Spectra of the Jacobian at a point."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equilibria.linear import Basis
from equilibria.norms import rms_norm
from equilibria.options import check_callable, check_integer, check_tolerance
from equilibria.problem import FixedPoint
from equilibria.status import ConvergenceWarning
from equilibria.tree import Layout


def spectral_radius(
    f: Callable[..., Any], z: Any, *args: Any, rtol: float = 1e-3, max_steps: int = 100, batch_dims: int = 1
) -> Tensor:
    """Largest absolute eigenvalue of df/dz at `z`, for each sample; right for complex pairs.

    >>> A = torch.tensor([[0.0, -0.9], [0.9, 0.0]])  # a rotation: eigenvalues +-0.9i
    >>> eq.diagnostics.spectral_radius(lambda z: z @ A.T, torch.zeros(1, 2))
    tensor([0.9000])

    Plain iteration converges near an equilibrium where it is below 1. Arnoldi's method on the transposed Jacobian, from
    a fixed start, one product a step. On Jacobians far from normal (nilpotent ones: embedded networks) any method in
    floating point reports about eps ** (1 / index) where the truth is 0.

    Args:
        f: as for `eq.fixed_point`.
        z: the point, often the equilibrium; a state of any structure.
        args: handed to `f`.
        rtol: relative accuracy asked of the Ritz value.
        max_steps: products allowed; memory grows with them. Exact where they reach the size of the state.
        batch_dims: as for `eq.fixed_point`.

    Returns:
        Float tensor per sample, of the shape of the batch dimensions; NaN for samples whose Jacobian is not finite.

    Warns:
        ConvergenceWarning: for samples that miss `rtol` within `max_steps`.

    Source: Arnoldi (1951); Saad (2011), Numerical methods for large eigenvalue problems, section 6.2.
    """
    check_callable("f", f)
    check_tolerance("rtol", rtol, optional=False)
    check_integer("max_steps", max_steps, 1)
    check_integer("batch_dims", batch_dims, 0)
    layout = Layout.of(z, batch_dims)
    jacobian = FixedPoint(f, args, layout, rms_norm, None, None, has_aux=False).linearize(layout.pack(z))
    batch, n = jacobian.image.shape
    if n == 0 or batch == 0:
        return jacobian.image.new_zeros(layout.batch_shape)
    # A generator of its own: the global one stays untouched, and every sample starts alike in whatever batch.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=generator, dtype=torch.float64).to(jacobian.image)
    basis = Basis((start / start.norm()).expand(batch, n).clone())
    limit = min(max_steps, n)
    hessenberg = torch.zeros(batch, limit + 1, limit, dtype=torch.float64, device=start.device)
    radius = torch.full((batch,), torch.nan, dtype=torch.float64, device=start.device)
    missed = torch.ones(batch, dtype=torch.bool, device=start.device)
    broken = torch.zeros_like(missed)
    for k in range(limit):
        image = jacobian.transposed_product(basis[k])
        broken = broken | ~torch.isfinite(image).all(dim=1)
        column, norm = basis.extend(torch.where(broken[:, None], 0, image))
        hessenberg[:, : k + 1, k] = column.double()
        hessenberg[:, k + 1, k] = norm.double()
        if (k + 1) % 5 and k + 1 < limit:
            continue
        values, vectors = torch.linalg.eig(hessenberg[:, : k + 1, : k + 1])
        largest = values.abs().argmax(dim=1, keepdim=True)
        estimate = values.abs().gather(1, largest)[:, 0]
        # The residual of the leading Ritz pair: how far it is from an eigenpair of the Jacobian itself.
        last = vectors[:, -1].abs().gather(1, largest)[:, 0] * norm.double()
        radius = torch.where(missed, estimate, radius)
        missed = missed & (last > rtol * estimate) & (k + 1 < n)
        if not bool((missed & ~broken).any()):
            break
    missed = missed & ~broken
    if bool(missed.any()):
        warnings.warn(
            f"spectral_radius: {int(missed.sum())} of {batch} samples missed rtol={rtol} within {limit} products; "
            "raise max_steps or loosen rtol.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return torch.where(broken, torch.nan, radius).to(layout.dtype).reshape(layout.batch_shape)
