"""Text of a data set of Hugging Face, by its name; the one module that uses `datasets`, of the extra `hf`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onelayer.corpora.texts import Document
from onelayer.errors import UsageError

PREFIX = "hf:"
FILES = ("train.text", "validation.text")

_VALIDATION = ("validation", "valid", "dev")
_STRINGS = ("string", "large_string")


def fetch(data: str, folder: Path) -> list[list[Document]]:
    """Streams the text of a data set into files, so that it is read over the network once and never held whole.

    The text is that of the column `text`, or where there is none of all columns of strings, one below the other; every
    row ends with a line end.

    >>> fetch("hf:Salesforce/wikitext:wikitext-2-raw-v1", Path("texts"))        # doctest: +SKIP
    [[Document(entry='', path=PosixPath('texts/train.text'), size=10918892, ends_line=True)], [...]]

    Args:
        data: `hf:owner/name`, or `hf:owner/name:configuration`; a local folder of a data set may stand for the name.
        folder: an existing one, for `train.text` and `validation.text`.

    Returns:
        The text to train on, and where the data set has a split for that, the text to validate on.

    Raises:
        UsageError: `datasets` is not installed, or there is no such data set, no network, or no text in it.
        OSError: the files cannot be written.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise UsageError(
            "Data sets of Hugging Face need the package datasets: pip install 'equilibria[hf]', or give a file or a "
            "folder."
        ) from None
    name, _, configuration = data.removeprefix(PREFIX).partition(":")
    if not name:
        raise UsageError(f"The data {data} name no data set: give one, as in hf:owner/name.")
    splits = _asked(data, lambda: datasets.load_dataset(name, configuration or None, streaming=True))
    return [
        [_write(data, splits[split], folder / file)]
        for split, file in zip(_choose(data, list(splits)), FILES, strict=False)
    ]


def _asked(data: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:  # the package lets through whatever its many parts raise
        why = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
        raise UsageError(
            f"The data set {data} cannot be read ({why}): check the network, and its name, as in hf:owner/name or "
            "hf:owner/name:configuration."
        ) from None


def _rows(data: str, split: Any) -> Iterator[dict[str, Any]]:
    rows = iter(split)
    while (row := _asked(data, lambda: next(rows, None))) is not None:
        yield row


def _choose(data: str, names: list[str]) -> list[str]:
    train = "train" if "train" in names else names[0] if len(names) == 1 else None
    if train is None:
        raise UsageError(f"The data set {data} has no split train, only {', '.join(names)}: name another one.")
    return [train, *[name for name in _VALIDATION if name in names and name != train][:1]]


def _write(data: str, split: Any, path: Path) -> Document:
    with path.open("wb") as file:
        for text in _texts(data, split):
            file.write((text if text.endswith("\n") else text + "\n").encode())
    size = path.stat().st_size
    if not size:
        raise UsageError(f"The data set {data} has no text in it: name another one.")
    return Document("", path, size, ends_line=True)


def _texts(data: str, split: Any) -> Iterator[str]:
    columns: list[str] = []
    for row in _rows(data, split):
        columns = columns or _columns(data, split, row)
        text = "\n".join(row[column] for column in columns if row[column])
        if text:
            yield text


def _columns(data: str, split: Any, row: dict[str, Any]) -> list[str]:
    if split.features is None:  # some formats do not say what their columns hold before they are read
        found = [name for name, value in row.items() if isinstance(value, str)]
    else:
        found = [name for name, feature in split.features.items() if getattr(feature, "dtype", "") in _STRINGS]
    if not found:
        raise UsageError(f"The data set {data} has no column of text, only {', '.join(row)}: name another one.")
    return ["text"] if "text" in found else found
