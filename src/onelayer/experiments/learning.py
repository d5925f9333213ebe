"""One trainer for all arms of all experiments, the learner of `onelayer train`, and what is told of each of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onelayer.experiments.experiment import FAILED, Progress, Row, Table
from onelayer.experiments.peak import peak_bytes
from onelayer.experiments.statistics import measured, paired, spread
from onelayer.learner import COLUMNS, Learner, advance, make_optimizer
from onelayer.models.language_model import LanguageModel
from onelayer.parallel import Processes
from onelayer.presets import RunConfig
from onelayer.report.numbers import count, duration, memory
from onelayer.report.record import CAP_LIMIT

Draw = Callable[[int], tuple[Tensor, Tensor]]
Score = Callable[[LanguageModel], Row]


def learn(
    model: LanguageModel,
    config: RunConfig,
    draw: Draw,
    score: Score,
    progress: Progress,
    lengths: Tensor | None = None,
    called: nn.Module | None = None,
) -> Row:
    """Trains a model, scores it on the way and at the end, and tells what it took.

    Args:
        model: with its first weights, on the device of the configuration.
        config: of the training; its `validate_every` says how often the model is scored.
        draw: from the number of a step, its tokens and targets; see `onelayer.learner.advance`.
        score: what is measured without gradient, in evaluation mode; its `"score"` is what makes the curve.
        progress: told of each step.
        lengths: bytes that each token stands for; `None` where bits are counted by targets.
        called: what is called in training, where that is not the model itself.

    Returns:
        What `score` measured at the end, and the rest of a row, see `cost_table`.

    Raises:
        UsageError: the training diverged.
    """
    training = config.training
    device = torch.device(training.device)
    group = Processes(device)
    learner = Learner(config, group, model, called or model, make_optimizer(model, training))
    curve: list[tuple[int, float, float]] = []
    solves: list[Tensor] = []
    tokens, spent, began = 0, 0.0, time.perf_counter()
    x = y = torch.zeros(0)
    for step in range(training.steps):
        x, y = draw(step)
        start = clock(device)
        found = advance(learner, x, y, torch.ones_like(y) if lengths is None else lengths[y], step)
        spent += clock(device) - start
        tokens += x.numel()
        if step >= int(0.9 * training.steps):
            solves.append(found.rows)
        progress(1)
        if (step + 1) % training.validate_every == 0 or step + 1 == training.steps:
            curve.append((step + 1, spent, _scored(model, score)["score"]))
    row = _scored(model, score) | {"curve": curve, "tokens": tokens, "cpu_seconds": spent}
    total, own = model.parameter_counts()
    row |= {"seconds": time.perf_counter() - began, "parameters": total, "parameters_without_embeddings": own}
    row |= _solved(model, torch.cat(solves))

    def step_again() -> None:
        learner.called.train()
        with config.autocast(device):
            output = learner.called(x.to(device), y.to(device))
        (output.losses.sum() + output.penalty).backward()
        model.zero_grad(set_to_none=True)

    return row | {"peak_memory_bytes": peak_bytes(step_again, device.type)}


def clock(device: torch.device) -> float:
    """Seconds, to take differences of: those of this process alone on a CPU, which others may share.

    A GPU is waited for.

    >>> 0 <= clock(torch.device("cpu"))
    True
    """
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _scored(model: LanguageModel, score: Score) -> Row:
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            return score(model)
    finally:
        model.train(was)


def _solved(model: LanguageModel, rows: Tensor) -> Row:
    """Evaluations, residuals and shares at the cap of the last tenth of the training."""
    if not model.is_equilibrium:
        layers = float(model.config.layers)
        return {"forward": {"mean": layers, "p95": layers}, "backward": {"mean": layers, "p95": layers}}
    column: dict[str, Tensor] = dict(zip(COLUMNS, rows.unbind(1), strict=True))
    found: Row = {"cap": model.config.max_steps, "residual": _quantiles(column["residual"])}
    for way, steps, failed in (("forward", "steps", "failed"), ("backward", "adjoint_steps", "adjoint_failed")):
        found[way] = _quantiles(column[steps]) | {"at_cap": float(column[failed].mean())}
    return found


def _quantiles(values: Tensor) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "median": float(values.median()),
        "p95": float(values.quantile(0.95)) if len(values) else math.nan,
    }


def scored_solves(solutions: Sequence[Any]) -> Row:
    """What a score tells of the solves behind it, under `"scored"`; nothing where there are none.

    >>> scored_solves([None])
    {}
    """
    found = [solution for solution in solutions if solution is not None]
    if not found:
        return {}
    steps = torch.cat([solution.steps.double().cpu() for solution in found])
    residual = torch.cat([solution.residual.double().cpu() for solution in found])
    failed = torch.cat([~solution.converged.cpu() for solution in found])
    at_cap = {"at_cap": float(failed.double().mean())}
    return {"scored": {"evaluations": _quantiles(steps) | at_cap, "residual": _quantiles(residual)}}


def is_cut_off(rows: Sequence[Row]) -> bool:
    """Whether more than 5% of the solves of some rows hit their cap, so that what was trained is a K-step network.

    >>> is_cut_off([{"forward": {"mean": 6.0}}])
    False
    """
    shares = [row["forward"].get("at_cap", 0.0) for row in rows if "forward" in row]
    checked = [row["scored"]["evaluations"]["at_cap"] for row in rows if "scored" in row]
    return any(values and statistics.fmean(values) > CAP_LIMIT for values in (shares, checked))


COST_COLUMNS = (
    *("task", "arm", "seeds", "parameters", "without embeddings", "rate"),
    *("forward: mean", "95%", "at cap", "backward: mean", "95%", "at cap"),
    *("when scored: mean", "95%", "at cap", "residual", "peak memory of a step", "tokens", "CPU time"),
)


def cost_table(rows: Sequence[Row], arms: Sequence[str]) -> Table:
    """What each arm of each task took: the means over its seeds.

    Args:
        rows: of the experiment.
        arms: in the order in which they are told.
    """
    told, failed = [], []
    for task in dict.fromkeys(row["task"] for row in measured(rows)):
        for arm in arms:
            own = measured(rows, task, arm)
            failed += [f"{task}, {arm}, seed {row['seed']}: {row[FAILED]}" for row in own if FAILED in row]
            own = [row for row in own if FAILED not in row]
            if own:
                told.append(_costs(task, arm, own))
    note = (
        "Evaluations are of a sample's solve, in the last tenth of the training and where the model is scored, and "
        "layers for explicit networks; backward they are products with the transposed Jacobian. Residuals are "
        "relative, the median and the 95th percentile when scored. Peak memory is what the tensors of a training "
        "step hold at once beside weights and optimizer. CPU time is of the training alone, one thread. "
        f"Where more than {CAP_LIMIT:.0%} of the solves hit their cap the row is called a K-step network."
    )
    return Table("What each row took", COST_COLUMNS, told, " ".join([note, *failed]))


def _costs(task: str, arm: str, rows: Sequence[Row]) -> list[str]:
    def mean(*path: str) -> float | None:
        found = [_at(row, path) for row in rows]
        known = [value for value in found if value is not None]
        return statistics.fmean(known) if known else None

    def number(value: float | None, form: str = ".1f") -> str:
        return "" if value is None else f"{value:{form}}"

    first = rows[0]
    residual = [mean("scored", "residual", name) for name in ("median", "p95")]
    name = f"{arm}, a {first['cap'] - 1}-step network" if is_cut_off(rows) else arm
    return [
        *(task, name, str(len(rows)), f"{first['parameters']:,}", f"{first['parameters_without_embeddings']:,}"),
        "" if first.get("rate") is None else f"{first['rate']:g}",
        *(number(mean(way, what), form) for way in ("forward", "backward") for what, form in _OF_A_WAY),
        *(number(mean("scored", "evaluations", what), form) for what, form in _OF_A_WAY),
        " / ".join(number(value, ".1e") for value in residual if value is not None),
        *(memory(mean("peak_memory_bytes") or 0), count(mean("tokens") or 0), duration(mean("cpu_seconds") or 0)),
    ]


_OF_A_WAY = (("mean", ".1f"), ("p95", ".0f"), ("at_cap", ".1%"))


def _at(row: Row, path: Sequence[str]) -> float | None:
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def score_table(
    rows: Sequence[Row], arms: Sequence[str], reference: str, name: str = "score", what: str = "bits per byte"
) -> Table:
    """A number of each arm on each task, and how much more the others have of it than one of them, seed by seed.

    Args:
        rows: of the experiment.
        arms: in the order in which they are told.
        reference: the arm that the others are compared with.
        name: of the number in a row.
        what: that it is, in words.
    """
    from_rows = [row for row in rows if FAILED not in row]
    told = []
    for task in dict.fromkeys(row["task"] for row in measured(from_rows)):
        for arm in arms:
            own = measured(from_rows, task, arm)
            if own:
                gap = None if arm == reference else paired(from_rows, task, arm, reference, name)
                told.append([task, arm, str(len(own)), spread([row[name] for row in own]), str(gap or "")])
    columns = ("task", "arm", "seeds", f"{what}, mean ± sd", f"more than {reference}, mean [95% interval]")
    return Table(what[0].upper() + what[1:], columns, told, "Differences are by pairs of the same seed, Student's t.")
