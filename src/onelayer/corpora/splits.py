"""Splitting documents into text to train on and text to validate on, without reading more than what lies at the cut."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from onelayer.corpora.texts import Document, pieces

# Whole entries are held out until validation has the first share of the text, and none that takes it past the second.
_ENOUGH, _TOO_MUCH = 0.06, 0.10
# Where whole entries cannot give that, the end of the text is held out.
_TAIL = 0.075


@dataclass(frozen=True)
class Span:
    """A stretch of a file.

    Attributes:
        path: of the file.
        start, stop: its bytes, where a line end stands after the last one even if the file has none there.
        size: bytes of the file.
    """

    path: Path
    start: int
    stop: int
    size: int

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, a piece at a time."""
        yield from pieces(self.path, self.start, min(self.stop, self.size))
        if self.stop > max(self.start, self.size):
            yield b"\n"


@dataclass(frozen=True)
class Part:
    """A text of stretches of files, one after the other.

    >>> part = Part((Span(Path("a.txt"), 0, 10, 20), Span(Path("b.txt"), 0, 5, 5)))
    >>> part.size, part.files
    (15, 2)

    Attributes:
        spans: the stretches, none of them empty.
    """

    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return sum(span.stop - span.start for span in self.spans)

    @property
    def files(self) -> int:
        """Number of files that it has something of."""
        return len(self.spans)

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, a piece at a time."""
        for span in self.spans:
            yield from span.pieces()


def split(documents: Sequence[Document]) -> tuple[Part, Part]:
    """Whole entries held out for validation, chosen by a hash of their names; where none fit, the tail of the text.

    >>> train, validation = split(documents)                                    # doctest: +SKIP

    Args:
        documents: at least one; files of several get a line end where they have none.

    Returns:
        The text to train on, and that to validate on; the second is empty for a text of a few bytes.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.entry] = sizes.get(document.entry, 0) + document.size
    held_out = _hold_out(sizes)
    if not held_out:
        return _tail(whole(documents))
    kept = [document for document in documents if document.entry not in held_out]
    return whole(kept), whole([document for document in documents if document.entry in held_out])


def whole(documents: Sequence[Document]) -> Part:
    """All of some documents.

    >>> whole([Document("", Path("a.txt"), 7, ends_line=False)]).size
    7
    """
    several = len(documents) > 1
    return Part(
        tuple(
            Span(document.path, 0, document.size + (several and not document.ends_line), document.size)
            for document in documents
        )
    )


def _hold_out(sizes: dict[str, int]) -> set[str]:
    """Entries for validation, in the order of their hashes; none where they cannot make up the share wanted."""
    total = sum(sizes.values())
    chosen: set[str] = set()
    size = 0
    for entry in sorted(sizes, key=lambda entry: hashlib.sha256(entry.encode("utf-8", "surrogateescape")).digest()):
        if size + sizes[entry] <= _TOO_MUCH * total:
            chosen.add(entry)
            size += sizes[entry]
        if size >= _ENOUGH * total:
            return chosen
    return set()


def _tail(part: Part) -> tuple[Part, Part]:
    """The text before the held-out tail and the tail, which begins at a line's start if one is near the place."""
    cut = part.size - int(part.size * _TAIL)
    cut += _ahead(_between(part, cut, part.size).pieces(), int(part.size * _TAIL / 10))
    return _between(part, 0, cut), _between(part, cut, part.size)


def _ahead(text: Iterable[bytes], near: int) -> int:
    """How far ahead the next line starts if that is near, else the next character."""
    passed, character = 0, 0
    for piece in text:
        if passed == 0:
            character = next((i for i, byte in enumerate(piece) if byte & 0xC0 != 0x80), len(piece))
        line = piece.find(b"\n", 0, max(near - passed, 0)) + 1
        if line:
            return passed + line
        passed += len(piece)
        if passed >= near:
            break
    return character


def _between(part: Part, start: int, stop: int) -> Part:
    spans, passed = [], 0
    for span in part.spans:
        length = span.stop - span.start
        first, last = max(start - passed, 0), min(stop - passed, length)
        if first < last:
            spans.append(Span(span.path, span.start + first, span.start + last, span.size))
        passed += length
    return Part(tuple(spans))
