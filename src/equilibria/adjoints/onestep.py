"""Jacobian-free back-propagation."""

from dataclasses import dataclass

from torch import Tensor

from equilibria.adjoints.phantom import Phantom
from equilibria.adjoints.protocol import Solve
from equilibria.loop import Outcome
from equilibria.problem import Equation
from equilibria.solution import AdjointReport
from equilibria.status import Failures


@dataclass(frozen=True)
class OneStep:
    """Jacobian-free back-propagation: the gradient of one step from the solution; the cheapest approximation.

    >>> a = torch.tensor([[0.5]], requires_grad=True)
    >>> z = eq.fixed_point(lambda z: a * torch.cos(z), torch.zeros(1, 1), adjoint=eq.OneStep()).value
    >>> torch.autograd.grad(z.sum(), a)[0]
    tensor([[0.9004]])

    Source: Fung et al. (2022), JFB: Jacobian-free backpropagation for implicit networks.
    """

    def attach(
        self, problem: Equation, solve: Solve, failures: Failures, report: AdjointReport
    ) -> tuple[Tensor, Outcome]:
        return Phantom(steps=1).attach(problem, solve, failures, report)
