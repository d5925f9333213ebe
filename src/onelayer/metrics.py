"""What a run writes down as it goes: a line of JSON for each step, and the same for TensorBoard where it is wanted."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from onelayer.errors import UsageError
from onelayer.files import write_bytes, written

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None


def check_tensorboard() -> None:
    """Makes sure that TensorBoard is there.

    >>> check_tensorboard()

    Raises:
        UsageError: it is not installed.
    """
    if SummaryWriter is None:
        raise UsageError("--tensorboard needs TensorBoard: install equilibria[tensorboard], or leave it out.")


class Metrics:
    """`metrics.jsonl`: a line is on disk before the next step starts, and half a line is never read.

    >>> with Metrics(Path("runs/first"), after_step=0) as metrics:              # doctest: +SKIP
    ...     metrics.write({"kind": "train", "step": 1})

    Args:
        run: the run folder.
        after_step: lines of later steps are dropped, because the run goes on from there.
        tensorboard: whether numbers are written for TensorBoard too, into `run/tensorboard`.

    Raises:
        UsageError: TensorBoard is wanted and not installed, or nothing can be written there.

    Attributes:
        problem: why a line could not be written, as on a full disk; `None` where all were.
    """

    problem: str | None = None

    def __init__(self, run: Path, after_step: int, tensorboard: bool = False) -> None:
        if tensorboard:
            check_tensorboard()
        path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(run) if line["step"] <= after_step]
        self._board = None
        with written(path, f"make room on the disk, then go on by --resume {run}"):
            write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = path.open("a", encoding="utf-8")
            if tensorboard and SummaryWriter is not None:
                # Points of steps that are made again are dropped there too.
                self._board = SummaryWriter(str(run / "tensorboard"), purge_step=after_step + 1)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # what is left to write has met a full disk already
            self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line, or says in `problem` why it cannot."""
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            self.problem = error.strerror or str(error)
        for name, value in line.items() if self._board is not None else ():
            if isinstance(value, int | float) and name not in ("step", "seconds") and self._board is not None:
                self._board.add_scalar(f"{line['kind']}/{name}", value, line["step"])


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; one that was cut short when the run was killed is left out.

    >>> [line["bits_per_byte"] for line in read_metrics(Path("runs/first"))]    # doctest: +SKIP
    """
    path = run / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
