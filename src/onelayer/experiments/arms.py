"""The four that stand beside each other in every experiment, made of the same block."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import LanguageModel

EQUILIBRIUM, ONE_LAYER = "equilibrium", "explicit 1"


def twins(
    config: ModelConfig, layers: int, block: Callable[[ModelConfig], Any] | None = None
) -> dict[str, ModelConfig]:
    """Configurations by the name of the arm: the equilibrium, its block once, so many blocks, its block as many times.

    All have as many parameters as the equilibrium; so many blocks are narrower for it, as near as their width permits.

    >>> {name: arm.width for name, arm in twins(ModelConfig(width=128, heads=4), layers=4).items()}
    {'equilibrium': 128, 'explicit 1': 128, 'explicit 4': 66, 'tied 4': 128}

    Args:
        config: of the equilibrium.
        layers: of the deep explicit network, and applications of the tied one.
        block: where it is not the architecture's own.
    """
    explicit = replace(config, depth="untied", layers=layers, jacobian_weight=0.0, warm_start=False)
    return {
        EQUILIBRIUM: replace(config, depth="equilibrium"),
        ONE_LAYER: replace(explicit, layers=1),
        f"explicit {layers}": as_large(explicit, parameters(config, block), block),
        f"tied {layers}": replace(explicit, depth="tied"),
    }


def parameters(config: ModelConfig, block: Callable[[ModelConfig], Any] | None = None) -> int:
    """Number of parameters of a model.

    >>> parameters(ModelConfig(width=64, heads=2))
    65728
    """
    with torch.device("meta"):
        return LanguageModel(config, block).parameter_counts()[0]


def as_large(config: ModelConfig, wanted: int, block: Callable[[ModelConfig], Any] | None = None) -> ModelConfig:
    """The configuration with the width, and heads of at least 8 entries, that come nearest to a number of parameters.

    >>> as_large(ModelConfig(depth="untied", layers=4), 229_760).width
    66

    Args:
        config: all else.
        wanted: parameters.
        block: where it is not the architecture's own.
    """

    def of_width(width: int, heads: int) -> ModelConfig:
        return replace(config, width=width, heads=heads)

    candidates = []
    for heads in range(1, config.heads + 1):
        widths = range(8 * heads, 2 * config.width + 1, 2 * heads)  # `heads` pairs of entries at a time
        place = bisect_left(widths, wanted, key=lambda width, heads=heads: parameters(of_width(width, heads), block))
        candidates += [of_width(width, heads) for width in widths[max(place - 1, 0) : place + 1]]
    # Of equally good ones, that with most heads, as in the model it stands beside.
    return min(candidates, key=lambda c: (abs(parameters(c, block) - wanted), -c.heads))
