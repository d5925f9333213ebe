"""Whether the equilibrium depends on where the solve starts."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equilibria.fixed_point import fixed_point
from equilibria.norms import Norm, rms_norm
from equilibria.options import check_integer, check_positive
from equilibria.problem import FixedPoint
from equilibria.solvers import Anderson, Solver
from equilibria.status import ConvergenceWarning, Status
from equilibria.tree import Layout, detached

# An equilibrium whose residual is this large beside it met its tolerance by atol alone: it is zero as far as the solve
# can tell, and its direction is rounding.
ZERO = 0.1


@dataclass(frozen=True)
class PathIndependence:
    """What became of solves from many starts, for each sample.

    Attributes:
        alignment: float tensor per sample, the mean cosine similarity over pairs of equilibria: the asymptotic
            alignment score, 1 where all starts lead to one equilibrium. NaN with fewer than two equilibria.
        distance: float tensor per sample, the largest relative distance |a - b| / max(|a|, |b|) of a pair, in [0, 2];
            NaN with fewer than two equilibria. It tells apart equilibria of one direction, which the cosine does not.
        converged: int tensor per sample, starts that reached an equilibrium; only these count above.
        status: int tensor, (*batch, starts), an `eq.Status` for each.
        distances: float tensor, (*batch, starts, starts), of each pair; NaN where one did not converge.
    """

    alignment: Tensor
    distance: Tensor
    converged: Tensor
    status: Tensor
    distances: Tensor


def path_independence(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    starts: int = 8,
    scale: float = 1.0,
    seed: int = 0,
    solver: Solver = Anderson(),  # noqa: B008 (a frozen dataclass)
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 100,
    norm: Norm = rms_norm,
    batch_dims: int = 1,
) -> PathIndependence:
    """Solve z = f(z, *args) from several starts, and compare the equilibria that they lead to.

    >>> paths = eq.diagnostics.path_independence(lambda z, a: torch.tanh(a * z), torch.zeros(2, 1),
    ...                                          torch.tensor([[0.5], [2.0]]), starts=4, solver=eq.Picard())
    >>> paths.distance  # one equilibrium for a slope of 0.5; for 2, zero and a pair of opposite ones
    tensor([0.0000, 2.0000])

    The first start is `z0`, the others are `z0` plus Gaussian noise, the same for every sample, so that a sample's
    answer does not depend on its batch. (The paper starts from equilibria of other inputs, which would.) Equality is
    judged as finely as the tolerance of the solves: two answers to one equilibrium differ by about
    rtol / (1 - spectral radius).

    Args:
        f, z0, args: as for `eq.fixed_point`.
        starts: how many, at least 2.
        scale: standard deviation of the noise, in units of the state; take the size of the states that matter.
        seed: of the noise; the global random state is neither read nor changed.
        solver, rtol, atol, max_steps, norm, batch_dims: of each solve, as for `eq.fixed_point`.

    Returns:
        `PathIndependence`.

    Warns:
        ConvergenceWarning: where starts did not converge, which says nothing about where they would have led.

    Source: Anil et al. (2022), Path independent equilibrium models can better exploit test-time computation, section 4.
    """
    check_integer("starts", starts, 2)
    check_integer("seed", seed, 0)
    check_positive("scale", scale)
    check_integer("batch_dims", batch_dims, 0)
    layout = Layout.of(z0, batch_dims)
    origin = layout.pack(detached(z0))
    generator = torch.Generator().manual_seed(seed)
    equilibria, statuses = [], []
    problem = FixedPoint(f, args, layout, norm, None, None, has_aux=False)
    for k in range(starts):
        noise = torch.randn(origin.shape[1], generator=generator, dtype=torch.float64).to(origin)
        start = origin + scale * noise if k else origin
        with torch.no_grad():
            solution = fixed_point(
                f,
                layout.unpack(start),
                *args,
                solver=solver,
                rtol=rtol,
                atol=atol,
                max_steps=max_steps,
                norm=norm,
                batch_dims=batch_dims,
                on_failure="ignore",
            )
            z = layout.pack(solution.value)
            image = problem.apply(z).double()
        z = z.double()
        zero = torch.linalg.vector_norm(image - z, dim=1) >= ZERO * torch.linalg.vector_norm(image, dim=1)
        equilibria.append(torch.where(zero[:, None], 0, z))
        statuses.append(solution.status.reshape(layout.batch))
    status = torch.stack(statuses, dim=1)
    return _compare(torch.stack(equilibria, dim=1), status, layout)


def _compare(equilibria: Tensor, status: Tensor, layout: Layout) -> PathIndependence:
    found = status == Status.CONVERGED
    starts = status.shape[1]
    pairs = found[:, :, None] & found[:, None, :]
    sizes = torch.linalg.vector_norm(equilibria, dim=2)
    directions = torch.where(sizes[:, :, None] > 0, equilibria / sizes[:, :, None], 0)
    larger = torch.maximum(sizes[:, :, None], sizes[:, None, :])
    # One start after the other: all differences at once would take starts times the memory.
    apart = torch.stack([torch.linalg.vector_norm(equilibria - z[:, None], dim=2) for z in equilibria.unbind(1)], dim=1)
    distances = torch.where(larger > 0, apart / larger, 0)
    # Two zeros are one equilibrium although they have no direction.
    cosines = torch.where(larger > 0, torch.bmm(directions, directions.mT), 1).clamp(-1, 1)
    others = pairs & ~torch.eye(starts, dtype=torch.bool, device=status.device)
    count = others.sum(dim=(1, 2))
    alignment = torch.where(others, cosines, 0).sum(dim=(1, 2)) / count  # 0 / 0 is the NaN of too few
    distance = torch.where(others, distances, -1).amax(dim=(1, 2))
    distance = torch.where(count > 0, distance, torch.nan)
    distances = torch.where(pairs, distances, torch.nan)
    missed = int((~found).sum())
    if missed:
        samples = int((~found).any(dim=1).sum())
        warnings.warn(
            f"path_independence: {missed} of {found.numel()} solves, of {samples} of {len(found)} samples, did not "
            "converge and are left out; raise max_steps, loosen rtol, or take a solver that converges there.",
            ConvergenceWarning,
            stacklevel=3,
        )
    shape = layout.batch_shape
    return PathIndependence(
        alignment.to(layout.dtype).reshape(shape),
        distance.to(layout.dtype).reshape(shape),
        found.sum(dim=1).reshape(shape),
        status.reshape(*shape, starts),
        distances.to(layout.dtype).reshape(*shape, starts, starts),
    )
