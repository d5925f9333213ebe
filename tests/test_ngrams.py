"""Byte models against a slow one that follows the formula word for word, and against the laws of probability."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onelayer.corpora import ngrams, token_files, tokenizer
from onelayer.corpora.prepared import Corpus
from onelayer.corpora.token_files import Tokens
from onelayer.errors import UsageError

# Few letters make contexts recur, all letters make some unseen: both cases of the formula come up.
text = st.one_of(st.binary(min_size=1, max_size=80), st.text("ab\n", min_size=1, max_size=80).map(str.encode))
BYTES = tokenizer.of_bytes()
orders = st.sampled_from(ngrams.ORDERS)


def tokens(data: bytes) -> Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def baselines(train: bytes, validation: bytes, of_these: tokenizer.Tokenizer = BYTES) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        parts = []
        for part, data in (("train", train), ("validation", validation)):
            token_files.write(Path(name, part), [of_these.encode(data)], of_these.dtype)
            parts.append(Tokens(Path(name, part), of_these.dtype, of_these.vocabulary))
        return ngrams.baselines(Corpus("text", Path(name), *parts, of_these, len(train), len(validation), 1, 1, 0, ""))


class DictionaryModel:
    """Witten-Bell as it is written, one context at a time."""

    def __init__(self, data: bytes, order: int) -> None:
        self.order = order
        self.followers: dict[bytes, Counter[int]] = {}
        for length in range(order + 1):
            for i in range(length, len(data)):
                self.followers.setdefault(data[i - length : i], Counter())[data[i]] += 1

    def probability(self, byte: int, context: bytes) -> float:
        shorter = self.probability(byte, context[1:]) if context else 1 / 256
        followers = self.followers.get(context)
        if followers is None:
            return shorter
        return (followers[byte] + len(followers) * shorter) / (followers.total() + len(followers))

    def probabilities(self, data: bytes) -> list[float]:
        return [self.probability(data[i], data[max(i - self.order, 0) : i]) for i in range(len(data))]


@given(train=text, scored=text, order=orders)
def test_every_probability_is_what_the_formula_says(train: bytes, scored: bytes, order: int):
    model, slow = ngrams.fit(tokens(train), order), DictionaryModel(train, order)
    expected = slow.probabilities(scored)
    np.testing.assert_allclose(model.probabilities(tokens(scored)), expected, rtol=1e-12)
    np.testing.assert_allclose(model.bits_per_byte(tokens(scored)), -np.log2(expected).mean(), rtol=1e-12)


@given(train=text, context=st.one_of(text, st.just(b"")), order=orders)
def test_a_distribution_is_positive_sums_to_one_and_agrees_with_scoring(train: bytes, context: bytes, order: int):
    model = ngrams.fit(tokens(train), order)
    distribution = model.distribution(context[-order:] if order else b"")
    assert distribution.shape == (256,)
    assert (distribution > 0).all()
    np.testing.assert_allclose(distribution.sum(), 1, rtol=1e-12)
    np.testing.assert_array_equal(distribution, model.distribution(context))
    for byte in {train[0], 0, 255}:
        scored = model.probabilities(tokens(context + bytes([byte])))
        np.testing.assert_allclose(scored[-1], distribution[byte], rtol=1e-12)


@given(train=text, scored=text, piece=st.integers(1, 7))
def test_counting_and_scoring_in_pieces_changes_nothing(train: bytes, scored: bytes, piece: int):
    whole = baselines(train, scored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "_PIECE", piece)
        in_pieces = baselines(train, scored)
    assert list(whole) == ["0", "1", "2"]
    for order, bits in whole.items():
        np.testing.assert_allclose(in_pieces[order], bits, rtol=1e-12)


@given(train=text, scored=text, order=orders)
def test_baselines_are_the_models_of_each_order(train: bytes, scored: bytes, order: int):
    expected = ngrams.fit(tokens(train), order).bits_per_byte(tokens(scored))
    assert baselines(train, scored)[str(order)] == expected


@settings(max_examples=30)
@given(train=text, scored=text, most=st.integers(1, 40))
def test_baselines_read_the_first_bytes_whatever_the_tokens(train: bytes, scored: bytes, most: int):
    pairs = tokenizer.train([b"abababab\n" * 9], 259)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "MOST", most)
        patch.setattr(ngrams, "_PIECE", 3)
        found = baselines(train, scored), baselines(train, scored, pairs)
    expected = baselines(train[:most], scored[:most])
    for order, bits in expected.items():
        np.testing.assert_allclose([figures[order] for figures in found], bits, rtol=1e-12)


def test_a_byte_never_seen_costs_finite_bits():
    assert 8 < ngrams.fit(tokens(b"a" * 1000), 2).bits_per_byte(tokens(b"z")) < 20


@pytest.mark.parametrize("order", [-1, 3])
def test_other_orders_are_refused(order: int):
    with pytest.raises(UsageError, match="0, 1 or 2"):
        ngrams.fit(tokens(b"abc"), order)


def test_empty_texts_are_refused():
    with pytest.raises(UsageError, match="empty"):
        ngrams.fit(tokens(b""), 1)
    with pytest.raises(UsageError, match="empty"):
        ngrams.fit(tokens(b"abc"), 1).bits_per_byte(tokens(b""))
