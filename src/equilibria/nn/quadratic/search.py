"""The whole search for the solution of a quadratic program, and proofs that there is none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.nn.quadratic.program import Program, apply, largest, optimality
from equilibria.nn.quadratic.splitting import LONGEST, ROUND, Found, improve, splitting, start
from equilibria.status import Status

LOOSE = 1e-3  # residual at which Newton's method takes over in the first round; a tenth of it in each that follows
PATIENCE = 3  # rounds before proofs are looked for
PROVING = 8  # rounds for a proof
NEAR = 1e-4  # a residual that leaves nothing to prove
RADIUS = 1e6  # a program counts as infeasible where no point within this distance satisfies its constraints
ACTIVE = 1e-6  # relative size below which a multiplier or a slack counts as zero


class Searched(NamedTuple):
    """How a search ended: the state and penalty of the splitting in scaled units, and a status for each sample."""

    found: Found
    status: Tensor
    evaluations: int


def search(program: Program, rtol: float, atol: float, max_steps: int) -> Searched:
    """Rounds of the splitting, for the samples that are not solved yet, until none is left or `max_steps` are used.

    What three rounds leave is looked at for a proof that there is nothing to find.

    Args:
        program: scaled.
        rtol, atol: of the conditions of optimality.
        max_steps: evaluations of the operator allowed to a sample.
    """
    found = start(program)
    status = torch.full_like(found.steps, Status.MAX_STEPS)
    evaluations, left, loose, rounds = 0, max_steps, LOOSE, 0
    while left > 0:
        todo = (status == Status.MAX_STEPS).nonzero().flatten()
        if len(todo) == 0:
            break
        allowed = min(left, ROUND * 2**rounds, LONGEST)
        part = program.take(todo)
        better, count = improve(part, found.take(todo), loose, rtol, atol, allowed)
        found, evaluations = found.put(todo, better), evaluations + count
        ended = torch.where(better.solved, Status.CONVERGED, Status.MAX_STEPS)
        rounds += 1
        if rounds == PATIENCE and bool((~better.solved).any()):
            residual = optimality(part, better.x, splitting(part, better.penalty).multipliers(better.v)).residual()
            unsolved = (~better.solved & ~(residual < NEAR)).nonzero().flatten()
            proofs, count = proven(part.take(unsolved), better.x[unsolved])
            ended, evaluations = ended.index_copy(0, unsolved, proofs), evaluations + count
        status = status.index_copy(0, todo, ended)
        left, loose = left - allowed, max(loose / 10, rtol)
    return Searched(found, status, evaluations)


def proven(program: Program, x: Tensor) -> tuple[Tensor, int]:
    """`INFEASIBLE` or `UNBOUNDED` for each sample where a certificate is found, `MAX_STEPS` elsewhere.

    A certificate is the solution of a quadratic program that always has one, a projection onto a cone: of C x - d
    onto {y: C'y = 0, y >= 0 for inequalities}, and of -q onto {z: P z = 0, A z = 0, G z <= 0}. The first says that no
    point satisfies the constraints where y'd < 0, to which no x matters: that at which the search was left makes the
    point small beside what violates the constraints. The second is zero where the cost is bounded below.

    Source: Banjac, Goulart, Stellato and Boyd (2019), Infeasibility detection in the alternating direction method of
    multipliers for convex optimization, where the same vectors are the limits of the differences of iterates.
    """
    status = torch.full_like(program.q[:, 0], Status.MAX_STEPS, dtype=torch.int64)
    p, evaluations = program.equalities, 0
    rows = program.d.shape[1]
    if rows:
        y, evaluations = _projected(apply(program.C, x) - program.d, program.C.mT, -_unit(rows, program.q)[p:])
        y = torch.cat([y[:, :p], y[:, p:].clamp(min=0)], dim=1)
        gain = -(y * program.d).sum(dim=1)
        leak = apply(program.C.mT, y).abs().sum(dim=1)
        proof = (gain > 0) & (gain > RADIUS * largest(program.d) * leak)
        status = torch.where(proof, Status.INFEASIBLE, status)
    level = torch.cat([program.P, program.C[:, :p]], dim=1)
    z, count = _projected(-program.q, level, program.C[:, p:])
    gain = -(z * program.q).sum(dim=1)
    leak = apply(level, z).abs().sum(dim=1) + apply(program.C[:, p:], z).clamp(min=0).sum(dim=1)
    proof = (status == Status.MAX_STEPS) & (gain > 0) & (gain > RADIUS * largest(program.q) * leak)
    return torch.where(proof, Status.UNBOUNDED, status), evaluations + count


def _projected(point: Tensor, level: Tensor, below: Tensor) -> tuple[Tensor, int]:
    """The projection onto {z: level z = 0, below z <= 0}; zeros where it is not found."""
    batch, n = point.shape
    # Rows of length one, orthogonal to each other, span the same: as they come they may be nearly dependent.
    _, sizes, rows = torch.linalg.svd(level, full_matrices=False)
    level = torch.where((sizes > 1e-10 * sizes[:, :1])[:, :, None], rows, 0)
    C = torch.cat([level, below.expand(batch, -1, -1)], dim=1)
    cone = Program(_unit(n, point).expand(batch, n, n), -point, C, C.new_zeros(batch, C.shape[1]), level.shape[1])
    size = torch.where(largest(point) > 0, largest(point), 1)[:, None]
    cone = cone._replace(q=cone.q / size)
    found, evaluations = start(cone), 0
    for k in range(PROVING):
        todo = (~found.solved).nonzero().flatten()
        if len(todo) == 0:
            break
        better, count = improve(cone.take(todo), found.take(todo), max(LOOSE / 10**k, 1e-9), 1e-9, 1e-9, LONGEST)
        found, evaluations = found.put(todo, better), evaluations + count
    return torch.where(found.solved[:, None], found.x * size, 0), evaluations


def _unit(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def degenerate(program: Program, z: Tensor, multipliers: Tensor) -> Tensor:
    """Whether a solution has no single derivative, (batch,): another is as good, or a constraint is only just active.

    Args:
        program: scaled.
        z, multipliers: of its solution.
    """
    p = program.equalities
    reached = optimality(program, z, multipliers)
    slack = program.d[:, p:] - apply(program.C[:, p:], z)
    pressed = multipliers[:, p:] > ACTIVE * reached.stationarity_scale[:, None]
    touching = slack < ACTIVE * reached.violation_scale[:, None]
    weak = (touching & ~pressed).any(dim=1)
    active = torch.cat([torch.ones_like(program.d[:, :p], dtype=torch.bool), pressed], dim=1)
    rows = torch.where(active[:, :, None], program.C, 0)
    floor = 1e-9 * _unit(z.shape[1], z)
    _, info = torch.linalg.cholesky_ex(program.P + rows.mT @ rows - floor)
    return weak | (info > 0)
