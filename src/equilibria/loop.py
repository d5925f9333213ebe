"""The loop: every iterative solve of the library runs through here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equilibria.precision import precise
from equilibria.problem import Problem
from equilibria.solvers.protocol import Solver
from equilibria.status import Agree, Status

# STALLED: the error, at the rounding level, has not fallen by a tenth over this many evaluations.
STALL_WINDOW = 10
STALL_FACTOR = 0.9


@dataclass(frozen=True)
class Iterate:
    """What a callback sees after each evaluation.

    Attributes:
        evaluations: calls of `f` so far.
        value: the state just evaluated, of the structure of `z0`.
        residual: per sample, of `value`.
        status: per sample, int; `MAX_STEPS` for samples still running.
        active: per sample, bool; still running.
    """

    evaluations: int
    value: Any
    residual: Tensor
    status: Tensor
    active: Tensor


@dataclass(frozen=True)
class Outcome:
    """What the loop hands back, packed: per-sample results as in `Solution`, and the solver's memory."""

    z: Tensor
    status: Tensor
    steps: Tensor
    error: Tensor
    evaluations: int
    memory: Any


def run(
    problem: Problem,
    solver: Solver,
    z: Tensor,
    memory: Any,
    max_steps: int,
    callback: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
    agree: Agree = bool,
) -> Outcome:
    """Iterate until every sample has converged, failed or used up `max_steps` evaluations.

    A sample that stops is frozen: its iterate, status, steps and error never change again, whatever the others do.

    Args:
        problem: what to solve.
        solver: proposes the next iterate.
        z: start, of shape (batch, n).
        memory: of the solver, from its `init` or an earlier solve.
        max_steps: evaluations allowed.
        callback: called after each evaluation with iterate, error, status and active.
        agree: makes ranks stop together.
    """
    active = torch.ones(z.shape[0], dtype=torch.bool, device=z.device)
    status = torch.full_like(active, Status.MAX_STEPS, dtype=torch.int64)
    steps = since = zeros = torch.zeros_like(status)
    improved, converged, failed, ended, finite = None, active, active, active, active
    settled, best = z, z
    best_error = reference = final_error = torch.empty(0)
    first, quick, some_active = True, True, len(z) > 0
    stopped: Tensor | None = None
    while True:
        evaluation = problem.evaluate(z)
        apart = stopped is not None
        with torch.no_grad():
            error = evaluation.error
            if first:
                best_error = final_error = error
                reference = torch.full_like(error, torch.inf)
            fell = error < STALL_FACTOR * reference
            usual = fell > evaluation.satisfied
            if stopped is not None:
                usual = usual | stopped
            # Where every error fell and none is small enough yet there is no more to do. To ask costs a look at the
            # device, so it is asked after steps of this kind alone.
            if quick and bool(usual.all()):
                best_error, reference, since = error, error, zeros
                improved, any_ended = None, False
            else:
                # size is finite exactly where f(z) is: an error of 1/0 at f(z) = 0 is a number to improve on.
                finite = evaluation.size < torch.inf
                improved = active & (error < best_error)
                best_error = torch.where(improved, error, best_error)
                since = torch.where(fell, 0, since + 1)
                reference = torch.where(fell, error, reference)
                converged = active & evaluation.satisfied
                stalled = (since >= STALL_WINDOW) & (best_error <= problem.floor)
                failed = active & ~converged & (stalled | ~finite)
                ended = converged | failed
                looks = torch.stack((ended.any(), (active & ~ended).any(), usual.all()))
                any_ended, some_active, quick = looks.tolist()
        best = z if improved is None else torch.where(improved[:, None], z, best)
        if any_ended:
            failure = torch.where(finite, Status.STALLED, Status.NONFINITE)
            status = torch.where(converged, Status.CONVERGED, torch.where(failed, failure, status))
            steps = torch.where(ended, problem.evaluations, steps)
            final_error = torch.where(converged, error, torch.where(failed, best_error, final_error))
            # Failed samples go back to their best iterate, so that f is never evaluated at NaN again.
            settled = torch.where(active[:, None], torch.where(failed[:, None], best, z), settled)
            active = active & ~ended
            stopped = ~active
        if callback is not None:
            callback(z, error, status, active)
        running = agree(some_active)
        if problem.evaluations >= max_steps or not running:
            break
        evaluation = evaluation._replace(best=best, best_error=best_error, stopped=stopped, agree=agree)
        with precise(z):
            proposal, memory = solver.step(problem, evaluation, memory)
        z = problem.round(proposal if stopped is None else torch.where(stopped[:, None], settled, proposal))
        first = False
        if problem.evaluations >= max_steps:
            break  # the step itself took the last evaluation, as Newton's do
    if some_active:
        steps = torch.where(active, problem.evaluations, steps)
        final_error = torch.where(active, best_error, final_error)
    if apart:
        # A sample that stopped met its tolerance; if it no longer does, it is others that have moved it.
        coupled = (status == Status.CONVERGED) & ~evaluation.satisfied & (error > 2 * final_error)
        status = torch.where(coupled, Status.COUPLED, status)
        final_error = torch.where(coupled, error, final_error)
    # Also where all have stopped: ranks that went on together have all their evaluations in their graphs.
    z = torch.where(active[:, None], best, settled)
    return Outcome(z, status, steps, final_error, problem.evaluations, memory)
