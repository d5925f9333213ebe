"""Autocast is meant for the user's function: what is done with its outputs keeps the digits of its buffers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on a device now, or None where it is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast_state(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts in which autocast is as it is now: solvers run without, and backward outside the user's own."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def context() -> AbstractContextManager[Any]:
        if not enabled and not torch.is_autocast_enabled(kind):
            return nullcontext()
        # What torch's fused layers cast without grad the cache would hand out with grad, and lose their gradients.
        return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=not torch.is_grad_enabled())

    return context


def precise(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast, for the algebra of solvers and for derivatives taken on the way.

    In half precision the products of a history lose what it knows, and overflow in float16 where vectors are long; and
    the backward of what a function does outside of autocast would be done in half precision.
    """
    if autocast_dtype(tensor.device) is None:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
