"""What keeps a function the same at every evaluation of a solve: its buffers, and the random numbers that it draws."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from equilibria.transforms import outside, transformed

SEEDS = 2**63 - 1

# A buffer of a module: the module, its name there, and a value.
Place = tuple[nn.Module, str, Tensor]


class _Steady:
    """`f` for the length of one solve and its backward.

    Buffers of parts of `module` that are training (statistics of BatchNorm, vectors of spectral normalisation) have at
    every evaluation the values that they had at the start; the k-th call of `draw` in an evaluation gets the same
    numbers in all of them.
    """

    def __init__(self, f: Callable[..., Any], module: nn.Module | None) -> None:
        self.f = f
        self._outer = _current.get()
        self._seed: int | None = None
        self._numbers: dict[tuple[int, torch.Size, torch.device], Tensor] = {}
        self._draws = 0
        parts = [] if module is None else [part for part in module.modules() if part.training]
        owned = [(part, name, b) for part in parts for name, b in part._buffers.items() if b is not None]
        self._start = _copied(owned)
        self._end: list[Place] = []
        self._first = True

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        token = _current.set(self)
        self._draws = 0
        try:
            return self._moving(*inputs, **keywords) if self._start else self.f(*inputs, **keywords)
        finally:
            _current.reset(token)

    def _moving(self, *inputs: Any, **keywords: Any) -> Any:
        kept = _now(self._start)
        trial = _copied(self._start)
        _put(trial)
        try:
            return self.f(*inputs, **keywords)
        finally:
            self._end = [(part, name, new.detach()) for part, name, new in _now(trial)]
            _put(kept)
            if self._first:
                # What stays as it is, such as a mask, need not be copied again. Versions do not tell: BatchNorm's
                # statistics move without one; nor does each value: a mean of zero stays zero at a start of zeros.
                pairs = zip(self._end, self._start, strict=True)
                moving = {id(part) for (part, _, new), (*_, old) in pairs if not torch.equal(new, old)}
                moved = [id(part) in moving for part, *_ in self._start]
                self._start, self._end = (list(compress(places, moved)) for places in (self._start, self._end))
                self._first = False

    def settle(self) -> None:
        """Move the buffers once, to where the last evaluation left them, and the global generator where it was used."""
        with torch.no_grad():
            for part, name, value in self._end:
                buffer = getattr(part, name)
                if isinstance(buffer, Tensor) and buffer.shape == value.shape:
                    buffer.copy_(value)
                else:
                    part._buffers[name] = value
        if self._seed is not None and self._outer is None:
            _new_seed(torch.default_generator)

    def numbers(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The answer to the next `draw` of this evaluation."""
        key = (self._next(), shape, device)
        if key not in self._numbers:
            with outside():
                generator = torch.Generator(device).manual_seed(self._stream(key[0]))
                self._numbers[key] = torch.rand(shape, generator=generator, device=device)
        return self._numbers[key]

    def _next(self) -> int:
        self._draws += 1
        return self._draws

    def _stream(self, k: int) -> int:
        if self._seed is None and self._outer is not None:
            # A solve inside an evaluation of another is a part of that function, which is to stay the same too.
            self._seed = self._outer._stream(self._outer._next())
        elif self._seed is None:
            # The global generator stays where it is until the end: if it moves before, something else has moved it.
            self._seed = _new_seed(torch.Generator().set_state(torch.get_rng_state()))
        return _new_seed(torch.Generator().manual_seed((self._seed + k) % SEEDS))


_current: ContextVar[_Steady | None] = ContextVar("the function whose evaluation is under way", default=None)


def _copied(places: list[Place]) -> list[Place]:
    copies: dict[int, Tensor] = {}  # a buffer that two modules share stays one
    return [(part, name, copies.setdefault(id(value), value.detach().clone())) for part, name, value in places]


def _now(places: list[Place]) -> list[Place]:
    return [(part, name, getattr(part, name)) for part, name, _ in places]


def _put(places: list[Place]) -> None:
    for part, name, value in places:
        part._buffers[name] = value


def _new_seed(generator: torch.Generator) -> int:
    return int(torch.randint(SEEDS, (), generator=generator))


def hold(f: Callable[..., Any], module: Any = None) -> _Steady:
    """`f` as one function, the same at every call.

    Args:
        f: the user's function.
        module: the module behind it; None is `f` itself.
    """
    module = f if module is None else module
    # What transforms have wrapped must not be kept from one evaluation to the next.
    return _Steady(f, module if isinstance(module, nn.Module) and not transformed() else None)


@contextmanager
def steady(f: Callable[..., Any], module: Any = None) -> Iterator[Callable[..., Any]]:
    """The same for the length of a solve; one that succeeds moves the buffers of the module once."""
    held = hold(f, module)
    yield held
    held.settle()


def solving() -> bool:
    """Whether this runs within an evaluation of a solve."""
    return _current.get() is not None


def draw(shape: torch.Size, device: torch.device) -> Tensor:
    """Random numbers in [0, 1): within a solve the same at every evaluation of it, elsewhere new ones."""
    current = _current.get()
    return torch.rand(shape, device=device) if current is None else current.numbers(shape, device)
