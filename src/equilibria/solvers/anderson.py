"""Anderson acceleration."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.options import check_fraction, check_integer
from equilibria.problem import Evaluation, Problem
from equilibria.solvers.buffers import write
from equilibria.solvers.picard import relaxed
from equilibria.solvers.safeguard import Safeguard


class Memory(NamedTuple):
    """The last differences of residuals and of relaxed images, newest overwriting oldest, and their correlations."""

    residual: Tensor | None  # (batch, n), of the last evaluation
    image: Tensor | None  # (batch, n), relaxed, of the last evaluation
    residuals: Tensor | None  # (batch, history, n), differences
    images: Tensor | None  # (batch, history, n), differences
    correlations: Tensor | None  # (batch, history, history) of the residuals, the ridge on their diagonal
    scale: Tensor | None  # (batch, history): 1 / length of each, 0 for one that has none to speak of
    seen: int  # differences written so far
    guard: Safeguard


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration, type II, with a relative regulariser and a safeguard.

    >>> eq.fixed_point(torch.cos, torch.zeros(1, 1), solver=eq.Anderson()).value
    tensor([[0.7391]])

    The next iterate is r + f(z) with the part of the residual r removed that the last differences of residuals span:
    gamma = argmin |r - sum_j gamma_j dR_j|, z <- z + w r - sum_j gamma_j (dZ_j + w dR_j). The least-squares problem is
    scaled to unit columns, so that its regulariser means the same at every residual, and columns that depend on newer
    ones are dropped. Where acceleration does not lower the residual plain iteration takes turns, see `Safeguard`.

    Args:
        history: differences kept, at least 1; each costs two buffers of the state's size.
        relaxation: w in (0, 1]; take 0.2 to 0.5 on maps that expand.

    Sources: Anderson (1965); Walker and Ni (2011), eq. 2.2; the alternation with plain steps is in the spirit of Zhang,
    O'Donoghue and Boyd (2020).
    """

    history: int = 6
    relaxation: float = 1.0

    def __post_init__(self) -> None:
        check_integer("history", self.history, 1)
        check_fraction("relaxation", self.relaxation)

    def init(self, problem: Problem, z: Tensor, previous: Memory | None = None) -> Memory:
        guard = Safeguard.init(z, budget=4 * self.history)
        if previous is None or previous.residuals is None or previous.images is None:
            return Memory(None, None, None, None, None, None, 0, guard)
        # The differences still approximate the Jacobian; the last point belongs to the other problem. A sample that
        # ended in NaN left some behind, and 0 * nan is not 0. All are copies: `step` writes into them.
        residuals, images = (torch.nan_to_num(b, 0, 0, 0) for b in (previous.residuals, previous.images))
        correlations, scale = (None if b is None else b.clone() for b in (previous.correlations, previous.scale))
        return Memory(None, None, residuals, images, correlations, scale, previous.seen, guard)

    def step(self, problem: Problem, evaluation: Evaluation, memory: Memory) -> tuple[Tensor, Memory]:
        residual, image = evaluation.residual, relaxed(evaluation, self.relaxation)
        guard, plain, restart = memory.guard.update(evaluation, patience=2 * self.history)
        depth = min(self.history, residual.shape[1])  # more differences than dimensions are always dependent
        residuals, images, correlations, scale, seen = memory[2:7]
        fresh = None
        if memory.residual is not None and memory.image is not None and depth:
            slot = seen % depth
            residuals = write(residuals, slot, residual - memory.residual, depth)
            images = write(images, slot, image - memory.image, depth)
            fresh = residuals[:, slot]
            seen += 1
        if residuals is None or images is None:
            return image, Memory(residual, image, None, None, None, None, seen, guard)
        newest = (seen - 1) % depth
        rows = residual[:, None] if fresh is None else torch.stack([fresh, residual], dim=1)
        products = torch.bmm(rows, residuals.mT)
        if fresh is not None:
            correlations, scale = _correlate(correlations, scale, products[:, 0], newest, depth)
        assert correlations is not None
        assert scale is not None
        memory = Memory(residual, image, residuals, images, correlations, scale, seen, guard)
        gamma = _least_squares(correlations, scale, products[:, -1], newest)
        accelerated = image - torch.bmm(gamma[:, None], images)[:, 0]
        if plain is None or restart is None:
            return accelerated, memory
        proposal = torch.where(plain[:, None], image, accelerated)
        return torch.where(restart[:, None], evaluation.best, proposal), memory


def _ridge(dtype: torch.dtype) -> float:
    return 1e-13 if dtype == torch.float64 else 1e-7


def _correlate(
    correlations: Tensor | None, scale: Tensor | None, row: Tensor, newest: int, depth: int
) -> tuple[Tensor, Tensor]:
    """Enter the products of the newest difference with all of them."""
    unit = 1 + _ridge(row.dtype)
    if correlations is None or scale is None:
        correlations = torch.diag_embed(row.new_full((row.shape[0], depth), unit))
        scale = row.new_zeros(row.shape[0], depth)
    elif torch.is_grad_enabled():
        correlations, scale = correlations.clone(), scale.clone()
    square = row[:, newest, None]
    # A difference that is zero, too small to square, infinite or not a number correlates with none and takes no part.
    own = torch.where(square > torch.finfo(row.dtype).tiny, square, torch.inf).rsqrt()
    scale[:, newest, None] = own
    count = row.shape[1]
    row = (row * scale[:, :count]).nan_to_num(0, 0, 0) * own
    row[:, newest] = unit
    correlations[:, newest, :count] = row
    correlations[:, :count, newest] = row
    return correlations, scale


def _least_squares(correlations: Tensor, scale: Tensor, target: Tensor, newest: int) -> Tensor:
    """Solve the normal equations sample by sample, dropping columns that depend on newer ones."""
    count = target.shape[1]
    correlations, scale = correlations[:, :count, :count], scale[:, :count]
    target = (target * scale).nan_to_num(0, 0, 0)
    lower, info = torch.linalg.cholesky_ex(correlations)
    sound = _pivots(lower) > info[:, None]
    if not bool(sound.all()):
        # Which of two dependent columns is the older shows in the order from the newest on, which is its own inverse.
        position = torch.arange(count, device=target.device)
        order = (newest - position) % count
        ordered, info = torch.linalg.cholesky_ex(correlations[:, order[:, None], order])
        known = position < (info[:, None] - 1) % (count + 1)  # past a failed pivot, counted from 1, it says nothing
        keep = (_pivots(ordered) & known)[:, order] | sound.all(dim=1, keepdim=True)
        apart = torch.eye(count, dtype=target.dtype, device=target.device)
        lower, _ = torch.linalg.cholesky_ex(torch.where(keep[:, :, None] & keep[:, None, :], correlations, apart))
        target = torch.where(keep, target, 0)
    return torch.cholesky_solve(target[:, :, None], lower)[:, :, 0] * scale


def _pivots(lower: Tensor) -> Tensor:
    """Which columns do not depend on those before them: a pivot near the ridge does."""
    return lower.diagonal(dim1=1, dim2=2) > (8 * _ridge(lower.dtype)) ** 0.5
