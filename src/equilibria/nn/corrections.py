"""Losses on iterates of a solve, beside that on its equilibrium."""

from itertools import pairwise
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from equilibria.adjoints import Adjoint, OneStep, Unrolled
from equilibria.loop import Iterate, Outcome
from equilibria.nn.deq import DEQ, check_layer
from equilibria.options import check_fraction, check_integer, check_part
from equilibria.problem import FixedPoint
from equilibria.solution import AdjointReport, Solution
from equilibria.solve import WarmStart, solve, uncompiled
from equilibria.status import Failures, Status


@uncompiled
def corrections(
    layer: DEQ,
    *inputs: Any,
    after: tuple[int, ...],
    adjoint: Adjoint = OneStep(),  # noqa: B008 (a frozen dataclass)
    decay: float = 0.8,
    z0: Any = None,
    state: WarmStart | None = None,
    max_steps: int | None = None,
    **keywords: Any,
) -> list[tuple[float, Any]]:
    """Outputs of a layer at iterates of its solve and at its equilibrium, differentiable, each with a weight.

    Trained on all of them, a layer answers well where its solve is cut short, and its solves stay short.

    >>> layer, x, target = eq.DEQ(Cell(8)), torch.randn(4, 8), torch.zeros(4, 8)
    >>> pairs = eq.nn.corrections(layer, x, after=(1, 3))
    >>> [round(weight, 2) for weight, output in pairs]
    [0.64, 0.8, 1.0]
    >>> loss = sum(weight * (output - target).square().mean() for weight, output in pairs)
    >>> torch.equal(pairs[-1][1], layer(x))
    True

    The layer is solved once. Its own output comes last, the same to the last bit as that of a call, with the gradient
    of the layer's own adjoint. Which iterates are taken depends on no other sample of the batch: one that stopped
    before has there what it stopped at. An iterate costs one evaluation with a graph by `eq.OneStep()`, and its memory.

    Args:
        layer: what is solved.
        inputs, z0, state, max_steps, keywords: as for a call of the layer.
        after: steps of the solver after which iterates are taken, increasing, at least 1 each; after `k` steps of
            `eq.Picard()` or `eq.Anderson()` the cell has been evaluated `k` times.
        adjoint: how the iterates are differentiated, as if they were the equilibrium: `eq.OneStep()`,
            `eq.Phantom(...)`; any but `eq.Unrolled()`.
        decay: in (0, 1]; the k-th output from the end has the weight `decay ** k`, the layer's own 1.

    Returns:
        Pairs of a weight and an output, through `readout` where the layer has one; one more than `after` has entries.

    Raises:
        SolveError: a sample failed and the layer's `on_failure` is "raise".
        TypeError, ValueError: an option makes no sense.

    Source: Bai, Geng, Savani and Kolter (2022), Deep equilibrium optical flow estimation, on sparse
    fixed-point correction.
    """
    check_layer("corrections", layer)
    _check_after(after)
    check_part("adjoint", adjoint, ("attach",), "eq.OneStep()")
    if isinstance(adjoint, Unrolled):
        raise ValueError("An iterate has no steps of its own to unroll: take eq.OneStep() or eq.Phantom(...).")
    check_fraction("decay", decay)
    max_steps = layer._allowed(max_steps)
    z0 = layer._start(inputs) if z0 is None else z0
    recorder = _Recorder(after)
    failures = layer._failures()
    with layer._posed(inputs, keywords, z0) as problem:
        solution = solve(problem, z0, layer.solver, layer.adjoint, max_steps, failures, state, recorder)
    # What a call moves has been moved, to where the last evaluation of the solve left it.
    found = [_attached(problem, solution, recorder.kept.get(step), adjoint, failures) for step in after]
    found.append(layer._recorded(solution, z0).value)
    outputs = found if layer.readout is None else [layer.readout(z) for z in found]
    return [(decay ** (len(after) - k), output) for k, output in enumerate(outputs)]


class _Recorder:
    """A callback that keeps some of the iterates."""

    def __init__(self, after: tuple[int, ...]) -> None:
        self.after = after
        self.kept: dict[int, Iterate] = {}
        self._steps = 0

    def __call__(self, iterate: Iterate) -> None:
        if self._steps in self.after:
            self.kept[self._steps] = iterate
        self._steps += 1


def _attached(
    problem: FixedPoint, solution: Solution, iterate: Iterate | None, adjoint: Adjoint, failures: Failures
) -> Any:
    """An iterate with a gradient; where a sample had stopped, or where there is none, what was returned."""
    layout = problem.layout
    with torch.no_grad():
        z = layout.pack(solution.value)
        status, steps, error = (
            tensor.reshape(layout.batch) for tensor in (solution.status, solution.steps, solution.residual)
        )
        if iterate is not None:
            active = iterate.active.reshape(layout.batch)
            z = torch.where(active[:, None], layout.pack(iterate.value), z)
            status = torch.where(active, Status.MAX_STEPS, status)
            error = torch.where(active, iterate.residual.reshape(layout.batch), error)
    if torch.is_grad_enabled():
        outcome = Outcome(z, status, steps, error, solution.evaluations, None)
        z, _ = adjoint.attach(problem, lambda _: outcome, failures, AdjointReport())
    leaves = layout.unpack(z)
    # So that each can be changed in place without the others.
    return pytree.tree_map(Tensor.clone, leaves) if len(layout.sizes) > 1 else leaves


def _check_after(after: Any) -> None:
    if not isinstance(after, (tuple, list)):
        raise TypeError(f"after must be a tuple of steps, such as (1, 2, 4), not {after!r}.")
    for step in after:
        check_integer("each step of after", step, 1)
    if any(one >= other for one, other in pairwise(after)):
        raise ValueError(f"after must be increasing, not {tuple(after)}.")
