"""Byte models of order 0, 1 and 2 with Witten-Bell smoothing: the bar that a trained model must clear.

The probability of a byte w after the context h, the last k bytes, is

    p_k(w | h) = (c(h w) + T(h) p_{k-1}(w | h')) / (c(h) + T(h)),        p_{-1}(w) = 1 / 256,

where c counts occurrences in the training text, c(h) is the sum of c(h w) over w, T(h) is the number of different bytes
seen after h, and h' is h without its first byte. A context never seen falls through to the next shorter one. This is
method C of Witten and Bell in its interpolated form: the more different bytes have followed h, the likelier a new one.

Sources: I. H. Witten and T. C. Bell, "The zero-frequency problem: estimating the probabilities of novel events in
adaptive text compression", IEEE Transactions on Information Theory 37(4), 1991; S. F. Chen and J. Goodman, "An
empirical study of smoothing techniques for language modeling", 1998 (the interpolated form).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onelayer.corpora.prepared import Corpus
from onelayer.corpora.token_files import Tokens
from onelayer.corpora.tokenizer import BYTES as VOCABULARY
from onelayer.corpora.tokenizer import Tokenizer
from onelayer.errors import UsageError

ORDERS = (0, 1, 2)

MOST = 32 << 20  # bytes of a text that are counted or scored, from its start

# Strings are counted in pieces of the text, so that a text of any size takes little more than itself.
_PIECE = 1 << 22

_Integers = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Table:
    """Counts of all strings of one length: the context h followed by one byte w, coded as a number in base 256."""

    strings: _Integers  # those that occur, sorted
    counts: _Integers  # c(h w), one for each of them
    totals: _Integers  # c(h), one for each possible context
    types: _Integers  # T(h), likewise


@dataclass(frozen=True, eq=False)
class WittenBell:
    """An interpolated Witten-Bell model of the bytes of a text; made by `fit`.

    >>> import torch
    >>> model = fit(torch.tensor(list(b"self, himself, shelf"), dtype=torch.uint8), order=2)
    >>> float(model.distribution(b"sel")[ord("f")]) > 0.5
    True

    Attributes:
        order: number of bytes of context it looks at.
    """

    order: int
    _tables: tuple[_Table, ...]

    def probabilities(self, tokens: Tensor) -> _Floats:
        """Probability of each byte of a text given those before it.

        Args:
            tokens: uint8, one-dimensional; the first bytes are predicted from as much context as there is.

        Returns:
            One probability for each byte.
        """
        data = tokens.numpy()
        probability = np.full(len(data), 1 / VOCABULARY)
        for length, table in enumerate(self._tables):
            strings = _strings(data, length + 1)
            contexts = strings // VOCABULARY
            types = table.types[contexts]
            seen = _count_of(strings, table) + types * probability[length:]
            total = table.totals[contexts] + types
            # A context never seen has total 0 and says nothing: the shorter one's answer stands.
            probability[length:] = np.where(total > 0, seen / np.maximum(total, 1), probability[length:])
        return probability

    def distribution(self, context: bytes) -> _Floats:
        """Probabilities of all 256 bytes after a context, of which the last `order` bytes matter.

        Args:
            context: the bytes before; may be shorter than the order.

        Returns:
            256 positive numbers with sum 1.
        """
        every = np.arange(VOCABULARY)
        probability = np.full(VOCABULARY, 1 / VOCABULARY)
        for length, table in enumerate(self._tables[: len(context) + 1]):
            history = int.from_bytes(context[len(context) - length :], "big")
            types, total = table.types[history], table.totals[history] + table.types[history]
            if total > 0:
                probability = (_count_of(history * VOCABULARY + every, table) + types * probability) / total
        return probability

    def bits_per_byte(self, tokens: Tensor) -> float:
        """Mean of -log2 of the probability of each byte of a text.

        Args:
            tokens: uint8, one-dimensional, at least one byte.

        Returns:
            Bits per byte; 8 is what knowing nothing takes.

        Raises:
            UsageError: the text is empty.
        """
        if len(tokens) == 0:
            raise UsageError("An empty text has no bits per byte: give at least one byte to score.")
        total = 0.0
        for start in range(0, len(tokens), _PIECE):
            before = min(start, self.order)  # each piece sees the context that stands before it
            piece = self.probabilities(tokens[start - before : start + _PIECE])[before:]
            total -= float(np.log2(piece).sum())
        return total / len(tokens)


def fit(tokens: Tensor, order: int) -> WittenBell:
    """Counts a text, which is all the training that these models have.

    >>> import torch
    >>> model = fit(torch.tensor(list(b"abracadabra"), dtype=torch.uint8), order=1)
    >>> round(float(model.distribution(b"a")[ord("b")]), 3)
    0.34

    Args:
        tokens: the text to learn, uint8, one-dimensional.
        order: number of bytes of context, 0, 1 or 2.

    Returns:
        The model.

    Raises:
        UsageError: the order is another one, or the text is empty.
    """
    if order not in ORDERS:
        raise UsageError(f"The order of a byte model is 0, 1 or 2, and not {order}.")
    if len(tokens) == 0:
        raise UsageError("A byte model cannot be fitted to an empty text: give at least one byte.")
    data = tokens.numpy()
    return WittenBell(order, tuple(_count(data, length) for length in range(order + 1)))


def baselines(corpus: Corpus) -> dict[str, float]:
    """Bits per byte of the models of every order on validation text, learned from training text.

    They learn from the first 32 MiB of the one and are scored on the first 32 MiB of the other, where there is more.

    >>> from onelayer.corpora import prepare
    >>> baselines(prepare(None, "tokens")).keys()
    dict_keys(['0', '1', '2'])

    Args:
        corpus: text, as tokens of any kind; it is counted byte by byte.

    Returns:
        Bits per byte by order; the orders are strings, as they are in JSON.

    Raises:
        UsageError: one of the texts is empty.
    """
    train, validation = (_first_bytes(tokens, corpus.tokenizer) for tokens in (corpus.train, corpus.validation))
    largest = fit(train, ORDERS[-1])
    models = [WittenBell(order, largest._tables[: order + 1]) for order in ORDERS]
    return {str(model.order): model.bits_per_byte(validation) for model in models}


def _first_bytes(tokens: Tokens, tokenizer: Tokenizer) -> Tensor:
    text, start = bytearray(), 0
    while len(text) < MOST and start < len(tokens):
        ids = tokens.read(np.array([start]), min(_PIECE, len(tokens) - start))[0]
        text += tokenizer.decode(ids.numpy())
        start += len(ids)
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8)[:MOST])


def _strings(data: npt.NDArray[np.uint8], length: int) -> _Integers:
    """Every string of that many bytes, in the order of the text, coded in base 256."""
    count = max(len(data) - length + 1, 0)
    codes = np.zeros(count, dtype=np.int64)
    for i in range(length):
        codes = codes * VOCABULARY + data[i : i + count]
    return codes


def _count(data: npt.NDArray[np.uint8], context: int) -> _Table:
    pieces = [
        np.unique(_strings(data[start : start + _PIECE + context], context + 1), return_counts=True)
        for start in range(0, max(len(data) - context, 1), _PIECE)
    ]
    strings, where = np.unique(np.concatenate([codes for codes, _ in pieces]), return_inverse=True)
    counts = np.zeros(len(strings), dtype=np.int64)
    np.add.at(counts, where, np.concatenate([count for _, count in pieces]))
    contexts = strings // VOCABULARY
    totals = np.zeros(VOCABULARY**context, dtype=np.int64)
    np.add.at(totals, contexts, counts)
    return _Table(strings, counts, totals, np.bincount(contexts, minlength=VOCABULARY**context))


def _count_of(strings: _Integers, table: _Table) -> _Integers:
    if len(table.strings) == 0:
        return np.zeros(len(strings), dtype=np.int64)
    where = np.minimum(np.searchsorted(table.strings, strings), len(table.strings) - 1)
    return np.where(table.strings[where] == strings, table.counts[where], 0)
