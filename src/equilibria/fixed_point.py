"""The entry point for equilibria."""

from collections.abc import Callable
from typing import Any

import torch

from equilibria.adjoints import Adjoint, Implicit
from equilibria.norms import Norm, rms_norm
from equilibria.options import check_callable
from equilibria.problem import FixedPoint
from equilibria.solution import Solution
from equilibria.solve import Callback, WarmStart, check_options, solve, uncompiled
from equilibria.solvers import Anderson, Solver
from equilibria.status import Failures
from equilibria.steady import steady
from equilibria.tree import Layout


@uncompiled
def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = Anderson(),  # noqa: B008 (a frozen dataclass)
    adjoint: Adjoint = Implicit(),  # noqa: B008
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 100,
    norm: Norm = rms_norm,
    batch_dims: int = 1,
    on_failure: str = "raise",
    has_aux: bool = False,
    state: WarmStart | None = None,
    state_dtype: torch.dtype | None = None,
    callback: Callback | None = None,
    process_group: Any = None,
) -> Solution:
    """Solve z = f(z, *args) for each sample of a batch, differentiably.

    >>> W = torch.tensor([[0.2, -0.4], [0.3, 0.1]], requires_grad=True)
    >>> x = torch.tensor([[1.0, 0.0], [0.5, -0.5], [0.0, 2.0]])
    >>> sol = eq.fixed_point(lambda z, x: torch.tanh(z @ W + x), torch.zeros(3, 2), x)
    >>> sol.value.shape, sol.converged.tolist()
    (torch.Size([3, 2]), [True, True, True])
    >>> sol.value.sum().backward()  # the gradient of the equilibrium, into W

    A sample has converged when norm(f(z) - z) <= atol + rtol * norm(f(z)) in every leaf of the state.

    Under `torch.func` (`grad`, `vjp`, `jvp`, `jacrev`, `jacfwd`, `hessian`, `vmap`, in any composition) and in forward
    mode there are derivatives of every order, with `eq.Implicit()` alone. What is differentiated and mapped there are
    `args`, and an `f` that captures what would have to be is refused. Mapped axes are solved as samples of one batch:
    the per-sample tensors of the solution have them, `callback` and `sol.adjoint` see them in front, and `sol.state`
    holds where the solve ended but not what its solver learnt.

    Args:
        f: from a state and `args` to a state of the same structure and shapes. What it captures (parameters, inputs)
            gets gradients as well as `args`.
        z0: the start: a floating tensor or any tuple, list or dict of such, nested or not; the first `batch_dims`
            dimensions of every leaf index independent samples.
        args: handed to `f`.
        solver: how the solution is searched for: `eq.Anderson()`, `eq.Picard()`.
        adjoint: how it is differentiated: `eq.Implicit()`, `eq.Phantom(...)`, `eq.OneStep()`, `eq.Unrolled()`.
        rtol: relative tolerance; None is 1e-8, 1e-4 or 1e-2 where `f` computes in float64, float32 or half precision
            (under autocast: its dtype).
        atol: absolute tolerance; None is a hundredth of that, or 0 where `rtol` is given.
        max_steps: evaluations of `f` allowed; 1 evaluates once and returns `z0` with its residual.
        norm: from a leaf, (batch, ...), to one number per sample; `eq.rms_norm` or `eq.max_norm`.
        batch_dims: 0 solves one joint problem.
        on_failure: what to do about samples that fail: "raise" `eq.SolveError`, "warn" with `eq.ConvergenceWarning`, or
            "ignore". Failed samples return their best finite iterate, with true status and residual.
        has_aux: `f` returns (state, aux); the aux of the returned value comes back as data.
        state: `Solution.state` of an earlier solve of the same shape, to start from instead of `z0`.
        state_dtype: dtype of the state in place of that of `z0`, for example float32 around a bfloat16 `f`.
        callback: called with an `eq.Iterate` after every evaluation, without gradient.
        process_group: ranks that must stop together, for an `f` that holds a collective.

    Returns:
        `eq.Solution`.

    Raises:
        SolveError: a sample failed and `on_failure` is "raise".
        TypeError, ValueError: an option or what `f` returned makes no sense; the message says what is allowed.
    """
    check_callable("f", f)
    check_options(solver, adjoint, rtol, atol, max_steps, norm, batch_dims, on_failure, state_dtype, callback)
    with steady(f) as f:
        problem = FixedPoint(f, args, Layout.of(z0, batch_dims, state_dtype), norm, rtol, atol, has_aux)
        return solve(problem, z0, solver, adjoint, max_steps, Failures(on_failure, process_group), state, callback)
