"""What adjoints that differentiate at the solution have in common."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from equilibria.loop import Outcome
from equilibria.status import Status

Pull = Callable[[Tensor, Tensor], Tensor]


class _Zero(torch.autograd.Function):
    """Zeros whose backward is `pull`: added to a detached value, they give it a gradient and leave its bits alone."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, z: Tensor, pull: Pull, refusal: str) -> Tensor:
        ctx.save_for_backward(z)
        ctx.pull = pull
        ctx.refusal = refusal
        return torch.full_like(delta, -0.0)  # z + 0.0 would turn a -0.0 of z into 0.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(ctx.refusal)
        return ctx.pull(ctx.saved_tensors[0], grads[0]), None, None, None


def attach(z: Tensor, image: Tensor, bad: Tensor | None, pull: Pull, refusal: str) -> Tensor:
    """`z` bit for bit, whose gradient v reaches `image` as `pull(z, v)`.

    Args:
        z: the detached solution, (batch, n).
        image: the differentiable evaluation, (batch, n).
        bad: samples to leave out, which get zero gradient, or None.
        pull: from (z, v) to the gradient of `image`.
        refusal: what to say when second derivatives are asked for.
    """
    if not image.requires_grad:
        return z
    delta = image - z
    if bad is not None:
        delta = torch.where(bad[:, None], 0, delta)
    return z + _Zero.apply(delta, z, pull, refusal)


def shield(outcome: Outcome) -> tuple[Tensor, Tensor | None, AbstractContextManager[Any]]:
    """Where to differentiate, which samples to leave out, and a context that keeps their NaN out of gradients.

    Zeroing a sample's gradient is not enough where `f` is not finite, since 0 * nan is nan in the sums over samples
    that weights get. So such a sample takes the place of a good one, and what `f` saves for backward is freed of the
    NaN that its own inputs bring.
    """
    bad = outcome.status == Status.NONFINITE
    z = outcome.z.detach()
    if not bool(bad.any()):
        return z, None, nullcontext()
    good = (~bad).nonzero().flatten()
    if len(good):
        z = torch.where(bad[:, None], z[good[0]], z)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: _cleaned(tensor, bad), lambda tensor: tensor)
    return z, bad, hooks


def _cleaned(tensor: Tensor, bad: Tensor) -> Tensor:
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return tensor
    finite = tensor[torch.isfinite(tensor)]
    if tensor.ndim == 0 or tensor.shape[0] % len(bad) or not bool((finite != 0).any()):
        # Infinities among zeros alone are an attention mask, which all samples share.
        return torch.where(torch.isnan(tensor), 0, tensor)
    rows = torch.where(torch.isnan(tensor), 0, tensor).reshape(len(bad), -1)
    infinite = torch.isinf(rows)
    if bool(infinite[~bad].any()):
        return rows.reshape(tensor.shape)
    return torch.where(infinite, 0, rows).reshape(tensor.shape)


def autocast_state(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts in which autocast is as it is now: backward runs outside the user's own."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
