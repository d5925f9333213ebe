"""How a model reads the tokens that generation has so far: from what earlier ones left, or all of them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from onelayer.models.language_model import LanguageModel, Output
from onelayer.models.window import Slot

Text = Sequence[int]


class Reader(Protocol):
    """Reads the windows of some texts and says what may follow each."""

    def restart(self, windows: Sequence[Text]) -> list[Output]:
        """Reads windows anew, of one or more tokens each; the last token is the last of the last output."""
        ...

    def advance(self, tokens: Text) -> Output:
        """Reads one more token of each window."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes of what is kept from one token to the next."""
        ...


class CachedReader:
    """Solves for a new token alone, with the keys and values that the tokens before it left at their equilibrium.

    One slot of keys and values serves an equilibrium model, whatever its effective depth; its explicit twins take one
    for each layer. The slots are allocated once, for a whole context. A token is given views of the part in use, not
    the whole slots with `offset`: attention then neither reads nor masks what is not used yet.

    >>> from onelayer.models.configuration import ModelConfig
    >>> reader = CachedReader(LanguageModel(ModelConfig(width=64, heads=2, context=32)).eval())
    >>> with torch.no_grad():
    ...     outputs = reader.restart([b"def f", b"x = "])
    ...     reader.advance(b"(1").logits.shape
    torch.Size([2, 1, 256])
    >>> reader.stored_bytes == 2 * 2 * 32 * 64 * 4                              # keys and values, of one slot
    True

    Args:
        model: in evaluation mode.
        chunk: tokens of a window that are read by one solve; `None` is all.
        warm: whether the solve for a token starts at the state of the token before it, not at the model's own start.
    """

    def __init__(self, model: LanguageModel, chunk: int | None = None, warm: bool = False) -> None:
        self._model = model
        self._chunk = chunk
        self._warm = warm
        self._slots: tuple[Slot, ...] = ()
        self._real: Tensor | None = None
        self._used = 0
        self._state: Tensor | None = None

    def restart(self, windows: Sequence[Text]) -> list[Output]:
        """Reads windows anew, chunk by chunk."""
        tokens, self._real = padded(windows, self._model.embedding.weight.device)
        self._used, self._state = 0, None
        chunk = tokens.shape[1] if self._chunk is None else self._chunk
        return [self._read(part, None) for part in tokens.split(chunk, dim=1)]

    def advance(self, tokens: Text) -> Output:
        """Reads one more token of each window."""
        if self._real is not None:
            self._real = torch.nn.functional.pad(self._real, (0, 1), value=True)
        column = torch.tensor(list(tokens), device=self._model.embedding.weight.device)[:, None]
        return self._read(column, self._state if self._warm else None)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the slots."""
        return sum(part.nbytes for slot in self._slots for part in slot)

    def _read(self, tokens: Tensor, start: Tensor | None) -> Output:
        used, end = self._used, self._used + tokens.shape[1]
        past = tuple((keys[:, :, :used], values[:, :, :used]) for keys, values in self._slots) if used else None
        real = None if self._real is None else self._real[:, :end]
        output = self._model(tokens, real=real, past=past, start=start, remember=True)
        if not self._slots:
            self._slots = tuple((self._room(keys), self._room(values)) for keys, values in output.left)
        for slot, left in zip(self._slots, output.left, strict=True):
            for part, new in zip(slot, left, strict=True):
                part[:, :, used:end] = new
        self._used, self._state = end, output.state[:, -1:]
        return output

    def _room(self, part: Tensor) -> Tensor:
        batch, heads, _, size = part.shape
        return part.new_zeros(batch, heads, self._model.config.context, size)


class WholeReader:
    """Solves for the whole window again at every token: what the cache is held against.

    >>> from onelayer.models.configuration import ModelConfig
    >>> reader = WholeReader(LanguageModel(ModelConfig(width=64, heads=2, context=32)).eval())
    >>> with torch.no_grad():
    ...     outputs = reader.restart([b"def f", b"x = "])
    ...     reader.advance(b"(1").logits.shape
    torch.Size([2, 6, 256])

    Args:
        model: in evaluation mode.
        warm: whether a solve starts at the states that the one before ended in, the new token at that of the one before
            it, instead of the model's own start.
    """

    def __init__(self, model: LanguageModel, warm: bool = False) -> None:
        self._model = model
        self._warm = warm
        self._windows: list[list[int]] = []
        self._state: Tensor | None = None

    def restart(self, windows: Sequence[Text]) -> list[Output]:
        """Reads windows anew."""
        self._windows = [list(window) for window in windows]
        return [self._read(None)]

    def advance(self, tokens: Text) -> Output:
        """Reads the windows with one more token each."""
        for window, token in zip(self._windows, tokens, strict=True):
            window.append(token)
        if not self._warm or self._state is None:
            return self._read(None)
        return self._read(torch.cat([self._state, self._state[:, -1:]], dim=1))

    @property
    def stored_bytes(self) -> int:
        """Bytes of the states that the next solve starts at."""
        return 0 if self._state is None else self._state.nbytes

    def _read(self, start: Tensor | None) -> Output:
        tokens, real = padded(self._windows, self._model.embedding.weight.device)
        output = self._model(tokens, real=real, start=start)
        if self._warm:
            self._state = output.state
        return output


def padded(windows: Sequence[Text], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Windows of different lengths side by side, filled up on the left.

    >>> padded([[5, 6, 7], [8]], torch.device("cpu"))
    (tensor([[5, 6, 7],
            [0, 0, 8]]), tensor([[ True,  True,  True],
            [False, False,  True]]))

    Args:
        windows: tokens.
        device: where they are wanted.

    Returns:
        Tokens `(windows, longest)`, and which of them are no padding; `None` where all are.
    """
    longest = max(map(len, windows))
    tokens = torch.tensor([[0] * (longest - len(window)) + list(window) for window in windows], device=device)
    lengths = torch.tensor([len(window) for window in windows], device=device)
    if min(map(len, windows)) == longest:
        return tokens, None
    return tokens, torch.arange(longest, device=device) >= longest - lengths[:, None]
