"""Copy memory: the sequences, and the networks that are to recall them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from onelayer.experiments.arms import as_large, parameters, twins
from onelayer.experiments.copying import baselines
from onelayer.models.configuration import ModelConfig
from onelayer.presets import Device, Precision

SYMBOLS, RECALLED = 8, 10  # kinds of symbols, from 1; how many are to be recalled
BLANK, DELIMITER = 0, 9
VOCABULARY = 10
LSTM, GRU, TCN = "LSTM", "GRU", "TCN"

_BLOCKS: dict[str, Callable[[ModelConfig], Any]] = {
    LSTM: baselines.lstm,
    GRU: baselines.gru,
    TCN: baselines.ConvolutionalBlock,
}


@dataclass(frozen=True)
class Settings:
    """How much of it.

    Attributes:
        minutes: budget on the machine it is meant for.
        device, precision: of the training.
        delays: blanks between the last symbol and the first that is asked for, a task each.
        seeds: paired, of weights and data.
        rates: of learning, from which each arm made of the block chooses at the first delay, with a seed of its own.
        baseline_rates: from which the LSTM, the GRU and the TCN choose.
        layers: of the deep explicit network, and applications of the tied one.
        width, heads: of the equilibrium.
        kernel: of the TCN.
        batch_size, steps: of the training of the four made of one block.
        unrolled_steps: first updates of the equilibrium that are taken through as many plain applications of its block
            as the tied network has.
        more: times as many updates that the LSTM, the GRU and the TCN get, which are cheaper by the update.
        sequences: scored at the end; an eighth of them on the way.
    """

    minutes: int
    device: Device = "cpu"
    precision: Precision = "float32"
    delays: tuple[int, ...] = (50, 100, 200)
    seeds: int = 3
    rates: tuple[float, ...] = (1e-3, 2e-3)
    baseline_rates: tuple[float, ...] = (2e-3, 6e-3)
    layers: int = 4
    width: int = 64
    heads: int = 1
    kernel: int = 8
    batch_size: int = 8
    steps: int = 700
    unrolled_steps: int = 280
    more: int = 1
    sequences: int = 256


def sequences(count: int, delay: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of the task, and what is to be said at each of their positions.

    Ten symbols, blanks, and from the delimiter on nothing but delimiters; blanks are to be said until the first of
    them has been read, and after it the ten symbols.

    >>> x, y = sequences(1, 3, torch.Generator().manual_seed(0))
    >>> print(x[0].tolist(), y[0].tolist(), sep=chr(10))
    [5, 8, 6, 1, 4, 4, 4, 8, 2, 4, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 8, 6, 1, 4, 4, 4, 8, 2, 4]

    Args:
        count: of sequences.
        delay: T, positions between the last symbol and the first that is asked for.
        generator: that draws the symbols.

    Returns:
        Tokens and targets, int64 `(count, delay + 20)`.

    Source: Hochreiter and Schmidhuber, 1997; in this form Bai, Kolter and Koltun, 2018 (arXiv:1803.01271), and "Deep
    Equilibrium Models", 2019 (arXiv:1909.01377).
    """
    symbols = torch.randint(1, SYMBOLS + 1, (count, RECALLED), generator=generator)
    blanks = symbols.new_full((count, delay - 1), BLANK)
    tokens = torch.cat([symbols, blanks, symbols.new_full((count, RECALLED + 1), DELIMITER)], dim=1)
    return tokens, torch.cat([symbols.new_full((count, delay + RECALLED), BLANK), symbols], dim=1)


def memoryless(delay: int) -> float:
    """Mean loss in nats of one who knows where symbols are asked for and remembers none.

    >>> round(memoryless(50), 4)
    0.2971
    """
    return RECALLED * math.log(SYMBOLS) / (delay + 2 * RECALLED)


def generator(seed: int, step: int | None = None) -> torch.Generator:
    """Of the sequences of an update, or of those that are scored; two calls never share a stream.

    Args:
        seed: of the trial.
        step: number of the update; `None` for scoring.
    """
    return torch.Generator().manual_seed(2 * seed + 1 if step is None else 2 * (seed * 1_000_003 + step))


@cache
def arm_of(settings: Settings, name: str, delay: int) -> tuple[ModelConfig, Callable[[ModelConfig], Any] | None]:
    """Configuration of an arm, and its block where that is not the Transformer's; all have as many parameters.

    >>> arm_of(Settings(minutes=1), "GRU", delay=50)[0].width
    94

    Args:
        settings: of the experiment.
        name: of the arm.
        delay: of the task.
    """
    config = ModelConfig(
        vocabulary=VOCABULARY,
        width=settings.width,
        heads=settings.heads,
        context=delay + 2 * RECALLED,
        positions="relative",
    )
    if name not in _BLOCKS:
        return _twins(config, settings.layers)[name], None
    # Weight normalisation is the TCN's alone: it is part of it in the paper.
    whole = replace(config, depth="tied", layers=1, heads=1, kernel=settings.kernel, weight_norm=name == TCN)
    return as_large(whole, parameters(config), _BLOCKS[name]), _BLOCKS[name]


_twins = cache(twins)  # widths are searched for, which takes about a second


def arms(settings: Settings) -> list[str]:
    """Names of the arms, the equilibrium first.

    >>> arms(Settings(minutes=1))
    ['equilibrium', 'explicit 1', 'explicit 4', 'tied 4', 'LSTM', 'GRU', 'TCN']
    """
    return [*_twins(ModelConfig(width=16, heads=1), settings.layers), *_BLOCKS]


def task(delay: int) -> str:
    """Name of the task with a delay.

    >>> task(50)
    'T = 50'
    """
    return f"T = {delay}"


def updates(settings: Settings, arm: str) -> int:
    """Number of updates of an arm.

    >>> updates(Settings(minutes=1, steps=10, more=3), "LSTM")
    30
    """
    return settings.steps * (settings.more if arm in _BLOCKS else 1)


def rates(settings: Settings, arm: str) -> tuple[float, ...]:
    """Rates of learning that an arm chooses from.

    >>> rates(Settings(minutes=1, rates=(1e-3,)), "tied 4")
    (0.001,)
    """
    return settings.baseline_rates if arm in _BLOCKS else settings.rates
