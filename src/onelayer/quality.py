"""How well a model predicts a text, token by token, at any number of allowed evaluations."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from onelayer.corpora import validation_windows
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
    """

    max_steps: int | None
    evaluations: float | None
    residual: float | None
    share_at_cap: float | None
    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a text, and which tokens of each are scored.

    Attributes:
        text: tokens, one-dimensional, of any integer type.
        context: tokens that a window feeds to the model.
        starts: of the windows in the text, int64 `(windows,)`.
        fresh: place in each window from which on its targets are scored, likewise.
    """

    text: Tensor
    context: int
    starts: Tensor
    fresh: Tensor

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs, targets and whether these are scored, `(size, context)` each, from the first window to the last."""
        every = self.text.unfold(0, self.context + 1, 1)
        for starts, fresh in zip(self.starts.split(size), self.fresh.split(size), strict=True):
            tokens = every[starts].long()
            yield tokens[:, :-1], tokens[:, 1:], torch.arange(self.context) >= fresh[:, None]


def strided(text: Tensor, context: int, stride: int) -> Windows:
    """Windows that advance by a stride and together score each token of a text but its first exactly once.

    The first window scores all its targets, each further one those that none before it has scored, of which each has
    at least `context - stride` tokens before it in the window. The last window ends with the text.

    >>> windows = strided(torch.arange(12), context=5, stride=3)
    >>> [targets[scored].tolist() for _, targets, scored in windows.batches(1)]
    [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11]]

    Args:
        text: tokens, one-dimensional, more than `context` of them.
        context: tokens that a window feeds to the model.
        stride: tokens by which windows advance, from 1 to `context`; `context` makes windows that share no target.

    Raises:
        UsageError: the stride is out of its range, or the text too short.
    """
    if not 1 <= stride <= context:
        raise UsageError(f"The stride must lie between 1 and the context, {context}, and is {stride}.")
    last = len(text) - 1 - context
    if last < 0:
        raise UsageError(f"A text of {len(text):,} tokens has no window of {context:,} with the token after it.")
    starts = torch.tensor([*range(0, last, stride), last])
    ends = starts + context
    return Windows(text, context, starts, torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1] - starts[1:]]))


def spread(text: Tensor, context: int, count: int) -> Windows:
    """The windows of `validation_windows`, spread evenly over the text, whose targets are all scored.

    >>> spread(torch.arange(100), context=8, count=3).starts
    tensor([ 0, 45, 91])
    """
    starts = validation_windows(torch.arange(len(text)), context, count)[0][:, 0]
    return Windows(text, context, starts, torch.zeros_like(starts))


def score(
    model: LanguageModel,
    config: RunConfig,
    windows: Windows,
    allowed: tuple[int, ...] = (),
    lengths: Tensor | None = None,
) -> list[Quality]:
    """Runs the model over windows of a text, without gradient and in evaluation mode.

    >>> windows = strided(corpus.validation, context=64, stride=32)             # doctest: +SKIP
    >>> [found.bits_per_byte for found in score(model, config, windows, (2, 8, 64))]    # doctest: +SKIP
    [3.5, 2.31, 2.19]

    Args:
        model: on any device.
        config: for the batch size and the precision.
        windows: what to read and which tokens to score.
        allowed: evaluations allowed to each solve, one measurement for each; none is the configuration's.
        lengths: bytes that each token of the vocabulary stands for, int `(vocabulary,)`; `None` where tokens are bytes.

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
    size = config.training.batch_size
    passes: tuple[int | None, ...] = allowed or (None,)
    training = model.training
    model.eval()
    try:
        total = -(-len(windows.starts) // size) * len(passes)
        often = 0.5 if sys.stderr.isatty() else 15.0  # a log file wants fewer lines than a terminal redraws
        bar = tqdm(total=total, unit="batch", delay=_QUIET, leave=False, dynamic_ncols=True, mininterval=often)
        with torch.no_grad(), bar:
            return [_pass(model, config, windows, size, steps, lengths, bar) for steps in passes]
    finally:
        model.train(training)


def _pass(
    model: LanguageModel,
    config: RunConfig,
    windows: Windows,
    size: int,
    max_steps: int | None,
    lengths: Tensor | None,
    bar: tqdm,
) -> Quality:
    device = model.embedding.weight.device
    nats, tokens, length, solutions = 0.0, 0, 0, []
    with config.autocast(device):
        for x, y, scored in windows.batches(size):
            found = model(x.to(device), y.to(device), max_steps=max_steps)
            nats += float(found.losses[scored.to(device)].double().sum())
            tokens += int(scored.sum())
            length += int(scored.sum() if lengths is None else lengths[y[scored]].sum())
            solutions.append(found.solution)
            bar.update()
    if length == 0:
        raise UsageError("The tokens scored stand for no bytes: read the text with the tokenizer of this model.")
    rates = nats / math.log(2) / length, math.exp(min(nats / tokens, 700.0)), tokens, length
    if not model.is_equilibrium:
        return Quality(None, None, None, None, *rates)
    steps = torch.cat([solution.steps for solution in solutions])
    residual = torch.cat([solution.residual for solution in solutions])
    at_cap = torch.cat([~solution.converged for solution in solutions])
    return Quality(
        model.config.eval_max_steps if max_steps is None else max_steps,
        float(steps.double().mean()),
        float(residual.double().median()),
        float(at_cap.double().mean()),
        *rates,
    )


def doubling(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to a number, and that number.

    >>> doubling(24)
    (1, 2, 4, 8, 16, 24)
    """
    return (*(2**k for k in range(most.bit_length()) if 2**k < most), most)
