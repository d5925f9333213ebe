"""Tokenizers: nothing is lost, text gives the same tokens however it is read, and what changes text is refused."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from onelayer.corpora import pieces, tokenizer
from onelayer.errors import UsageError

SOURCE = Path(tokenizer.__file__).read_bytes()
WORDS = "für jede Größe gibt es ein Maß, 日本語 も、 и по-русски\n\n".encode()
PAIRS = tokenizer.train([SOURCE, WORDS * 20], vocabulary=600)
BYTES = tokenizer.of_bytes()
SPECIAL = "<\uff5cbegin\uff5c>"
# How Llama 3 cuts text into words.
LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
LLAMA += r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

both = pytest.mark.parametrize("of_these", [BYTES, PAIRS], ids=["bytes", "pairs"])
# Text as it comes, and bytes that are no text, with what borders are made of more often than chance has it.
texts = st.lists(
    st.sampled_from(["\n", " ", "def", "é", "日本", "\u00a0", "\u3000", "'ll", "12"]) | st.text(max_size=5)
)
data = texts.map(lambda parts: "".join(parts).encode()) | st.binary(max_size=60)


def cut(text: bytes, places: list[int]) -> Iterator[bytes]:
    ends = sorted(place % (len(text) + 1) for place in places)
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        yield text[start:end]


@both
@given(text=data)
def test_what_is_encoded_is_decoded(of_these: tokenizer.Tokenizer, text: bytes):
    ids = of_these.encode(text)
    assert of_these.decode(ids) == text
    assert of_these.lengths[ids].sum() == len(text)
    assert ids.dtype == of_these.dtype
    assert not len(ids) or int(ids.max()) < of_these.vocabulary


@both
@given(text=data, times=st.integers(1, 40), places=st.lists(st.integers(0), max_size=6))
def test_the_tokens_of_pieces_are_those_of_the_whole(
    of_these: tokenizer.Tokenizer, text: bytes, times: int, places: list[int]
):
    text = text * times
    with pytest.MonkeyPatch.context() as patch:  # short segments, so that many borders are met
        patch.setattr(pieces, "_LEAST", 8)
        patch.setattr(pieces, "_MOST", 24)
        found = [np.zeros(0, of_these.dtype), *of_these.encode_pieces(cut(text, places))]
        assert np.concatenate(found).tolist() == of_these.encode(text).tolist()
        segments = list(pieces.segments(cut(text, places)))
    assert b"".join(segments) == text
    assert all(len(segment) <= 24 for segment in segments)


@pytest.mark.parametrize("words", ["GPT-2", "Llama 3"])
@given(parts=texts)
def test_the_libraries_begin_a_word_at_every_border_so_that_cutting_there_changes_no_token(
    words: str, parts: list[str]
):
    text = "".join(parts)
    document = json.loads(PAIRS.to_json())
    if words == "Llama 3":
        split = {"type": "Split", "pattern": {"Regex": LLAMA}, "behavior": "Isolated", "invert": False}
        byte_level = document["pre_tokenizer"] | {"use_regex": False}
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    encoder = Encoder.from_str(json.dumps(document))
    borders = [border.start() for border in pieces._BORDER.finditer(text.encode())]
    segments = [text.encode()[start:end].decode() for start, end in itertools.pairwise([0, *borders, None])]
    cut_up = encoder.pre_tokenizer.pre_tokenize_str
    assert [word for segment in segments for word, _ in cut_up(segment)] == [word for word, _ in cut_up(text)]


def test_long_text_is_cut_at_borders_and_never_within_a_character():
    lines = b"".join(b"line %d of a text\n" % i for i in range(20_000))
    segments = list(pieces.segments([lines]))
    assert len(segments) > 10
    assert all(re.match(rb"line | \w", segment) for segment in segments)
    assert all(1 << 14 <= len(segment) < (1 << 14) + 20 for segment in segments[:-1])
    for text in ("日本語" * 50_000, "a" + "é" * 90_000, "x" * 200_000):
        segments = list(pieces.segments([text.encode()]))
        assert "".join(segment.decode() for segment in segments) == text
        assert all((1 << 16) - 4 < len(segment) <= 1 << 16 for segment in segments[:-1])
    assert list(pieces.segments([])) == []
    junk = b"\x80" * 200_000
    assert PAIRS.decode(PAIRS.encode(junk)) == junk


def test_bytes_are_their_own_numbers_and_so_are_the_first_pairs():
    every = bytes(range(256))
    assert BYTES.encode(every).tolist() == list(every)
    assert all(PAIRS.decode([byte]) == bytes([byte]) for byte in range(256))
    assert (BYTES.vocabulary, PAIRS.vocabulary) == (256, 600)
    assert (BYTES.lengths == 1).all()
    assert PAIRS.lengths.tolist() == [len(PAIRS.decode([token])) for token in range(600)]
    assert (BYTES.dtype, PAIRS.dtype) == (np.uint8, np.uint16)
    assert len(PAIRS.encode(SOURCE)) < 0.6 * len(SOURCE)


@both
def test_transformers_reads_the_same_tokens_from_the_file(of_these: tokenizer.Tokenizer, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(of_these.to_json(), encoding="utf-8")
    loaded = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), clean_up_tokenization_spaces=False
    )
    text = (SOURCE + WORDS).decode()
    assert len(loaded) == of_these.vocabulary
    assert loaded.encode(text) == of_these.encode(text.encode()).tolist()
    assert loaded.decode(loaded.encode(text)) == text
    loaded.save_pretrained(tmp_path / "saved")
    again = tokenizer.read(tmp_path / "saved" / "tokenizer.json")
    assert again.fingerprint == of_these.fingerprint
    assert again.is_bytes == of_these.is_bytes


def test_training_is_a_function_of_the_text():
    again = tokenizer.train(cut(SOURCE + WORDS * 20, [7, 1000, 1001, 9999]), vocabulary=600)
    assert again.to_json() == PAIRS.to_json()
    assert again.fingerprint == PAIRS.fingerprint
    assert tokenizer.train([SOURCE], vocabulary=600).fingerprint != PAIRS.fingerprint
    assert len({BYTES.fingerprint, PAIRS.fingerprint, tokenizer.train([SOURCE], vocabulary=599).fingerprint}) == 3


def test_fingerprints_tell_apart_whatever_changes_tokens():
    document = json.loads(PAIRS.to_json())
    assert tokenizer.from_json(json.dumps(document, indent=1)).fingerprint == PAIRS.fingerprint
    document["pre_tokenizer"]["use_regex"] = False
    assert tokenizer.from_json(json.dumps(document)).fingerprint != PAIRS.fingerprint
    document = json.loads(PAIRS.to_json())
    merges = document["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]
    assert tokenizer.from_json(json.dumps(document)).fingerprint != PAIRS.fingerprint


def test_special_tokens_of_other_vocabularies_are_tokens_and_lose_nothing():
    encoder = Encoder.from_str(PAIRS.to_json())
    encoder.add_special_tokens(["<|endoftext|>", SPECIAL])
    of_these = tokenizer.from_json(encoder.to_str())
    text = f"one<|endoftext|>two{SPECIAL}".encode()
    ids = of_these.encode(text)
    assert of_these.vocabulary == 602
    assert {600, 601} <= set(ids.tolist())
    assert of_these.decode(ids) == text
    assert of_these.lengths[600:].tolist() == [13, len(SPECIAL.encode())]


def changed(change: str) -> str:
    document: dict[str, Any] = json.loads(PAIRS.to_json())
    if change == "normalizer":
        document["normalizer"] = {"type": "NFC"}
    elif change == "space":
        document["pre_tokenizer"]["add_prefix_space"] = True
    elif change == "dropout":
        document["model"]["dropout"] = 0.1
    elif change == "missing byte":
        del document["model"]["vocab"]["Ā"]
    elif change == "dropping split":
        split = {"type": "Split", "pattern": {"String": "\t"}, "behavior": "Removed", "invert": False}
        steps = [split, document["pre_tokenizer"]]
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    elif change == "no byte level":
        document["pre_tokenizer"] = {"type": "Whitespace"}
    elif change == "no pre-tokenizer":
        document["pre_tokenizer"] = None
    elif change == "merges":
        document["model"]["merges"].append(["nowhere", "to be found"])
    return json.dumps(document)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("normalizer", "changes text"),
        ("space", "changes text"),
        ("dropout", "changes text"),
        ("missing byte", "no byte-level BPE"),
        ("dropping split", "lose|give back"),
        ("no byte level", "no byte-level BPE"),
        ("no pre-tokenizer", "no byte-level BPE"),
        ("merges", "cannot be used|no tokenizer.json"),
    ],
)
def test_tokenizers_that_lose_or_change_text_are_refused(change: str, said: str):
    assert tokenizer.from_json(changed("nothing")).fingerprint == PAIRS.fingerprint
    with pytest.raises(UsageError, match=said) as caught:
        tokenizer.from_json(changed(change))
    assert "\n" not in str(caught.value)


def test_text_that_a_tokenizer_loses_is_noticed_when_it_comes():
    document = json.loads(PAIRS.to_json())
    split = {"type": "Split", "pattern": {"String": "\u2603"}, "behavior": "Removed", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}
    of_these = tokenizer.from_json(json.dumps(document))  # nothing shows yet
    assert of_these.decode(of_these.encode(WORDS)) == WORDS
    with pytest.raises(UsageError, match="loses some of this text"):
        of_these.encode("a \u2603 man".encode())


def test_a_word_piece_tokenizer_is_refused(tmp_path: Path):
    encoder = Encoder(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    encoder.normalizer = normalizers.Lowercase()
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.decoder = decoders.WordPiece()
    encoder.train_from_iterator(["some words"], trainers.WordPieceTrainer(vocab_size=50, show_progress=False))
    encoder.save(str(tmp_path / "words.json"))
    with pytest.raises(UsageError, match=r"words\.json: This tokenizer is no byte-level BPE"):
        tokenizer.read(tmp_path / "words.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"model": 3, "pre_tokenizer": null}'])
def test_what_is_no_tokenizer_is_refused(text: str, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UsageError, match=r"no tokenizer\.json|no byte-level BPE"):
        tokenizer.read(tmp_path / "tokenizer.json")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot be read"):
        tokenizer.read(tmp_path / "nowhere.json")
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        tokenizer.read(tmp_path / "latin.json")


@both
@pytest.mark.parametrize("token", [-1, 600])
def test_numbers_that_are_no_tokens_are_refused(of_these: tokenizer.Tokenizer, token: int):
    with pytest.raises(UsageError, match=f"Token {token} is not of this tokenizer"):
        of_these.decode([0, token, 5])


def test_vocabularies_too_small_or_too_large_for_the_text_are_refused():
    with pytest.raises(UsageError, match="255 and must be at least 256"):
        tokenizer.train([SOURCE], vocabulary=255)
    with pytest.raises(UsageError, match=r"only 2.. tokens in it where a vocabulary of 1,000"):
        tokenizer.train([b"abcabc"], vocabulary=1000)
    assert tokenizer.train([b""], vocabulary=256).is_bytes
