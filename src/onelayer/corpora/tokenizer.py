"""Tokens: what text is cut into before a model reads it, bytes or pairs of them merged, losing nothing either way.

Every vocabulary here is byte-level, as that of GPT-2: its tokens are strings of bytes and each of the 256 bytes is one
of them, so any text at all can be written in it and read back. A tokenizer is kept as `tokenizer.json`, the file of the
`tokenizers` library, which `transformers.PreTrainedTokenizerFast` reads too.

Sources: Sennrich, Haddow and Birch, "Neural machine translation of rare words with subword units", 2016
(arXiv:1508.07909); Radford et al., "Language models are unsupervised multitask learners", 2019, section 2.2.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Encoder
from tokenizers.trainers import BpeTrainer

from onelayer.corpora.pieces import segments
from onelayer.corpora.tokenizer_file import ALPHABET, without_padding
from onelayer.errors import UsageError
from onelayer.models.configuration import BYTES as BYTES

_IDS = npt.NDArray[np.integer[Any]]
_BATCH = 64  # segments that the encoder is given at once, which it shares among threads
_BAD = re.compile("[\udc80-\udcff]+")  # what bytes that are not UTF-8 become when they are decoded all the same
# Text that a tokenizer must give back as it was: spaces, line ends, composed and decomposed letters, every byte.
_PROBE = (" a  b\t\r\n\n c'll D1234\u00a0e\u0301 \u00e9\ufb01\u2126 \u65e5\u672c\U0001f600\x00\x7f  ").encode()
_PROBE += bytes(range(BYTES)) + _PROBE


NUMBERS = {character: byte for byte, character in enumerate(ALPHABET)}


class Tokenizer:
    """Turns bytes into tokens and tokens into bytes; made by `of_bytes`, `from_json`, `read` or `train`.

    >>> tokenizer = of_bytes()
    >>> tokenizer.encode(b"def")
    array([100, 101, 102], dtype=uint8)
    >>> tokenizer.decode([100, 101, 102])
    b'def'

    Attributes:
        vocabulary: number of tokens; ids are less than it.
        lengths: bytes that each token stands for, int64 `(vocabulary,)`, for bits per byte.
        fingerprint: SHA-256 in hexadecimal of all that decides which tokens a text gives.
        dtype: smallest unsigned type that holds the ids.
        is_bytes: whether tokens are bytes and ids are their values.
    """

    def __init__(self, strings: list[bytes], document: str, encoder: Encoder | None, fingerprint: str) -> None:
        self.vocabulary = len(strings)
        self.lengths = np.array([len(string) for string in strings], dtype=np.int64)
        self.fingerprint = fingerprint
        self.dtype = np.min_scalar_type(self.vocabulary - 1)
        self.is_bytes = encoder is None
        self._strings = strings
        self._document = document
        self._encoder = encoder
        self._byte_ids = np.zeros(BYTES, dtype=self.dtype)
        for token, string in reversed(list(enumerate(strings))):
            if len(string) == 1:
                self._byte_ids[string[0]] = token

    def encode(self, data: bytes) -> _IDS:
        """The tokens of a text, or of any other bytes.

        Args:
            data: UTF-8 text; bytes in it that are not become one token each.

        Returns:
            The ids, one-dimensional.

        Raises:
            UsageError: the tokenizer loses something of this text.
        """
        return np.concatenate([np.zeros(0, dtype=self.dtype), *self.encode_pieces([data])])

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[_IDS]:
        """The tokens of a text that comes in pieces, which are those of the whole text wherever it is cut.

        >>> [ids.tolist() for ids in of_bytes().encode_pieces([b"de", b"f"])]
        [[100, 101], [102]]

        Args:
            pieces: the text; only a few hundred kilobytes of it are held at a time.

        Returns:
            An iterator over arrays of ids.

        Raises:
            UsageError: the tokenizer loses something of this text.
        """
        if self._encoder is None:
            for piece in pieces:
                yield np.frombuffer(piece, dtype=np.uint8)
            return
        parts = segments(pieces)
        while batch := list(islice(parts, _BATCH)):
            ids = self._encode(self._encoder, batch)
            if int(self.lengths[ids].sum()) != sum(map(len, batch)):
                raise UsageError("The tokenizer loses some of this text: give a byte-level BPE that changes nothing.")
            yield ids

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that tokens stand for.

        Args:
            ids: non-negative and less than the vocabulary.

        Returns:
            The bytes; the end of a text may hold only a part of a character.

        Raises:
            UsageError: an id is not of the vocabulary.
        """
        values = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        wrong = values[(values < 0) | (values >= self.vocabulary)]
        if wrong.size:
            raise UsageError(
                f"Token {wrong[0]} is not of this tokenizer, which has {self.vocabulary:,}: use that of the model."
            )
        if self._encoder is None:
            return values.astype(np.uint8).tobytes()
        return b"".join([self._strings[token] for token in values.tolist()])

    def to_json(self) -> str:
        """The text of its `tokenizer.json`.

        >>> len(json.loads(of_bytes().to_json())["model"]["vocab"])
        256
        """
        return self._document

    def _encode(self, encoder: Encoder, batch: list[bytes]) -> _IDS:
        texts: list[str] = []
        order: list[npt.NDArray[Any] | None] = []  # ids of bytes that are not UTF-8, and None for the next of texts
        for data in batch:
            text = data.decode("utf-8", "surrogateescape")
            end = 0
            for bad in _BAD.finditer(text):
                texts.append(text[end : bad.start()])
                order += [None, self._byte_ids[list(bad.group().encode("utf-8", "surrogateescape"))]]
                end = bad.end()
            texts.append(text[end:])
            order.append(None)
        found = iter(encoder.encode_batch_fast(texts, add_special_tokens=False))
        return np.concatenate([np.array(next(found).ids, dtype=self.dtype) if ids is None else ids for ids in order])


