"""One step of the Arnoldi process, for a batch of independent operators."""

from collections.abc import Callable

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


# Vectors are kept in blocks of this many: memory grows with what is held, and nothing is ever copied to grow.
BLOCK = 8


class Basis:
    """An orthonormal Krylov basis per sample.

    Args:
        first: unit vectors (or zeros) of shape (batch, n).
    """

    def __init__(self, first: Tensor) -> None:
        self._blocks: list[Tensor] = []
        self.count = 0
        self._append(first)

    def __getitem__(self, k: int) -> Tensor:
        """The vector k of every sample, (batch, n)."""
        return self._blocks[k // BLOCK][:, k % BLOCK]

    def project(self, vector: Tensor) -> Tensor:
        """Inner products with the vectors, (batch, count)."""
        return torch.cat([torch.bmm(vector[:, None], block.mT)[:, 0] for block in self._filled(self.count)], dim=1)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Sum of the first vectors, weighted by coefficients of shape (batch, k <= count); (batch, n)."""
        blocks = self._filled(coefficients.shape[1])
        parts = coefficients.split([block.shape[1] for block in blocks], dim=1)
        total = torch.bmm(parts[0][:, None], blocks[0])[:, 0]
        for part, block in zip(parts[1:], blocks[1:], strict=True):
            total = total + torch.bmm(part[:, None], block)[:, 0]
        return total

    def extend(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Orthogonalise `vector` and append it; returns its coefficients (batch, count) and the norm that was left.

        Where nothing is left (an invariant subspace) the norm is exactly zero and so is the appended vector.
        """
        before = torch.linalg.vector_norm(vector, dim=1)
        coefficients = vector.new_zeros(vector.shape[0], self.count)
        for _ in range(2):  # classical Gram-Schmidt needs its second pass to be orthogonal to rounding
            projection = self.project(vector)
            vector = vector - self.combine(projection)
            coefficients = coefficients + projection
        norm = torch.linalg.vector_norm(vector, dim=1)
        norm = torch.where(norm > 10 * torch.finfo(norm.dtype).eps * before, norm, 0)
        self._append(torch.where(norm[:, None] > 0, vector / norm[:, None], 0))
        return coefficients, norm

    def _append(self, vector: Tensor) -> None:
        if self.count % BLOCK == 0:
            self._blocks.append(vector.new_empty(vector.shape[0], BLOCK, vector.shape[1]))
        self._blocks[-1][:, self.count % BLOCK] = vector
        self.count += 1

    def _filled(self, count: int) -> list[Tensor]:
        blocks = self._blocks[: -(-count // BLOCK)]
        return [*blocks[:-1], blocks[-1][:, : count - BLOCK * (len(blocks) - 1)]]
