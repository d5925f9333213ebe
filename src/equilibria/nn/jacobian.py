"""The size of a cell's Jacobian as something to train on."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from equilibria.options import check_callable
from equilibria.precision import precise
from equilibria.problem.linearization import leaf_at, recording
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
        vector, drawn from the global generator, with the transposed Jacobian; 0 for an empty batch. Backward through it
        takes second derivatives of `f`, which a compiled function has none of.

    Raises:
        TypeError: `z` is not made of floating tensors.
        ValueError: `f` changes the structure or a shape of the state, its result has no graph that leads to the state,
            or a `torch.func` transform is open.

    Source: Bai, Koltun and Kolter (2021), Stabilizing equilibrium models by Jacobian regularization, equation 6, after
    Hutchinson (1990).
    """
    check_callable("f", f)
    leaves, structure = pytree.tree_flatten(z)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        raise TypeError(f"The state must be made of floating tensors; {z!r:.60} is not.")
    size = max(sum(leaf.numel() for leaf in leaves), 1)
    if transformed():
        raise ValueError("jacobian_penalty takes ordinary gradients on the way: call it outside of torch.func.")
    # Fused attention has no second derivative, so that its plain form stands in. An activation checkpoint around would
    # run all that it holds anew for the gradient in here, so that this one evaluation keeps its tensors itself:
    # detached, since a graph that holds an output of its own is never freed.
    keeps = saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)
    with recording(), keeps, sdpa_kernel(SDPBackend.MATH):
        inputs = [leaf_at(leaf) for leaf in leaves]
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
