"""The fixed point of an operator splitting, and how it is found."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.fixed_point import fixed_point
from equilibria.nn.quadratic.program import Optimality, Program, apply, optimality
from equilibria.problem import Evaluation, Problem
from equilibria.solvers import Anderson

SHIFT = 1e-6  # of P, so that it can be factored where it is singular
STIFFER = 1e3  # equalities are penalised so many times as much as inequalities
PENALTY = 1.0  # to begin with
# Evaluations in the first round, how many of them polish, and evaluations in the longest round: the penalty is best
# corrected early.
ROUND, POLISHING = 60, 10
LONGEST = 180
# Of the system that polishes, whose rows may repeat each other; refinement takes its effect away.
REGULAR, REFINEMENTS = 1e-8, 4

State = tuple[Tensor, Tensor]


class Splitting(NamedTuple):
    """What the operator of a program needs beside its state: `lower` is the Cholesky factor of P + shift + C' W C.

    W has the penalties, (batch, p + m), on its diagonal.
    """

    program: Program
    penalties: Tensor
    lower: Tensor

    def operator(self, state: State) -> State:
        """One step of ADMM on x, (batch, n), and v, (batch, p + m).

        Where it stands still x is optimal: C x = w, the point that satisfies the constraints and is nearest to v, and
        the multipliers are the penalties times v - w.

        Source: Stellato, Banjac, Goulart, Bemporad and Boyd (2020), OSQP, algorithm 1 without over-relaxation, in the
        form of Douglas-Rachford splitting, whose state is v.
        """
        program, penalties, lower = self
        x, v = state
        w = program.bounded(v)
        right = SHIFT * x - program.q + apply(program.C.mT, penalties * (2 * w - v))
        x = torch.cholesky_solve(right[:, :, None], lower)[:, :, 0]
        return x, v + apply(program.C, x) - w

    def multipliers(self, v: Tensor) -> Tensor:
        """Those of the constraints, (batch, p + m)."""
        return self.penalties * (v - self.program.bounded(v))


def splitting(program: Program, penalty: Tensor) -> Splitting:
    """The operator of a program, with a penalty (batch,) on violations of its constraints."""
    rows, p = program.d.shape[1], program.equalities
    stiffness = torch.ones(rows, dtype=penalty.dtype, device=penalty.device)
    stiffness[:p] = STIFFER
    penalties = penalty[:, None] * stiffness
    shift = SHIFT * torch.eye(program.q.shape[1], dtype=penalty.dtype, device=penalty.device)
    normal = program.P + shift + program.C.mT @ (penalties[:, :, None] * program.C)
    lower, _ = torch.linalg.cholesky_ex(normal)
    return Splitting(program, penalties, lower)


class Polish:
    """The solver that takes the constraints which v says are active for equalities, and solves for x and multipliers.

    This is Newton's method on the operator, whose derivative is that of the active set, with the structure of its
    system used: near a solution one step is exact, and where it is not the next one has another active set.

    Args:
        split: of the program.

    Source: Hintermüller, Ito and Kunisch (2002), The primal-dual active set strategy as a semismooth Newton method;
    the regularised system of Stellato et al. (2020), section 4.
    """

    def __init__(self, split: Splitting) -> None:
        self.split = split
        self.n = split.program.q.shape[1]

    def init(self, problem: Problem, z: Tensor, previous: None = None) -> None:
        return None

    def step(self, problem: Problem, evaluation: Evaluation, memory: None) -> tuple[Tensor, None]:
        program, n = self.split.program, self.n
        x, v = evaluation.z[:, :n], evaluation.z[:, n:]
        active = v > program.d
        active[:, : program.equalities] = True
        rows = torch.where(active[:, :, None], program.C, 0)
        diagonal = torch.cat([torch.full_like(x, REGULAR), torch.where(active, -REGULAR, 1.0)], dim=1)
        matrix = torch.cat(
            [torch.cat([program.P, rows.mT], dim=2), torch.cat([rows, rows.new_zeros(*v.shape, v.shape[1])], dim=2)],
            dim=1,
        )
        exact = matrix + torch.diag_embed(torch.cat([torch.zeros_like(x), (~active).to(v)], dim=1))
        right = torch.cat([-program.q, torch.where(active, program.d, 0)], dim=1)
        factors, pivots, _ = torch.linalg.lu_factor_ex(matrix + torch.diag_embed(diagonal))
        found = torch.cat([x, torch.where(active, self.split.multipliers(v), 0)], dim=1)
        for _ in range(REFINEMENTS):
            gap = right - apply(exact, found)
            found = found + torch.linalg.lu_solve(factors, pivots, gap[:, :, None])[:, :, 0]
        x, y = found[:, :n], found[:, n:]
        return torch.cat(
            [x, torch.where(active, program.d + y / self.split.penalties, apply(program.C, x))], dim=1
        ), None


class Found(NamedTuple):
    """Where a search is: state (x, v) in scaled units, penalty, whether optimal, and evaluations of each sample."""

    x: Tensor
    v: Tensor
    penalty: Tensor
    solved: Tensor
    steps: Tensor

    def take(self, samples: Tensor) -> Found:
        """Some of the samples."""
        return Found(*(part[samples] for part in self))

    def put(self, samples: Tensor, other: Found) -> Found:
        """With some samples as they are in another."""
        return Found(*(mine.index_copy(0, samples, new) for mine, new in zip(self, other, strict=True)))


def start(program: Program) -> Found:
    """Zeros."""
    batch = len(program.q)
    return Found(
        torch.zeros_like(program.q),
        torch.zeros_like(program.d),
        program.q.new_full((batch,), PENALTY),
        torch.zeros(batch, dtype=torch.bool, device=program.q.device),
        torch.zeros(batch, dtype=torch.int64, device=program.q.device),
    )


def improve(program: Program, found: Found, loose: float, rtol: float, atol: float, allowed: int) -> tuple[Found, int]:
    """One round: the accelerated iteration to a loose tolerance, then Newton's method.

    Args:
        program: scaled.
        found: where to go on.
        loose: relative residual at which Newton's method takes over.
        rtol, atol: of the conditions of optimality.
        allowed: evaluations.

    Returns:
        Where it ends, and evaluations of the batch. Samples that are not solved have another penalty for the next
        round, one that balances the two residuals.
    """
    split = splitting(program, found.penalty)
    state, steps, evaluations = (found.x, found.v), found.steps, 0
    polishing = min(POLISHING, max(allowed // 4, 1))
    rounds = ((Anderson(history=10), loose, allowed - polishing), (Polish(split), max(rtol / 100, 1e-13), polishing))
    for solver, tolerance, most in rounds:
        if most < 1:
            continue
        solution = fixed_point(
            split.operator, state, solver=solver, rtol=tolerance, max_steps=most, on_failure="ignore"
        )
        state, steps, evaluations = solution.value, steps + solution.steps, evaluations + solution.evaluations
    x, v = state
    y = split.multipliers(v)
    reached = optimality(program, x, y)
    solved = reached.within(rtol, atol)
    penalty = torch.where(solved, found.penalty, _balanced(found.penalty, reached))
    # The multipliers stay as they are where the penalty changes.
    w = program.bounded(v)
    v = torch.where(solved[:, None], v, w + (v - w) * (found.penalty / penalty)[:, None])
    return Found(x, v, penalty, solved, steps), evaluations


def _balanced(penalty: Tensor, reached: Optimality) -> Tensor:
    violation = reached.violation / reached.violation_scale
    stationarity = reached.stationarity / reached.stationarity_scale
    ratio = (violation / stationarity).sqrt().nan_to_num(1, 1, 1).clamp(0.1, 10)
    return (penalty * ratio).clamp(1e-6, 1e6)
