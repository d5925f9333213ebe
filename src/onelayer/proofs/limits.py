"""What the theorems leave open, executed; and how an embedded network looks from inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import equilibria as eq
from onelayer.proofs.measure import GRADIENT_BOUND, differentiate, relative_error


@dataclass(frozen=True)
class Reach:
    """How far back truncated gradients reach in an embedded network.

    Attributes:
        shares: a row for each number of steps k, a column for each layer's weight: the norm of its gradient by
            `eq.Phantom(k)`, relative to that of the true one.
        exact: the same rows, whether that gradient is the true one, to rounding.
        one_step: layers that get any gradient from `eq.OneStep`.
    """

    shares: list[list[float]]
    exact: list[list[bool]]
    one_step: int

    @property
    def holds(self) -> bool:
        """Whether k steps give the last k layers their true gradients and all others exactly none."""
        layers = range(len(self.shares))
        exact = all(self.exact[k][i] for k in layers for i in layers if i + k + 1 >= len(layers))
        none = all(self.shares[k][i] == 0 for k in layers for i in layers if i + k + 1 < len(layers))
        return exact and none and self.one_step == 1


def reach(network: nn.Sequential, x: Tensor) -> Reach:
    """Measures a perceptron, embedded in the affine form, whose stages are its linear layers.

    >>> reach(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double(), torch.randn(4, 3).double()).one_step
    1
    """
    deq = eq.universal.embed(network, x, form="affine")
    weights = [part.weight for part in network if isinstance(part, nn.Linear)]

    def gradients(adjoint: eq.Adjoint) -> list[Tensor]:
        deq.adjoint = adjoint
        return differentiate(deq, (x,), weights)[1][: len(weights)]

    true = differentiate(network, (x,), weights)[1][: len(weights)]
    shares, exact = [], []
    for steps in range(1, len(weights) + 1):
        found = gradients(eq.Phantom(steps))
        shares.append([float(a.norm() / b.norm()) for a, b in zip(found, true, strict=True)])
        exact.append([relative_error([a], [b]) <= GRADIENT_BOUND for a, b in zip(found, true, strict=True)])
    return Reach(shares, exact, sum(bool(gradient.any()) for gradient in gradients(eq.OneStep())))


@dataclass(frozen=True)
class Blocks:
    """The literal form of the theorem: the matrix W_z and the widths of its blocks."""

    matrix: list[list[float]]
    widths: list[int]

    @property
    def holds(self) -> bool:
        """Whether nothing but the blocks below the diagonal differs from zero."""
        of = [i for i, width in enumerate(self.widths) for _ in range(width)]
        return len(of) == len(self.matrix) and all(
            value == 0 for i, row in enumerate(self.matrix) for j, value in enumerate(row) if of[j] != of[i] - 1
        )


def blocks(network: nn.Sequential, x: Tensor) -> Blocks:
    """The weight matrix of an embedded perceptron.

    >>> blocks(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), torch.randn(4, 3)).widths
    [2, 1]
    """
    cell: Any = eq.universal.embed(network, x, form="affine").cell
    return Blocks(cell.W_z.detach().tolist(), list(cell.widths.values()))


@dataclass(frozen=True)
class Filling:
    """The activations of an embedded network, updated all at once from a random start.

    Attributes:
        stages: names, in order of depth.
        errors: a row for each number of updates, from none on; largest error of each stage's activation relative to
            its largest entry.
    """

    stages: list[str]
    errors: list[list[float]]


@dataclass(frozen=True)
class Film:
    """Pictures of the stages of an embedded network, as it is updated from a random start.

    Attributes:
        stages: names, those whose activations are pictures.
        frames: a list for each number of updates, from none on; in it a picture for each stage, rows of numbers between
            0, the least of the right activation, and 1, its largest.
        exact: for each of them, whether it is the right one to the last bit.
    """

    stages: list[str]
    frames: list[list[list[list[float]]]]
    exact: list[list[bool]]


def filling(network: nn.Sequential, x: Tensor) -> Filling:
    """Updates the random state of a perceptron in the affine form until it is right.

    >>> found = filling(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double(), torch.randn(4, 3).double())
    >>> len(found.errors), max(found.errors[-1])
    (3, 0.0)
    """
    deq = eq.universal.embed(network, x, form="affine")
    stages, states = _updates(deq, x)
    errors = [[relative_error([a], [b]) for a, b in zip(state, states[-1], strict=True)] for state in states]
    return Filling(stages, errors)


def film(network: nn.Module, x: Tensor) -> Film:
    """Updates the random state of a convolutional network until it is right, and shows its first sample.

    >>> found = film(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten()), torch.randn(1, 1, 5, 5))
    >>> found.stages, [sum(exact) for exact in found.exact]
    (['0', '1'], [0, 1, 2, 2])
    """
    names, states = _updates(eq.universal.embed(network, x), x)
    shown = [i for i, activation in enumerate(states[-1]) if activation.ndim == 4]
    frames, exact = [], []
    for state in states:
        frames.append([_picture(state[i][0, 0], states[-1][i][0, 0]).tolist() for i in shown])
        exact.append([torch.equal(state[i], states[-1][i]) for i in shown])
    return Film([names[i] for i in shown], frames, exact)


def _picture(activation: Tensor, right: Tensor) -> Tensor:
    low, high = right.min(), right.max()
    # Two digits are more than a printed shade tells, and what an all but constant activation has above rounding.
    return ((activation - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).mul(100).round() / 100


@torch.no_grad()
def _updates(deq: eq.DEQ, x: Tensor) -> tuple[list[str], list[list[Tensor]]]:
    """Names of the stages, and their activations in a random state and after each update until nothing moves."""
    cell: Any = deq.cell
    z = pytree.tree_map(torch.randn_like, cell.initial_state(x))
    states = [_activations(cell, z)]
    for _ in cell.stages:
        z = cell(z, x)
        states.append(_activations(cell, z))
    return list(cell.stages), states


def _activations(cell: Any, z: Tensor | dict[str, Tensor]) -> list[Tensor]:
    if isinstance(z, Tensor):  # the affine form: one row of all activations
        return list(z.split(list(cell.widths.values()), dim=1))
    return [z[stage] for stage in cell.stages]


@dataclass(frozen=True)
class Curve:
    """Residuals of a solve, the worst sample's, against the evaluations made before and in it."""

    name: str
    evaluations: list[float]
    residuals: list[float]


