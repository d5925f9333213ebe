"""How far an embedded network is from the network itself, in value and gradient."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn


def floating(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def error(one: Tensor | None, other: Tensor | None) -> float:
    """The largest difference relative to the largest entry; 0 where both are the same, or none."""
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    apart = (one - other).abs().max().item() if one.numel() else 0.0
    return apart if apart == 0 else apart / max(one.abs().max().item(), 1e-300)


def loss(outputs: Any) -> Tensor:
    """One number in which every entry of every output counts differently."""
    weights = [torch.cos(torch.arange(t.numel(), dtype=t.dtype)).reshape(t.shape) for t in floating(outputs)]
    return sum((w * t).sum() for w, t in zip(weights, floating(outputs), strict=True))


def errors(network: nn.Module, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """The largest error of any output, and of the gradient of any parameter and floating input."""
    inputs = tuple(t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs)
    wanted, outputs = network(*inputs), layer(*inputs)
    assert pytree.tree_structure(wanted) == pytree.tree_structure(outputs)
    pairs = list(zip(pytree.tree_leaves(wanted), pytree.tree_leaves(outputs), strict=True))
    tensors = [*network.parameters(), *floating(inputs)]
    gradients = [torch.autograd.grad(loss(tree), tensors, allow_unused=True) for tree in (wanted, outputs)]
    return max(error(a, b) for a, b in pairs), max(error(a, b) for a, b in zip(*gradients, strict=True))
