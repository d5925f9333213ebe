"""`onelayer compare`: the trials of an experiment, several at a time, and what they say."""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
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

    A trial has one thread, so that several can share a machine and none is faster for it.

    >>> compare(EXPERIMENTS["gradients"], EXPERIMENTS["gradients"].presets["tiny"], Path("zoo"))    # doctest: +SKIP

    Args:
        experiment: what is asked.
        settings: one of its presets, or a change of one.
        folder: where the results are or will be.
        workers: trials at a time, in as many processes; one alone runs in this process. `None` is one a core, or one
            where there is a GPU to share.
        command: what the user typed, for the record.

    Raises:
        UsageError: the folder or the machine will not do.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("This preset is for a GPU, and there is none that PyTorch can use: take another preset.")
    if workers is None:
        workers = 1 if settings.device == "cuda" else os.cpu_count() or 1
    if workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}.")
    asked = {name: value for name, value in asdict(settings).items() if name != "minutes"}  # says nothing of the rows
    results = Results(folder, {"experiment": experiment.name} | asked)
    missing = _missing(experiment, settings, results)
    with _alone() if workers == 1 else _together(workers) as run:
        while missing:
            run(experiment.measure, settings, missing, results)
            missing = _missing(experiment, settings, results)
    findings = experiment.tell(settings, results.rows)
    write_findings(experiment, settings, results, findings, command)
    return findings


def _missing(experiment: Experiment[Any], settings: Any, results: Results) -> list[Trial]:
    """Seed by seed, so that a run which is cut off has compared something."""
    missing = [trial for trial in experiment.plan(settings, results.rows) if not results.has(trial)]
    return sorted(missing, key=lambda trial: (trial.stage, trial.seed))


_Run = Callable[[Any, Any, list[Trial], Results], None]


def _bar(trials: list[Trial]) -> tqdm[Any]:
    return tqdm(total=sum(trial.units for trial in trials), unit="step", dynamic_ncols=True, smoothing=0.02)


@contextmanager
def _alone() -> Iterator[_Run]:
    """One trial after the other, in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(measure: Any, settings: Any, trials: list[Trial], results: Results) -> None:
        with _bar(trials) as bar:
            for trial in trials:
                bar.set_postfix_str(str(trial))
                results.add(trial, _measured(measure, settings, trial, bar.update))

    try:
        yield run
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _together(workers: int) -> Iterator[_Run]:
    """Several trials at a time, in as many processes."""
    context = mp.get_context("spawn")  # a forked process would inherit the threads of torch half alive
    done: Any = context.SimpleQueue()
    pool = ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(done,))

    def run(measure: Any, settings: Any, trials: list[Trial], results: Results) -> None:
        waiting: dict[Future[Row], Trial] = {}
        left = list(trials)
        with _bar(trials) as bar:
            while left or waiting:
                while left and len(waiting) < workers:  # no more are handed in than run, so none starts after the last
                    trial = left.pop(0)
                    waiting[pool.submit(_in_a_worker, measure, settings, trial)] = trial
                ready, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in ready:
                    trial = waiting.pop(future)
                    results.add(trial, future.result())
                    bar.set_postfix_str(str(trial))
                while not done.empty():
                    bar.update(done.get())

    try:
        yield run
    except BaseException:
        for process in list((pool._processes or {}).values()):  # they would train to their end otherwise
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _measured(measure: Any, settings: Any, trial: Trial, report: Callable[[int], Any]) -> Row:
    reported = 0

    def progress(units: int) -> None:
        nonlocal reported
        reported += units
        report(units)

    try:
        found = measure(settings, trial, progress)
    except UsageError as error:  # a training that diverged is a result
        found = {FAILED: str(error)}
    report(trial.units - reported)
    return found


def _in_a_worker(measure: Any, settings: Any, trial: Trial) -> Row:
    return _measured(measure, settings, trial, _done.put)


_done: Any = None


def _prepare(done: Any) -> None:
    global _done
    _done = done
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A parent that was killed cannot stop its workers, and nobody would read what they measure."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
