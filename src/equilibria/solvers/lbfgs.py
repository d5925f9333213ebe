"""Limited-memory BFGS."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.linear import dot
from equilibria.options import check_integer
from equilibria.problem import Evaluation, Problem

# A step is accepted when it lowers the objective by this part of what its slope promises (Armijo's condition).
SUFFICIENT = 1e-4


class Pair(NamedTuple):
    """An accepted step and the fall of the downhill vector along it; zeros for samples that have none here."""

    step: Tensor  # (batch, n)
    fall: Tensor  # (batch, n)
    weight: Tensor  # (batch,), 1 / (step . fall), or 0


class Memory(NamedTuple):
    """The point that each sample searches from, and what is on trial."""

    base: Tensor  # (batch, n)
    value: Tensor  # (batch,), of the objective there
    downhill: Tensor  # (batch, n), minus the gradient there
    direction: Tensor  # (batch, n)
    length: Tensor  # (batch,)
    scale: Tensor  # (batch,), of the inverse Hessian, from the newest pair
    pairs: tuple[Pair, ...]  # oldest first


@dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS with a backtracking line search for each sample; minimises the objective of `eq.argmin`.

    >>> eq.argmin(lambda z: ((z - 3) ** 2).sum(dim=1), torch.zeros(1, 2), solver=eq.LBFGS()).value.tolist()
    [[3.0, 3.0]]

    Args:
        history: pairs kept, at least 1; each costs two buffers of the state's size.

    Sources: Liu and Nocedal (1989); Nocedal and Wright (2006), algorithm 7.4; Hager and Zhang (2005) for accepting
    steps that are below the rounding of the objective.
    """

    history: int = 20

    def __post_init__(self) -> None:
        check_integer("history", self.history, 1)

    def init(self, problem: Problem, z: Tensor, previous: Memory | None = None) -> None:
        return None

    def step(self, problem: Problem, evaluation: Evaluation, memory: Memory | None) -> tuple[Tensor, Memory]:
        z, downhill, value = evaluation.z, evaluation.residual, evaluation.values
        if value is None:
            raise TypeError("LBFGS minimises an objective: use it with eq.argmin; for this take eq.Broyden().")
        if memory is None:
            # The first step is no longer than the state may plausibly be from its minimum.
            length = (1 / torch.linalg.vector_norm(downhill, dim=1)).nan_to_num(posinf=1).clamp(max=1)
            memory = Memory(z, value, downhill, downhill, length, torch.ones_like(length), ())
            return z + length[:, None] * downhill, memory
        base, old_value, old_downhill, direction, length, scale, pairs = memory
        slope = -dot(old_downhill, direction)
        rounding = 10 * torch.finfo(value.dtype).eps * old_value.abs()
        flat = ((value - old_value).abs() <= rounding) & (dot(downhill, downhill) <= dot(old_downhill, old_downhill))
        accepted = (value <= old_value + SUFFICIENT * length * slope) | flat
        row = accepted[:, None]
        step, fall = torch.where(row, z - base, 0), torch.where(row, old_downhill - downhill, 0)
        curvature, square = dot(step, fall), dot(fall, fall)
        sound = curvature > 1e-10 * (dot(step, step) * square).sqrt()  # keeps the inverse Hessian positive
        weight = torch.where(sound, 1 / torch.where(sound, curvature, 1), 0)
        pairs = (*pairs, Pair(step, fall, weight))[-self.history :]
        scale = torch.where(sound, curvature / torch.where(sound, square, 1), scale)
        base, old_downhill = torch.where(row, z, base), torch.where(row, downhill, old_downhill)
        direction = torch.where(row, _apply_inverse(pairs, scale, old_downhill), direction)
        uphill = dot(direction, old_downhill) <= 0
        direction = torch.where((accepted & uphill)[:, None], old_downhill, direction)
        length = torch.where(accepted, 1, length / 2)
        memory = Memory(base, torch.where(accepted, value, old_value), old_downhill, direction, length, scale, pairs)
        return base + length[:, None] * direction, memory


def _apply_inverse(pairs: tuple[Pair, ...], scale: Tensor, vector: Tensor) -> Tensor:
    """The two loops: the inverse Hessian times a vector."""
    parts = []
    for pair in reversed(pairs):
        part = pair.weight * dot(pair.step, vector)
        vector = vector - part[:, None] * pair.fall
        parts.append(part)
    vector = scale[:, None] * vector
    for pair, part in zip(pairs, reversed(parts), strict=True):
        vector = vector + (part - pair.weight * dot(pair.fall, vector))[:, None] * pair.step
    return vector
