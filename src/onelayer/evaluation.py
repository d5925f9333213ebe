"""What a trained model does on the validation text, and whether it is the equilibrium it claims to be."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onelayer.corpora import Corpus, validation_windows
from onelayer.generation import decode, generate
from onelayer.models.language_model import LanguageModel, bits
from onelayer.ngrams import baselines
from onelayer.presets import RunConfig

PROMPT = "def "


@dataclass(frozen=True, eq=False)
class Measurement:
    """A model on some windows of text.

    Attributes:
        bits_per_byte: mean over all bytes.
        steps: evaluations of the block until each window's solve stopped, int `(windows,)`; `None` without equilibrium.
        residual: relative residual of each window's state, `(windows,)`; `None` likewise.
        share_at_cap: share of the solves that ended without meeting the tolerance; `None` likewise.
    """

    bits_per_byte: float
    steps: Tensor | None
    residual: Tensor | None
    share_at_cap: float | None


def measure(
    model: LanguageModel, config: RunConfig, inputs: Tensor, targets: Tensor, max_steps: int | None = None
) -> Measurement:
    """Runs the model over windows of text, without gradient and in evaluation mode.

    >>> inputs, targets = validation_windows(corpus.validation, 128, 64)        # doctest: +SKIP
    >>> measure(model, config, inputs, targets).bits_per_byte                   # doctest: +SKIP
    2.31

    Args:
        model: on any device.
        config: for the batch size and the precision.
        inputs: int64 `(windows, context)`.
        targets: the same, one byte later.
        max_steps: evaluations allowed to each solve, instead of the configuration's.

    Returns:
        The measurement.
    """
    training = model.training
    model.eval()
    device = model.embedding.weight.device
    total, solutions = 0.0, []
    size = config.training.batch_size
    with torch.no_grad(), config.autocast(device):
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            found = model(x.to(device), y.to(device), max_steps=max_steps)
            total += float(bits(found.losses)) * y.numel()
            solutions.append(found.solution)
    model.train(training)
    if not model.is_equilibrium:
        return Measurement(total / targets.numel(), None, None, None)
    steps = torch.cat([solution.steps for solution in solutions]).cpu()
    residual = torch.cat([solution.residual for solution in solutions]).float().cpu()
    converged = torch.cat([solution.converged for solution in solutions])
    return Measurement(total / targets.numel(), steps, residual, float((~converged).float().mean()))


def evaluate(
    model: LanguageModel, config: RunConfig, corpus: Corpus, tokens: int, seconds: float, peak_memory: int
) -> dict[str, Any]:
    """The whole evaluation that ends a run, in the form of `evaluation.json`.

    >>> evaluate(model, config, corpora.load(), 0, 0.0, 0)["bits_per_byte"]     # doctest: +SKIP
    2.31

    Args:
        model: trained.
        config: of its run.
        corpus: its text.
        tokens: bytes that it was trained on, counted as often as they were seen.
        seconds: that its training took.
        peak_memory: bytes that it took.

    Returns:
        A dictionary that JSON can hold; figures of the equilibrium are `None` for models without one.
    """
    inputs, targets = validation_windows(corpus.validation, config.model.context, config.training.evaluation_windows)
    full = measure(model, config, inputs, targets)
    total, without_embeddings = model.parameter_counts()
    prompt = PROMPT.encode()[: config.model.context]
    # How many solves hit the cap is said of the validation text.
    drawn = generate(model, [prompt], config.training.sample_bytes, on_failure="ignore")
    text = "".join(decode(tokens[0] for tokens in drawn))
    return {
        "bits_per_byte": full.bits_per_byte,
        "residual": None if full.residual is None else float(full.residual.median()),
        "residual_p95": None if full.residual is None else float(full.residual.quantile(0.95)),
        "share_at_cap": full.share_at_cap,
        "evaluations": None if full.steps is None else summary(full.steps),
        "by_allowed_evaluations": by_allowed_evaluations(model, config, inputs, targets),
        "ngrams": baselines(corpus.train, corpus.validation),
        "parameters": {"total": total, "without_embeddings": without_embeddings},
        "tokens": tokens,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory,
        "sample": {"prompt": prompt.decode(), "text": text},
    }


def summary(steps: Tensor) -> dict[str, Any]:
    """Mean, 95th percentile and histogram of the evaluations that solves took.

    >>> summary(torch.tensor([8, 8, 10]))["histogram"]
    {'8': 2, '10': 1}
    """
    return {
        "mean": float(steps.float().mean()),
        "p95": float(steps.float().quantile(0.95)),
        "histogram": {str(count): number for count, number in sorted(Counter(steps.tolist()).items())},
    }


def by_allowed_evaluations(
    model: LanguageModel, config: RunConfig, inputs: Tensor, targets: Tensor
) -> list[dict[str, Any]] | None:
    """Bits per byte and median residual when each solve may evaluate the block 1, 2, 3, 4, 6, 8, 12, ... times.

    The first evaluation measures the start, so that 1 is the model before its block was ever applied, and 2 is the
    block applied once.

    >>> by_allowed_evaluations(model, config, inputs, targets)[0]               # doctest: +SKIP
    {'max_steps': 1, 'bits_per_byte': 8.3, 'residual': 1.0}
    """
    if not model.is_equilibrium:
        return None
    most = config.model.eval_max_steps
    allowed = sorted({1, 2, most} | {n for k in range(1, 30) for n in (2**k, 3 * 2 ** (k - 1)) if n < most})
    rows = []
    for max_steps in allowed:
        found = measure(model, config, inputs, targets, max_steps)
        assert found.residual is not None
        residual = float(found.residual.median())
        rows.append({"max_steps": max_steps, "bits_per_byte": found.bits_per_byte, "residual": residual})
        if found.share_at_cap == 0:  # more would change nothing
            break
    return rows


def peak_memory_bytes(device: str) -> int:
    """Most memory that this process has held: on the device, or resident where the device is the CPU.

    >>> peak_memory_bytes("cpu") > 1_000_000
    True
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
