"""Linear systems as fixed-point problems."""

from collections.abc import Callable

import torch
from torch import Tensor

from equilibria.norms import residual_size
from equilibria.problem.evaluation import Evaluation
from equilibria.problem.linearization import Linearization
from equilibria.problem.splitting import Splitting


class Affine:
    """The fixed-point problem u = b + M u, for solving linear systems (I - M) u = b by a nonlinear solver.

    The residual it reports is relative to `b`, which is what a gradient's accuracy is measured against.

    Args:
        product: u -> M u, of shape (batch, n).
        b: right-hand side, of shape (batch, n), finite.
        rtol: relative tolerance of the residual.
        level: the relative residual that rounding alone explains.
        plain: it is iterated plainly. What then stands still to the last bit has converged entry by entry, also where
            entries lie many orders of magnitude apart, as the gradients of a deep network do; elsewhere a residual is
            known to the rounding of u alone. With `rtol` 0 it is iterated until then.
    """

    # Its parts, where it comes in some.
    splitting: Splitting | None = None

    def __init__(
        self, product: Callable[[Tensor], Tensor], b: Tensor, rtol: float, level: float, plain: bool = False
    ) -> None:
        self.product = product
        self.b = b
        self.rtol = rtol
        self.level = level
        self.floor = 0.0 if plain and rtol == 0 else level
        self.plain = plain
        self.evaluations = 0
        self._scale = torch.linalg.vector_norm(b, dim=1)

    def evaluate(self, u: Tensor) -> Evaluation:
        """One product, and the residual at `u`."""
        self.evaluations += 1
        image = self.b + self.product(u)
        residual = image - u
        size = residual_size(residual, u)
        if self.plain:
            size = torch.where((residual == 0).all(dim=1), 0, size)
        error = torch.where(size == 0, size, size / self._scale)
        return Evaluation(u, image, residual, error, size, size <= self.rtol * self._scale, u, error)

    def linearize(self, u: Tensor) -> Linearization:
        """Products with M, which is its own derivative, and with its transpose."""
        return Linearization(lambda u: self.b + self.product(u), u)

    def round(self, u: Tensor) -> Tensor:
        """The vector itself: it is never handed out in another dtype."""
        return u
