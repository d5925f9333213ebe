"""The linear part of a monotone equilibrium: one matrix for each frequency."""

import torch
from torch import Tensor

from equilibria.nn.monotone.frames import Frame

# Squarings of the Gram matrix: its norm is then overestimated by the 64th root of the number of components at most.
SQUARINGS = 4


class Coupling:
    """W = (1 - m) I - A^T A + B - B^T on packed states, (batch, n).

    Args:
        matrices: (frequencies, components, components), of W.
        frame: between states and frequencies.
    """

    def __init__(self, matrices: Tensor, frame: Frame) -> None:
        self.matrices = matrices
        self.frame = frame
        self._inverses: dict[tuple[float, bool], Tensor] = {}
        self._size: float | None = None

    @staticmethod
    def of(a: Tensor, b: Tensor, margin: float, frame: Frame) -> "Coupling":
        """From the matrices of A and B, each (frequencies, components, components)."""
        unit = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return Coupling((1 - margin) * unit - a.mH @ a + b - b.mH, frame)

    @property
    def rate(self) -> Tensor:
        """The matrices of I - W."""
        return (
            torch.eye(self.matrices.shape[-1], dtype=self.matrices.dtype, device=self.matrices.device) - self.matrices
        )

    @property
    def size(self) -> float:
        """A number no less than the norm of I - W."""
        if self._size is None:
            with torch.no_grad():
                self._size = float(norm_bound(self.rate))
        return self._size

    @property
    def transposed(self) -> "Coupling":
        """That of W^T, which shares the size."""
        other = Coupling(self.matrices.detach().mH, self.frame)
        other._size = self.size
        other._inverses = {key: inverse.detach().mH for key, inverse in self._inverses.items()}
        return other

    def product(self, z: Tensor) -> Tensor:
        """W z."""
        return self.frame.back(self.matrices @ self.frame.to(z))

    def resolvent(self, v: Tensor, step: float) -> Tensor:
        """(I + step (I - W))^{-1} v; the inverse is computed once for each step."""
        key = (step, torch.is_grad_enabled())
        if key not in self._inverses:
            unit = torch.eye(self.matrices.shape[-1], dtype=self.matrices.dtype, device=self.matrices.device)
            self._inverses[key], _ = torch.linalg.inv_ex(unit + step * self.rate)
        return self.frame.back(self._inverses[key] @ self.frame.to(v))


def norm_bound(matrices: Tensor) -> Tensor:
    """A scalar no less than the largest spectral norm of `matrices`, (count, n, n), and little above it."""
    tiny = torch.finfo(matrices.dtype).tiny
    # Squares of what is large or small overflow or vanish.
    largest = matrices.abs().amax(dim=(1, 2)).clamp(min=tiny)
    matrices = matrices / largest[:, None, None]
    power = matrices.mH @ matrices
    logarithm = torch.zeros_like(largest)
    for k in range(SQUARINGS + 1):
        scale = torch.linalg.matrix_norm(power).clamp(min=tiny)
        logarithm = logarithm + scale.log() / 2**k
        if k < SQUARINGS:
            power = power / scale[:, None, None]
            power = power @ power
    return (largest * (logarithm / 2).exp()).amax()
