"""Gradients of the iteration itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from equilibria.adjoints.attachment import restore, sealed, shield
from equilibria.adjoints.protocol import Solve
from equilibria.loop import Outcome
from equilibria.options import check_flag
from equilibria.problem import Equation
from equilibria.solution import AdjointReport
from equilibria.status import Failures


@dataclass(frozen=True)
class Unrolled:
    """Back-propagation through the very iteration that solved; all orders of derivatives, at a memory that grows.

    >>> a = torch.tensor([[0.5]], requires_grad=True)
    >>> z = eq.fixed_point(lambda z: a * torch.cos(z), torch.zeros(1, 1), adjoint=eq.Unrolled()).value
    >>> torch.autograd.grad(z.sum(), a)[0]
    tensor([[0.7395]])

    It is the gradient of the iterate that was reached, converged or not, also with respect to the start `z0`. Where f
    expands an accelerated iteration can converge while its derivative does not: differentiate by `Implicit` there, or
    relax.

    Args:
        checkpoint: keep only the states between evaluations, and evaluate `f` again in backward.
    """

    checkpoint: bool = False

    def __post_init__(self) -> None:
        check_flag("checkpoint", self.checkpoint)

    def attach(
        self, problem: Equation, solve: Solve, failures: Failures, report: AdjointReport
    ) -> tuple[Tensor, Outcome]:
        f = problem.f
        if self.checkpoint:
            problem.f = _checkpointed(f)
        outcome = solve(problem)
        value = outcome.z
        z, bad = shield(outcome, failures.agree)
        if bad is not None:
            # Rare: once more, with the samples that met NaN left out of every evaluation's backward; all in memory,
            # since what a checkpoint computes again in backward could not be cleaned.
            problem.f = f

            def solve_again(_: Tensor) -> Tensor:
                again = solve(problem)
                report.evaluations += again.evaluations
                return restore(again.z, outcome, bad)

            value = sealed(solve_again, bad)(z)
        if failures.agree(not value.requires_grad):
            # Every sample is still at its start: its gradient is zero, as others' would be, and not an error.
            image = sealed(problem.apply, bad)(z)
            report.evaluations += 1
            value = value + torch.where(torch.zeros_like(image, dtype=torch.bool), image, -0.0)
        return value, outcome


def _checkpointed(f: Callable[..., Any]) -> Callable[..., Any]:
    def evaluate(*inputs: Any) -> Any:
        return checkpoint(f, *inputs, use_reentrant=False)

    return evaluate
