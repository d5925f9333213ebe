"""Products with a Jacobian at a point."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


class Linearization:
    """Products with the Jacobian J of a function of a packed buffer at one point.

    Args:
        call: from (batch, n) to (batch, n).
        z: the point, of shape (batch, n).
    """

    def __init__(self, call: Callable[[Tensor], Tensor], z: Tensor) -> None:
        self.call = call
        with recording():
            self.z = leaf_at(z)
            self.image = call(self.z)
        self._dual: tuple[Tensor, Tensor | None] | None = None
        self._by_differences = False

    def transposed_product(self, u: Tensor) -> Tensor:
        """J^T u for each sample; zero where the function does not depend on its state."""
        if not self.image.requires_grad:
            return torch.zeros_like(u)
        u = u.to(self.image.dtype)
        try:
            (product,) = torch.autograd.grad(self.image, self.z, u, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "donated buffers" not in str(error):
                raise
            # Compiled for a backward that comes once, as that of another adjoint: evaluated anew for each product.
            with recording():
                image = self.call(self.z)
            (product,) = torch.autograd.grad(image, self.z, u, allow_unused=True)
        return torch.zeros_like(u) if product is None else product

    def product(self, u: Tensor) -> Tensor:
        """J u for each sample, by differentiating the transposed product, which is linear in its vector.

        Fused attention has no second derivative, so that its plain form stands in; where an operation has none at all
        (a compiled function), by central differences.
        """
        if not self.image.requires_grad:
            return torch.zeros_like(u)
        if self._by_differences:
            return self._difference(u)
        try:
            return self._by_duality(self.image, u)
        except RuntimeError as error:
            _refuse_others(error)
        try:
            self._dual = None
            with recording(), sdpa_kernel(SDPBackend.MATH):
                image = self.call(self.z)
            return self._by_duality(image, u)
        except RuntimeError as error:
            _refuse_others(error)
        self._dual = None
        self._by_differences = True
        return self._difference(u)

    def _by_duality(self, image: Tensor, u: Tensor) -> Tensor:
        if self._dual is None:
            with recording():
                w = torch.zeros_like(image, requires_grad=True)
                (transposed,) = torch.autograd.grad(image, self.z, w, create_graph=True, allow_unused=True)
            self._dual = w, transposed
        w, transposed = self._dual
        if transposed is None or not transposed.requires_grad:
            return torch.zeros_like(u)
        u = u.to(transposed.dtype)
        (product,) = torch.autograd.grad(transposed, w, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(u) if product is None else product

    @torch.no_grad()
    def _difference(self, u: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        scale = 1 + torch.linalg.vector_norm(self.z, dim=1, keepdim=True)
        step = torch.finfo(u.dtype).eps ** (1 / 3) * scale / torch.where(size > 0, size, 1)
        difference = self.call(self.z + step * u) - self.call(self.z - step * u)
        return difference / (2 * step)


def recording() -> AbstractContextManager[Any]:
    """Grad mode on, also in inference mode, where `torch.enable_grad` alone changes nothing and says nothing."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.enable_grad()


def leaf_at(z: Tensor) -> Tensor:
    """A leaf of the values of `z` to differentiate at; within `recording`."""
    return (z.clone() if z.is_inference() else z.detach()).requires_grad_()


def _refuse_others(error: RuntimeError) -> None:
    """Raise again what is not the lack of a second derivative, as operations and compiled functions word it."""
    if not any(words in str(error) for words in ("not implemented", "double backward", "donated buffers")):
        raise error
