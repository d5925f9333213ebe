"""The folder of an experiment: its settings, and a line of JSON for each trial that is done.

settings.json      what was asked for; going on with other settings is refused
rows.jsonl         the raw results, one line a trial
report.html        what they say, to look at
section.md         the same for docs/results.md
*.svg              the pictures, a file each
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from onelayer.errors import UsageError
from onelayer.experiments.experiment import Row, Trial
from onelayer.files import write_bytes, written


class Results:
    """Rows on disk, which outlive the process that measured them.

    >>> results = Results(Path("parity"), {"experiment": "tracking", "steps": 10})
    >>> results.add(Trial("parity", "tied", seed=0), {"accuracy": 0.5})
    >>> [row["accuracy"] for row in Results(Path("parity")).rows]
    [0.5]

    Args:
        folder: made where there is none.
        settings: of the experiment; `None` reads those that are there.

    Raises:
        UsageError: there is something else in the folder, results of other settings, or nothing can be written there.
    """

    def __init__(self, folder: Path, settings: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self._path = folder / "rows.jsonl"
        known = folder / "settings.json"
        if settings is None and not known.is_file():
            raise UsageError(f"{folder} holds no results of onelayer compare: name the folder of an experiment.")
        with written(folder, "name another folder by --out"):
            if known.is_file():
                settings = self._same(json.loads(known.read_text(encoding="utf-8")), settings)
            else:
                if folder.exists() and any(folder.iterdir()):
                    raise UsageError(f"{folder} holds something else than results: name another folder by --out.")
                folder.mkdir(parents=True, exist_ok=True)
                write_bytes(known, (json.dumps(settings, indent=2) + "\n").encode())
        assert settings is not None
        self.settings = settings
        self.rows = self._read()

    def has(self, trial: Trial) -> bool:
        """Whether a trial is done."""
        return any(trial.key.items() <= row.items() for row in self._keys)

    def add(self, trial: Trial, measured: Row) -> None:
        """Appends a row, which is on disk when this returns.

        Raises:
            UsageError: the disk is full.
        """
        row = trial.key | measured
        remedy = "make room on the disk, and give the command again to go on"
        with written(self._path, remedy), self._path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)

    @property
    def _keys(self) -> list[Row]:
        names = Trial("", "", 0).key
        return [{name: row.get(name) for name in names} for row in self.rows]

    def _same(self, known: dict[str, Any], settings: dict[str, Any] | None) -> dict[str, Any]:
        asked = known if settings is None else json.loads(json.dumps(settings))  # JSON has no tuples
        changed = sorted(name for name in known | asked if known.get(name) != asked.get(name))
        if changed:
            raise UsageError(
                f"{self.folder} holds results of other settings ({', '.join(changed)}): name another folder by --out."
            )
        return known

    def _read(self) -> list[Row]:
        if not self._path.exists():
            return []
        text = self._path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:  # a line that was cut short is a trial that is not done
            write_bytes(self._path, whole)
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise UsageError(f"{self._path} is damaged ({error}): restore it, or start anew elsewhere.") from None
