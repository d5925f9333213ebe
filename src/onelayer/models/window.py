"""What a forward knows of its tokens before any block runs: who may look at whom, and what came before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Slot = tuple[Tensor, Tensor]
"""What tokens leave in a slot for later ones, `(batch, heads, tokens, size)` each: keys and values."""


class Memory(NamedTuple):
    """A past segment, for the next one to look back at.

    Attributes:
        x: its embedded tokens, `(batch, tokens, width)`.
        states: what entered the block there, `(batch, tokens, state width)` for each slot.
    """

    x: Tensor
    states: tuple[Tensor, ...]


class Window(NamedTuple):
    """Tokens side by side, and those before them.

    Attributes:
        time: number of tokens.
        stored: number of positions that each slot of the past holds, used or not.
        offset: number of those that are used, from the first; the position of the first token here.
        mask: bool `(batch or 1, 1, time, stored + time)`, what each token may look at; `None` where that is all that
            is stored and all tokens up to its own.
        real: bool `(batch, time, 1)`, False for padding; `None` where there is none.
        device: of the tokens.
        tables: what a block adds that depends on positions alone, so that all its applications share it.
    """

    time: int
    stored: int
    offset: int
    mask: Tensor | None
    real: Tensor | None
    device: torch.device
    tables: tuple[Tensor, ...] = ()

    @property
    def positions(self) -> Tensor:
        """Of the tokens, counted from the first of the past, int64 `(time,)`."""
        return torch.arange(self.offset, self.offset + self.time, device=self.device)

    @property
    def seen(self) -> Tensor:
        """Positions of all that can be looked at, stored ones first, int64 `(stored + time,)`."""
        return torch.cat([torch.arange(self.stored, device=self.device), self.positions])

    @property
    def causal(self) -> bool:
        """Whether attention has to keep tokens from those after them by itself."""
        return self.mask is None and self.time > 1


def window(
    time: int, device: torch.device, stored: int = 0, offset: int | None = None, real: Tensor | None = None
) -> Window:
    """The window of some tokens.

    >>> window(2, torch.device("cpu"), stored=1).mask
    tensor([[[[ True,  True, False],
              [ True,  True,  True]]]])

    Args:
        time: number of tokens.
        device: where they are.
        stored: positions that each slot of the past holds.
        offset: positions of them that are used; `None` is all.
        real: `(batch, offset + time)`, 0 or False for padding, also of the past; `None` where there is none.

    Returns:
        The window. A padding token may look at itself, since attention to nothing is not a number.
    """
    offset = stored if offset is None else offset
    if real is not None:
        real = real.bool()
        real = None if bool(real.all()) else real
    if real is None and (stored == 0 or (time == 1 and offset == stored)):
        return Window(time, stored, offset, None, None, device)
    causal = torch.ones(time, time, dtype=torch.bool, device=device).tril()
    used = torch.arange(stored, device=device) < offset
    if real is None:
        mask = torch.cat([used.expand(time, stored), causal], dim=1)
        return Window(time, stored, offset, mask[None, None], None, device)
    past = torch.nn.functional.pad(real[:, :offset], (0, stored - offset))
    here = real[:, offset:]
    itself = torch.eye(time, dtype=torch.bool, device=device)
    among = (causal & here[:, None, :]) | itself
    mask = torch.cat([past[:, None, :].expand(-1, time, -1), among], dim=2)
    return Window(time, stored, offset, mask[:, None], None if bool(here.all()) else here[..., None], device)
