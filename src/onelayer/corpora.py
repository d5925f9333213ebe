"""Text as bytes: what a model reads, split into train and validation, and the windows it is given.

A token is a byte, so the vocabulary is 256, nothing is learned about the text before training starts, and bits per
byte compare across models. The default text is the source of Python's own standard library, which every machine that
runs this already has.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onelayer.errors import UsageError
from onelayer.texts import Document, folder, is_folder, standard_library, text_file

VOCABULARY = 256

# Whole entries are held out until validation has the first share of the text, and none that takes it past the second.
_ENOUGH, _TOO_MUCH = 0.06, 0.10
# Where whole entries cannot give that, the end of the text is held out.
_TAIL = 0.075


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as bytes, split once and for all into a part to train on and a part to validate on.

    >>> corpus = load("notes.txt")                                              # doctest: +SKIP
    >>> corpus.describe()                                                       # doctest: +SKIP
    'notes.txt: 925,021 bytes to train on (1 file), 74,979 to validate on'

    Attributes:
        name: what the text is, for people.
        train: bytes to train on, a one-dimensional uint8 tensor on the CPU.
        validation: bytes to validate on, likewise; with a folder these are whole top-level entries of it.
        train_files, validation_files: number of files in each part; a file cut in two counts in both.
        skipped_files: files of the folder that are empty or not text, and so in neither part.
        fingerprint: SHA-256 of both parts, in hexadecimal, to recognise the same data when a run is resumed.
    """

    name: str
    train: Tensor
    validation: Tensor
    train_files: int
    validation_files: int
    skipped_files: int
    fingerprint: str

    def describe(self) -> str:
        """Name, sizes and file counts in one line."""
        parts = [
            f"{self.name}: {len(self.train):,} bytes to train on ({_files(self.train_files)})",
            f"{len(self.validation):,} to validate on ({_files(self.validation_files)})",
        ]
        if self.skipped_files:
            parts.append(f"{_files(self.skipped_files)} skipped as empty or not text")
        return ", ".join(parts)


def load(path: str | Path | None = None) -> Corpus:
    """Reads a text file, a folder of text, or by default the source of Python's standard library.

    A folder is read recursively in sorted order; hidden files and files that are not UTF-8 text are skipped. Whole
    top-level entries of it, chosen by a hash of their names, are held out for validation until they make up 6 to 10% of
    the text, so that near copies, which mostly lie side by side, stay together. Where no entries fit (a single file, a
    folder of few), the last 7.5% of the text are held out. The same files give the same split on every machine.

    >>> corpus = load()
    >>> corpus.train.dtype, 0.05 < len(corpus.validation) / len(corpus.train) < 0.12
    (torch.uint8, True)

    Args:
        path: a text file, or a folder; `None` for the standard library.

    Returns:
        The corpus, in memory.

    Raises:
        UsageError: the path is missing, unreadable, empty, holds no text, or is not UTF-8.
    """
    if path is None:
        name, documents, skipped = standard_library()
    elif is_folder(Path(path)):
        name = Path(path).resolve().name or str(path)
        documents, skipped = folder(Path(path))
    else:
        name, documents, skipped = Path(path).name, [Document("", text_file(Path(path)))], 0
    return _split(name, documents, skipped)


def require(corpus: Corpus, context: int) -> None:
    """Makes sure that both parts of the corpus hold at least one window of a context and the byte that follows it.

    >>> require(load(), context=256)

    Args:
        corpus: what `load` returned.
        context: bytes that the model sees at once.

    Raises:
        UsageError: the context is not positive, or a part of the corpus is too short for it.
    """
    if context < 1:
        raise UsageError(f"The context is {context} bytes and must be at least 1.")
    for part, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) <= context:
            raise UsageError(
                f"The text {corpus.name} is shorter than one context: its {part} part holds {len(tokens):,} bytes "
                f"where a context of {context:,} takes {context + 1:,}; give more text or a smaller context."
            )


