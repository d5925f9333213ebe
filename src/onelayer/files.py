"""Files that are whole or not there, also after a crash."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


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
