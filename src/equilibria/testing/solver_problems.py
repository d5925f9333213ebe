"""Laws of solvers: what they must solve, in which dtypes, and what they must not claim to have solved."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from equilibria.problem import Evaluation, Problem
from equilibria.solvers import Solver
from equilibria.status import Status
from equilibria.testing.cases import JUMPS, LATE_NAN, STRUCTURES, UNSOLVABLE, Case, Entry, make_case
from equilibria.testing.found import gradients
from equilibria.testing.laws import distance, expect, same


@dataclass(frozen=True)
class Tried:
    """A solver, and the entry point that it is tried with."""

    solver: Solver
    entry: Entry


def _names(status: Tensor) -> str:
    return ", ".join(sorted({Status(code).name for code in status.flatten().tolist()}))


def _reaches_the_answer(tried: Tried, case: Case) -> None:
    solution = case.solve(tried.solver)
    expect(
        solution.converged.all(),
        f"ended by {_names(solution.status)} after {solution.evaluations} evaluations (worst residual "
        f"{float(solution.residual.max()):.1e}), on {case}: plain iteration converges there.",
    )
    off = distance(case.join(solution.value), case.answer())
    expect(
        off <= case.rtol,
        f"says CONVERGED {off:.1e} away from the answer, on {case}: leave the problem and its tolerances as they are.",
    )


def converges_for_every_structure(tried: Tried) -> None:
    batches = ((), (4,), (2, 3), (5,))
    for structure, batch in zip(STRUCTURES, batches, strict=True):
        _reaches_the_answer(tried, make_case(tried.entry, structure, batch))


def converges_at_every_size(tried: Tried) -> None:
    for n in (1, 2, 40):
        _reaches_the_answer(tried, make_case(tried.entry, n=n, seed=n))


def converges_on_linear_maps(tried: Tried) -> None:
    for n in (1, 6):
        _reaches_the_answer(tried, make_case(tried.entry, n=n, linear=True, seed=n))


def converges_in_float32(tried: Tried) -> None:
    for linear in (False, True):
        _reaches_the_answer(tried, make_case(tried.entry, n=8, dtype=torch.float32, linear=linear))


def ends_in_half_precision(tried: Tried) -> None:
    case = make_case(tried.entry, n=16, dtype=torch.bfloat16)
    solution = case.solve(tried.solver)
    ended = (solution.status == Status.CONVERGED) | (solution.status == Status.STALLED)
    expect(
        ended.all(),
        f"burns all {solution.evaluations} evaluations ({_names(solution.status)}), on {case}: take steps that a "
        "bfloat16 state can hold.",
    )


@dataclass(frozen=True)
class _Watched:
    """A solver whose proposals are looked at."""

    solver: Solver

    def init(self, problem: Problem, z: Tensor, previous: Any = None) -> Any:
        return self.solver.init(problem, z, previous)

    def step(self, problem: Problem, evaluation: Evaluation, memory: Any) -> tuple[Tensor, Any]:
        z = evaluation.z
        proposal, memory = self.solver.step(problem, evaluation, memory)
        expect(
            proposal.shape == z.shape and proposal.dtype == z.dtype and proposal.device == z.device,
            f"proposed {tuple(proposal.shape)} in {proposal.dtype} on {proposal.device} for a state of "
            f"{tuple(z.shape)} in {z.dtype} on {z.device}: make new tensors by z.new_zeros(...) and the like.",
        )
        return proposal, memory


def proposes_in_the_dtype_and_on_the_device_of_the_state(tried: Tried) -> None:
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            case = make_case(tried.entry, "dict", dtype=dtype)
            case = case.with_args(*(arg.to(device) for arg in case.args))
            solution = case.solve(_Watched(tried.solver), max_steps=12)
            kinds = {(leaf.dtype, leaf.device) for leaf in solution.value.values()}
            expect(kinds == {(dtype, case.x.device)}, f"the value came back as {kinds}, on {case}.")


def never_claims_what_has_no_solution(tried: Tried) -> None:
    for fault in (UNSOLVABLE, JUMPS):
        case = make_case(tried.entry, batch=(3,), n=3)
        if fault == JUMPS and case.is_argmin:
            continue  # a jump of the gradient through zero is a minimum
        case = case.spoil(1, fault)
        solution = case.solve(tried.solver, max_steps=60)
        expect(
            not solution.converged[1] and solution.converged[[0, 2]].all(),
            f"a sample without a solution, number 1, made the statuses {_names(solution.status)} "
            f"({solution.status.tolist()}), on {case}: leave the problem and its tolerances as they are.",
        )


def makes_nan_the_status_of_its_sample(tried: Tried) -> None:
    for fault, when in ((torch.nan, "from the start"), (LATE_NAN, "after the start")):
        for n in (3, 7):
            case = make_case(tried.entry, batch=(4,), n=n).spoil(2, fault)
            solution, _, grad_x = gradients(case, tried.solver)
            value, where = case.join(solution.value), f"NaN {when} in sample 2 of 4, on {case}"
            expected = [int(Status.CONVERGED)] * 4
            expected[2] = int(Status.NONFINITE)
            expect(
                solution.status.tolist() == expected,
                f"{where}: the statuses are {solution.status.tolist()} and not {expected}; keep NaN in its own row, "
                "by torch.where and not by multiplication with zero.",
            )
            expect(value.isfinite().all(), f"{where}: the value returned is not finite.")
            expect((grad_x[2] == 0).all(), f"{where}: its gradient is {grad_x[2].tolist()} and not zero.")


def gives_true_residuals_at_every_cap(tried: Tried) -> None:
    contracting = make_case(tried.entry, "tuple", (3,))
    expanding = make_case(tried.entry, n=3, linear=True)
    expanding = replace(expanding, w=4 * expanding.w)
    for case, max_steps in itertools.product((contracting, expanding), (1, 2, 3, 7)):
        with torch.no_grad():
            quiet = case.solve(tried.solver, max_steps=max_steps)
        x = case.x.clone().requires_grad_()
        solution = replace(case, x=x).solve(tried.solver, max_steps=max_steps)
        where = f"with max_steps={max_steps}, on {case}"
        off = distance(solution.residual, case.residual(solution.value))
        expect(
            off <= 1e-9,
            f"the residual of the value returned differs from the one reported by {off:.1e} {where}: write into no "
            "tensor of the evaluation.",
        )
        expect(
            same(solution.value, quiet.value) and same(solution.steps, quiet.steps),
            f"the value is not the same with gradients as without {where}: a solver takes the same steps each time.",
        )
        if max_steps == 1:
            expect(same(solution.value, case.z0), f"one evaluation did not return the start, on {case}.")
