"""How a solve went, evaluation by evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equilibria.fixed_point import fixed_point
from equilibria.loop import Iterate
from equilibria.norms import Norm, rms_norm
from equilibria.options import check_integer
from equilibria.solution import Solution
from equilibria.solvers import Anderson, Solver
from equilibria.tree import Layout


@dataclass(frozen=True)
class Trace:
    """The history of a solve. Rows after a sample has stopped are NaN for that sample.

    Attributes:
        evaluations: int tensor, (rows,), calls of `f` up to and including each row's.
        residual: float tensor, (rows, *batch), of the state evaluated, as in `eq.Solution`.
        step_size: float tensor, (rows, *batch), the root-mean-square of the step that led there; NaN in row 0.
        cosine: float tensor, (rows, *batch), of the angle between that step and the one before: near 1 the solve
            creeps, near -1 it swings to and fro (a lower relaxation helps); NaN in rows 0 and 1 and where a step is 0.
        solution: what the solve returned, without gradient.
    """

    evaluations: Tensor
    residual: Tensor
    step_size: Tensor
    cosine: Tensor
    solution: Solution


def trace(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = Anderson(),  # noqa: B008 (a frozen dataclass)
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 100,
    norm: Norm = rms_norm,
    batch_dims: int = 1,
    state_dtype: torch.dtype | None = None,
) -> Trace:
    """Solve z = f(z, *args) and record residuals, step sizes and turns of every evaluation.

    >>> history = eq.diagnostics.trace(lambda z: 1 - 0.5 * z, torch.zeros(1, 1), solver=eq.Picard(), max_steps=4)
    >>> history.residual[:, 0]
    tensor([1.0000, 1.0000, 0.3333, 0.2000])
    >>> history.cosine[:, 0]
    tensor([nan, nan, -1., -1.])

    Samples that fail are told by `history.solution.status`, not by a warning: looking at them is what a trace is for.

    Args:
        f, z0, args, solver, rtol, atol, max_steps, norm, batch_dims, state_dtype: as for `eq.fixed_point`.

    Returns:
        `Trace`.
    """
    check_integer("batch_dims", batch_dims, 0)
    layout = Layout.of(z0, batch_dims, state_dtype)
    recorder = _Recorder(layout)
    with torch.no_grad():
        solution = fixed_point(
            f,
            z0,
            *args,
            solver=solver,
            rtol=rtol,
            atol=atol,
            max_steps=max_steps,
            norm=norm,
            batch_dims=batch_dims,
            on_failure="ignore",
            state_dtype=state_dtype,
            callback=recorder,
        )
    evaluations = torch.tensor(recorder.evaluations, device=layout.device)
    ran = evaluations.view(-1, *(1 for _ in layout.batch_shape)) <= solution.steps
    residual, step_size, cosine = (
        torch.where(ran, torch.stack(rows).reshape(ran.shape), torch.nan)
        for rows in (recorder.residuals, recorder.step_sizes, recorder.cosines)
    )
    return Trace(evaluations, residual, step_size, cosine, solution)


class _Recorder:
    """A callback that keeps numbers of every evaluation, and the last state and step."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.evaluations: list[int] = []
        self.residuals: list[Tensor] = []
        self.step_sizes: list[Tensor] = []
        self.cosines: list[Tensor] = []
        self._z: Tensor | None = None
        self._step: Tensor | None = None

    def __call__(self, iterate: Iterate) -> None:
        z = self.layout.pack(iterate.value)
        # Without a state or a step before, NaN: what follows from it is NaN as well.
        before = torch.full_like(z, torch.nan) if self._z is None else self._z
        step = z - before
        last = torch.full_like(z, torch.nan) if self._step is None else self._step
        self.evaluations.append(iterate.evaluations)
        self.residuals.append(iterate.residual)
        self.step_sizes.append(rms_norm(step))
        self.cosines.append(_cosine(step, last))
        self._z, self._step = z, step


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of the angle between two vectors of each sample; NaN where one is zero."""
    a, b = (v / torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (a, b))
    return (a * b).sum(dim=1).clamp(-1, 1)
