"""Turning a text into tokens on disk, split into train and validation.

A text is prepared once, as a stream, so that none is too long: it is split, turned into tokens and written to a folder
(see `onelayer.corpora.prepared`), of which training maps the few pages that it needs. A token is a byte unless a
vocabulary or a tokenizer is asked for, and bits per byte compare across them, since each token stands for a known
number of bytes. The default text is the source of Python's own standard library, which every machine that runs this
already has.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from onelayer.corpora import hub_data, texts, token_files
from onelayer.corpora.prepared import TOKENIZER, UNFINISHED, Corpus, finish, is_prepared, open_tokens
from onelayer.corpora.splits import Part, split, whole
from onelayer.corpora.tokenizer import BYTES, Tokenizer
from onelayer.corpora.tokenizer import train as learn
from onelayer.errors import UsageError
from onelayer.models.configuration import ModelConfig

# What preparation may have left in a folder when it was cut short, and overwrites.
_LEFT = {UNFINISHED, TOKENIZER, "train.bin", "validation.bin", *hub_data.FILES}

# Byte pairs are learned from at most so much text, taken evenly from all that there is to train on.
_SAMPLE = 64 << 20


def prepare(
    data: str | Path | None, folder: str | Path, vocabulary: int | None = None, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Turns text into tokens on disk: a file, a folder, a data set of Hugging Face, or Python's standard library.

    A folder is read recursively in sorted order; hidden files and files that are not UTF-8 text are skipped. Whole
    top-level entries of it, chosen by a hash of their names, are held out for validation until they make up 6 to 10% of
    the text, so that near copies, which mostly lie side by side, stay together. Where no entries fit (a single file, a
    folder of few), the last 7.5% of the text are held out; a data set with a split of its own for validation keeps it.
    The same text gives the same tokens on every machine. Memory does not grow with the text.

    >>> corpus = prepare(None, "tokens")
    >>> corpus.tokenizer.vocabulary, 0.05 < len(corpus.validation) / len(corpus.train) < 0.12
    (256, True)

    Args:
        data: a text file or folder; `hf:owner/name` or `hf:owner/name:configuration`; `None` for the standard library;
            or a folder of tokens made before, which is used where it lies.
        folder: where the tokens go: a new or empty folder, or one where this was cut short.
        vocabulary: number of tokens: 256 for bytes, more for byte pairs learned from the text; `None` is 256, or what
            the folder of tokens has.
        tokenizer: one that there is already, instead.

    Returns:
        The corpus.

    Raises:
        UsageError: the data are missing, unreadable, empty, no text or not UTF-8; the folder is taken or its disk full;
            the vocabulary does not suit the text; or the tokens there are those of another tokenizer.
    """
    folder = Path(folder)
    if tokenizer is not None and vocabulary not in (None, tokenizer.vocabulary):
        raise UsageError(
            f"The tokenizer has {tokenizer.vocabulary:,} tokens where {vocabulary:,} were asked for: leave out one."
        )
    if data is not None and is_prepared(Path(data)):
        return _as_asked(open_tokens(data), vocabulary, tokenizer)
    with _being_written(folder):
        if isinstance(data, str) and data.startswith(hub_data.PREFIX):
            name, skipped = data, 0
            documents = hub_data.fetch(data, folder)
            train, validation = map(whole, documents) if len(documents) > 1 else split(documents[0])
        else:
            name, documents, skipped = _documents(data)
            train, validation = split(documents)
        parts = {"train": train, "validation": validation}
        tokenizer = _learn(train, vocabulary) if tokenizer is None else tokenizer
        digest = hashlib.sha256(train.size.to_bytes(8, "big"))
        facts = {"name": name, "skipped_files": skipped}
        for part, text in parts.items():
            ids = tokenizer.encode_pieces(_noted(text, digest.update, f"{part} text to tokens"))
            count = token_files.write(folder / f"{part}.bin", ids, tokenizer.dtype)
            facts[part] = {"tokens": count, "bytes": text.size, "files": text.files}
        finish(folder, facts | {"fingerprint": digest.hexdigest()}, tokenizer)
    return open_tokens(folder)


