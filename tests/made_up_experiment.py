"""An experiment that learns nothing, for tests of what runs experiments; workers import it by this name."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onelayer.errors import UsageError
from onelayer.experiments.experiment import Claim, Experiment, Findings, Progress, Row, Table, Trial
from onelayer.experiments.rates import with_chosen_rates
from onelayer.experiments.statistics import measured


@dataclass(frozen=True)
class Settings:
    """What a trial does: by its arm it squares, diverges, breaks, or waits for the file to be there."""

    minutes: int = 1
    device: str = "cpu"
    seeds: int = 2
    rates: tuple[float, ...] = (0.1, 0.2)
    arms: tuple[str, ...] = ("one", "two")
    marker: str = ""


def plan(settings: Settings, rows: Sequence[Row]) -> list[Trial]:
    return with_chosen_rates(rows, ["<task>"], list(settings.arms), settings.seeds, settings.rates, units=3)


def measure(settings: Settings, trial: Trial, progress: Progress) -> Row:
    progress(2)
    if trial.arm == "diverges":
        raise UsageError("Training diverged at step 3.")
    if trial.arm == "breaks":
        raise RuntimeError("a fault of the program")
    if trial.arm == "waits":
        Path(f"{settings.marker}.{os.getpid()}").touch()
        time.sleep(300)
    assert trial.rate is not None
    return {"score": (trial.seed + 1) * trial.rate + len(trial.arm), "process": os.getpid()}


def tell(settings: Settings, rows: Sequence[Row]) -> Findings:
    own = measured(rows)
    told = [[row["arm"], str(row.get("score"))] for row in own]
    return Findings([Table("Scores & such", ("arm", "score"), told)], [Claim("4 rows", f"{len(own)}", len(own) == 4)])


EXPERIMENT = Experiment("made-up", "Made up <b>", "Is it?", {"cpu": Settings()}, plan, measure, tell, "I doubt it.")
