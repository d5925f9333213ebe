"""Gradient descent."""

from dataclasses import dataclass

from torch import Tensor

from equilibria.options import check_positive
from equilibria.problem import Evaluation, Problem


@dataclass(frozen=True)
class GradientDescent:
    """Gradient descent with momentum: m <- b m - s g, z <- z + m; for `eq.argmin`, and for roots of monotone maps.

    >>> objective = lambda z: ((z - 3) ** 2).sum(dim=1)
    >>> eq.argmin(objective, torch.zeros(1, 1), solver=eq.GradientDescent(0.2)).steps
    tensor([28])

    Args:
        step_size: s, above 0; below 2 / L where the gradient is L-Lipschitz.
        momentum: b in [0, 1).

    Source: Polyak (1964).
    """

    step_size: float
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)
        if isinstance(self.momentum, bool) or not isinstance(self.momentum, (int, float)):
            raise TypeError(f"momentum must be a number in [0, 1), not {self.momentum!r}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {self.momentum}.")

    def init(self, problem: Problem, z: Tensor, previous: Tensor | None = None) -> Tensor | None:
        return None

    def step(self, problem: Problem, evaluation: Evaluation, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        move = self.step_size * evaluation.residual
        if memory is not None and self.momentum:
            move = move + self.momentum * memory
        return evaluation.z + move, move
