"""The page of a run: numbers first, then what they came from, in one file that needs nothing else."""

from __future__ import annotations

import json
import shlex
from html import escape
from pathlib import Path

from onelayer.report import html, numbers
from onelayer.report.record import Record, read

try:
    from onelayer.report.figures import draw
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "matplotlib":
        raise

    def draw(record: Record) -> dict[str, str] | None:
        return None


# Title and caption of each figure, in the order of the page; a caption must be true whatever the figure shows.
_CAPTIONS = {
    "loss": (
        "Bits per byte",
        "Pale: every training step; full: their running mean; dots: validation. Dashed, once a run is evaluated: byte "
        "models that count strings of one, two and three bytes in the same training text, scored on the same text, of "
        "each at most the first 32 MiB. A model that knows more than these counts ends below the lowest. A steep start "
        "may lie outside the frame.",
    ),
    "residual": (
        "Is it an equilibrium?",
        "Distance of the returned state from being a fixed point, relative to its size, on a logarithmic axis. Solves "
        "that converge end at or below their tolerance; a climbing curve means that equilibria become harder to find.",
    ),
    "evaluations": (
        "Work of a solve in training",
        "Evaluations of the block until the forward solve stops, and products with its transposed Jacobian in the "
        "backward solve. A rising curve means that a step becomes dearer as the weights grow.",
    ),
    "histogram": (
        "Work of a solve on validation",
        "Every sample stops on its own, so a wide spread means that some text is harder than other. Solves that were "
        "cut off would pile up at the cap.",
    ),
    "allowed": (
        "What the evaluations buy",
        "The same weights on the same text, with solves cut off after so many evaluations. The first evaluation looks "
        "at the start, so at 1 the block has not been applied and at 2 it has been applied once. The further a point "
        "lies above the converged line, the more the evaluations after it matter; a model that ignores depth is flat.",
    ),
    "convergence": (
        "How a solve converges",
        "Residual of the same cut-off solves, on logarithmic axes. On a straight fall every doubling of the work buys "
        "the same factor; a floor above the tolerance means that more work would buy nothing.",
    ),
    "memory": (
        "Memory",
        "Peak memory of the process so far. Ordinary back-propagation stores every application of a block; an implicit "
        "gradient stores one evaluation, however many the solve took. Updates at the start of a run that go through a "
        "few plain applications store each of these.",
    ),
}

# Control characters that a model may emit, as the pictures that Unicode has for them: browsers do not show them.
_VISIBLE = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {127: 0x2421}


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run folder, from what the run has written there so far.

    The page stands alone: no network, no other files. A run that was interrupted gets a page with what there is, and
    where matplotlib is missing the page says so and has no plots.

    >>> write_report(Path("runs/small"))                                        # doctest: +SKIP
    PosixPath('runs/small/report.html')

    Args:
        run: folder of a run, with `config.json` or `metrics.jsonl` and, at the end, `evaluation.json`.

    Returns:
        Path of the page.

    Raises:
        UsageError: the folder is not that of a run.
    """
    report = Path(run) / "report.html"
    html.write(_page(read(Path(run))), report)
    return report


def _page(record: Record) -> str:
    parts = [
        _header(record),
        *(f'<p class="note">{escape(note)}</p>' for note in record.notes),
        _verdict(record),
        html.tiles(numbers.tiles(record)),
        _checks(record),
        _figures(record),
        _sample(record),
        _configuration(record),
    ]
    return html.document(record.name, parts)


def _header(record: Record) -> str:
    model, data = (record.config.get(key) for key in ("model", "data"))
    model, data = (value if isinstance(value, dict) else {} for value in (model, data))
    layers = model.get("layers")
    kinds = {
        "equilibrium": "One block, solved for its equilibrium",
        "tied": f"One block, applied {layers} times",
        "untied": f"{layers} different blocks",
    }
    kind = kinds.get(str(model.get("depth")), "A language model over bytes")
    text = data.get("name") or data.get("path")
    above = f"onelayer · run {record.name}"
    return (
        f"<header>\n<p>{escape(above)}</p>\n<h1>{escape(kind)}</h1>\n"
        f"<p>{escape(f'Trained to predict the next byte of {text}.{_start(record)}') if text else ''}</p>\n</header>"
    )


def _start(record: Record) -> str:
    """How an equilibrium model was trained before its gradients were implicit; empty where they were from the start."""
    model, training = (record.config.get(key) for key in ("model", "training"))
    model, training = (value if isinstance(value, dict) else {} for value in (model, training))
    steps, layers = training.get("unrolled_steps"), training.get("unrolled_layers")
    if model.get("depth") != "equilibrium" or not steps or not layers:
        return ""
    return f" Its first {steps} updates went through {layers} plain applications of the block, by back-propagation."


def _verdict(record: Record) -> str:
    verdict = numbers.verdict(record)
    if verdict is None:
        return ""
    good, sentence = verdict
    return f'<p class="verdict{"" if good else " bad"}">{escape(sentence)}</p>'


def _checks(record: Record) -> str:
    rows = [
        f"<tr><td>{escape(check.asked)}</td><td>{escape(check.measured)}</td>"
        f'<td class="{"yes" if check.holds else "no"}">{"✓ holds" if check.holds else "✗ does not hold"}</td></tr>'
        for check in numbers.checks(record)
    ]
    if not rows:
        return ""
    head = "<thead><tr><th>Asked for</th><th>Measured</th><th></th></tr></thead>"
    return f"<h2>What it shows</h2>\n<table>{head}<tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


def _figures(record: Record) -> str:
    drawings = draw(record)
    if drawings is None:
        sentence = "The plots are missing because matplotlib is not installed: install it and write this report again."
        return f'<h2>Curves</h2>\n<p class="note">{sentence}</p>'
    figures = html.figures(_CAPTIONS, drawings, wide=frozenset({"loss"}))
    return f"<h2>Curves</h2>\n{figures}" if figures else ""


def _sample(record: Record) -> str:
    sample = record.evaluation.get("sample")
    if not isinstance(sample, dict) or not isinstance(sample.get("text"), str):
        return ""
    prompt, text = str(sample.get("prompt") or ""), sample["text"]
    shown = escape(text.removeprefix(prompt).translate(_VISIBLE))
    lead = f'<span class="prompt">{escape(prompt.translate(_VISIBLE))}</span>' if prompt else ""
    return (
        f"<h2>What it writes</h2>\n<pre>{lead}{shown}</pre>\n"
        '<p class="after">Sampled byte by byte by the trained model; what was given to it stands first, in colour.</p>'
    )


def _configuration(record: Record) -> str:
    if not record.config:
        return ""
    command = record.config.get("command")
    if isinstance(command, list):
        command = shlex.join(str(word) for word in command)
    again = f"<h2>Again</h2>\n<pre>{escape(str(command))}</pre>\n" if command else ""
    shown = escape(json.dumps(record.config, indent=2, ensure_ascii=False))
    return (
        f'{again}<details class="after"><summary>The configuration, resolved</summary>\n<pre>{shown}</pre>\n</details>'
    )
