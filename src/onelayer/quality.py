"""How well a model predicts a text, token by token, at any number of allowed evaluations."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from onelayer.corpora import batches
from onelayer.corpora.token_files import Tokens
from onelayer.errors import UsageError
from onelayer.models.language_model import LanguageModel
from onelayer.presets import RunConfig

_QUIET = 3.0  # seconds of work before a progress bar appears


@dataclass(frozen=True)
class Quality:
    """How well a text was predicted.

    Attributes:
        max_steps: evaluations of the block allowed to a solve; `None` for models without equilibrium.
        evaluations: of the block until a window's solve stopped, the mean; `None` likewise.
        residual: relative residual of a window's state, the median; `None` likewise.
        share_at_cap: share of the solves that ended without meeting the tolerance; `None` likewise.
        bits_per_byte: cross entropy of all tokens in bits over the bytes that they stand for.
        perplexity: exponential of the mean cross entropy of a token.
        tokens: number of tokens scored.
        bytes: that they stand for.
        evaluations_p95, residual_p95: 95th percentiles of both; `None` likewise.
        histogram: how many solves took how many evaluations; `None` likewise.
    """

    max_steps: int | None
    evaluations: float | None
    residual: float | None
    share_at_cap: float | None
    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int
    evaluations_p95: float | None = None
    residual_p95: float | None = None
    histogram: dict[int, int] | None = None


class Batch(NamedTuple):
    """Windows to read together: the tokens before them, theirs, those to predict, and which of these are scored."""

    before: Tensor
    inputs: Tensor
    targets: Tensor
    scored: Tensor


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a text, and which tokens of each are scored.

    Attributes:
        text: tokens.
        context: tokens that a window feeds to the model.
        starts: of the windows in the text, int64 `(windows,)`.
        fresh: place in each window from which on its targets are scored, likewise.
    """

    text: Tokens
    context: int
    starts: Tensor
    fresh: Tensor

    def batches(self, size: int, memory: int = 0) -> Iterator[Batch]:
        """The windows from first to last, at most `size` at a time, each with the `memory` tokens before it.

        At the start of a text there are fewer; windows side by side have as many.
        """
        for starts, fresh in zip(self.starts.split(size), self.fresh.split(size), strict=True):
            lengths = starts.clamp(max=memory)
            for length in lengths.unique().tolist():
                own = lengths == length
                tokens = self.text.read((starts[own] - length).numpy(), length + self.context + 1)
                before, window = tokens[:, :length], tokens[:, length:]
                scored = torch.arange(self.context) >= fresh[own, None]
                yield Batch(before, window[:, :-1], window[:, 1:], scored)


def strided(text: Tokens, context: int, stride: int, count: int | None = None) -> Windows:
    """Windows that advance by a stride and together score each token of a text but its first exactly once.

    The first window scores all its targets, each further one those that none before it has scored, of which each has
    at least `context - stride` tokens before it in the window. The last window ends with the text.

    >>> _ = Path("text.bin").write_bytes(bytes(range(12)))
    >>> text = Tokens(Path("text.bin"), np.dtype(np.uint8), vocabulary=256)
    >>> windows = strided(text, context=5, stride=3)
    >>> [batch.targets[batch.scored].tolist() for batch in windows.batches(1)]
    [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11]]

    Args:
        text: more than `context` tokens.
        context: tokens that a window feeds to the model.
        stride: tokens by which windows advance, from 1 to `context`; `context` makes windows that share no target.
        count: tokens to score, from the first; `None` for all.

    Raises:
        UsageError: the stride or the count is out of its range, or the text too short.
    """
    if not 1 <= stride <= context:
        raise UsageError(f"The stride must lie between 1 and the context, {context}, and is {stride}.")
    if count is not None and count < context:
        raise UsageError(f"The tokens to score must be at least the context, {context}, and are {count}.")
    last = (len(text) - 1 if count is None else min(count, len(text) - 1)) - context
    if last < 0:
        raise UsageError(f"A text of {len(text):,} tokens has no window of {context:,} with the token after it.")
    starts = torch.tensor([*range(0, last, stride), last])
    ends = starts + context
    return Windows(text, context, starts, torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1] - starts[1:]]))


