"""The entry point for minima."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equilibria.adjoints import Adjoint, Implicit
from equilibria.linear import ConjugateGradient
from equilibria.norms import Norm, rms_norm
from equilibria.options import check_callable
from equilibria.problem import Gradient, Root
from equilibria.solution import Solution
from equilibria.solve import Callback, WarmStart, check_options, solve, uncompiled
from equilibria.solvers import LBFGS, Newton, Solver
from equilibria.status import Failures
from equilibria.steady import steady
from equilibria.tree import Layout


@uncompiled
def argmin(
    objective: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    atol: float | None = None,
    max_steps: int = 200,
    norm: Norm = rms_norm,
    batch_dims: int = 1,
    on_failure: str = "raise",
    has_aux: bool = False,
    equality: tuple[Tensor, Tensor] | None = None,
    state: WarmStart | None = None,
    state_dtype: torch.dtype | None = None,
    callback: Callback | None = None,
    process_group: Any = None,
) -> Solution:
    """Minimise objective(z, *args) for each sample of a batch, differentiably.

    >>> a = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> sol = eq.argmin(lambda z, a: ((z - a) ** 2).sum(dim=1) + (z**4).sum(dim=1), torch.zeros(1, 2), a)
    >>> sol.value
    tensor([[0.5898, 0.8351]], grad_fn=<...>)

    A sample has converged when norm(gradient) <= atol in every leaf of the state: a minimum where the solver descends,
    as `LBFGS` and `GradientDescent` do; `Newton` finds any stationary point, the minimum of a convex objective.

    Args:
        objective: from a state and `args` to one scalar a sample, of the shape of the batch dimensions; twice
            differentiable.
        z0: the start, as for `eq.fixed_point`.
        args: handed to the objective.
        solver: `eq.LBFGS()` (the default), `eq.GradientDescent(...)`, `eq.Newton()` (the default with `equality`).
        adjoint: None is `eq.Implicit` with conjugate gradients, since the Hessian is symmetric, and positive at a
            strict minimum; with `equality`, with GMRES.
        atol: absolute tolerance; None is 1e-8, 1e-5 or 1e-2 where the objective computes in float64, float32 or half
            precision.
        equality: (A, b), of shapes (m, n) or (batch, m, n) and (m,) or (batch, m): minimise subject to A z = b, where z
            is the flattened state of n entries, by the root of the Karush-Kuhn-Tucker system. Both get gradients.
        max_steps, norm, batch_dims, on_failure, has_aux, state, state_dtype, callback, process_group: as for
            `eq.fixed_point`.

    Returns:
        `eq.Solution`, whose residual is norm(gradient) at the value; with `equality` that of the whole system, and the
        multipliers, (batch, m), as `aux`.

    Raises:
        SolveError: a sample failed and `on_failure` is "raise".
        TypeError, ValueError: an option or what the objective returned makes no sense.
    """
    check_callable("objective", objective)
    solver = solver or (LBFGS() if equality is None else Newton())
    adjoint = adjoint or (Implicit(solver=ConjugateGradient()) if equality is None else Implicit())
    check_options(solver, adjoint, None, atol, max_steps, norm, batch_dims, on_failure, state_dtype, callback)
    layout = Layout.of(z0, batch_dims, state_dtype)
    failures = Failures(on_failure, process_group)
    if has_aux and equality is not None:
        raise ValueError("has_aux cannot go with equality, whose multipliers are the aux: close over what you need.")
    with steady(objective) as objective:
        gradient = Gradient(objective, layout, has_aux)
        if equality is None:
            problem = Root(gradient, args, layout, norm, None, atol, has_aux)
            return solve(problem, z0, solver, adjoint, max_steps, failures, state, callback)
        A, b = _check_equality(equality, layout)
        multiplier = torch.zeros(*layout.batch_shape, A.shape[1], dtype=layout.dtype, device=layout.device)
        start = {"z": z0, "multiplier": multiplier}
        # A and b are arguments, since transforms follow nothing else.
        joint = Layout.of(start, batch_dims, state_dtype)
        problem = Root(_stationarity(gradient), (A, b, *args), joint, norm, None, atol, has_aux=False)
        solution = solve(problem, start, solver, adjoint, max_steps, failures, state, callback)
        return dataclasses.replace(solution, value=solution.value["z"], aux=solution.value["multiplier"].detach())


def _stationarity(gradient: Gradient) -> Callable[..., Any]:
    """The Karush-Kuhn-Tucker system, a function of the state with its multipliers, of A, b and further arguments."""
    layout = gradient.layout

    def system(joint: Any, A: Tensor, b: Tensor, *args: Any) -> Any:
        z, multiplier = layout.pack_start(joint["z"]), joint["multiplier"].reshape(layout.batch, -1)
        pull = layout.unpack(torch.einsum("bmn,bm->bn", A, multiplier))
        slope = layout.pack(gradient(joint["z"], *args))
        gap = torch.einsum("bmn,bn->bm", A, z) - b
        return {"z": layout.unpack(slope + layout.pack(pull)), "multiplier": gap.reshape(joint["multiplier"].shape)}

    return system


def _check_equality(equality: tuple[Tensor, Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    A, b = equality
    n = sum(layout.sizes)
    if A.ndim not in (2, 3) or A.shape[-1] != n or b.shape[-1:] != A.shape[-2:-1]:
        raise ValueError(
            f"equality must be (A, b) of shapes (m, {n}) and (m,), or with a leading batch of {layout.batch}, not "
            f"{tuple(A.shape)} and {tuple(b.shape)}."
        )
    A, b = A.to(layout.dtype), b.to(layout.dtype)
    return A.expand(layout.batch, *A.shape[-2:]), b.expand(layout.batch, b.shape[-1])
