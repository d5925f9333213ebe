"""The loop: every iterative solve of the library runs through here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equilibria.problem import Problem
from equilibria.solvers.protocol import Solver
from equilibria.status import Status

# STALLED: the error, at the rounding level, has not fallen by a tenth over this many evaluations.
STALL_WINDOW = 10
STALL_FACTOR = 0.9

# From "some sample of mine ..." to "some sample on some rank ...": lets ranks that share collectives stop together.
Agree = Callable[[bool], bool]


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
    steps = torch.zeros_like(status)
    best = z
    best_error = reference = final_error = torch.empty(0)
    since = torch.zeros_like(status)
    first = True
    while True:
        evaluation = problem.evaluate(z)
        with torch.no_grad():
            error = evaluation.error
            # size is finite exactly where f(z) is: an error of 1/0 at f(z) = 0 is a number to improve on.
            finite = torch.isfinite(evaluation.size)
            if first:
                best_error = reference = final_error = error
                fell = improved = finite
            else:
                improved = active & (error < best_error)
                fell = error < STALL_FACTOR * reference
                best_error = torch.where(improved, error, best_error)
            since = torch.where(fell, 0, since + 1)
            reference = torch.where(fell, error, reference)
            converged = active & evaluation.satisfied & finite
            stalled = (since >= STALL_WINDOW) & (best_error <= problem.level)
            nonfinite = active & ~finite
            failed = active & ~converged & (stalled | nonfinite)
            status = torch.where(converged, Status.CONVERGED, status)
            status = torch.where(failed, torch.where(nonfinite, Status.NONFINITE, Status.STALLED), status)
            steps = torch.where(active, problem.evaluations, steps)
            final_error = torch.where(active, torch.where(converged, error, best_error), final_error)
        best = torch.where(improved[:, None], z, best)
        active = active & ~converged & ~failed
        if callback is not None:
            callback(z, error, status, active)
        # Samples that just failed go back to their best iterate, so that f is never evaluated at NaN again.
        frozen = torch.where((failed | (active & ~improved))[:, None], best, z)
        running = agree(bool(active.any()))
        if problem.evaluations >= max_steps or not running:
            return Outcome(frozen, status, steps, final_error, problem.evaluations, memory)
        proposal, memory = solver.step(problem, evaluation._replace(best=best), memory)
        first = False
        z = problem.round(torch.where(active[:, None], proposal, frozen))
