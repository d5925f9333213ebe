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
    """The last differences of residuals and of relaxed images, newest overwriting oldest, and their Gram matrix."""

    residual: Tensor | None  # (batch, n), of the last evaluation
    image: Tensor | None  # (batch, n), relaxed, of the last evaluation
    residuals: Tensor | None  # (batch, history, n), differences
    images: Tensor | None  # (batch, history, n), differences
    gram: Tensor | None  # (batch, history, history)
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
        if previous is None or previous.residuals is None or previous.images is None or previous.gram is None:
            return Memory(None, None, None, None, None, 0, guard)
        # The differences still approximate the Jacobian; the last point belongs to the other problem. A sample that
        # ended in NaN left some behind, and 0 * nan is not 0. All are copies: `step` writes into them.
        residuals, images = (torch.nan_to_num(b, 0, 0, 0) for b in (previous.residuals, previous.images))
        return Memory(None, None, residuals, images, previous.gram.clone(), previous.seen, guard)

    def step(self, problem: Problem, evaluation: Evaluation, memory: Memory) -> tuple[Tensor, Memory]:
        residual, image = evaluation.residual, relaxed(evaluation, self.relaxation)
        guard, plain, restart = memory.guard.update(evaluation, patience=2 * self.history)
        residuals, images, gram, seen = memory.residuals, memory.images, memory.gram, memory.seen
        depth = min(self.history, residual.shape[1])  # more differences than dimensions are always dependent
        rows = residual[:, None]
        if memory.residual is not None and memory.image is not None and depth:
            residuals = write(residuals, seen % depth, residual - memory.residual, depth)
            images = write(images, seen % depth, image - memory.image, depth)
            rows = torch.stack([residuals[:, seen % depth], residual], dim=1)
            seen += 1
        memory = Memory(residual, image, residuals, images, gram, seen, guard)
        if residuals is None or images is None:
            return image, memory
        slot, filled = (seen - 1) % depth, min(seen, depth)
        products = torch.bmm(rows, residuals[:, :filled].mT)
        if rows.shape[1] == 2:
            gram = _write_row(gram, slot, products[:, 0], depth)
            memory = memory._replace(gram=gram)
        assert gram is not None
        newest_first = [(slot - k) % filled for k in range(filled)]
        gamma = _least_squares(gram[:, :filled, :filled], products[:, -1], newest_first)
        accelerated = image - torch.bmm(gamma[:, None], images[:, :filled])[:, 0]
        if plain is None or restart is None:
            return accelerated, memory
        proposal = torch.where(plain[:, None], image, accelerated)
        return torch.where(restart[:, None], evaluation.best, proposal), memory


def _write_row(gram: Tensor | None, slot: int, row: Tensor, depth: int) -> Tensor:
    if gram is None:
        gram = row.new_zeros(row.shape[0], depth, depth)
    elif torch.is_grad_enabled():
        gram = gram.clone()
    gram[:, slot, : row.shape[1]] = row
    gram[:, : row.shape[1], slot] = row
    return gram


def _least_squares(gram: Tensor, target: Tensor, order: list[int]) -> Tensor:
    """Solve the normal equations sample by sample, dropping columns that depend on ones earlier in `order`."""
    permutation = torch.tensor(order, device=gram.device)
    gram, target = gram[:, permutation[:, None], permutation], target[:, permutation]
    ridge = 1e-13 if gram.dtype == torch.float64 else 1e-7
    with torch.no_grad():
        diagonal = gram.diagonal(dim1=1, dim2=2)
        usable = torch.isfinite(diagonal) & (diagonal > torch.finfo(gram.dtype).tiny)
        scale = torch.where(usable, diagonal, 1).rsqrt()
        eye = torch.eye(len(order), dtype=gram.dtype, device=gram.device)
        weights = scale[:, :, None] * scale[:, None, :]

    def factor(keep: Tensor) -> tuple[Tensor, Tensor]:
        pairs = keep[:, :, None] & keep[:, None, :]
        return torch.linalg.cholesky_ex(torch.where(pairs, gram * weights, eye) + ridge * eye)

    with torch.no_grad():
        lower, info = factor(usable)
        # A pivot near the ridge is a dependent column; past a failed one the factor says nothing.
        position = torch.arange(len(order), device=gram.device)
        sound = (info[:, None] == 0) | (position < info[:, None] - 1)
        keep = usable & sound & (lower.diagonal(dim1=1, dim2=2).square() > 8 * ridge)
        kept = bool((keep == usable).all())
    if torch.is_grad_enabled() or not kept:  # the factor above has no graph
        lower, _ = factor(keep)
    right = torch.where(keep, target * scale, 0)
    gamma = torch.cholesky_solve(right[:, :, None], lower)[:, :, 0] * scale
    return gamma[:, torch.argsort(permutation)]
