"""Spectra of the Jacobian at a point."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equilibria.diagnostics.arnoldi import Arnoldi, leading_eigenvalue
from equilibria.diagnostics.jacobian import jacobian_at, warn_missed
from equilibria.options import check_integer, check_positive


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
        rtol: relative size of the perturbation of df/dz of which the answer is an exact eigenvalue; its relative error
            is the same where df/dz is normal, and times the condition number of the eigenvalue elsewhere.
        max_steps: products allowed; memory grows with them. Exact where they reach the size of the state.
        batch_dims: as for `eq.fixed_point`.

    Returns:
        Float tensor per sample, of the shape of the batch dimensions; NaN for samples whose Jacobian is not finite.

    Warns:
        ConvergenceWarning: for samples that miss `rtol` within `max_steps`.

    Source: Arnoldi (1951); Saad (2011), Numerical methods for large eigenvalue problems, section 6.2.
    """
    check_positive("rtol", rtol)
    check_integer("max_steps", max_steps, 1)
    layout, jacobian = jacobian_at(f, z, args, batch_dims)
    radius, missed = leading_eigenvalue(jacobian, rtol, max_steps)
    warn_missed("spectral_radius", missed, rtol, max_steps)
    return radius.to(layout.dtype).reshape(layout.batch_shape)


@dataclass(frozen=True)
class Spectrum:
    """Ritz values of a Jacobian, for each sample.

    Attributes:
        values: complex128, (*batch, steps), by falling absolute value; NaN past the end of those that a sample has.
        residuals: float64, (*batch, steps), the distance |J^T v - value v| of each from an eigenpair, v a unit vector.
    """

    values: Tensor
    residuals: Tensor


def spectrum(f: Callable[..., Any], z: Any, *args: Any, max_steps: int = 50, batch_dims: int = 1) -> Spectrum:
    """The outer eigenvalues of df/dz at `z`, for each sample, each with its distance from an eigenpair.

    >>> A = torch.diag(torch.tensor([0.9, -0.5, 0.1]))
    >>> eq.diagnostics.spectrum(lambda z: z @ A, torch.zeros(1, 3)).values.real
    tensor([[ 0.9000, -0.5000,  0.1000]], dtype=torch.float64)

    Ritz values of Arnoldi's method, as in `spectral_radius`: the outer ones converge first, and only those whose
    residual is small are eigenvalues. All eigenvalues, each once whatever its multiplicity, where `max_steps` reaches
    the size of the state.

    Args:
        f, z, args: as for `spectral_radius`.
        max_steps: products to take; memory grows with them.
        batch_dims: as for `eq.fixed_point`.

    Returns:
        `Spectrum`; all NaN for samples whose Jacobian is not finite.

    Source: Saad (2011), Numerical methods for large eigenvalue problems, section 6.2.
    """
    check_integer("max_steps", max_steps, 1)
    layout, jacobian = jacobian_at(f, z, args, batch_dims)
    batch, n = jacobian.image.shape
    limit = min(max_steps, n)
    values = torch.full((batch, limit), torch.nan, dtype=torch.complex128, device=layout.device)
    residuals = torch.full((batch, limit), torch.nan, dtype=torch.float64, device=layout.device)
    if batch and n:
        arnoldi = Arnoldi(jacobian, limit)
        for _ in range(limit):
            arnoldi.step()
        # Each sample by the steps of its own: past the end of its basis the projection is zeros, not eigenvalues.
        for size in arnoldi.sizes.unique().tolist():
            mine = (arnoldi.sizes == size) & ~arnoldi.broken
            found, distances = arnoldi.ritz(size)
            order = found.abs().argsort(dim=1, descending=True)
            values[mine, :size] = found.gather(1, order)[mine]
            residuals[mine, :size] = distances.gather(1, order)[mine]
    shape = (*layout.batch_shape, limit)
    return Spectrum(values.reshape(shape), residuals.reshape(shape))
