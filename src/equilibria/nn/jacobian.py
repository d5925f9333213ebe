"""The size of a cell's Jacobian as something to train on."""

from collections.abc import Callable

import torch
from torch import Tensor


def jacobian_penalty(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """An unbiased estimate of the squared Frobenius norm of the Jacobian of `f` at `z`, per entry of the state.

    Added to a loss, it keeps the equilibrium one that a solver finds in few evaluations.

    >>> layer, x = eq.DEQ(Cell(8)), torch.randn(4, 8)
    >>> z = layer(x)
    >>> loss = z.square().mean() + 0.1 * eq.nn.jacobian_penalty(lambda z: layer.cell(z, x), z)

    Args:
        f: from a state to a state of the same shape. What it captures gets gradients; it is evaluated once.
        z: where, usually an equilibrium; it gets no gradient.

    Returns:
        A scalar, the mean over samples and entries of the squared product of one random Gaussian vector, drawn from the
        global generator, with the transposed Jacobian. Backward through it takes second derivatives of `f`.

    Raises:
        ValueError: `f` changes the shape of the state.

    Source: Bai, Koltun and Kolter (2021), Stabilizing equilibrium models by Jacobian regularization, equation 6, after
    Hutchinson (1990).
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        out = f(z)
        if out.shape != z.shape:
            raise ValueError(f"f must keep the shape of the state, and made {tuple(out.shape)} of {tuple(z.shape)}.")
        (product,) = torch.autograd.grad(out, z, torch.randn_like(out), create_graph=True)
        return product.float().square().mean() if product.dtype != torch.float64 else product.square().mean()
