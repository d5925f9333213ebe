"""Autocast is meant for the user's function: what is done with its outputs keeps the digits of its buffers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def precise(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast, for the algebra of solvers and for derivatives taken on the way.

    In half precision the products of a history lose what it knows, and overflow in float16 where vectors are long; and
    the backward of what a function does outside of autocast would be done in half precision.
    """
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def as_it_is(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """`function` under the autocast of now, wherever it is called: for calls of the user's from within `precise`."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return function
    dtype = torch.get_autocast_dtype(kind)

    def call(argument: Tensor) -> Tensor:
        with torch.autocast(kind, dtype=dtype):
            return function(argument)

    return call
