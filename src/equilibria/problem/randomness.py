"""Detects functions that draw random numbers, and says which part of them does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class Watch:
    """Whether a default generator has moved since."""

    def __init__(self, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generators.append(torch.cuda.default_generators[index])
        self._before = self._states()

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]

    def moved(self) -> bool:
        return any(not torch.equal(now, then) for now, then in zip(self._states(), self._before, strict=True))


# Further calls that `difference` makes: one at the point itself, the rest elsewhere. Two masks of a small state may be
# alike by chance, four hardly.
CALLS = 5


def difference(call: Callable[[Tensor], Tensor], z: Tensor, output: Tensor, elsewhere: Tensor) -> float:
    """How far calls at one point lie apart: at `z`, where one gave `output`, or at another point; 0 for rounding.

    The usual start is zeros, where dropout changes nothing, so that another point has to be looked at as well.
    """
    first = call(elsewhere)
    pairs = [(output, call(z)), *((first, call(elsewhere)) for _ in range(CALLS - 2))]
    apart = [_difference(one, other) for one, other in pairs]
    return max(apart)


def _difference(one: Tensor, other: Tensor) -> float:
    apart, size = (torch.nan_to_num(t).square().mean().sqrt() for t in (one - other, other))
    return apart.item() if apart > 1e-3 * size else 0.0


def culprits(call: Callable[[], Any], device: torch.device) -> str:
    """The modules whose own forward draws random numbers in a call, in words; empty where no module does."""
    found: dict[str, None] = {}
    with _hooks(device, lambda module: found.setdefault(repr(module).split("\n")[0])):
        call()
    return f" in {', '.join(found)}" if found else ""


@contextmanager
def _hooks(device: torch.device, tell: Callable[[nn.Module], object]) -> Iterator[None]:
    open_calls: list[tuple[Watch, list[bool]]] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        open_calls.append((Watch(device), []))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        watch, inner = open_calls.pop()
        if watch.moved():
            if not inner:
                tell(module)
            for _, others in open_calls:
                others.append(True)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