def convergence(layers: Sequence[eq.DEQ], inputs: tuple[Tensor, ...]) -> tuple[list[Curve], Curve]:
    """How the layers converge one after the other, and all at once.

    >>> from onelayer.proofs.stacks import STACKS
    >>> apart, together = convergence(*STACKS[0].build())
    >>> len(apart), together.residuals[-1] < 1e-12
    (2, True)

    Returns:
        A curve for each layer, beginning where the one before it ends; and that of the fused layer.
    """
    joint = eq.universal.fuse(*layers)
    together = _curve("all at once", joint, inputs, 0)
    apart: list[Curve] = []
    with torch.no_grad():
        for i, layer in enumerate(layers):
            before = apart[-1].evaluations[-1] if apart else 0
            apart.append(_curve(f"layer {i + 1}", layer, inputs, before))
            inputs = (layer(*inputs),)
    return apart, together


def _curve(name: str, layer: eq.DEQ, inputs: tuple[Tensor, ...], before: float) -> Curve:
    options = {name: getattr(layer, name) for name in ("solver", "rtol", "atol", "max_steps", "norm", "batch_dims")}
    cell: Any = layer.cell
    found = eq.diagnostics.trace(cell, cell.initial_state(*inputs), *inputs, **options)
    residuals = found.residual.nan_to_num(0.0).flatten(1).amax(dim=1)
    return Curve(name, (before + found.evaluations).tolist(), residuals.tolist())
