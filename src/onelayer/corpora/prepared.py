"""The folder that holds a text as tokens: what is in it, and how it is known to be whole.

train.bin, validation.bin   the tokens, as unsigned integers of the smallest size that holds them
tokenizer.json              what turned text into these tokens, see `onelayer.corpora.tokenizer`
tokens.json                 what the files hold, with checksums; written last, so without it they are not whole
tokens.partial              there while the folder is being written, and where that was cut short
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onelayer.corpora import token_files, tokenizer
from onelayer.corpora.token_files import Tokens
from onelayer.corpora.tokenizer import Tokenizer
from onelayer.errors import UsageError
from onelayer.files import write_bytes

FACTS, UNFINISHED, TOKENIZER = "tokens.json", "tokens.partial", "tokenizer.json"
PARTS = ("train", "validation")

_ANEW = "prepare the data anew"


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as tokens, split once and for all into a part to train on and a part to validate on.

    >>> corpus = open_tokens("tokens/notes")                                    # doctest: +SKIP
    >>> corpus.describe()                                                       # doctest: +SKIP
    'notes.txt: 925,021 bytes to train on (1 file), 74,979 to validate on (1 file)'

    Attributes:
        name: what the text is, for people.
        folder: where its tokens lie.
        train, validation: the tokens of each part.
        tokenizer: what made them; its own fingerprint tells tokenizers apart.
        train_bytes, validation_bytes: bytes of text in each part.
        train_files, validation_files: number of files in each part; a file cut in two counts in both.
        skipped_files: files of the folder that are empty or not text, and so in neither part.
        fingerprint: SHA-256 of the text of both parts, in hexadecimal, to recognise the same data when a run is
            resumed, whatever the tokenizer.
    """

    name: str
    folder: Path
    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    train_bytes: int
    validation_bytes: int
    train_files: int
    validation_files: int
    skipped_files: int
    fingerprint: str

    def describe(self) -> str:
        """Name, sizes and file counts in one line."""
        parts = [
            f"{self.name}: {self.train_bytes:,} bytes to train on ({_files(self.train_files)})",
            f"{self.validation_bytes:,} to validate on ({_files(self.validation_files)})",
        ]
        if self.skipped_files:
            parts.append(f"{_files(self.skipped_files)} skipped as empty or not text")
        if not self.tokenizer.is_bytes:
            tokens = f"{len(self.train):,} and {len(self.validation):,} tokens"
            parts.append(f"as {tokens} of a vocabulary of {self.tokenizer.vocabulary:,}")
        return ", ".join(parts)


def is_prepared(folder: Path) -> bool:
    """Whether a path is a folder of tokens, be they whole or not.

    >>> is_prepared(Path("texts"))
    False
    """
    return (folder / FACTS).is_file() or (folder / UNFINISHED).is_file()


def open_tokens(folder: str | Path) -> Corpus:
    """The corpus whose tokens lie in a folder, once it is clear that they are whole.

    >>> open_tokens("runs/first/tokens").describe()                             # doctest: +SKIP
    'Python 3.12.3 standard library: 9,012,345 bytes to train on (540 files), 701,234 to validate on (31 files)'

    Args:
        folder: made by `onelayer.corpora.prepare`, or by `onelayer tokenize`.

    Returns:
        The corpus; of files larger than 64 MiB, a sample of that size was checked.

    Raises:
        UsageError: the folder is missing, or its files are damaged, cut short, or of another tokenizer.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["format"] != 1:
            raise UsageError(f"{folder} is of another version of this program: {_ANEW}.")
        dtype = np.dtype({1: np.uint8, 2: np.uint16, 4: np.uint32}[np.dtype(facts["dtype"]).itemsize])
        tokens = {part: Tokens(folder / f"{part}.bin", dtype, int(facts["vocabulary"])) for part in PARTS}
        damaged = [
            found.path
            for part, found in tokens.items()
            if len(found) != facts[part]["tokens"] or token_files.checksum(found.path) != facts[part]["checksum"]
        ]
        if damaged:
            raise UsageError(f"The tokens {damaged[0]} are damaged or cut short: {_ANEW}.")
        of_these = tokenizer.read(folder / TOKENIZER)
        if of_these.fingerprint != facts["tokenizer"]:
            raise UsageError(f"{folder / TOKENIZER} is not what made the tokens beside it: restore it, or {_ANEW}.")
        return Corpus(
            name=str(facts["name"]),
            folder=folder,
            train=tokens["train"],
            validation=tokens["validation"],
            tokenizer=of_these,
            train_bytes=int(facts["train"]["bytes"]),
            validation_bytes=int(facts["validation"]["bytes"]),
            train_files=int(facts["train"]["files"]),
            validation_files=int(facts["validation"]["files"]),
            skipped_files=int(facts["skipped_files"]),
            fingerprint=str(facts["fingerprint"]),
        )
    except (FileNotFoundError, NotADirectoryError):
        if (folder / UNFINISHED).is_file():
            why = f"The tokens in {folder} are not whole, since preparing them was cut short: {_ANEW}."
        else:
            why = f"There are no tokens in {folder}, it has no {FACTS}: name a folder made by onelayer tokenize."
        raise UsageError(why) from None
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / FACTS} is damaged ({error}): {_ANEW}.") from None


def finish(folder: Path, facts: dict[str, Any], of_these: Tokenizer) -> None:
    """Declares the token files of a folder whole.

    >>> finish(Path("tokens"), facts, tokenizer.of_bytes())                     # doctest: +SKIP

    Args:
        folder: with `train.bin` and `validation.bin`, which are on disk.
        facts: what is known of them, less what can be seen from the files and the tokenizer.
        of_these: the tokenizer that made them.
    """
    write_bytes(folder / TOKENIZER, of_these.to_json().encode())
    for part in PARTS:
        facts[part]["checksum"] = token_files.checksum(folder / f"{part}.bin")
    facts |= {"dtype": of_these.dtype.name, "vocabulary": of_these.vocabulary, "tokenizer": of_these.fingerprint}
    write_bytes(folder / FACTS, (json.dumps({"format": 1} | facts, indent=2) + "\n").encode())
    (folder / UNFINISHED).unlink(missing_ok=True)


def _files(count: int) -> str:
    return f"{count:,} file{'' if count == 1 else 's'}"
