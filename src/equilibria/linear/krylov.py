"""One step of the Arnoldi process, for a batch of independent operators."""

from collections.abc import Callable

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


class Basis:
    """An orthonormal Krylov basis per sample, in memory that grows with the vectors it holds.

    Args:
        first: unit vectors (or zeros) of shape (batch, n).
    """

    def __init__(self, first: Tensor) -> None:
        self._buffer = first[:, None]
        self.count = 1

    @property
    def vectors(self) -> Tensor:
        """(batch, count, n)."""
        return self._buffer[:, : self.count]

    def extend(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Orthogonalise `vector` and append it; returns its coefficients (batch, count) and the norm that was left.

        Where nothing is left (an invariant subspace) the norm is exactly zero and so is the appended vector.
        """
        vectors = self.vectors
        before = torch.linalg.vector_norm(vector, dim=1)
        coefficients = torch.zeros_like(vectors[:, :, 0])
        for _ in range(2):  # classical Gram-Schmidt needs its second pass to be orthogonal to rounding
            projection = torch.bmm(vector[:, None], vectors.mT)
            vector = vector - torch.bmm(projection, vectors)[:, 0]
            coefficients = coefficients + projection[:, 0]
        norm = torch.linalg.vector_norm(vector, dim=1)
        norm = torch.where(norm > 10 * torch.finfo(norm.dtype).eps * before, norm, 0)
        unit = torch.where(norm[:, None] > 0, vector / norm[:, None], 0)
        if self.count == self._buffer.shape[1]:
            grown = unit.new_empty(unit.shape[0], 2 * self.count, unit.shape[1])
            grown[:, : self.count] = self._buffer
            self._buffer = grown
        self._buffer[:, self.count] = unit
        self.count += 1
        return coefficients, norm
