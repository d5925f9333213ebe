"""Arnoldi's method on the transposed Jacobian, whose eigenvalues are those of the Jacobian."""

import torch
from torch import Tensor

from equilibria.diagnostics.jacobian import LOOK, fixed_start
from equilibria.linear import Basis
from equilibria.problem import Linearization


class Arnoldi:
    """The Krylov basis of each sample and the Jacobian projected on it.

    Attributes:
        hessenberg: (batch, limit + 1, limit), float64; the steps taken are filled.
        sizes: (batch,), steps until the basis was complete (an invariant subspace), at most those taken.
        broken: (batch,) bool, a product was not finite.

    Args:
        jacobian: at a point, of at least one sample and one entry.
        limit: steps that there is room for, at most the size of the state.
    """

    def __init__(self, jacobian: Linearization, limit: int) -> None:
        image = jacobian.image
        self.jacobian = jacobian
        self.basis = Basis(fixed_start(image))
        self.hessenberg = image.new_zeros(len(image), limit + 1, limit, dtype=torch.float64)
        self.sizes = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        self.broken = torch.zeros(len(image), dtype=torch.bool, device=image.device)

    @property
    def steps(self) -> int:
        return self.basis.count - 1

    def step(self) -> None:
        """One product, and the column it adds."""
        k = self.steps
        image = self.jacobian.transposed_product(self.basis[k])
        self.broken = self.broken | ~torch.isfinite(image).all(dim=1)
        running = (self.hessenberg[:, k, k - 1] > 0) if k else torch.ones_like(self.broken)
        self.sizes = torch.where(running, k + 1, self.sizes)
        column, norm = self.basis.extend(torch.where(self.broken[:, None], 0, image))
        self.hessenberg[:, : k + 1, k] = column.double()
        self.hessenberg[:, k + 1, k] = norm.double()

    def ritz(self, size: int) -> tuple[Tensor, Tensor]:
        """Ritz values of the first `size` steps and how far each is from an eigenpair; both (batch, size)."""
        values, vectors = torch.linalg.eig(self.hessenberg[:, :size, :size])
        return values, vectors[:, -1].abs() * self.hessenberg[:, size, size - 1, None]


def leading_eigenvalue(jacobian: Linearization, rtol: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """Its absolute value for each sample, float64, NaN where the Jacobian is not finite; and which samples missed."""
    batch, n = jacobian.image.shape
    missed = torch.ones(batch, dtype=torch.bool, device=jacobian.image.device)
    radius = torch.zeros_like(missed, dtype=torch.float64)
    if n == 0 or batch == 0:
        return radius, ~missed
    arnoldi = Arnoldi(jacobian, min(max_steps, n))
    for k in range(1, min(max_steps, n) + 1):
        arnoldi.step()
        if k % LOOK and k < min(max_steps, n):
            continue
        values, distances = arnoldi.ritz(k)
        largest = values.abs().argmax(dim=1, keepdim=True)
        estimate, distance = values.abs().gather(1, largest)[:, 0], distances.gather(1, largest)[:, 0]
        radius = torch.where(missed, estimate, radius)
        missed = missed & (distance > rtol * estimate) & (k < n)
        if not bool((missed & ~arnoldi.broken).any()):
            break
    return torch.where(arnoldi.broken, torch.nan, radius), missed & ~arnoldi.broken
