"""The windows of a text that a model is given: at random, as streams, or spread evenly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from onelayer.corpora.token_files import Tokens
from onelayer.errors import UsageError


def batch(
    tokens: Tokens,
    step: int,
    batch_size: int,
    context: int,
    seed: int,
    rows: range | None = None,
    streams: bool = False,
) -> tuple[Tensor, Tensor]:
    """Windows of the text for one training step, a function of `seed` and `step` alone.

    A run that is resumed at a step, on however many processes, therefore sees exactly what an uninterrupted run sees
    there, with no sampler state to save, and no global random state is touched.

    >>> _ = Path("text.bin").write_bytes(bytes(range(100)))
    >>> tokens = Tokens(Path("text.bin"), np.dtype(np.uint8), vocabulary=256)
    >>> inputs, targets = batch(tokens, step=3, batch_size=2, context=8, seed=0)
    >>> inputs.shape, bool((targets == inputs + 1).all())
    (torch.Size([2, 8]), True)
    >>> [batch(tokens, step, 2, 8, seed=1, streams=True)[0][:, 0].tolist() for step in (0, 1)]
    [[40, 88], [48, 0]]

    Args:
        tokens: longer than `context`.
        step: number of the training step, from 0.
        batch_size: number of windows in the step, in all processes together.
        context: tokens in a window.
        seed: number of the run, from 0.
        rows: those of the windows that are wanted; `None` for all.
        streams: whether a row goes on where it ended in the step before, as a memory of past segments needs it, and
            not at a random place. Rows start evenly spaced, at a place that the seed decides, and after the last whole
            window of the text comes the first.

    Returns:
        Inputs and targets, int64, both `(rows, context)`; targets are the inputs one position later.

    Raises:
        UsageError: the text is not longer than one context, or a number is out of its range.
    """
    _check_windows(tokens, context, batch_size)
    if step < 0 or seed < 0:
        raise UsageError(f"The seed and the step must be 0 or more, and are {seed} and {step}.")
    rows = range(batch_size) if rows is None else rows
    if len(rows) and not 0 <= min(rows) <= max(rows) < batch_size:
        raise UsageError(f"The rows {min(rows)} to {max(rows)} are not among the {batch_size} of a batch.")
    if streams:
        count = (len(tokens) - 1) // context
        first = int(np.random.default_rng(seed).integers(0, count))
        starts = np.array([(first + row * count // batch_size + step) % count * context for row in range(batch_size)])
    else:
        starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - context, size=batch_size)
    return _windows(tokens, starts[list(rows)], context)


def validation_windows(tokens: Tokens, context: int, count: int) -> tuple[Tensor, Tensor]:
    """Windows spread evenly over the text, no two of which predict the same token.

    >>> _ = Path("text.bin").write_bytes(bytes(range(100)))
    >>> tokens = Tokens(Path("text.bin"), np.dtype(np.uint8), vocabulary=256)
    >>> inputs, targets = validation_windows(tokens, context=8, count=3)
    >>> inputs[:, 0].tolist()
    [0, 45, 91]

    Args:
        tokens: longer than `context`.
        context: tokens in a window.
        count: number of windows wanted; fewer come back where the text has no room for as many.

    Returns:
        Inputs and targets, int64, both `(windows, context)`; targets are the inputs one position later.

    Raises:
        UsageError: the text is not longer than one context, or a number is out of its range.
    """
    return _windows(tokens, spread_starts(tokens, context, count), context)


def spread_starts(tokens: Tokens, context: int, count: int) -> npt.NDArray[np.int64]:
    """Where the windows of `validation_windows` start, whose arguments are these.

    >>> _ = Path("text.bin").write_bytes(bytes(range(100)))
    >>> spread_starts(Tokens(Path("text.bin"), np.dtype(np.uint8), vocabulary=256), context=8, count=3)
    array([ 0, 45, 91])
    """
    _check_windows(tokens, context, count)
    count = min(count, (len(tokens) - 1) // context)
    room = len(tokens) - 1 - context
    return np.array([i * room // max(count - 1, 1) for i in range(count)])


def _check_windows(tokens: Tokens, context: int, count: int) -> None:
    if context < 1 or count < 1:
        raise UsageError(f"There must be at least 1 window of at least 1 token; asked for were {count} of {context}.")
    if len(tokens) <= context:
        raise UsageError(f"A text of {len(tokens):,} tokens has no window of {context:,} with the token after it.")


def _windows(tokens: Tokens, starts: npt.NDArray[np.int64], context: int) -> tuple[Tensor, Tensor]:
    windows = tokens.read(starts, context + 1)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
