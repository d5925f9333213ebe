"""Norms: from one leaf, (batch, ...), to one number per sample, (batch,)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Norm = Callable[[Tensor], Tensor]


def rms_norm(leaf: Tensor) -> Tensor:
    """Root-mean-square over the entries of each sample: width does not change what a tolerance means.

    >>> rms_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([3.5355, 0.0000])

    Args:
        leaf: floating tensor of shape (batch, ...).

    Returns:
        Tensor of shape (batch,); 0 for a sample without entries. Half precision is summed in float32. Entries whose
        squares underflow (below 1e-19 in float32) leave a lower bound, sqrt(entries) from the truth at most; never 0.
    """
    flat = leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:]))
    if flat.shape[1] == 0:
        return flat.new_zeros(flat.shape[0])
    dtype = _accumulation(flat)
    # Squares underflow to zero long before entries do; the largest entry bounds the norm from below.
    least = flat.abs().amax(dim=1).to(dtype)
    return torch.maximum(torch.linalg.vector_norm(flat, dim=1, dtype=dtype), least) * flat.shape[1] ** -0.5


def max_norm(leaf: Tensor) -> Tensor:
    """Largest absolute entry of each sample: no single entry (one token, one pixel) can hide in a mean.

    >>> max_norm(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
    tensor([4., 0.])

    Args:
        leaf: floating tensor of shape (batch, ...).

    Returns:
        Tensor of shape (batch,); 0 for a sample without entries.
    """
    flat = leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:]))
    if flat.shape[1] == 0:
        return flat.new_zeros(flat.shape[0])
    return flat.abs().amax(dim=1).to(_accumulation(flat))


def residual_size(residual: Tensor, x: Tensor) -> Tensor:
    """The norm of a residual for each sample, no less than what rounding of `x` leaves to be known of it.

    Where x has outgrown b by 1 / eps, as on singular systems, A x - b cancels whatever x is.
    """
    noise = 0.25 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x, dim=1)
    return torch.maximum(torch.linalg.vector_norm(residual, dim=1), noise)


def _accumulation(leaf: Tensor) -> torch.dtype:
    return torch.promote_types(leaf.dtype, torch.float32)
