"""The size of a cell's Jacobian as something to train on."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from equilibria.options import check_callable
from equilibria.precision import precise
from equilibria.transforms import transformed


def jacobian_penalty(f: Callable[[Any], Any], z: Any) -> Tensor:
    """An unbiased estimate of the squared Frobenius norm of the Jacobian of `f` at `z`, per entry of the state.

    Added to a loss, it keeps the equilibrium one that a solver finds in few evaluations.

    >>> layer, x = eq.DEQ(Cell(8)), torch.randn(4, 8)
    >>> z = layer(x)
    >>> loss = z.square().mean() + 0.1 * eq.nn.jacobian_penalty(lambda z: layer.cell(z, x), z)

    Args:
        f: from a state to a state of the same structure and shapes. What it captures gets gradients; it is evaluated
            once.
        z: where, usually an equilibrium; any pytree of floating tensors. It gets no gradient.

    Returns:
        A scalar, float32 at least, the mean over samples and entries of the squared product of one random Gaussian
        vector, drawn from the global generator, with the transposed Jacobian. Backward through it takes second
        derivatives of `f`.

    Raises:
        TypeError: `z` is not made of floating tensors.
        ValueError: `f` changes the structure or a shape of the state, its result has no graph that leads to the state,
            a `torch.func` transform is open, or the state has no entries.

    Source: Bai, Koltun and Kolter (2021), Stabilizing equilibrium models by Jacobian regularization, equation 6, after
    Hutchinson (1990).
    """
    check_callable("f", f)
    leaves, structure = pytree.tree_flatten(z)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        raise TypeError(f"The state must be made of floating tensors; {z!r:.60} is not.")
    size = sum(leaf.numel() for leaf in leaves)
    if size == 0:
        raise ValueError("The state has no entries to take a mean over: leave the penalty out for an empty batch.")
    if transformed():
        raise ValueError("jacobian_penalty takes ordinary gradients on the way: call it outside of torch.func.")
    with torch.enable_grad():
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        outputs, found = pytree.tree_flatten(f(pytree.tree_unflatten(inputs, structure)))
        shapes = [tuple(leaf.shape) for leaf in inputs], [tuple(leaf.shape) for leaf in outputs]
        if found != structure or shapes[0] != shapes[1]:
            raise ValueError(f"f must keep structure and shapes of the state, and made {shapes[1]} of {shapes[0]}.")
        followed = [out for out in outputs if out.requires_grad]
        # In the precision of the operations, but without autocast, which would do sums of this backward in half.
        with precise(inputs[0]):
            vectors = [torch.randn_like(out) for out in followed]
            products = torch.autograd.grad(followed, inputs, vectors, create_graph=True, allow_unused=True)
            squares = [_squared(product) for product in products if product is not None]
        if not squares:
            raise ValueError("No graph leads from f(z) back to z: f must not detach the state or switch gradients off.")
        return torch.stack(squares).sum() / size


def _squared(product: Tensor) -> Tensor:
    return product.to(torch.promote_types(product.dtype, torch.float32)).square().sum()
