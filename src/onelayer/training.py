"""Training: one straight script from a configuration to a run folder with everything in it."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from onelayer import checkpoints, corpora, runs
from onelayer.checkpoints import Checkpoint
from onelayer.errors import UsageError
from onelayer.evaluation import evaluate, measure, peak_memory_bytes
from onelayer.models.language_model import LanguageModel, bits
from onelayer.prepared import Corpus
from onelayer.presets import RunConfig, TrainingConfig
from onelayer.report import write_report


def train(config: RunConfig, run: Path, resume: bool = False, command: str = "onelayer train") -> dict[str, Any]:
    """Trains a model, saving as it goes, then evaluates it and writes the report.

    A resumed run gives the numbers that it would have given without the interruption, bit for bit on one thread.
    An interrupt (Ctrl-C or SIGTERM) lets the current step finish and saves before it is passed on.

    >>> train(preset("tiny"), Path("runs/first"))["bits_per_byte"]              # doctest: +SKIP
    6.9

    Args:
        config: all that determines the run.
        run: the run folder; a new one is made, and to resume it must be there.
        resume: go on from the newest undamaged checkpoint of the folder.
        command: what the user typed, for the record.

    Returns:
        What was written to `evaluation.json`.

    Raises:
        UsageError: the data, the folder or the configuration will not do, or training diverged.
        KeyboardInterrupt: the run was interrupted, and has been saved.
    """
    training, device = config.training, config.training.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("There is no CUDA device on this machine: choose the device cpu or the preset small.")
    corpus = runs.same_corpus(run, config) if resume else runs.create(run, config, command)
    start = _last_save(run) if resume else None

    torch.manual_seed(training.seed)
    model = LanguageModel(config.model).to(device)
    optimizer = make_optimizer(model, training)
    step, seconds = 0, 0.0
    if start is not None:
        runs.load_weights(model, start, run)
        checkpoints.restore_optimizer(optimizer, model, start.tensors)
        checkpoints.restore_random(start.tensors)
        step, seconds = int(start.facts["step"]), float(start.facts["seconds"])
    else:
        _save(run, model, optimizer, corpus, step, seconds)
    print(f"{corpus.describe()}\n{_describe(model)}\nrun folder: {run}", flush=True)

    metrics = runs.Metrics(run, after_step=step)
    inputs, targets = corpora.validation_windows(corpus.validation, config.model.context, training.validation_windows)
    bar = tqdm(total=training.steps, initial=step, unit="step", dynamic_ncols=True, mininterval=_bar_interval())
    began = time.perf_counter() - seconds
    with _interruptible() as signals, bar:
        while step < training.steps:
            line = train_step(model, optimizer, config, corpus, step)
            step += 1
            seconds = time.perf_counter() - began
            line |= {"step": step, "tokens": step * training.batch_size * config.model.context, "seconds": seconds}
            metrics.write({"kind": "train"} | line | {"peak_memory_bytes": peak_memory_bytes(device)})
            bar.set_postfix_str(_status(line), refresh=False)
            bar.update()
            if step % training.validate_every == 0 or step == training.steps:
                metrics.write({"kind": "validation", "step": step} | _validate(model, config, inputs, targets))
            if step % training.save_every == 0 or step == training.steps or signals.noted:
                _save(run, model, optimizer, corpus, step, seconds)
            if signals.noted:
                bar.close()
                print(f"Saved at step {step}: onelayer train --resume {run} goes on from there.", file=sys.stderr)
                raise KeyboardInterrupt
        metrics.close()
        bar.close()

        signals.hold = False  # all is saved, so from here on an interrupt may cut in
        tokens = training.steps * training.batch_size * config.model.context
        evaluation = evaluate(model, config, corpus, tokens, seconds, peak_memory_bytes(device))
        runs.write_json(run / "evaluation.json", evaluation)
        write_report(run)
    return evaluation


def train_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, config: RunConfig, corpus: Corpus, step: int
) -> dict[str, Any]:
    """One update of the weights.

    >>> train_step(model, optimizer, preset("small"), corpus, step=0)["bits_per_byte"]   # doctest: +SKIP
    8.4

    Args:
        model, optimizer: changed in place.
        config: of the run.
        corpus: its text.
        step: number of the update, from 0.

    Returns:
        What `metrics.jsonl` says of the update; figures of the equilibrium are `None` where none was solved for.

    Raises:
        UsageError: the loss or the gradient is not finite.
    """
    training = config.training
    learning_rate = learning_rate_at(step, training)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    x, y = corpora.batch(corpus.train, step, training.batch_size, config.model.context, training.seed)
    x, y = x.to(training.device), y.to(training.device)
    unrolled = model.is_equilibrium and step < training.unrolled_steps
    model.train()
    with config.autocast(x.device):
        found = model(x, y, unrolled=training.unrolled_layers if unrolled else None)
    loss, solution = bits(found.losses), found.solution
    # In nats, as learning rates and gradient norms are usually quoted for.
    (loss * math.log(2) + found.penalty).backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip))
    value = loss.item()
    if not math.isfinite(norm + value):
        raise UsageError(
            f"Training diverged at step {step + 1}, its loss is {value} and its gradient {norm}: "
            "train anew with a lower learning rate."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    line: dict[str, Any] = {
        "bits_per_byte": value,
        "evaluations_forward": None,
        "evaluations_backward": None,
        "residual": None,
        "backward_residual": None,
        "share_at_cap": None,
        "learning_rate": learning_rate,
        "gradient_norm": norm,
    }
    if solution is not None:
        line["evaluations_forward"] = float(solution.steps.float().mean())
        line["residual"] = float(solution.residual.median())
        line["share_at_cap"] = float((~solution.converged).float().mean())
        if solution.adjoint.steps is not None and solution.adjoint.residual is not None:
            line["evaluations_backward"] = float(solution.adjoint.steps.float().mean())
            line["backward_residual"] = float(solution.adjoint.residual.median())
    return line


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    >>> make_optimizer(nn.Linear(2, 3), TrainingConfig()).param_groups[1]["weight_decay"]
    0.0
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.95))


def learning_rate_at(step: int, training: TrainingConfig) -> float:
    """A linear rise, then a cosine down to a share of the peak.

    >>> training = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    >>> [round(learning_rate_at(step, training), 2) for step in (0, 9, 10, 55, 99)]
    [0.1, 1.0, 1.0, 0.55, 0.1]

    Args:
        step: number of the update, from 0.
        training: for the peak, the length of the rise and where the cosine ends.

    Returns:
        The learning rate of that update.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    done = (step - training.warmup_steps) / max(training.steps - training.warmup_steps, 1)
    low = training.final_learning_rate
    return training.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)


