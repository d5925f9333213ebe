"""Gradients of a few steps taken from the solution."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.adjoints.attachment import attach, restore, sealed, shield
from equilibria.adjoints.protocol import Solve
from equilibria.loop import Outcome
from equilibria.options import check_fraction, check_integer
from equilibria.problem import Equation
from equilibria.solution import AdjointReport
from equilibria.status import Failures

REFUSAL = (
    "Phantom, OneStep and Neumann approximate first derivatives and have no second ones: take them without "
    "create_graph=True, or use eq.Implicit(order=2) or eq.Unrolled()."
)


@dataclass(frozen=True)
class Phantom:
    """Phantom gradients: back-propagation through a few relaxed steps from the solution; an approximation.

    >>> a = torch.tensor([[0.5]], requires_grad=True)
    >>> z = eq.fixed_point(lambda z: a * torch.cos(z), torch.zeros(1, 1), adjoint=eq.Phantom(steps=3)).value
    >>> torch.autograd.grad(z.sum(), a)[0]
    tensor([[0.7471]])

    Args:
        steps: steps to differentiate, at least 1; memory grows with them. With w = 1 the gradient is the Neumann series
            of the inverse cut after so many terms.
        relaxation: w in (0, 1], z <- (1 - w) z + w f(z).

    Source: Geng et al. (2021), On training implicit models.
    """

    steps: int
    relaxation: float = 1.0

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1)
        check_fraction("relaxation", self.relaxation)

    def attach(
        self, problem: Equation, solve: Solve, failures: Failures, report: AdjointReport
    ) -> tuple[Tensor, Outcome]:
        with torch.no_grad():
            outcome = solve(problem)
        z, bad = shield(outcome)

        def take_steps(z: Tensor) -> Tensor:
            for _ in range(self.steps):
                image = problem.apply(z)
                z = image if self.relaxation == 1 else torch.lerp(z, image, self.relaxation)
            return z

        report.evaluations += self.steps
        value = attach(z, sealed(take_steps, bad)(z), bad, _pass)
        return restore(value, outcome, bad), outcome


def _pass(z: Tensor, v: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise RuntimeError(REFUSAL)
    return v
