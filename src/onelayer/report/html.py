"""What all pages share: the style, figures with captions, tiles of numbers, and one file that is never half written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path


@dataclass(frozen=True)
class Tile:
    """One number of the page: its name, the number with its unit, and a few words below it."""

    name: str
    value: str
    more: str = ""


def tiles(found: Iterable[Tile]) -> str:
    """The numbers at the head of a page; nothing where there are none.

    >>> tiles([])
    ''
    """
    shown = [
        f'<div class="tile"><div class="name">{escape(tile.name)}</div>'
        f'<div class="value">{escape(tile.value)}</div>'
        f'<div class="more">{escape(tile.more)}</div></div>'
        for tile in found
    ]
    return '<section class="tiles">\n' + "\n".join(shown) + "\n</section>" if shown else ""


def figures(
    captions: Mapping[str, tuple[str, str]], drawings: Mapping[str, str], wide: frozenset[str] = frozenset()
) -> str:
    """The drawings that there are, in the order of their captions.

    >>> figures({"loss": ("Loss", "It falls.")}, {})
    ''

    Args:
        captions: title and caption by name.
        drawings: SVG by name.
        wide: names of those that take the whole width.
    """
    shown = [
        f"<figure{' class=' + chr(34) + 'wide' + chr(34) if name in wide else ''}>\n<h3>{escape(title)}</h3>\n"
        f"{drawings[name]}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"
        for name, (title, caption) in captions.items()
        if name in drawings
    ]
    return '<section class="figures">\n' + "\n".join(shown) + "\n</section>" if shown else ""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page that needs no other file and no network.

    >>> document("Empty", [])[:15]
    '<!doctype html>'

    Args:
        title: plain text.
        parts: HTML, one below the other; empty ones are left out.
    """
    style = (resources.files("onelayer.report") / "page.css").read_text(encoding="utf-8")
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · onelayer</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def write(page: str, path: Path) -> None:
    """Writes a page in one step.

    >>> write(document("Empty", []), Path("empty.html"))
    """
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.write_text(page, encoding="utf-8", errors="replace")
    os.replace(unfinished, path)  # whoever reads it meanwhile sees the old page or the new one, never half of one