def _last_save(run: Path) -> Checkpoint:
    start, complaints = checkpoints.newest(run / "checkpoints")
    for complaint in complaints:
        print(f"{complaint} Going on from step {start.facts['step']}.", file=sys.stderr)
    return start


def _save(
    run: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, corpus: Corpus, step: int, seconds: float
) -> None:
    facts = {"step": step, "seconds": seconds, "fingerprint": corpus.fingerprint}
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    rest = checkpoints.optimizer_tensors(optimizer, model) | checkpoints.random_tensors()
    checkpoints.save_numbered(run / "checkpoints", step, Checkpoint(weights | rest, facts))
    checkpoints.write(run / "model.safetensors", Checkpoint(weights, facts))


def _validate(
    model: LanguageModel, config: RunConfig, inputs: torch.Tensor, targets: torch.Tensor
) -> dict[str, float | None]:
    found = measure(model, config, inputs, targets)
    return {
        "bits_per_byte": found.bits_per_byte,
        "evaluations_forward": None if found.steps is None else float(found.steps.float().mean()),
        "residual": None if found.residual is None else float(found.residual.median()),
        "share_at_cap": found.share_at_cap,
    }


class _Signals:
    """SIGINT and SIGTERM, only noted while `hold` is set, so that no step and no save is cut in two."""

    hold = True
    noted = False

    def __call__(self, number: int, frame: object) -> None:
        if self.noted or not self.hold:  # whoever asks twice does not want to wait
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
    return f"{depth}: {total:,} parameters, {without_embeddings:,} without embeddings"


def _bar_interval() -> float:
    return 0.5 if sys.stderr.isatty() else 15.0  # a log file wants fewer lines than a terminal redraws


def _status(line: dict[str, Any]) -> str:
    status = f"{line['bits_per_byte']:.3f} bits/byte"
    if line["residual"] is not None:
        status += f", {line['evaluations_forward']:.0f}+{line['evaluations_backward'] or 0:.0f} evaluations"
        status += f", residual {line['residual']:.0e}, {line['share_at_cap']:.0%} at cap"
    return status
