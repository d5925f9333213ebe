"""Training: one straight script from a configuration to a run folder with everything in it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from onelayer import checkpoints, learner, runs
from onelayer.corpora.prepared import Corpus
from onelayer.errors import UsageError
from onelayer.evaluation import evaluate, peak_memory_bytes
from onelayer.files import written
from onelayer.learner import Learner
from onelayer.metrics import Metrics, check_tensorboard
from onelayer.model_card import Measured
from onelayer.models.language_model import LanguageModel
from onelayer.parallel import Processes, processes
from onelayer.presets import RunConfig
from onelayer.quality import Quality, score, spread
from onelayer.report import write_report


def train(
    config: RunConfig,
    run: Path,
    resume: bool = False,
    command: str = "onelayer train",
    parallel: str | None = None,
    tensorboard: bool = False,
) -> dict[str, Any] | None:
    """Trains a model, saving as it goes, then evaluates it and writes the report.

    A resumed run gives the numbers that it would have given without the interruption, bit for bit on one thread and the
    same number of processes. An interrupt (Ctrl-C or SIGTERM) lets the current step finish and saves before it is
    passed on.

    >>> train(preset("tiny"), Path("runs/first"))["bits_per_byte"]              # doctest: +SKIP
    6.9

    Args:
        config: all that determines the run.
        run: the run folder; a new one is made, and to resume it must be there.
        resume: go on from the newest undamaged checkpoint of the folder.
        command: what the user typed, for the record.
        parallel: "ddp" or "fsdp2", for the processes that `torchrun` has started; `None` for this one alone.
        tensorboard: whether the metrics are written for TensorBoard too.

    Returns:
        What was written to `evaluation.json`; `None` in all processes but the first.

    Raises:
        UsageError: the data, the folder or the configuration will not do, or training diverged.
        KeyboardInterrupt: the run was interrupted, and has been saved.
    """
    training = config.training
    if tensorboard:
        check_tensorboard()
    with processes(parallel, training.device, training.batch_size, training.accumulate) as group:
        corpus = group.first_alone(
            lambda: runs.same_corpus(run, config) if resume else runs.create(run, config, command)
        )
        with _alone_in(run, group):
            seconds = _fit(config, run, resume, corpus, group, tensorboard)
        first = group.first
    if not first:
        return None
    # What is evaluated is what was saved, by one process.
    model, _ = runs.load_model(run)
    tokens = training.steps * training.batch_size * config.model.context
    evaluation = evaluate(model, config, corpus, tokens, seconds, peak_memory_bytes(training.device))
    remedy = f"the model is trained and saved, so make room on the disk and repeat the evaluation by --resume {run}"
    with written(run / "evaluation.json", remedy):
        runs.write_json(run / "evaluation.json", evaluation)
    evaluations = evaluation["evaluations"]
    measured = Measured(
        evaluation["bits_per_byte"],
        None if evaluations is None else evaluations["mean"],
        evaluation["residual"],
        evaluation["share_at_cap"],
    )
    runs.write_card(run, config, corpus, training.steps, measured)
    with written(run / "report.html", remedy):
        write_report(run)
    return evaluation


@contextmanager
def _alone_in(run: Path, group: Processes) -> Iterator[None]:
    with ExitStack() as stack:
        group.first_alone(lambda: stack.enter_context(runs.locked(run)))
        yield


def _fit(config: RunConfig, run: Path, resume: bool, corpus: Corpus, group: Processes, tensorboard: bool) -> float:
    """Trains to the end, and returns the seconds that it took, sittings before this one included."""
    training, context = config.training, config.model.context
    resumed = checkpoints.newest(run / "checkpoints", group) if resume else None
    learning = learner.start(config, group)
    step, seconds = 0, 0.0
    if resumed is None:
        _save(run, learning, corpus, step, seconds)
    else:
        checkpoint, facts, complaints = resumed
        learning.load(checkpoint)
        step, seconds = int(facts["step"]), float(facts["seconds"])
        for complaint in complaints if group.first else ():
            print(f"{complaint} Going on from step {step}.", file=sys.stderr)
    if group.first:
        shared = "" if group.parallel is None else f" on {group.count} processes ({group.parallel})"
        print(f"{corpus.describe()}\n{_describe(learning.model)}{shared}\nrun folder: {run}", flush=True)

    made: list[Metrics] = []  # by the first process; where it cannot, all of them stop
    group.first_alone(lambda: made.append(Metrics(run, after_step=step, tensorboard=tensorboard)))
    metrics = made[0] if made else None
    windows = spread(corpus.validation, context, training.validation_windows)
    bar = tqdm(
        total=training.steps,
        initial=step,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,  # a log file wants fewer lines than a terminal redraws
        disable=not group.first,
    )
    began = time.perf_counter() - seconds
    with _interruptible() as signals, bar, metrics or nullcontext():
        while step < training.steps:
            line = learner.update(learning, corpus, step)
            step += 1
            seconds = time.perf_counter() - began
            line |= {"step": step, "tokens": step * training.batch_size * context, "seconds": seconds}
            if metrics is not None:
                metrics.write({"kind": "train"} | line | {"peak_memory_bytes": peak_memory_bytes(training.device)})
            bar.set_postfix_str(_status(line), refresh=False)
            bar.update()
            if step % training.validate_every == 0 or step == training.steps:
                # Every process measures all windows: under "fsdp2" each has to take part in each call.
                (found,) = score(learning.model, config, windows, corpus.tokenizer.lengths)
                if metrics is not None:
                    metrics.write({"kind": "validation", "step": step} | _numbers(found))
            # A signal may reach one process before another, and all have to stop at the same step.
            unwritten = metrics is not None and metrics.problem is not None
            stops = group.gather(torch.tensor([[signals.noted, unwritten]], device=group.device))
            interrupted, unwritten = stops.any(dim=0).tolist()
            if unwritten:
                problem = group.share(None if metrics is None else metrics.problem)
                raise UsageError(
                    f"{run / 'metrics.jsonl'} cannot be written ({problem}): make room on the disk, then go on by "
                    f"--resume {run}."
                )
            if step % training.save_every == 0 or step == training.steps or interrupted:
                _save(run, learning, corpus, step, seconds)
            if interrupted:
                bar.close()
                if group.first:
                    print(f"Saved at step {step}: onelayer train --resume {run} goes on from there.", file=sys.stderr)
                raise KeyboardInterrupt
    return seconds


def _save(run: Path, learning: Learner, corpus: Corpus, step: int, seconds: float) -> None:
    facts = {"seconds": seconds, "fingerprint": corpus.fingerprint}
    checkpoints.save(run / "checkpoints", step, learning.tensors(), facts, learning.group)
    weights = learning.weights()
    learning.group.first_alone(lambda: runs.write_model(run, learning.config, weights, corpus, step))


def _numbers(found: Quality) -> dict[str, float | None]:
    return {
        "bits_per_byte": found.bits_per_byte,
        "evaluations_forward": found.evaluations,
        "residual": found.residual,
        "share_at_cap": found.share_at_cap,
    }


class _Signals:
    """SIGINT and SIGTERM, the first of them only noted, so that no step and no save is cut in two."""

    noted = False

    def __call__(self, number: int, frame: object) -> None:
        if self.noted:  # whoever asks twice does not want to wait
            raise KeyboardInterrupt
        self.noted = True


@contextmanager
def _interruptible() -> Iterator[_Signals]:
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield signals
        return
    previous = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _describe(model: LanguageModel) -> str:
    total, without_embeddings = model.parameter_counts()
    depth = {"equilibrium": "the equilibrium of one block", "tied": f"one block {model.config.layers} times"}.get(
        model.config.depth, f"{model.config.layers} blocks"
    )
    return f"{model.config.architecture}, {depth}: {total:,} parameters, {without_embeddings:,} without embeddings"


def _status(line: dict[str, Any]) -> str:
    status = f"{line['bits_per_byte']:.3f} bits/byte"
    if line["residual"] is not None:
        status += f", {line['evaluations_forward']:.0f}+{line['evaluations_backward'] or 0:.0f} evaluations"
        status += f", residual {line['residual']:.0e}, {line['share_at_cap']:.0%} at cap"
    return status
