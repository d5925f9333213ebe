"""What every entry point does with its problem: check, start, solve, attach, tell, return."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from equilibria.adjoints import Adjoint
from equilibria.functional import solve_transformed
from equilibria.loop import Iterate, Outcome, run
from equilibria.norms import Norm
from equilibria.options import check_callable, check_choice, check_integer, check_part, check_tolerance
from equilibria.problem import Equation
from equilibria.solution import AdjointReport, Solution
from equilibria.solvers import Solver
from equilibria.status import ON_FAILURE, Failures
from equilibria.transforms import transformed
from equilibria.tree import STATE_DTYPES, Layout, detached

Callback = Callable[[Iterate], object]
Entry = TypeVar("Entry", bound=Callable[..., Any])


def uncompiled(entry: Entry) -> Entry:
    """Keeps an outer `torch.compile` out: the loop is data-dependent and holds no graph worth capturing.

    What is compiled on its own, such as the cell of a layer, stays compiled.
    """
    return torch.compiler.disable(entry)  # pyright: ignore[reportReturnType]


class WarmStart(NamedTuple):
    """`Solution.state`: where a solve ended, and what its solver had learnt."""

    z: Tensor
    layout: Layout
    solver: Solver
    memory: Any


def check_options(
    solver: Solver,
    adjoint: Adjoint,
    rtol: float | None,
    atol: float | None,
    max_steps: int,
    norm: Norm,
    batch_dims: int,
    on_failure: str,
    state_dtype: torch.dtype | None = None,
    callback: Callback | None = None,
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
    if state_dtype is not None:
        check_choice("state_dtype", state_dtype, STATE_DTYPES)
    if callback is not None:
        check_callable("callback", callback)


def solve(
    problem: Equation,
    z0: Any,
    solver: Solver,
    adjoint: Adjoint,
    max_steps: int,
    failures: Failures,
    state: WarmStart | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Solve a problem from `z0`, or from where an earlier solve ended, and attach the solution to autograd."""
    layout = problem.layout
    if state is None:
        z, previous = layout.round(layout.pack_start(z0)), None
    else:
        z, previous = _resume(state, layout, solver)
    z = z.clone()  # an f that changes its state in place is refused, but only once it has done so

    def search(problem: Equation, z: Tensor, previous: Any) -> Outcome:
        # An adjoint that has to solve once more does not tell the callback again.
        tell = _telling(problem, callback) if callback is not None and problem.evaluations == 0 else None
        problem.evaluations = 0
        memory = solver.init(problem, z, previous)
        return run(problem, solver, z, memory, max_steps, tell, failures.agree)

    report = AdjointReport()
    if transformed():
        result = solve_transformed(problem, z, lambda p, z: search(p, z.clone(), None), adjoint, failures, report)
        value, status, steps, error, problem.evaluations = result
        end = WarmStart(value.detach(), layout, solver, None)
    else:
        if torch.is_grad_enabled():
            value, outcome = adjoint.attach(problem, lambda problem: search(problem, z, previous), failures, report)
            memory = detached(outcome.memory)
        else:
            outcome = search(problem, z, previous)
            value, memory = outcome.z, outcome.memory
        failures.tell("solve", outcome.status, outcome.error)
        status, steps, error, problem.evaluations = outcome.status, outcome.steps, outcome.error, outcome.evaluations
        end = WarmStart(outcome.z.detach().clone(), layout, solver, memory)
    aux = problem.take_aux(end.z, failures.agree)
    status, steps, error = (t.reshape(layout.batch_shape) for t in (status, steps, error))
    leaves = layout.unpack(value)
    if len(layout.sizes) > 1:
        leaves = pytree.tree_map(torch.clone, leaves)  # so that each can be changed in place without the others
    return Solution(leaves, status, steps, error, problem.evaluations, aux, end, report)


def _telling(problem: Equation, callback: Callback) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    layout = problem.layout

    def notify(z: Tensor, *per_sample: Tensor) -> None:
        error, status, active = (t.reshape(layout.batch_shape) for t in per_sample)
        with torch.no_grad():
            callback(Iterate(problem.evaluations, layout.unpack(z.detach().clone()), error, status, active))

    return notify


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
    shapes = [tuple(shape) for shape in layout.shapes]
    return f"{layout.batch} samples in shapes {shapes}, {layout.dtype}, on {layout.device}"
