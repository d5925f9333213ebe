"""Files that are whole or not there, also after a crash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onelayer.errors import UsageError


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file in one step: readers see the old content or the new, also after a crash.

    >>> write_bytes(Path("config.json"), b"{}")                                 # doctest: +SKIP

    Args:
        path: in an existing folder.
        data: the whole new content.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


@contextmanager
def written(path: Path, remedy: str) -> Iterator[None]:
    """Says in a sentence why something could not be written, as on a full disk or where nobody may write.

    >>> with written(Path("nowhere/one.json"), "name another folder"):
    ...     write_bytes(Path("nowhere/one.json"), b"{}")
    Traceback (most recent call last):
        ...
    onelayer.errors.UsageError: nowhere/one.json cannot be written (No such file or directory): name another folder.

    Args:
        path: what the block writes.
        remedy: what to do where it cannot, the end of a sentence.

    Raises:
        UsageError: in place of the block's `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error}): {remedy}.") from None


def check_target(path: Path) -> None:
    """Makes sure that a file can be written there, before the work that it is to hold.

    >>> check_target(Path("found.json"))

    Raises:
        UsageError: there is no such folder, or nobody may write in it.
    """
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"There is no folder {path.parent} to write {path.name} in: make it first.")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"{path} may not be written: name another file.")


def file_checksum(path: Path) -> str:
    """SHA-256 of the content of a file, in hexadecimal.

    >>> _ = Path("empty").write_bytes(b"")
    >>> file_checksum(Path("empty"))[:8]
    'e3b0c442'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_folder(path: Path) -> None:
    """Makes sure that renames in a folder are on disk.

    >>> flush_folder(Path("."))
    """
    if os.name != "posix":  # elsewhere a folder cannot be flushed
        return
    folder = os.open(path, os.O_RDONLY)  # a rename is safe once the folder is on disk
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
