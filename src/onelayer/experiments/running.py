"""`onelayer compare`: the trials of an experiment, several at a time, and what they say."""

from __future__ import annotations

import multiprocessing as mp
import os
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from onelayer.errors import UsageError
from onelayer.experiments.experiment import FAILED, Experiment, Findings, Row, Trial
from onelayer.experiments.page import write_findings
from onelayer.experiments.results import Results


def compare(
    experiment: Experiment[Any],
    settings: Any,
    folder: Path,
    workers: int | None = None,
    command: str = "onelayer compare",
) -> Findings:
    """Runs the trials that a folder lacks, and writes what all of them say into it.

    A trial runs in a process of its own with one thread, so that several can share a machine and none is faster for it.

    >>> compare(EXPERIMENTS["gradients"], EXPERIMENTS["gradients"].presets["tiny"], Path("zoo"))    # doctest: +SKIP

    Args:
        experiment: what is asked.
        settings: one of its presets, or a change of one.
        folder: where the results are or will be.
        workers: trials at a time; `None` for one a core, or one where there is a GPU to share.
        command: what the user typed, for the record.

    Raises:
        UsageError: the folder or the machine will not do.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("This preset is for a GPU, and there is none that PyTorch can use: take another preset.")
    workers = workers or (1 if settings.device == "cuda" else os.cpu_count() or 1)
    if workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}.")
    results = Results(folder, {"experiment": experiment.name} | asdict(settings))
    while missing := [trial for trial in experiment.plan(settings, results.rows) if not results.has(trial)]:
        _run(experiment, settings, missing, results, workers)
    findings = experiment.tell(settings, results.rows)
    write_findings(experiment, settings, results, findings, command)
    return findings


def _run(experiment: Experiment[Any], settings: Any, trials: list[Trial], results: Results, workers: int) -> None:
    context = mp.get_context("spawn")  # a forked process would inherit the threads of torch half alive
    done: Any = context.SimpleQueue()
    with (
        tqdm(total=sum(trial.units for trial in trials), unit="step", dynamic_ncols=True) as bar,
        ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(done,)) as pool,
    ):
        waiting: dict[Future[Row], Trial] = {}
        left = list(trials)
        try:
            while left or waiting:
                while (
                    left and len(waiting) < workers
                ):  # no more are handed in than run, so an interrupt loses no others
                    trial = left.pop(0)
                    waiting[pool.submit(_measure, experiment.measure, settings, trial)] = trial
                ready, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                while not done.empty():
                    bar.update(done.get())
                for future in ready:
                    trial = waiting.pop(future)
                    results.add(trial, future.result())
                    bar.set_postfix_str(str(trial))
        except BaseException:
            for process in list((pool._processes or {}).values()):  # they would train to their end otherwise
                process.terminate()
            raise


_done: Any = None


def _prepare(done: Any) -> None:
    global _done
    _done = done
    torch.set_num_threads(1)


def _measure(measure: Any, settings: Any, trial: Trial) -> Row:
    reported = 0

    def progress(units: int) -> None:
        nonlocal reported
        reported += units
        _done.put(units)

    try:
        found = measure(settings, trial, progress)
    except UsageError as error:  # a training that diverged is a result
        found = {FAILED: str(error)}
    _done.put(trial.units - reported)
    return found
