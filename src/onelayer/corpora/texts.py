"""Text on disk: one file, a folder of files, or the source of Python's standard library, never all of it in memory."""

from __future__ import annotations

import codecs
import os
import platform
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from onelayer.errors import UsageError

# Left out of the default text, wherever in it the name stands: other people's packages, tests, compiled files.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Left out too: tables that a program wrote, which a model learns by heart or not at all.
_TABLES = (
    "encodings/*",
    "pydoc_data/*",
    "msilib/*",
    "html/entities.py",
    "stringprep.py",
    "_sysconfigdata*",
    "_sysconfig_vars*",
)
# Modules that repeat twenty lines and more of each other; such a family counts as one entry of the split.
_FAMILIES = (
    ("aifc", "chunk", "sunau", "wave"),
    ("asynchat", "asyncore"),
    ("bz2", "gzip", "lzma"),
    ("cProfile", "profile", "pstats"),
    ("distutils", "sysconfig"),
    ("genericpath", "ntpath", "posixpath"),
    ("imghdr", "sndhdr"),
    ("io", "_pyio"),
    ("lib2to3", "token", "tokenize"),
)


PIECE = 1 << 20  # bytes that are read at a time


@dataclass(frozen=True)
class Document:
    """One text file, and the top-level entry that it belongs to, since whole entries are held out.

    >>> Document(entry="json", path=Path("json/decoder.py"), size=12473, ends_line=True).entry
    'json'

    Attributes:
        entry: name of the file or folder that it is or lies in, seen from the top.
        path: of the file.
        size: its bytes, at least one.
        ends_line: whether the last of them ends a line.
    """

    entry: str
    path: Path
    size: int
    ends_line: bool


def pieces(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """A stretch of a file, a piece at a time.

    >>> b"".join(pieces(Path("notes.txt"), 0, 5))                               # doctest: +SKIP
    b'Dear '

    Args:
        path: of the file.
        start, stop: bytes, counted from its start.

    Returns:
        An iterator over pieces of at most one mebibyte.

    Raises:
        UsageError: the file cannot be read, or has become shorter than that.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            while start < stop:
                piece = file.read(min(PIECE, stop - start))
                if not piece:
                    raise UsageError(f"{path} has become shorter while it was read: leave the data as they are.")
                start += len(piece)
                yield piece
    except OSError as error:
        raise _unreadable(path, error) from None


def standard_library() -> tuple[str, list[Document], int]:
    """The source of the running Python's standard library, without tests, tables and installed packages.

    >>> name, documents, skipped = standard_library()
    >>> name.endswith("standard library"), any(document.entry == "argparse" for document in documents)
    (True, True)

    Returns:
        What the text is, its documents in sorted order, and how many files were empty or not text.

    Raises:
        UsageError: this Python comes without the source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    families = {module: family[0] for family in _FAMILIES for module in family}
    documents, skipped = [], 0
    for file, parts in _walk(root) if root.is_dir() else ():
        inside = "/".join(parts)
        if not inside.endswith(".py") or _NOT_LIBRARY.intersection(parts) or any(fnmatch(inside, t) for t in _TABLES):
            continue
        module = parts[0].removesuffix(".py")
        document = _document(families.get(module, module), file)
        if isinstance(document, Document):
            documents.append(document)
        else:
            skipped += 1
    if not documents:
        raise UsageError("This Python has its standard library without the source: give a text file or folder as data.")
    return f"Python {platform.python_version()} standard library", documents, skipped


def folder(root: Path) -> tuple[list[Document], int]:
    """Every UTF-8 text file under a folder, hidden ones left out.

    >>> documents, skipped = folder(Path("texts"))                              # doctest: +SKIP

    Args:
        root: an existing folder.

    Returns:
        The documents in sorted order, and how many files were empty or not text.

    Raises:
        UsageError: something in it cannot be read, or it holds no text at all.
    """
    documents: list[Document] = []
    skipped: list[str] = []
    for file, parts in _walk(root):
        document = _document(parts[0], file)
        if isinstance(document, Document):
            documents.append(document)
        else:
            skipped.append(f"{file.name} {document}")
    if not documents:
        found = f"none of its {len(skipped)} files is ({skipped[0]})" if skipped else "it has no files"
        raise UsageError(f"The data folder {root} holds no UTF-8 text, {found}: give a folder or file of text.")
    return documents, len(skipped)


def text_file(path: Path) -> Document:
    """One file, when it is UTF-8 text.

    >>> text_file(Path("notes.txt")).size                                       # doctest: +SKIP
    1000000

    Raises:
        UsageError: the file cannot be read, is empty, or is not UTF-8 text.
    """
    document = _document("", path)
    if not isinstance(document, Document):
        raise UsageError(f"The data file {path} {document}: give a file of UTF-8 text.")
    return document


def is_folder(path: Path) -> bool:
    """Whether a data path is a folder (true) or a file (false).

    >>> is_folder(Path("."))
    True

    Raises:
        UsageError: it is neither, does not exist, or must not be looked at.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UsageError(f"The data path {path} does not exist: give a text file or a folder of text.") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise UsageError(f"The data path {path} is neither a file nor a folder: give a text file or a folder of text.")
    return stat.S_ISDIR(mode)


def _walk(root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The regular, unhidden files under a folder and their path inside it; sorted, whatever order the disk has."""

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename or root), error)

    for here, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            file = Path(here, name)
            if not name.startswith(".") and file.is_file():
                yield file, file.relative_to(root).parts


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path} cannot be read ({error.strerror or error}): make it readable or give other data.")


def _document(entry: str, path: Path) -> Document | str:
    """The file as a document, or why it is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    size, last, pending = 0, b"", 0
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                # UTF-16 text in Latin letters is valid UTF-8 with every second byte zero, and no text has such bytes.
                if b"\0" in piece:
                    return f"is not text (zero byte at offset {size + piece.index(0)})"
                pending = len(decoder.getstate()[0])
                decoder.decode(piece)
                size, last = size + len(piece), piece
            pending = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text ({error.reason} at offset {size - pending + error.start})"
    except OSError as error:
        raise _unreadable(path, error) from None
    return Document(entry, path, size, last.endswith(b"\n")) if size else "is empty"
