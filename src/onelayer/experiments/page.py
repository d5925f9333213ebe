"""What an experiment found: the page, the section of docs/results.md, and the same in plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import torch

from onelayer.experiments.experiment import FAILED, Experiment, Findings, Table
from onelayer.experiments.results import Results
from onelayer.files import write_bytes, written
from onelayer.report import html
from onelayer.report.drawing import svg

# The colours of the page, for a picture that stands alone.
_COLORS = {"ink": "#1d1f24", "muted": "#6d7079", "grid": "#d9d6cd", "first": "#2f62d0", "second": "#d2571f"}
_COLORS |= {"third": "#2a8a66"}


def write_findings(
    experiment: Experiment[Any], settings: Any, results: Results, findings: Findings, command: str
) -> None:
    """Writes `report.html`, `section.md` and the pictures into the folder of the results.

    Raises:
        UsageError: the disk is full.
    """
    drawings = {name: svg(drawing.figure, name) for name, drawing in findings.drawings.items()}
    with written(results.folder, "make room on the disk, and give the command again"):
        html.write(page(experiment, settings, results, findings, drawings, command), results.folder / "report.html")
        for name, drawing in drawings.items():
            write_bytes(results.folder / f"{name}.svg", _alone(drawing).encode())
        text = section(experiment, settings, results, findings, command)
        write_bytes(results.folder / "section.md", text.encode())


def page(
    experiment: Experiment[Any],
    settings: Any,
    results: Results,
    findings: Findings,
    drawings: dict[str, str],
    command: str,
) -> str:
    """The whole page.

    Args:
        experiment, settings, results, findings: what was asked, how, and what came of it.
        drawings: SVG by name.
        command: what the user typed.
    """
    held = [claim.holds for claim in findings.claims]
    captions = {name: (drawing.title, drawing.caption) for name, drawing in findings.drawings.items()}
    parts = [
        f"<header>\n<p>onelayer · compare · {escape(experiment.name)}</p>\n<h1>{escape(experiment.title)}</h1>\n"
        f"<p>{escape(experiment.question)}</p>\n</header>",
        f'<p class="verdict{"" if all(held) else " bad"}">{escape(verdict(findings))}</p>' if held else "",
        _claims(findings),
        html.figures(captions, drawings, wide=frozenset(captions)),
        *(_table(table) for table in findings.tables),
        f"<h2>What a sceptical reviewer would say</h2>\n<p>{escape(experiment.sceptic)}</p>",
        f"<h2>Again</h2>\n<pre>{escape(command)}</pre>\n"
        f'<p class="after">{escape(machine(settings, results))} The raw results are in rows.jsonl.</p>',
    ]
    return html.document(experiment.title, parts)


def section(experiment: Experiment[Any], settings: Any, results: Results, findings: Findings, command: str) -> str:
    """A section of docs/results.md, in Markdown.

    Args:
        experiment, settings, results, findings: what was asked, how, and what came of it.
        command: what the user typed.
    """
    parts = [
        f"## {experiment.title}",
        experiment.question,
        f"```bash\n{command}\n```",
        machine(settings, results),
    ]
    if findings.claims:
        columns = ("asked", "measured", "")
        told = [
            [claim.asked, claim.measured, "holds" if claim.holds else "**does not hold**"] for claim in findings.claims
        ]
        parts.append(markdown(columns, told))
    for name, drawing in findings.drawings.items():
        parts += [f"![{drawing.title}](results/{experiment.name}/{name}.svg)", f"*{drawing.caption}*"]
    for table in findings.tables:
        parts += [f"### {table.title}", markdown(table.columns, table.rows), table.note]
    parts += ["### What a sceptical reviewer would say", experiment.sceptic]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(findings: Findings) -> str:
    """How much of what was asked is so, in a sentence.

    >>> verdict(Findings())
    'Nothing was asked that would hold or not.'
    """
    if not findings.claims:
        return "Nothing was asked that would hold or not."
    broken = sum(not claim.holds for claim in findings.claims)
    return f"Of {len(findings.claims)} things asked, {broken} did not hold." if broken else "All that was asked holds."


def machine(settings: Any, results: Results) -> str:
    """Where and how the rows were made, in words.

    Args:
        settings: of the experiment.
        results: its rows.
    """
    failed = sum(FAILED in row for row in results.rows)
    where = torch.cuda.get_device_name() if settings.device == "cuda" else "a CPU, one thread a trial"
    without = f", of which {failed} ended in nothing" if failed else ""
    return f"{len(results.rows)} trials{without}, on {where}; PyTorch {torch.__version__.partition('+')[0]}."


def plain(findings: Findings) -> str:
    """The tables and claims for a terminal.

    >>> print(plain(Findings(tables=[Table("Found", ("arm", "score"), [["one", "1.5"]])])))
    Found
    arm  score
    one    1.5
    <BLANKLINE>
    Nothing was asked that would hold or not.
    """
    told = [
        "\n".join([table.title, *aligned([table.columns, *table.rows]), *([table.note] if table.note else [])])
        for table in findings.tables
    ]
    claims = [f"{'holds' if c.holds else 'DOES NOT HOLD'}: {c.asked}. Measured: {c.measured}." for c in findings.claims]
    return "\n\n".join([*told, *claims, verdict(findings)])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines whose columns stand below each other.

    >>> aligned([("arm", "score"), ("one", "1.5")])
    ['arm  score', 'one    1.5']
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown(("arm", "score"), [["one", "1.5"]]))
    | arm | score |
    | --- | ---: |
    | one | 1.5 |
    """
    head = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def _claims(findings: Findings) -> str:
    if not findings.claims:
        return ""
    rows = [
        f"<tr><td>{escape(claim.asked)}</td><td>{escape(claim.measured)}</td>"
        f'<td class="{"yes" if claim.holds else "no"}">{"✓ holds" if claim.holds else "✗ does not hold"}</td></tr>'
        for claim in findings.claims
    ]
    head = "<thead><tr><th>asked</th><th>measured</th><th></th></tr></thead>"
    return f"<h2>What should be seen</h2>\n<table>{head}<tbody>\n{chr(10).join(rows)}\n</tbody></table>\n<p></p>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f'\n<p class="after">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table class="dense"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>{note}"
    )


def _alone(drawing: str) -> str:
    for name, color in _COLORS.items():
        drawing = drawing.replace(f"var(--{name})", color)
    paper = '<rect width="100%" height="100%" fill="#ffffff"/>'  # a dark reader would hide the ink
    return re.sub(r"^(<svg [^>]*>)", rf"\1{paper}", drawing)
