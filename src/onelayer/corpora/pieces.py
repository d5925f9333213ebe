"""Where a stream of text may be cut before it is turned into tokens, so that no token depends on how it was read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# A segment ends at the first border at least so many bytes after its start; without one, at the second number.
_LEAST, _MOST = 1 << 14, 1 << 16

# A border has a character that is no space on either side, and stands after a line end or before a single space. The
# tokenizers of GPT-2 and its successors start a new word at each of them, so cutting there changes no token. White
# space of more than one byte starts with one of the bytes c2, e1, e2 and e3 80, which are left out.
_SOLID = (
    rb"[!-~]",
    rb"[\xc3-\xdf][\x80-\xbf]",
    rb"(?:[\xe0\xe4-\xef][\x80-\xbf]|\xe3[\x81-\xbf])[\x80-\xbf]",
    rb"[\xf0-\xf4][\x80-\xbf]{3}",
)
_NEXT = rb"(?:" + rb"|".join(_SOLID) + rb")"
_AFTER_LINE = rb"(?:" + rb"|".join(rb"(?<=" + solid + rb"\n)" for solid in _SOLID) + rb")(?=" + _NEXT + rb")"
_BEFORE_SPACE = rb"(?:" + rb"|".join(rb"(?<=" + solid + rb")" for solid in _SOLID) + rb")(?= " + _NEXT + rb")"
_BORDER = re.compile(_AFTER_LINE + rb"|" + _BEFORE_SPACE)


def segments(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """A text in segments of 16 to 64 KiB, the same ones whatever the pieces that it comes in.

    >>> list(segments([b"one li", b"ne"]))
    [b'one line']

    Args:
        pieces: the text, of which no more is held than a piece and a segment.

    Returns:
        An iterator over its segments; none is cut within a character.
    """
    text = bytearray()
    for piece in pieces:
        text += piece
        start = 0
        while len(text) - start > _MOST:
            end = _end(text, start)
            yield bytes(text[start:end])
            start = end
        del text[:start]
    if text:
        yield bytes(text)


def _end(text: bytearray, start: int) -> int:
    border = _BORDER.search(text, start + _LEAST, start + _MOST)
    if border:
        return border.start()
    end = start + _MOST
    while text[end] & 0xC0 == 0x80 and end > start + _MOST - 3:
        end -= 1
    return end
