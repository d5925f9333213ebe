"""The entry point for equilibria."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equilibria.adjoints import Adjoint, Implicit
from equilibria.loop import Iterate, Outcome, run
from equilibria.norms import Norm, rms_norm
from equilibria.options import check_callable, check_choice, check_integer, check_part, check_tolerance
from equilibria.problem import FixedPoint
from equilibria.solution import AdjointReport, Solution
from equilibria.solvers import Anderson, Solver
from equilibria.status import ON_FAILURE, Failures
from equilibria.tree import STATE_DTYPES, Layout, detached

Callback = Callable[[Iterate], object]


class WarmStart(NamedTuple):
    """`Solution.state`: where a solve ended, and what its solver had learnt."""

    z: Tensor
    layout: Layout
    solver: Solver
    memory: Any


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
    failures = Failures(on_failure, process_group)
    return _solve_uncompiled(
        f,
        z0,
        args,
        solver,
        adjoint,
        rtol,
        atol,
        max_steps,
        norm,
        batch_dims,
        failures,
        has_aux,
        state,
        state_dtype,
        callback,
    )


def check_options(
    solver: Solver,
    adjoint: Adjoint,
    rtol: float | None,
    atol: float | None,
    max_steps: int,
    norm: Norm,
    batch_dims: int,
    on_failure: str,
) -> None:
    """Raise where an option makes no sense, in words that say what would."""
    check_part("solver", solver, ("init", "step"), "eq.Anderson()")
    check_part("adjoint", adjoint, ("attach",), "eq.Implicit()")
    check_tolerance("rtol", rtol)
    check_tolerance("atol", atol)
    check_integer("max_steps", max_steps, 1)
    check_callable("norm", norm)
    check_integer("batch_dims", batch_dims, 0)
    check_choice("on_failure", on_failure, ON_FAILURE)


def solve(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...],
    solver: Solver,
    adjoint: Adjoint,
    rtol: float | None,
    atol: float | None,
    max_steps: int,
    norm: Norm,
    batch_dims: int,
    failures: Failures,
    has_aux: bool = False,
    state: WarmStart | None = None,
    state_dtype: torch.dtype | None = None,
    callback: Callback | None = None,
) -> Solution:
    """`fixed_point` with its policy for failures as an object, which a layer keeps."""
    check_callable("f", f)
    check_options(solver, adjoint, rtol, atol, max_steps, norm, batch_dims, failures.on_failure)
    if state_dtype is not None:
        check_choice("state_dtype", state_dtype, STATE_DTYPES)
    if callback is not None:
        check_callable("callback", callback)
    layout = Layout.of(z0, batch_dims, state_dtype)
    if state is None:
        z, previous = layout.round(layout.pack_start(z0)), None
    else:
        z, previous = _resume(state, layout, solver)
    z = z.clone()  # an f that changes its state in place is refused, but only once it has done so
    problem = FixedPoint(f, args, layout, norm, rtol, atol, has_aux)

    def notify(z: Tensor, *per_sample: Tensor) -> None:
        assert callback is not None
        error, status, active = (t.reshape(layout.batch_shape) for t in per_sample)
        with torch.no_grad():
            callback(Iterate(problem.evaluations, layout.unpack(z.detach().clone()), error, status, active))

    def iterate(problem: FixedPoint) -> Outcome:
        # An adjoint that has to solve once more does not tell the callback again.
        tell = notify if callback is not None and problem.evaluations == 0 else None
        problem.evaluations = 0
        memory = solver.init(problem, z, previous)
        return run(problem, solver, z, memory, max_steps, tell, failures.agree)

    report = AdjointReport()
    if torch.is_grad_enabled():
        value, outcome = adjoint.attach(problem, iterate, failures, report)
    else:
        outcome = iterate(problem)
        value = outcome.z
    failures.tell("solve", outcome.status, outcome.error)
    end = WarmStart(outcome.z.detach().clone(), layout, solver, detached(outcome.memory))
    problem.evaluations = outcome.evaluations
    aux = problem.take_aux(outcome.z.detach(), failures.agree)
    status, steps, error = (t.reshape(layout.batch_shape) for t in (outcome.status, outcome.steps, outcome.error))
    return Solution(layout.unpack(value), status, steps, error, problem.evaluations, aux, end, report)


# The loop is data-dependent and holds no graph worth capturing; an f that is compiled stays compiled.
_solve_uncompiled: Callable[..., Solution] = torch.compiler.disable(solve)  # pyright: ignore[reportAssignmentType]


def _resume(state: WarmStart, layout: Layout, solver: Solver) -> tuple[Tensor, Any]:
    if not isinstance(state, WarmStart):
        raise TypeError(f"state must be the state of an earlier Solution, sol.state, not {type(state).__name__}.")
    if state.layout != layout:
        raise ValueError(
            f"state comes from a solve of {_describe(state.layout)}; this one is of {_describe(layout)}: start from z0 "
            "instead."
        )
    return state.z, state.memory if state.solver == solver else None


def _describe(layout: Layout) -> str:
    return f"shapes {[tuple(shape) for shape in layout.shapes]}, {layout.dtype}, on {layout.device}"
