"""What a solver is."""

from typing import Any, Protocol

from torch import Tensor

from equilibria.problem import Evaluation, Problem


class Solver(Protocol):
    """Proposes iterates; the loop owns everything else (tolerances, freezing, statuses, counting).

    A solver is a frozen dataclass of its options. All of its state lives in the `memory` that it returns, which is
    indexed by sample first and treats every sample on its own.
    """

    def init(self, problem: Problem, z: Tensor, previous: Any = None) -> Any:
        """The memory before the first evaluation, for a start of shape (batch, n).

        `previous` is the last memory of an earlier solve of a similar problem, for a warm start; what it knows of that
        problem's Jacobian may be kept, and it must not be written into.
        """
        ...

    def step(self, problem: Problem, evaluation: Evaluation, memory: Any) -> tuple[Tensor, Any]:
        """The next iterate to evaluate, of shape (batch, n), and the new memory.

        `problem.linearize` gives products with the Jacobian, to solvers that take them.
        """
        ...
