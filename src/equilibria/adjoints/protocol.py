"""What an adjoint is."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from equilibria.loop import Outcome
from equilibria.problem import Equation
from equilibria.solution import AdjointReport
from equilibria.status import Failures

Solve = Callable[[Equation], Outcome]


class Adjoint(Protocol):
    """Solves a problem and attaches the solution to the autograd graph; called with grad mode on.

    An adjoint is a frozen dataclass of its options.
    """

    def attach(
        self, problem: Equation, solve: Solve, failures: Failures, report: AdjointReport
    ) -> tuple[Tensor, Outcome]:
        """The value, (batch, n), equal to `outcome.z` bit for bit, with a gradient; and the outcome.

        Args:
            problem: what to solve.
            solve: runs the forward solve, under the grad mode it is called in.
            failures: the policy, for failures of a backward solve.
            report: filled in as evaluations are made and backward runs.
        """
        ...
