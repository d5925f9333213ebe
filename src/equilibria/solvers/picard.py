"""Plain iteration."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.options import check_fraction
from equilibria.problem import Evaluation, Problem


def relaxed(evaluation: Evaluation, relaxation: float) -> Tensor:
    """(1 - w) z + w f(z); exactly f(z) at w = 1."""
    return evaluation.image if relaxation == 1 else torch.lerp(evaluation.z, evaluation.image, relaxation)


@dataclass(frozen=True)
class Picard:
    """Plain iteration, z <- (1 - w) z + w f(z).

    >>> eq.fixed_point(torch.cos, torch.zeros(1, 1), solver=eq.Picard()).value
    tensor([[0.7391]])

    Converges where f contracts, and after L steps, whatever the norms, where its Jacobian is nilpotent of index L. As
    the solver of `Implicit` it is recurrent back-propagation (Almeida 1987; Pineda 1987).

    Args:
        relaxation: w in (0, 1]; below 1 it also converges on some maps that expand (slopes below -1).
    """

    relaxation: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("relaxation", self.relaxation)

    def init(self, problem: Problem, z: Tensor, previous: None = None) -> None:
        return None

    def step(self, problem: Problem, evaluation: Evaluation, memory: None) -> tuple[Tensor, None]:
        return relaxed(evaluation, self.relaxation), None
