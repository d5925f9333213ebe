"""The entry point for roots."""

from collections.abc import Callable
from typing import Any

import torch

from equilibria.adjoints import Adjoint, Implicit
from equilibria.norms import Norm, rms_norm
from equilibria.options import check_callable
from equilibria.problem import Root
from equilibria.solution import Solution
from equilibria.solve import Callback, WarmStart, check_options, solve, uncompiled
from equilibria.solvers import Newton, Solver
from equilibria.status import Failures
from equilibria.steady import steady
from equilibria.tree import Layout


@uncompiled
def root(
    g: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = Newton(),  # noqa: B008 (a frozen dataclass)
    adjoint: Adjoint = Implicit(),  # noqa: B008
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
    """Solve g(z, *args) = 0 for each sample of a batch, differentiably.

    >>> a = torch.tensor([[2.0], [3.0]], requires_grad=True)
    >>> sol = eq.root(lambda z, a: z**2 - a, torch.ones(2, 1), a)  # the square root
    >>> sol.value
    tensor([[1.4142],
            [1.7321]], grad_fn=<...>)
    >>> torch.autograd.grad(sol.value.sum(), a)[0]  # 1 / (2 sqrt(a))
    tensor([[0.3536],
            [0.2887]])

    A sample has converged when norm(g(z)) <= atol in every leaf of the state.

    Args:
        g: from a state and `args` to a state of the same structure and shapes.
        z0: the start, as for `eq.fixed_point`.
        args: handed to `g`.
        solver: `eq.Newton()` (its `linear_solver` may be `eq.Dense()`), `eq.Broyden()`; solvers that iterate plainly
            find the fixed point of z - g(z).
        adjoint: `eq.Implicit()` or `eq.Unrolled()`.
        atol: absolute tolerance; None is 1e-8, 1e-5 or 1e-2 where `g` computes in float64, float32 or half precision.
        max_steps, norm, batch_dims, on_failure, has_aux, state, state_dtype, callback, process_group: as for
            `eq.fixed_point`.

    Returns:
        `eq.Solution`, whose residual is norm(g(z)) at the value.

    Raises:
        SolveError: a sample failed and `on_failure` is "raise".
        TypeError, ValueError: an option or what `g` returned makes no sense; the message says what is allowed.
    """
    check_callable("g", g)
    check_options(solver, adjoint, None, atol, max_steps, norm, batch_dims, on_failure, state_dtype, callback)
    with steady(g) as g:
        problem = Root(g, args, Layout.of(z0, batch_dims, state_dtype), norm, None, atol, has_aux)
        return solve(problem, z0, solver, adjoint, max_steps, Failures(on_failure, process_group), state, callback)
