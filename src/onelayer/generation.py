"""Text from a model, one token at a time."""

from __future__ import annotations

import codecs
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

import equilibria as eq
from onelayer.errors import UsageError
from onelayer.models.configuration import BYTES
from onelayer.models.language_model import LanguageModel
from onelayer.readers import CachedReader, Reader, Text, WholeReader
from onelayer.solves import Report

Start = Literal["own", "previous"]
OnFailure = Literal["warn", "ignore"]


class Generation(Iterator[list[int]]):
    """Tokens as they are drawn, one for each prompt at a time, and a report that grows with them.

    Attributes:
        report: on what has been drawn so far.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Text],
        count: int,
        temperature: float,
        seed: int,
        reader: Reader,
        on_failure: OnFailure,
    ) -> None:
        self.report = Report(len(prompts))
        self._model = model
        self._windows = [list(prompt) for prompt in prompts]
        self._left = count
        self._temperature = temperature
        self._randoms = [torch.Generator().manual_seed(seed + k) for k in range(len(prompts))]
        self._reader = reader
        self._on_failure = on_failure
        self._drawn: list[int] | None = None

    def __next__(self) -> list[int]:
        if not self._left:
            raise StopIteration
        logits = self._read()
        self._drawn = [self._draw(row, random) for row, random in zip(logits, self._randoms, strict=True)]
        self._left -= 1
        self.report.drawn += 1
        if not self._left:
            self._tell()
        return list(self._drawn)

    def _read(self) -> Tensor:
        drawn, model = self._drawn, self._model
        training = model.training
        model.eval()
        try:
            with torch.inference_mode():  # a token is many small operations, each a little cheaper than under no_grad
                if drawn is None:
                    outputs = self._reader.restart(self._windows)
                elif self._slide(drawn):
                    outputs = self._reader.restart(self._windows)
                    drawn = None
                else:
                    outputs = [self._reader.advance(drawn)]
        finally:
            model.train(training)
        for output in outputs:
            self.report.add(output.solution, model.config.layers, reading=drawn is None)
        self.report.cache_bytes = self._reader.stored_bytes
        logits = outputs[-1].logits
        assert logits is not None
        return logits[:, -1].to(torch.promote_types(logits.dtype, torch.float32)).cpu()

    def _slide(self, drawn: list[int]) -> bool:
        """Puts what was drawn behind the windows, and cuts those that it fills over the context to their last half."""
        context = self._model.config.context
        over = False
        for window, token in zip(self._windows, drawn, strict=True):
            window.append(token)
            if len(window) > context:
                del window[: len(window) - (context + 1) // 2]
                over = True
        return over

    def _draw(self, logits: Tensor, random: torch.Generator) -> int:
        finite = logits.isfinite()
        if not bool(finite.all()):
            self.report.not_finite += 1
            logits = torch.where(finite, logits, -torch.inf if bool(finite.any()) else 0.0)
        if self._temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(torch.softmax(logits / self._temperature, 0), 1, generator=random))

    def _tell(self) -> None:
        complaint = self.report.complaint()
        if complaint is not None and self._on_failure == "warn":
            warnings.warn(complaint, eq.ConvergenceWarning, stacklevel=3)


def generate(
    model: LanguageModel,
    prompts: Sequence[Text],
    count: int,
    temperature: float = 0.8,
    seed: int = 0,
    cache: bool = True,
    chunk: int | None = None,
    start: Start | None = None,
    on_failure: OnFailure = "warn",
) -> Generation:
    """Draws tokens that follow some prompts, side by side.

    Each token is drawn from the model's distribution given the tokens before it, at most one context of them. Where a
    text outgrows the context, it is read anew from its last half, rounded up: every token is predicted from at least
    half a context, exactly as the model predicts it on that window. What is drawn for a prompt does not depend on the
    prompts beside it, but for rounding.

    A solve that does not meet the tolerance, or meets NaN, still gives a token. It is counted in the report, and told
    by one warning when the last token has been drawn.

    >>> from onelayer.models.configuration import ModelConfig
    >>> model = LanguageModel(ModelConfig(width=64, heads=2, context=32))
    >>> drawn = generate(model, [b"def ", b"x = 1"], count=3)
    >>> [len(tokens) for tokens in drawn]
    [2, 2, 2]
    >>> drawn.report.at_cap, len(drawn.report.evaluations)
    (0, 2)

    Args:
        model: on any device, in either mode; it is used in evaluation mode.
        prompts: tokens of each, at least one and at most `model.config.context`; they may differ in length.
        count: number of tokens to draw for each prompt.
        temperature: divides the logits; 0 takes the likeliest token.
        seed: the same seed gives the same tokens; prompt number k draws with `seed + k`.
        cache: whether a token is solved for alone, with what the tokens before it left; else the whole window is solved
            for again, which agrees to the solver's tolerance and takes the longer the more there is of it.
        chunk: tokens of a prompt that are read by one solve, to bound memory; `None` is all. For the cache only.
        start: of the solve for a token: `"own"`, zeros or the guess that the model has learnt; or `"previous"`, the
            state of the token before it, which takes fewer evaluations (docs/log.md). `None` is `"previous"` with the
            cache and `"own"` without it.
        on_failure: `"warn"` or `"ignore"`.

    Returns:
        An iterator over the tokens drawn, a list with one for each prompt at a time, and its `report`; the arguments
        are checked at the call.

    Raises:
        UsageError: an argument is out of its range.

    Why one slot is exact stands in docs/generation.md.
    """
    _check(model, prompts, count, temperature, seed, chunk)
    warm = cache if start is None else start == "previous"
    reader = CachedReader(model, chunk, warm) if cache else WholeReader(model, warm)
    return Generation(model, prompts, count, temperature, seed, reader, on_failure)


def _check(
    model: LanguageModel, prompts: Sequence[Text], count: int, temperature: float, seed: int, chunk: int | None
) -> None:
    context, vocabulary = model.config.context, model.config.vocabulary
    unit = "bytes" if vocabulary == BYTES else "tokens"
    if not prompts:
        raise UsageError("There is no prompt: give at least one.")
    for prompt in prompts:
        if not prompt:
            raise UsageError(f"The prompt is empty: give at least one of the {unit} that the text starts with.")
        if len(prompt) > context:
            raise UsageError(
                f"The prompt has {len(prompt)} {unit} and the context only {context}: give a shorter prompt."
            )
    if count < 1:
        raise UsageError(f"The number of {unit} to draw must be at least 1, not {count}.")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"The temperature must be 0 or a positive number, not {temperature}.")
    if seed < 0:
        raise UsageError(f"The seed must be 0 or more, not {seed}.")
    if chunk is not None and chunk < 1:
        raise UsageError(f"The chunk must be at least 1 of the {unit}, not {chunk}.")


def decode(pieces: Iterable[bytes]) -> Iterator[str]:
    """Turns bytes into text as they come; what is not UTF-8 becomes the replacement character.

    >>> "".join(decode([b"a\\xc3", b"\\xa9\\xff"]))
    'aé�'

    Args:
        pieces: of the text, such as what each token stands for.

    Returns:
        An iterator over pieces of text, empty while a character is incomplete.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)
