"""What adjoints that differentiate at the solution have in common."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from equilibria.loop import Outcome
from equilibria.status import Agree, Status

Call = Callable[[Tensor], Tensor]
Pull = Callable[[Tensor, Tensor], Tensor]


class _Zero(torch.autograd.Function):
    """Zeros whose backward is `pull`: added to a detached value, they give it a gradient and leave its bits alone."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, z: Tensor, pull: Pull) -> Tensor:
        ctx.save_for_backward(z)
        ctx.pull = pull
        return torch.full_like(delta, -0.0)  # z + 0.0 would turn a -0.0 of z into 0.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.pull(ctx.saved_tensors[0], grads[0]), None, None


def attach(z: Tensor, image: Tensor, bad: Tensor | None, pull: Pull) -> Tensor:
    """`z` bit for bit, whose gradient v reaches `image` as `pull(z, v)`.

    Args:
        z: the solution, (batch, n).
        image: the differentiable evaluation, (batch, n).
        bad: samples to leave out, which get zero gradient, or None.
        pull: from (z, v) to the gradient of `image`; runs with grad mode on where that is to be differentiated.
    """
    if not image.requires_grad:
        return z
    delta = image - z
    if bad is not None:
        delta = torch.where(bad[:, None], 0, delta)
    return z + _Zero.apply(delta, z, pull)


def shield(outcome: Outcome, agree: Agree = bool) -> tuple[Tensor, Tensor | None]:
    """Where to differentiate, and which samples to leave out, or None.

    Zeroing a sample's gradient is not enough where `f` is not finite, since 0 * nan is nan in the sums over samples
    that weights get. So such a sample takes the place of a good one, and `f` is evaluated through `sealed`.
    """
    bad = outcome.status == Status.NONFINITE
    z = outcome.z.detach()
    if not agree(bool(bad.any())):
        return z, None
    good = (~bad).nonzero().flatten()
    if len(good):
        z = torch.where(bad[:, None], z[good[0]], z)
    return z, bad


def restore(value: Tensor, outcome: Outcome, bad: Tensor | None) -> Tensor:
    """`value` with the bad samples back at what the solve returned for them."""
    return value if bad is None else torch.where(bad[:, None], outcome.z.detach(), value)


def sealed(call: Call, bad: Tensor | None) -> Call:
    """`call`, with the NaN of bad samples kept out of its gradients.

    What it saves for backward is freed of the NaN that a bad sample's own inputs bring, and so are the gradients that
    pass from one operation to the next (0 / 0 where a derivative is infinite). Operands that samples share are expanded
    before they meet those of single samples, so that no operation sums infinite derivatives over samples by itself.
    What is left is a compiled function, whose operations nothing of this sees.
    """
    if bad is None:
        return call

    def clean(z: Tensor) -> Tensor:
        with _sealing(bad) as seal:
            return seal(call(z))

    return clean


@contextmanager
def _sealing(bad: Tensor) -> Iterator[Call]:
    start = torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]

    def clean(grad: Tensor | None) -> Tensor | None:
        if grad is None or bool(torch.isfinite(grad).all()):
            return grad
        if bool(bad.all()):
            return torch.zeros_like(grad)
        if not _by_sample(grad, bad):
            return grad
        rows = grad.reshape(len(bad), -1)
        return torch.where(bad[:, None] & ~torch.isfinite(rows), 0, rows).reshape(grad.shape)

    def seal(image: Tensor) -> Tensor:
        nodes, seen = [image.grad_fn], set()
        while nodes:
            node = nodes.pop()
            # Numbers grow as operations are recorded, and leaves have the highest: older nodes are not of this context.
            if node is None or node in seen or not start <= node._sequence_nr() < 2**64 - 1:
                continue
            seen.add(node)
            node.register_hook(lambda grads, _: tuple(map(clean, grads)))
            nodes += [following for following, _ in node.next_functions]
        return image

    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: _cleaned(tensor.detach(), bad), lambda tensor: tensor
    )
    with hooks, _Expanding():
        yield seal


class _Expanding(TorchFunctionMode):
    """Expands the operands of operations between entries, whose derivatives may be infinite, to one shape.

    The w of w / x at x = 0 would sum 0 / 0 over samples; the sum of an expanded w comes after, when it is clean.
    """

    NAMES = frozenset(
        f"{prefix}{name}{suffix}"
        for name in ("div", "divide", "truediv", "true_divide", "pow", "float_power", "atan2", "arctan2", "hypot")
        for prefix, suffix in (("", ""), ("__", "__"), ("__r", "__"))
    ) | {"xlogy", "logaddexp", "logaddexp2", "addcdiv", "fmod", "remainder", "lerp", "xlog1py"}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [arg for arg in args if isinstance(arg, Tensor)]
        if len(operands) > 1 and getattr(func, "__name__", None) in self.NAMES:
            expanded = iter(torch.broadcast_tensors(*operands))
            args = tuple(next(expanded) if isinstance(arg, Tensor) else arg for arg in args)
        return func(*args, **(kwargs or {}))


def _by_sample(tensor: Tensor, bad: Tensor) -> bool:
    """Whether the first dimensions of a tensor can be those of the samples, one or several of them, or a multiple."""
    return any(math.prod(tensor.shape[:k]) % len(bad) == 0 for k in range(1, tensor.ndim + 1))


def _cleaned(tensor: Tensor, bad: Tensor) -> Tensor:
    # By ones, since derivatives divide by what was saved.
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return tensor
    finite = tensor[torch.isfinite(tensor)]
    if not _by_sample(tensor, bad) or not bool((finite != 0).any()):
        # Infinities among zeros alone are an attention mask, which all samples share.
        return torch.where(torch.isnan(tensor), 1, tensor)
    rows = torch.where(torch.isnan(tensor), 1, tensor).reshape(len(bad), -1)
    infinite = torch.isinf(rows)
    if bool(infinite[~bad].any()):
        return rows.reshape(tensor.shape)
    return torch.where(infinite, 1, rows).reshape(tensor.shape)
