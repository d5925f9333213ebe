"""Token files: a text as numbers on disk, of any length, of which a training step maps the windows it reads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onelayer.errors import UsageError

# A checksum covers a file whole up to so many blocks of so many bytes, and so many spread over it beyond.
_BLOCK, _BLOCKS = 1 << 20, 64


class Tokens:
    """A text as tokens in a file, of which only what is asked for is in memory.

    >>> _ = Path("text.bin").write_bytes(b"a few words")
    >>> tokens = Tokens(Path("text.bin"), np.dtype(np.uint8), vocabulary=256)
    >>> len(tokens), tokens.read(np.array([0, 6]), count=3).tolist()
    (11, [[97, 32, 102], [119, 111, 114]])

    Args:
        path: of a file that holds nothing but ids.
        dtype: of the ids, little-endian.
        vocabulary: that all ids are less than.

    Raises:
        UsageError: the file is missing.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], vocabulary: int) -> None:
        self.path = path
        self.dtype = dtype.newbyteorder("<")
        self.vocabulary = vocabulary
        try:
            self._length = path.stat().st_size // dtype.itemsize
        except OSError as error:
            raise UsageError(f"The tokens {path} cannot be read ({error.strerror}): prepare the data anew.") from None

    def __len__(self) -> int:
        return self._length

    def read(self, starts: npt.NDArray[np.integer[Any]], count: int) -> Tensor:
        """Stretches of the text.

        The file is mapped anew at each call, because pages once touched stay in memory while a mapping lives.

        Args:
            starts: where each begins, `(rows,)`, counted in tokens.
            count: tokens in each.

        Returns:
            The ids, int64 `(rows, count)` on the CPU.

        Raises:
            IndexError: a stretch is not within the text.
            UsageError: the file has been damaged or removed.
        """
        starts = np.asarray(starts, dtype=np.int64)
        if count < 0 or (starts.size and not 0 <= int(starts.min()) <= int(starts.max()) <= len(self) - count):
            raise IndexError(f"A text of {len(self)} tokens does not hold {count} from each of {starts.tolist()}.")
        ids = np.empty((len(starts), count), dtype=np.int64)
        if ids.size:
            try:
                mapped = np.memmap(self.path, dtype=self.dtype, mode="r", shape=(len(self),))
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"The tokens {self.path} have been damaged ({error}): prepare the data anew."
                ) from None
            for row, start in zip(ids, starts.tolist(), strict=True):
                row[:] = mapped[start : start + count]
            del mapped
            if int(ids.max()) >= self.vocabulary:
                raise UsageError(
                    f"The tokens {self.path} are damaged, one of them is {int(ids.max())} in a vocabulary of "
                    f"{self.vocabulary}: prepare the data anew."
                )
        return torch.from_numpy(ids)


def write(path: Path, pieces: Iterable[npt.NDArray[np.integer[Any]]], dtype: np.dtype[Any]) -> int:
    """Writes tokens as they come, and has them on disk when it returns.

    >>> write(Path("text.bin"), [np.array([1, 2]), np.array([3])], np.dtype(np.uint16))
    3

    Args:
        path: of the file, which is replaced.
        pieces: ids, one-dimensional arrays.
        dtype: that they are written in.

    Returns:
        The number of tokens.
    """
    count = 0
    with path.open("wb") as file:
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype=dtype.newbyteorder("<")).data)
            count += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return count


def checksum(path: Path) -> str:
    """SHA-256 in hexadecimal of what a file holds; of 64 spread mebibytes where it is larger than that.

    >>> _ = Path("text.bin").write_bytes(b"words")
    >>> checksum(Path("text.bin"))[:8]
    'dba36bff'
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    blocks = -(-size // _BLOCK)
    with path.open("rb") as file:
        for i in range(min(blocks, _BLOCKS)):
            file.seek(_BLOCK * (i * (blocks - 1) // (_BLOCKS - 1) if blocks > _BLOCKS else i))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()