def of_bytes() -> Tokenizer:
    """The tokenizer whose tokens are bytes and whose ids are their values.

    >>> of_bytes().vocabulary
    256
    """
    return from_json(json.dumps(_document(NUMBERS, []), ensure_ascii=False))


def from_json(text: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    >>> from_json(of_bytes().to_json()).is_bytes
    True

    Args:
        text: of the file; a byte-level BPE without normalisation, as those of GPT-2, Llama 3 and saved models are.

    Returns:
        The tokenizer.

    Raises:
        UsageError: it is none, or one that loses some of a text or adds to it.
    """
    try:
        document = json.loads(text := without_padding(text))
        strings = _strings(document)
        rules = {
            "merges": [merge.split(" ") if isinstance(merge, str) else merge for merge in document["model"]["merges"]],
            "before": document["pre_tokenizer"],
            "added": sorted(added["id"] for added in document.get("added_tokens") or ()),
        }
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"This is no tokenizer.json of a byte-level BPE ({error!r}): give one that is.") from None
    if strings == [bytes([byte]) for byte in range(BYTES)] and not rules["merges"]:
        rules, encoder = {}, None  # however bytes are cut up beforehand, they remain bytes
    else:
        try:
            encoder = Encoder.from_str(text)
        except Exception as error:  # the library raises nothing more specific
            raise UsageError(f"This is no tokenizer.json that can be used ({error}): give another one.") from None
        encoder.no_truncation()
        encoder.no_padding()
    digest = hashlib.sha256(json.dumps([[string.hex() for string in strings], rules], sort_keys=True).encode())
    tokenizer = Tokenizer(strings, text, encoder, digest.hexdigest())
    if tokenizer.decode(tokenizer.encode(_PROBE)) != _PROBE:
        raise UsageError("This tokenizer does not give back the text that it was given: give a byte-level BPE.")
    return tokenizer


def read(path: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` on disk.

    >>> read("runs/first/tokenizer.json").vocabulary                            # doctest: +SKIP
    8192

    Raises:
        UsageError: the file cannot be read, or see `from_json`.
    """
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The tokenizer {path} cannot be read ({error}): name a tokenizer.json.") from None


def train(pieces: Iterable[bytes], vocabulary: int) -> Tokenizer:
    """Learns byte pairs from a text: the pair seen most often becomes one token, again and again.

    >>> tokenizer = train([b"low lower lowest " * 9], vocabulary=259)
    >>> [tokenizer.decode([token]) for token in tokenizer.encode(b"lowest")]
    [b'low', b'e', b's', b't']

    Args:
        pieces: the text, all of which is read; the same text gives the same tokenizer.
        vocabulary: number of tokens, at least 256; the first 256 are the bytes in their order.

    Returns:
        The tokenizer; the one of bytes for 256.

    Raises:
        UsageError: the vocabulary is too small, or the text too short for it.
    """
    if vocabulary < BYTES:
        raise UsageError(f"The vocabulary is {vocabulary} and must be at least {BYTES}, one token for each byte.")
    if vocabulary == BYTES:
        return of_bytes()
    encoder = Encoder.from_str(of_bytes().to_json())
    trainer = BpeTrainer(vocab_size=vocabulary, min_frequency=2, initial_alphabet=ALPHABET, show_progress=False)  # pyright: ignore[reportCallIssue]
    encoder.train_from_iterator((segment.decode("utf-8", "replace") for segment in segments(pieces)), trainer)
    model = json.loads(encoder.to_str())["model"]
    # The library numbers the bytes in the order of the characters that stand for them; here a byte is its own number.
    numbers = dict(NUMBERS)
    for token in sorted(model["vocab"], key=model["vocab"].__getitem__):
        numbers.setdefault(token, len(numbers))
    if len(numbers) < vocabulary:
        raise UsageError(
            f"The text has only {len(numbers):,} tokens in it where a vocabulary of {vocabulary:,} was asked for: "
            "ask for a smaller one or give more text."
        )
    return from_json(json.dumps(_document(numbers, model["merges"]), ensure_ascii=False))


def _document(vocabulary: dict[str, int], merges: list[Any]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    parts = ("truncation", "padding", "normalizer", "post_processor")
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    model = {"type": "BPE", **dict.fromkeys(options), "fuse_unk": False, "byte_fallback": False}
    model |= {"ignore_merges": False, "vocab": vocabulary, "merges": merges}
    document = {"version": "1.0", "added_tokens": [], **dict.fromkeys(parts)}
    return document | {"pre_tokenizer": byte_level, "decoder": byte_level, "model": model}


def _strings(document: dict[str, Any]) -> list[bytes]:
    """What each token stands for, once it is clear that the tokenizer changes nothing of a text."""
    model = document["model"]
    before = document["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    changes = document.get("normalizer") or model.get("dropout") or any(step["add_prefix_space"] for step in byte_level)
    if model["type"] != "BPE" or not byte_level or not NUMBERS.keys() <= model["vocab"].keys():
        raise UsageError("This tokenizer is no byte-level BPE: give one that is, as that of GPT-2 is.")
    if changes:
        raise UsageError("This tokenizer changes text before it cuts it up: give one that leaves it as it is.")
    added = {entry["content"]: entry["id"] for entry in document.get("added_tokens") or ()}
    strings = [b""] * (max([*model["vocab"].values(), *added.values()]) + 1)
    for token, number in model["vocab"].items():
        strings[number] = token.encode() if token in added else bytes(NUMBERS[character] for character in token)
    for content, number in added.items():
        strings[number] = content.encode()
    return strings
