"""Peaceman-Rachford splitting."""

from dataclasses import dataclass

from torch import Tensor

from equilibria.options import check_positive
from equilibria.problem import Evaluation, Problem
from equilibria.solvers.forward_backward import parts

# In units of 1 / |I - W|. With 1 the worst operator, I - W = m I + rotation, is solved in the fewest steps; others want
# longer ones, and this costs that one a factor of 1.7.
STEP = 3.0


@dataclass(frozen=True)
class PeacemanRachford:
    """Peaceman-Rachford splitting of a monotone equilibrium, z = activation(W z + b): implicit steps along both parts.

    >>> layer = eq.nn.MonotoneDEQ(eq.nn.MonotoneLinear(3, 8), solver=eq.PeacemanRachford())
    >>> layer.solve(torch.randn(2, 3)).converged
    tensor([True, True])

    It iterates u on u <- 2 x - (2 z - u), where z = prox(u) and x solves x + step ((I - W) x - b) = 2 z - u, and
    converges for any step. The inverse of I + step (I - W) is computed once a solve, and serves backward too; then a
    step takes one product with it and one with W, which measures the residual.

    Args:
        step_size: of both parts; None is 3 / |I - W|.

    Sources: Peaceman and Rachford (1955); Winston and Kolter (2020), Monotone operator equilibrium networks, section
    3.3.
    """

    step_size: float | None = None

    def __post_init__(self) -> None:
        if self.step_size is not None:
            check_positive("step_size", self.step_size)

    def init(self, problem: Problem, z: Tensor, previous: Tensor | None = None) -> Tensor | None:
        return previous

    def step(self, problem: Problem, evaluation: Evaluation, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        split = parts(problem, "PeacemanRachford")
        step = STEP / split.size if self.step_size is None else self.step_size
        z = evaluation.z
        outer = z if memory is None else 2 * z - memory
        u = 2 * split.resolvent(outer, step) - outer
        return split.proximal(u, step), u
