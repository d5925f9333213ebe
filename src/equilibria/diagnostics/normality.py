"""How far the Jacobian at a point is from normal."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equilibria.diagnostics.arnoldi import leading_eigenvalue
from equilibria.diagnostics.jacobian import jacobian_at, warn_missed
from equilibria.diagnostics.singular import leading_singular_value
from equilibria.options import check_integer, check_positive


def non_normality(
    f: Callable[..., Any], z: Any, *args: Any, rtol: float = 1e-3, max_steps: int = 100, batch_dims: int = 1
) -> Tensor:
    """1 - radius / norm of df/dz at `z`, for each sample: 0 for normal Jacobians, 1 for nilpotent ones.

    >>> A = torch.tensor([[0.5, 3.0], [0.0, 0.5]])
    >>> eq.diagnostics.non_normality(lambda z: z @ A.T, torch.zeros(1, 2))
    tensor([0.8377])

    The spectral radius says how errors shrink in the end, the operator norm how they may grow first: a Jacobian of
    radius 0.5 and norm 3 converges, after a detour that costs steps and can leave the region where it holds. The
    measure is 0 exactly where there is no detour: radius = norm means that |J^k| = radius^k for every k, as for normal
    matrices. Departures in parts of the Jacobian that are smaller than its leading part do not count; the classical
    measure of those (Henrici, 1962) needs every eigenvalue, which products with J alone do not give.

    Accurate to about `rtol`, times the condition number of the leading eigenvalue; on nilpotent Jacobians of index k it
    comes out low by about eps ** (1 / k), as their radius comes out high.

    Args:
        f, z, args: as for `eq.diagnostics.spectral_radius`.
        rtol: relative accuracy asked of the radius and of the norm.
        max_steps: products allowed for the radius, and pairs of products for the norm.
        batch_dims: as for `eq.fixed_point`.

    Returns:
        Float tensor in [0, 1] per sample, of the shape of the batch dimensions; 0 where the Jacobian is zero, NaN where
        it is not finite.

    Warns:
        ConvergenceWarning: for samples where the radius or the norm misses `rtol` within `max_steps`.

    Source: Trefethen and Embree (2005), Spectra and pseudospectra, sections 14 and 16, on powers of matrices.
    """
    check_positive("rtol", rtol)
    check_integer("max_steps", max_steps, 1)
    layout, jacobian = jacobian_at(f, z, args, batch_dims)
    radius, radius_missed = leading_eigenvalue(jacobian, rtol, max_steps)
    norm, norm_missed = leading_singular_value(jacobian, rtol, max_steps)
    warn_missed("non_normality", radius_missed | norm_missed, rtol, max_steps)
    # The norm is never below the radius: what rounding and rtol say otherwise is 0.
    measure = torch.where(norm == 0, norm, 1 - radius / norm).clamp(min=0)
    return measure.to(layout.dtype).reshape(layout.batch_shape)