def resolved(data: str) -> str:
    """The data as they are found from any working directory, which is what a run remembers.

    >>> resolved("hf:Salesforce/wikitext:wikitext-2-raw-v1"), resolved("text.txt") == str(Path.cwd() / "text.txt")
    ('hf:Salesforce/wikitext:wikitext-2-raw-v1', True)
    """
    return data if data.startswith(hub_data.PREFIX) else str(Path(data).resolve())


def require(corpus: Corpus, model: ModelConfig) -> None:
    """Makes sure that a model can read a corpus: all its tokens are known, and each part fills one context and more.

    >>> require(prepare(None, "other"), ModelConfig(context=256))

    Args:
        corpus: what `prepare` or `open_tokens` returned.
        model: for its vocabulary and context.

    Raises:
        UsageError: the vocabulary is smaller than that of the tokens, or a part is too short for the context.
    """
    if model.vocabulary < corpus.tokenizer.vocabulary:
        raise UsageError(
            f"The tokens of {corpus.name} are of a vocabulary of {corpus.tokenizer.vocabulary:,}, the model's of "
            f"{model.vocabulary:,}: give it that vocabulary, or prepare the text with a smaller one."
        )
    for part, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) <= model.context:
            raise UsageError(
                f"The text {corpus.name} is shorter than one context: its {part} part holds {len(tokens):,} tokens "
                f"where a context of {model.context:,} takes {model.context + 1:,}: give more text or a smaller "
                "context."
            )


def _documents(data: str | Path | None) -> tuple[str, list[texts.Document], int]:
    if data is None:
        return texts.standard_library()
    path = Path(data)
    if texts.is_folder(path):
        return (path.resolve().name or str(path), *texts.folder(path))
    return path.name, [texts.text_file(path)], 0


def _learn(text: Part, vocabulary: int | None) -> Tokenizer:
    every = max(-(-text.size // _SAMPLE), 1)

    def sample() -> Iterator[bytes]:
        passed = 0
        for piece in _noted(text, lambda piece: None, "learning byte pairs"):
            if passed // texts.PIECE % every == 0:
                yield piece
            passed += len(piece)

    return learn(sample(), BYTES if vocabulary is None else vocabulary)


def _noted(text: Part, note: Callable[[bytes], None], what: str) -> Iterator[bytes]:
    """The pieces of a text, each noted as it passes, with a bar where that takes more than a few seconds."""
    with tqdm(total=text.size, desc=what, unit="B", unit_scale=True, delay=3, dynamic_ncols=True) as bar:
        for piece in text.pieces():
            note(piece)
            yield piece
            bar.update(len(piece))


def _as_asked(corpus: Corpus, vocabulary: int | None, tokenizer: Tokenizer | None) -> Corpus:
    there = corpus.tokenizer
    if vocabulary not in (None, there.vocabulary):
        raise UsageError(
            f"The tokens in {corpus.folder} are of a vocabulary of {there.vocabulary:,} and not {vocabulary:,}: leave "
            "the vocabulary out, or give the text that they were made of."
        )
    if tokenizer is not None and tokenizer.fingerprint != there.fingerprint:
        raise UsageError(
            f"The tokens in {corpus.folder} were made by another tokenizer: use its own, {corpus.folder / TOKENIZER}, "
            "or give the text that they were made of."
        )
    return corpus


@contextmanager
def _being_written(folder: Path) -> Iterator[None]:
    """A folder for what the block writes; nothing of it stays unless the block comes to its end."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in folder.iterdir() if path.name not in _LEFT)
    except OSError as error:
        raise UsageError(f"The folder {folder} cannot be made ({error.strerror}): name another one.") from None
    if others:
        raise UsageError(f"{folder} exists already and holds {others[0]}: name another folder for the tokens.")
    try:
        (folder / UNFINISHED).touch()
        yield
    except BaseException as error:
        with suppress(OSError):  # what cannot be removed is known by the mark in the folder
            for name in [*sorted(_LEFT - {UNFINISHED}), UNFINISHED]:  # the mark goes last
                (folder / name).unlink(missing_ok=True)
            for path in new:
                path.rmdir()
        if isinstance(error, OSError):
            remedy = "free some space" if error.errno == errno.ENOSPC else "name another folder"
            raise UsageError(f"The tokens cannot be written to {folder} ({error.strerror}): {remedy}.") from None
        raise
    finally:
        with suppress(OSError):
            for name in hub_data.FILES:
                (folder / name).unlink(missing_ok=True)
