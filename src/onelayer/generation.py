"""Text from a model, one byte at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

import torch

from onelayer.errors import UsageError
from onelayer.models.language_model import LanguageModel


def generate(model: LanguageModel, prompt: bytes, count: int, temperature: float = 0.8, seed: int = 0) -> Iterator[int]:
    """Draws bytes that follow a prompt.

    Each byte is drawn from the model's distribution given the bytes before it, at most one context of them: once the
    text is longer, the window slides along. Every byte costs a solve of the whole window.

    >>> bytes(generate(model, b"def ", count=5))                                # doctest: +SKIP
    b'test_'

    Args:
        model: on any device.
        prompt: at least one byte and at most `model.config.context`.
        count: number of bytes to draw.
        temperature: divides the logits; 0 takes the likeliest byte.
        seed: the same seed gives the same bytes.

    Returns:
        An iterator over byte values; the arguments are checked at the call.

    Raises:
        UsageError: an argument is out of its range.
    """
    context = model.config.context
    if not prompt:
        raise UsageError("The prompt is empty: give at least one byte.")
    if len(prompt) > context:
        raise UsageError(f"The prompt has {len(prompt)} bytes and the context only {context}: give a shorter prompt.")
    if count < 1:
        raise UsageError(f"The number of bytes must be at least 1, not {count}.")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"The temperature must be 0 or a positive number, not {temperature}.")
    if seed < 0:
        raise UsageError(f"The seed must be 0 or more, not {seed}.")
    return _generate(model, prompt, count, temperature, torch.Generator().manual_seed(seed))


def _generate(
    model: LanguageModel, prompt: bytes, count: int, temperature: float, random: torch.Generator
) -> Iterator[int]:
    text = list(prompt)
    device = model.embedding.weight.device
    for _ in range(count):
        window = torch.tensor([text[-model.config.context :]], device=device)
        with torch.no_grad():
            logits = model(window).logits[0, -1].float().cpu()
        if temperature == 0:
            byte = int(logits.argmax())
        else:
            byte = int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=random))
        text.append(byte)
        yield byte


def decode(values: Iterable[int]) -> Iterator[str]:
    """Turns bytes into text as they come; what is not UTF-8 becomes the replacement character.

    >>> "".join(decode(b"a\\xc3\\xa9\\xff"))
    'aé�'

    Args:
        values: byte values.

    Returns:
        An iterator over pieces of text, empty while a character is incomplete.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for value in values:
        yield decoder.decode(bytes([value]))
    yield decoder.decode(b"", final=True)
