"""The Neumann series of the inverse, cut."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.adjoints.attachment import attach, restore, sealed, shield
from equilibria.adjoints.phantom import REFUSAL
from equilibria.adjoints.protocol import Solve
from equilibria.loop import Outcome
from equilibria.options import check_integer
from equilibria.problem import Equation
from equilibria.solution import AdjointReport
from equilibria.status import Failures


@dataclass(frozen=True)
class Neumann:
    """The first terms of the Neumann series, u = v + J^T v + (J^T)^2 v + ...; an approximation.

    >>> a = torch.tensor([[0.5]], requires_grad=True)
    >>> z = eq.fixed_point(lambda z: a * torch.cos(z), torch.zeros(1, 1), adjoint=eq.Neumann(terms=3)).value
    >>> torch.autograd.grad(z.sum(), a)[0]
    tensor([[0.7471]])

    The same gradient as `eq.Phantom(terms)` with w = 1, in the memory of one evaluation. Its error is of the order of
    radius ** terms where the spectral radius of J is below 1; nothing checks that it is.

    Args:
        terms: at least 1; `terms - 1` products with the transposed Jacobian.

    Source: Lorraine, Vicol and Duvenaud (2020), eq. 7; Geng et al. (2021).
    """

    terms: int

    def __post_init__(self) -> None:
        check_integer("terms", self.terms, 1)

    def attach(
        self, problem: Equation, solve: Solve, failures: Failures, report: AdjointReport
    ) -> tuple[Tensor, Outcome]:
        with torch.no_grad():
            outcome = solve(problem)
        z, bad = shield(outcome, failures.agree)
        image = sealed(problem.apply, bad)(z)
        report.evaluations += 1

        def pull(z: Tensor, v: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError(REFUSAL)
            jacobian = problem.linearize(z)
            report.evaluations += 1
            report.steps = torch.full_like(outcome_steps, self.terms - 1)
            term = u = v
            for _ in range(self.terms - 1):
                term = jacobian.transposed_product(term)
                u = u + term
            return u if bad is None else torch.where(bad[:, None], 0, u)

        outcome_steps = outcome.steps.reshape(problem.layout.batch_shape)
        value = attach(z, image, bad, pull)
        return restore(value, outcome, bad), outcome
