"""What a run folder holds, read with care: a run may have been killed in the middle of a line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onelayer.errors import UsageError

# Above this share of solves cut off by their cap, what was trained is a network of that many steps.
CAP_LIMIT = 0.05

Line = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What a run wrote down.

    >>> record = read(Path("runs/small"))                                       # doctest: +SKIP
    >>> record.number("bits_per_byte"), len(record.train)                       # doctest: +SKIP
    (2.31, 900)

    Attributes:
        name: name of the run folder.
        config: the resolved configuration; empty where there is none.
        train: one line for each training step, in order.
        validation: one line for each validation, in order.
        evaluation: what was measured at the end; empty for a run that has not come to its end.
        notes: sentences on what is missing or could not be read.
    """

    name: str
    config: Line
    train: list[Line]
    validation: list[Line]
    evaluation: Line
    notes: list[str]

    def number(self, *keys: str) -> float | None:
        """A number of the evaluation, as in `number("ngrams", "2")`; `None` where it is missing or not finite."""
        return number(self.evaluation, *keys)

    def setting(self, *keys: str) -> float | None:
        """A number of the configuration, likewise."""
        return number(self.config, *keys)

    def histogram(self) -> dict[int, float]:
        """How many solves of the final evaluation took how many evaluations of the block."""
        evaluations = self.evaluation.get("evaluations")
        counts = evaluations.get("histogram") if isinstance(evaluations, dict) else None
        if not isinstance(counts, dict):
            return {}
        found = {int(steps): number(counts, steps) for steps in counts if steps.isdecimal()}
        return {steps: count for steps, count in sorted(found.items()) if count is not None and count > 0}

    def recent(self, key: str) -> float | None:
        """Mean over the last tenth of the training lines that have this number; `None` where none has."""
        values = series(self.train, key)[1]
        last = values[-max(len(values) // 10, 1) :]
        return sum(last) / len(last) if last else None

    def last(self, kind: list[Line], key: str) -> float | None:
        """The last number of that name in some lines."""
        values = series(kind, key)[1]
        return values[-1] if values else None


def number(values: Line, *keys: str) -> float | None:
    """A finite number deep in a JSON object, or `None`.

    >>> number({"ngrams": {"2": 2.58}}, "ngrams", "2"), number({"residual": None}, "residual")
    (2.58, None)
    """
    value: Any = values
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def series(lines: list[Line], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one name, leaving out the lines that do not have it.

    >>> series([{"step": 1, "residual": 0.1}, {"step": 2, "residual": None}], "residual")
    ([1], [0.1])
    """
    points = [(number(line, "step"), number(line, key)) for line in lines]
    found = [(step, value) for step, value in points if step is not None and value is not None]
    return [step for step, _ in found], [value for _, value in found]


def by_allowed_evaluations(record: Record, key: str) -> tuple[list[float], list[float]]:
    """Evaluations allowed to a solve, and a number of the evaluation made with so many."""
    rows = record.evaluation.get("by_allowed_evaluations")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return series([{"step": row.get("max_steps"), key: row.get(key)} for row in rows], key)


def read(run: Path) -> Record:
    """Reads a run folder: `config.json`, `metrics.jsonl` and, for a run that came to its end, `evaluation.json`.

    >>> read(Path("runs/small")).name                                           # doctest: +SKIP
    'small'

    Args:
        run: the folder.

    Returns:
        What it holds.

    Raises:
        UsageError: the folder is not that of a run.
    """
    if not any((run / file).is_file() for file in ("config.json", "metrics.jsonl")):
        raise UsageError(
            f"{run} is not a run: it holds no config.json and no metrics.jsonl; name a folder of a training."
        )
    notes: list[str] = []
    config = _read_object(run / "config.json", notes)
    train, validation = _read_lines(run / "metrics.jsonl", notes)
    if (run / "evaluation.json").is_file():
        evaluation = _read_object(run / "evaluation.json", notes)
    else:
        evaluation = {}
        notes.append("This run has not been evaluated: it goes on or was interrupted, and this is what it wrote.")
    return Record(run.resolve().name, config, train, validation, evaluation, notes)


def _read_object(path: Path, notes: list[str]) -> Line:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} is missing or cannot be read, so what it holds is not shown.")
        return {}
    return value


def _read_lines(path: Path, notes: list[str]) -> tuple[list[Line], list[Line]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        notes.append(f"{path.name} is missing or cannot be read, so there are no curves.")
        return [], []
    kinds: dict[str, dict[int, Line]] = {"train": {}, "validation": {}}
    damaged = 0
    for row in text.splitlines():
        try:
            line = json.loads(row)
            # A run that was killed and resumed wrote some steps twice; the weights went on from the later line.
            kinds[line["kind"]][int(line["step"])] = line
        except (ValueError, TypeError, KeyError, OverflowError):
            damaged += 1
    if damaged:
        notes.append(f"{damaged} line{'' if damaged == 1 else 's'} of {path.name} could not be read and are left out.")
    train, validation = ([lines[step] for step in sorted(lines)] for lines in kinds.values())
    return train, validation
