"""The stacks of equilibrium layers that claim C is put to the proof on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import equilibria as eq
from onelayer.proofs.networks import perceptron

RTOL = 1e-13  # so tight that what is left of a difference is the claim's and not the solver's


@dataclass(frozen=True)
class Stack:
    """Equilibrium layers, one after the other.

    Attributes:
        name: in words, as the table shows it.
        build: makes the layers, in float64, and the inputs of the first; draws from the seed set before.
    """

    name: str
    build: Callable[[], tuple[list[eq.DEQ], tuple[Tensor, ...]]]


class Cell(nn.Module):
    """z = tanh(W z + U x) with a state wider or narrower than its input; W is `rate` times a rotation."""

    def __init__(self, inputs: int, width: int, rate: float) -> None:
        super().__init__()
        self.width = width
        self.state, self.input = nn.Linear(width, width, bias=False), nn.Linear(inputs, width)
        nn.init.orthogonal_(self.state.weight, rate)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.state(z) + self.input(x))

    def initial_state(self, x: Tensor) -> Tensor:
        """Zeros of the state's width."""
        return x.new_zeros(*x.shape[:-1], self.width)


def layers(inputs: int, shapes: list[tuple[int, float]]) -> list[eq.DEQ]:
    """A layer for each width and rate, each reading the one before.

    >>> [layer.cell.width for layer in layers(8, [(12, 0.5), (20, 0.7)])]
    [12, 20]
    """
    made = []
    for width, rate in shapes:
        cell = Cell(inputs, width, rate).double()
        adjoint = eq.Implicit(rtol=RTOL, max_steps=400)
        made.append(eq.DEQ(cell, adjoint=adjoint, rtol=RTOL, atol=0.0, max_steps=400, on_failure="ignore"))
        inputs = width
    return made


def _random(width: int) -> tuple[Tensor, ...]:
    return (torch.randn(16, width, dtype=torch.float64),)


def _of(*shapes: tuple[int, float]) -> Callable[[], tuple[list[eq.DEQ], tuple[Tensor, ...]]]:
    return lambda: (layers(16, list(shapes)), _random(16))


def _network_and_layer() -> tuple[list[eq.DEQ], tuple[Tensor, ...]]:
    network = perceptron(6, 16, nn.Tanh, 5 / 3).double().eval()
    embedded = eq.universal.embed(network, _random(16))
    embedded.on_failure = "ignore"
    return [embedded, *layers(16, [(24, 0.7)])], _random(16)


STACKS: tuple[Stack, ...] = (
    Stack("2 equilibrium layers", _of((24, 0.7), (40, 0.7))),
    Stack("3 equilibrium layers", _of((24, 0.8), (40, 0.5), (12, 0.7))),
    Stack("4 equilibrium layers", _of((24, 0.7), (40, 0.7), (12, 0.7), (32, 0.7))),
    Stack("an embedded network of 6 layers, then an equilibrium layer", _network_and_layer),
)
