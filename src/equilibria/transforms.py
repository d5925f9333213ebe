"""What `torch.func` transforms, and forward-mode differentiation, have wrapped a tensor in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._functorch.pyfunctorch import GradInterpreter, retrieve_current_functorch_interpreter
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

# Nothing of this is public in torch; it is what `torch.func` itself is made of, and all that the library uses of it.
_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def transforming() -> bool:
    """Whether a `torch.func` transform is open."""
    return torch._C._are_functorch_transforms_active()


def transformed() -> bool:
    """Whether a transform or a level of forward mode is open, so that ordinary graphs do not suffice."""
    return transforming() or forward_ad._current_level >= 0


def traced() -> bool:
    """Whether operations are recorded rather than run, as `torch.func.linearize` does: no loop can look at its data."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def followed(tensor: Tensor) -> bool:
    """Whether a plain tensor carries a derivative."""
    return tensor.requires_grad or (
        forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
    )


def peel(tensor: Tensor, unbatch: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The plain data inside a tensor; `unbatch(inside, dim)` says what becomes of an axis that a `vmap` maps."""
    if not transforming():
        with forward_ad._set_fwd_grad_enabled(False):
            return tensor.detach()
    interpreter = retrieve_current_functorch_interpreter()
    mine = _functorch.maybe_get_level(tensor) == interpreter.level()
    dim = _functorch.maybe_get_bdim(tensor) if mine and _functorch.is_batchedtensor(tensor) else None
    inside = _functorch.get_unwrapped(tensor) if mine else tensor
    with interpreter.lower():
        return peel(inside if dim is None else unbatch(inside, dim), unbatch)


def first(inside: Tensor, dim: int) -> Tensor:
    """One entry of a mapped axis, to stand for them all."""
    shape = list(inside.shape)
    if shape.pop(dim) == 0:
        return inside.new_zeros(shape)
    return inside.select(dim, 0)


def in_front(inside: Tensor, dim: int) -> Tensor:
    """All entries of a mapped axis, as the first axis."""
    return inside.movedim(dim, 0)


@contextmanager
def beside_tangents(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Within the rule of a tangent: the tensors without tangents of this level, and with those of all levels below.

    Forward mode is off there, at the levels below as well, where it would lose tangents of tangents in silence.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield tuple(forward_ad.unpack_dual(tensor).primal for tensor in tensors)


@contextmanager
def outside() -> Iterator[None]:
    """Where all transforms that are open now are not."""
    if not transforming():
        yield
        return
    interpreter = retrieve_current_functorch_interpreter()
    grad = torch.is_grad_enabled()
    if isinstance(interpreter, GradInterpreter):
        grad = interpreter.prev_grad_mode()
    with interpreter.lower(), torch.set_grad_enabled(grad), outside():
        yield


class Escapes(TorchFunctionMode):
    """Calls `refuse` before an operation on a tensor that belongs to a transform which is not open here."""

    def __init__(self, refuse: Callable[[], object]) -> None:
        super().__init__()
        self.refuse = refuse

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        level = _functorch.maybe_current_level() or 0
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and (_functorch.maybe_get_level(leaf) or 0) > level:
                self.refuse()
        return func(*args, **(kwargs or {}))
