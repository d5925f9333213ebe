"""Puts docs/results.md together from its introduction and what `onelayer compare` wrote beside each experiment's rows.

    onelayer compare language --data tinyshakespeare.txt peps.txt --out docs/results/language
    python benchmarks/results.py

The first goes on where the rows end, and writes the section anew where none is missing.
"""

from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
ORDER = ("memory", "gradients", "tracking", "blocks", "language", "copying", "restarts")


def assembled(docs: Path = DOCS) -> str:
    """The whole page."""
    sections = [docs / "results" / name / "section.md" for name in ORDER]
    parts = [docs / "results" / "introduction.md", *(path for path in sections if path.exists())]
    return "\n".join(path.read_text(encoding="utf-8") for path in parts)


if __name__ == "__main__":
    (DOCS / "results.md").write_text(assembled(), encoding="utf-8")