def batch(tokens: Tensor, step: int, batch_size: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random windows of the text for one training step, a function of `seed` and `step` alone.

    A run that is resumed at a step therefore sees exactly what an uninterrupted run sees there, with no sampler state
    to save, and no global random state is touched.

    >>> inputs, targets = batch(torch.arange(100, dtype=torch.uint8), step=3, batch_size=2, context=8, seed=0)
    >>> inputs.shape, bool((targets == inputs + 1).all())
    (torch.Size([2, 8]), True)

    Args:
        tokens: one-dimensional, longer than `context`.
        step: number of the training step, from 0.
        batch_size: number of windows.
        context: tokens in a window.
        seed: number of the run, from 0.

    Returns:
        Inputs and targets, int64, both `(batch_size, context)`; targets are the inputs one position later.

    Raises:
        UsageError: the text is not longer than one context, or a number is out of its range.
    """
    _check_windows(tokens, context, batch_size)
    if step < 0 or seed < 0:
        raise UsageError(f"The seed and the step must be 0 or more, and are {seed} and {step}.")
    starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - context, size=batch_size)
    return _windows(tokens, torch.from_numpy(starts), context)


def validation_windows(tokens: Tensor, context: int, count: int) -> tuple[Tensor, Tensor]:
    """Windows spread evenly over the text, no two of which predict the same byte.

    >>> inputs, targets = validation_windows(torch.arange(100, dtype=torch.uint8), context=8, count=3)
    >>> inputs[:, 0].tolist()
    [0, 45, 91]

    Args:
        tokens: one-dimensional, longer than `context`.
        context: tokens in a window.
        count: number of windows wanted; fewer come back where the text has no room for as many.

    Returns:
        Inputs and targets, int64, both `(windows, context)`; targets are the inputs one position later.

    Raises:
        UsageError: the text is not longer than one context, or a number is out of its range.
    """
    _check_windows(tokens, context, count)
    count = min(count, (len(tokens) - 1) // context)
    room = len(tokens) - 1 - context
    starts = [i * room // max(count - 1, 1) for i in range(count)]
    return _windows(tokens, torch.tensor(starts), context)


def _check_windows(tokens: Tensor, context: int, count: int) -> None:
    if context < 1 or count < 1:
        raise UsageError(f"There must be at least 1 window of at least 1 byte; asked for were {count} of {context}.")
    if len(tokens) <= context:
        raise UsageError(f"A text of {len(tokens):,} bytes has no window of {context:,} with the byte after it.")


def _windows(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = tokens[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _split(name: str, documents: list[Document], skipped: int) -> Corpus:
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.entry] = sizes.get(document.entry, 0) + len(document.data)
    held_out = _hold_out(sizes)
    if held_out:
        kept = [document.data for document in documents if document.entry not in held_out]
        others = [document.data for document in documents if document.entry in held_out]
        train, validation = _join(kept), _join(others)
        train_files, validation_files = len(kept), len(others)
    else:
        text = _join([document.data for document in documents])
        cut = _tail_start(text)
        train, validation = text[:cut], text[cut:]
        ends = np.cumsum([len(_ended(document.data)) for document in documents])
        train_files = min(int(np.searchsorted(ends, cut)) + 1, len(documents))
        validation_files = max(len(documents) - int(np.searchsorted(ends, cut, side="right")), 1)
    digest = hashlib.sha256(len(train).to_bytes(8, "big"))
    digest.update(train)
    digest.update(validation)
    return Corpus(name, _tokens(train), _tokens(validation), train_files, validation_files, skipped, digest.hexdigest())


def _hold_out(sizes: dict[str, int]) -> set[str]:
    """Entries for validation, in the order of their hashes; none where they cannot make up the share wanted."""
    total = sum(sizes.values())
    chosen: set[str] = set()
    size = 0
    for entry in sorted(sizes, key=lambda entry: hashlib.sha256(entry.encode("utf-8", "surrogateescape")).digest()):
        if size + sizes[entry] <= _TOO_MUCH * total:
            chosen.add(entry)
            size += sizes[entry]
        if size >= _ENOUGH * total:
            return chosen
    return set()


def _ended(data: bytes) -> bytes:
    return data if data.endswith(b"\n") else data + b"\n"


def _join(texts: list[bytes]) -> bytes:
    return texts[0] if len(texts) == 1 else b"".join(_ended(data) for data in texts)


def _tail_start(text: bytes) -> int:
    """Where the held-out tail starts: at a line's start if one is near, else at least not inside a character."""
    cut = len(text) - int(len(text) * _TAIL)
    line = text.find(b"\n", cut, cut + int(len(text) * _TAIL / 10)) + 1
    if line:
        return line
    while cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


def _tokens(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _files(count: int) -> str:
    return f"{count:,} file{'' if count == 1 else 's'}"
