"""Broyden's method."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.options import check_fraction, check_integer
from equilibria.problem import Evaluation, FixedPoint, Problem, Root
from equilibria.solvers.buffers import write
from equilibria.solvers.picard import relaxed
from equilibria.solvers.safeguard import Safeguard

# On roots, where plain iteration is no way back: a step that grows the residual by more than this is halved.
GROWTH = 10.0


class Memory(NamedTuple):
    """The last point, and the inverse Jacobian H = scale I + sum_k u_k v_k^T, of I - df/dz."""

    z: Tensor | None  # (batch, n), last evaluated
    residual: Tensor | None  # (batch, n), there
    direction: Tensor | None  # (batch, n), H residual
    scale: Tensor | None  # (batch, 1)
    left: Tensor | None  # (batch, capacity, n), u_k
    right: Tensor | None  # (batch, capacity, n), v_k
    seen: int
    guard: Safeguard


@dataclass(frozen=True)
class Broyden:
    """Broyden's (good) method with a limited memory and a safeguard.

    >>> eq.fixed_point(lambda z: 1 - 3 * z, torch.zeros(1, 1), solver=eq.Broyden()).value
    tensor([[0.2500]])

    Also solves maps that expand, where plain iteration diverges, and roots. It keeps the inverse of the Jacobian as
    the identity and one rank for each step, in memory that grows with the steps taken; past `history` the oldest rank
    is overwritten. Where it does not lower the residual of an equilibrium plain iteration takes turns, see `Safeguard`.

    Args:
        history: ranks kept, at least 1; each costs two buffers of the state's size.
        relaxation: w in (0, 1], the length of the first step, and of plain ones.

    Sources: Broyden (1965); Bai, Kolter and Koltun (2019) for its use in DEQs.
    """

    history: int = 30
    relaxation: float = 1.0

    def __post_init__(self) -> None:
        check_integer("history", self.history, 1)
        check_fraction("relaxation", self.relaxation)

    def init(self, problem: Problem, z: Tensor, previous: Memory | None = None) -> Memory:
        return Memory(None, None, None, None, None, None, 0, Safeguard.init(z, budget=24))

    def step(self, problem: Problem, evaluation: Evaluation, memory: Memory) -> tuple[Tensor, Memory]:
        z, residual = evaluation.z, evaluation.residual
        guard, plain, restart = memory.guard.update(evaluation, patience=12)
        if memory.z is None or memory.residual is None or memory.direction is None or memory.scale is None:
            scale = self._first_scale(problem, z, residual)
            memory = Memory(z, residual, scale * residual, scale, None, None, 0, guard)
            return z + scale * residual, memory
        scale, left, right = memory.scale, memory.left, memory.right
        filled = min(memory.seen, self.history)
        step = z - memory.z
        last = memory.direction
        if memory.seen == 0 and isinstance(problem, Root):
            # The first step tells the scale of g, which the identity does not have (Barzilai and Borwein).
            curvature = (step * (memory.residual - residual)).sum(dim=1, keepdim=True)
            scale = torch.where(curvature != 0, step.square().sum(dim=1, keepdim=True) / curvature.abs(), scale)
            last = scale * memory.residual
        direction, row = scale * residual, scale * step  # H r and H^T s
        if left is not None and right is not None:
            us, vs = left[:, :filled], right[:, :filled]
            direction = direction + torch.bmm(torch.bmm(residual[:, None], vs.mT), us)[:, 0]
            row = row + torch.bmm(torch.bmm(step[:, None], us.mT), vs)[:, 0]
        moved = last - direction  # H y, for y = the fall of the residual
        pivot = (step * moved).sum(dim=1, keepdim=True)
        bound = torch.linalg.vector_norm(step, dim=1) * torch.linalg.vector_norm(moved, dim=1)
        sound = (pivot.abs() > 1e-4 * bound[:, None]) & torch.isfinite(
            pivot
        )  # frozen samples do not move: no rank from them
        column = torch.where(sound, (step - moved) / torch.where(sound, pivot, 1), 0)
        row = torch.where(sound, row, 0)
        direction = direction + column * (row * residual).sum(dim=1, keepdim=True)
        slot = memory.seen % self.history
        left, right = write(left, slot, column, self.history), write(right, slot, row, self.history)
        memory = Memory(z, residual, direction, scale, left, right, memory.seen + 1, guard)
        if isinstance(problem, Root):
            back = evaluation.size > GROWTH * evaluation.best_error
            return torch.where(back[:, None], (z + evaluation.best) / 2, z + direction), memory
        if plain is None or restart is None:
            return z + direction, memory
        proposal = torch.where(plain[:, None], relaxed(evaluation, self.relaxation), z + direction)
        return torch.where(restart[:, None], evaluation.best, proposal), memory

    def _first_scale(self, problem: Problem, z: Tensor, residual: Tensor) -> Tensor:
        scale = torch.full_like(z[:, :1], self.relaxation)
        if isinstance(problem, FixedPoint):
            return scale
        # The size of g says nothing about the distance to its root: move by half the state's size, or by half.
        length = torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp(min=1) / 2
        size = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
        return scale * torch.where(size > length, length / size, 1)
