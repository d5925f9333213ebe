"""Laws of solvers: how they behave towards other samples, towards autograd and towards everything else."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from equilibria.adjoints import Implicit, Unrolled
from equilibria.fixed_point import fixed_point
from equilibria.status import SolveError, Status
from equilibria.testing.cases import UNSOLVABLE, make_case
from equilibria.testing.found import agree, find, weights
from equilibria.testing.laws import distance, expect, freed, same, settings_untouched, untouched
from equilibria.testing.solver_problems import Tried

COUPLED = (torch.float64, torch.float32)


class Counted:
    """A function that counts its calls, but not those that a checkpoint makes again in backward."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f
        self.calls = 0

    def __call__(self, *inputs: Any) -> Any:
        self.calls += not recomputing()
        return self.f(*inputs)


def recomputing() -> bool:
    """Whether a checkpoint of torch evaluates something again."""
    frame = sys._getframe(1)
    while frame is not None:
        ours = frame.f_globals.get("__name__") == "torch.utils.checkpoint"
        if ours and frame.f_code.co_name in ("unpack_hook", "backward"):
            return True
        frame = frame.f_back
    return False


def counts_every_call(tried: Tried) -> None:
    for grad in (False, True):
        for max_steps in (1, 2, 400):
            case = make_case(tried.entry, batch=(3,))
            f = Counted(case.f)
            x = case.x.clone().requires_grad_(grad)
            solution = case.solve(tried.solver, max_steps=max_steps, f=f, args=replace(case, x=x).args)
            told = solution.evaluations + solution.adjoint.evaluations
            expect(
                f.calls == told,
                f"{f.calls} calls were made and {told} told, with max_steps={max_steps}, on {case}: evaluate by "
                "problem.evaluate, or add what you call yourself to problem.evaluations.",
            )


def treats_a_sample_alike_alone_and_in_any_order(tried: Tried) -> None:
    for dtype in COUPLED:
        case = make_case(tried.entry, n=5, dtype=dtype, seed=3)
        together = find(case, tried.solver)
        order = [3, 0, 5, 1, 4, 2]
        agree(find(case.take(order), tried.solver), together.take(order), "in another order", case)
        for row in (0, 4):
            agree(find(case.take([row]), tried.solver), together.take([row]), "alone", case)


def treats_a_sample_alike_beside_one_of_nan(tried: Tried) -> None:
    _beside(tried, torch.nan, "beside a sample of NaN", COUPLED)


def treats_a_sample_alike_beside_one_that_never_converges(tried: Tried) -> None:
    _beside(tried, UNSOLVABLE, "beside a sample that never converges", (torch.float64,))


def _beside(tried: Tried, fault: float, where: str, dtypes: tuple[torch.dtype, ...]) -> None:
    for dtype in dtypes:
        case = make_case(tried.entry, n=5, dtype=dtype, seed=4)
        rest = [0, 1, 3, 4, 5]
        company = find(case.spoil(2, fault), tried.solver, max_steps=100)
        alone = find(case.take(rest), tried.solver, max_steps=100)
        agree(company.take(rest), alone, where, case)


def leaves_inputs_and_settings_alone(tried: Tried) -> None:
    case = make_case(tried.entry, "nested", (3,))
    z0 = case.z0
    with settings_untouched(), untouched({"the start z0": z0, "an argument of the function": case.args}):
        case.solve(tried.solver, z0=z0)


def takes_the_same_steps_each_time(tried: Tried) -> None:
    case = make_case(tried.entry, seed=5)
    first, second = (case.solve(tried.solver) for _ in range(2))
    expect(
        same((first.value, first.steps), (second.value, second.steps)),
        f"two solves of one problem differ, on {case}: keep all state in the memory that init and step return.",
    )