def spread(text: Tokens, context: int, count: int) -> Windows:
    """Windows spread evenly over a text, no two of which predict the same token, and whose targets are all scored.

    >>> _ = Path("text.bin").write_bytes(bytes(range(100)))
    >>> text = Tokens(Path("text.bin"), np.dtype(np.uint8), vocabulary=256)
    >>> spread(text, context=8, count=3).starts
    tensor([ 0, 45, 91])

    Args:
        text: more than `context` tokens.
        context: tokens that a window feeds to the model.
        count: windows wanted; there are fewer where the text has no room for as many.
    """
    starts = torch.from_numpy(batches.spread_starts(text, context, count))
    return Windows(text, context, starts, torch.zeros_like(starts))


def score(
    model: LanguageModel,
    config: RunConfig,
    windows: Windows,
    lengths: npt.NDArray[np.int64],
    allowed: tuple[int, ...] = (),
    progress: bool = True,
) -> list[Quality]:
    """Runs the model over windows of a text, without gradient and in evaluation mode.

    >>> windows = strided(corpus.validation, context=64, stride=32)             # doctest: +SKIP
    >>> lengths = corpus.tokenizer.lengths                                      # doctest: +SKIP
    >>> [found.bits_per_byte for found in score(model, config, windows, lengths, (2, 8, 64))]    # doctest: +SKIP
    [3.5, 2.31, 2.19]

    Args:
        model: on any device.
        config: for the batch size and the precision.
        windows: what to read and which tokens to score. A model with a memory reads what stands before a window first.
        lengths: bytes that each token stands for, see `Tokenizer.lengths`.
        allowed: evaluations allowed to each solve, one measurement for each; none is the configuration's.
        progress: whether a bar appears where it takes long.

    Returns:
        The measurements, in the order of `allowed`.

    Raises:
        UsageError: evaluations are allowed that make no sense, or to a model without equilibrium.
    """
    for steps in allowed:
        if steps < 1:
            raise UsageError(f"The evaluations allowed to a solve must be at least 1, not {steps}.")
        if not model.is_equilibrium:
            raise UsageError(
                f"max_steps is for equilibrium models, and this one has {model.config.layers} layers: leave it out."
            )
    passes: tuple[int | None, ...] = allowed or (None,)
    training = model.training
    model.eval()
    try:
        often = 0.5 if sys.stderr.isatty() else 15.0  # a log file wants fewer lines than a terminal redraws
        total = len(windows.starts) * len(passes)
        bar = tqdm(
            total=total,
            unit="window",
            delay=_QUIET,
            leave=False,
            dynamic_ncols=True,
            mininterval=often,
            disable=not progress,
        )
        with torch.no_grad(), bar:
            return [_pass(model, config, windows, torch.from_numpy(lengths), steps, bar) for steps in passes]
    finally:
        model.train(training)


def _pass(
    model: LanguageModel, config: RunConfig, windows: Windows, lengths: Tensor, max_steps: int | None, bar: tqdm
) -> Quality:
    device = model.embedding.weight.device
    nats, tokens, length, solutions = 0.0, 0, 0, []
    with config.autocast(device):
        for before, x, y, scored in windows.batches(config.training.batch_size, model.config.memory):
            memory = model(before.to(device), max_steps=max_steps).memory if before.numel() else None
            found = model(x.to(device), y.to(device), memory=memory, max_steps=max_steps)
            nats += float(found.losses[scored.to(device)].double().sum())
            tokens += int(scored.sum())
            length += int(lengths[y[scored]].sum())
            solutions.append(found.solution)
            bar.update(len(x))
    if length == 0:
        raise UsageError("The tokens scored stand for no bytes: read the text with the tokenizer of this model.")
    rates = nats / math.log(2) / length, math.exp(min(nats / tokens, 700.0)), tokens, length
    if not model.is_equilibrium:
        return Quality(None, None, None, None, *rates)
    steps = torch.cat([solution.steps for solution in solutions]).double()
    residual = torch.cat([solution.residual for solution in solutions]).double()
    at_cap = torch.cat([~solution.converged for solution in solutions]).double()
    return Quality(
        model.config.eval_max_steps if max_steps is None else max_steps,
        float(steps.mean()),
        float(residual.median()),
        float(at_cap.mean()),
        *rates,
        float(steps.quantile(0.95)),
        float(residual.quantile(0.95)),
        dict(sorted(Counter(map(int, steps.tolist())).items())),
    )


def doubling(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to a number, and that number.

    >>> doubling(24)
    (1, 2, 4, 8, 16, 24)
    """
    return (*(2**k for k in range(most.bit_length()) if 2**k < most), most)