def resumes_without_writing_into_the_memory_of_before(tried: Tried) -> None:
    case = make_case(tried.entry, seed=6)
    before = case.solve(tried.solver)
    moved = replace(case, x=case.x + 0.1)
    with untouched({"the memory of the solve before": before.state.memory}):
        first = moved.solve(tried.solver, state=before.state)
    second = moved.solve(tried.solver, state=before.state)
    expect(
        same((first.value, first.steps), (second.value, second.steps)),
        f"two solves resumed from one state differ, on {case}: init must copy what step writes into.",
    )
    expect(first.converged.all(), f"a solve resumed from a near one ended by {first.status.tolist()}, on {case}.")


def takes_empty_batches_and_empty_states(tried: Tried) -> None:
    for batch, n in (((0,), 3), ((1,), 3), ((2,), 0), ((0,), 0)):
        case = make_case(tried.entry, batch=batch, n=n)
        found = find(case, tried.solver)
        expect(found.value.shape == case.x.shape, f"returned the shape {tuple(found.value.shape)}, on {case}.")
        expect((found.status == Status.CONVERGED).all(), f"ended by {found.status.tolist()}, on {case}.")
        expect(found.gradient.isfinite().all(), f"the gradient is not finite, on {case}.")


def has_solutions_that_pass_gradcheck(tried: Tried) -> None:
    case = make_case(tried.entry, "nested", (2,))

    def value(w: Tensor, x: Tensor) -> Tensor:
        args = (w, x, case.slope, case.fault)
        return case.join(case.solve(tried.solver, Implicit(), tolerance=1e-11, args=args).value)

    inputs = [tensor.clone().requires_grad_() for tensor in (case.w, case.x)]
    torch.autograd.gradcheck(value, inputs, atol=1e-5, rtol=1e-4, fast_mode=True)


def is_unrolled_rightly_or_refuses_to_be(tried: Tried) -> None:
    case = make_case(tried.entry, batch=(3,), seed=7)
    x = case.x.clone().requires_grad_()
    args = replace(case, x=x).args
    expected = torch.autograd.grad(case.answer(*args), x, weights(x))[0]
    try:
        solution = case.solve(tried.solver, Unrolled(), tolerance=1e-11, args=args)
    except SolveError:
        raise
    except ValueError:
        return  # as it should where a solver cannot be differentiated
    found = torch.autograd.grad(solution.value, x, weights(x))[0]
    off = distance(found, expected)
    expect(
        off <= 1e-4,
        f"the gradient through its steps (eq.Unrolled) is {off:.1e} away from the right one, on {case}: keep step "
        "differentiable, or raise a ValueError in it where torch.is_grad_enabled() that names eq.Implicit().",
    )


def solves_compiled_functions(tried: Tried) -> None:
    case = make_case(tried.entry, batch=(3,))
    if case.is_argmin:
        return  # minima take second derivatives, which torch does not give of compiled functions
    f = image if tried.entry is fixed_point else _gap
    with torch.no_grad():
        plain = case.solve(tried.solver, f=f)
        compiled = case.solve(tried.solver, f=compiled_anew(f))
    off = distance(compiled.value, plain.value)
    expect(
        off <= 1e-6 and torch.equal(compiled.status, plain.status),
        f"the answer for a function under torch.compile is {off:.1e} away from that without, on {case}.",
    )


def image(z: Tensor, w: Tensor, x: Tensor, slope: Tensor, fault: Tensor) -> Tensor:
    return torch.tanh(slope * (z @ w) + x)


def _gap(z: Tensor, w: Tensor, x: Tensor, slope: Tensor, fault: Tensor) -> Tensor:
    return z - image(z, w, x, slope, fault)


def compiled_anew(f: FunctionType) -> Callable[..., Any]:
    """The compiled function, of a code object of its own: past eight versions of one the compiler gives up on it."""
    return torch.compile(FunctionType(f.__code__.replace(), f.__globals__, f.__name__), backend="aot_eager")


def leaves_no_reference_cycles(tried: Tried) -> None:
    case = make_case(tried.entry, batch=(3,))
    x = case.x.clone().requires_grad_()
    freed(lambda: case.solve(tried.solver, max_steps=20, args=replace(case, x=x).args))
