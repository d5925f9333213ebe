"""Laws of adjoints: second derivatives, reports, and the company of the rest of torch."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equilibria.fixed_point import fixed_point
from equilibria.nn import DEQ
from equilibria.status import ConvergenceWarning, SolveError, Status
from equilibria.testing.adjoint_gradients import PICARD, TIGHT, Taken
from equilibria.testing.cases import make_case
from equilibria.testing.found import gradients, weights
from equilibria.testing.laws import distance, expect, freed, settings_untouched, untouched
from equilibria.testing.solver_conduct import Counted, compiled_anew, image


class Cell(nn.Module):
    """tanh(slope (z W) + x), with a weight that is a parameter."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.6 * make_case(fixed_point).w.to(dtype))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + x)


def _layer(taken: Taken, dtype: torch.dtype = torch.float64) -> DEQ:
    return DEQ(Cell(dtype), PICARD, taken.adjoint, max_steps=400, on_failure="ignore")


def _weight(layer: DEQ) -> nn.Parameter:
    return next(layer.parameters())


def _inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return make_case(fixed_point, batch=(3,), seed=seed).x.to(dtype).requires_grad_()


def _pulled(layer: DEQ, x: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    grad_w, grad_x = torch.autograd.grad(value, (_weight(layer), x), weights(value), allow_unused=True)
    if grad_w is None or grad_x is None:
        raise AssertionError("a parameter or an input gets no gradient.")
    return grad_w, grad_x


def gives_second_derivatives_or_refuses_them(taken: Taken) -> None:
    case = make_case(fixed_point, batch=(2,), n=3, seed=9)
    inputs = [tensor.clone().requires_grad_() for tensor in (case.w, case.x)]
    directions = [weights(tensor).flip(-1) for tensor in inputs]

    def second(value: Tensor) -> list[Tensor]:
        first = torch.autograd.grad((value**2 * weights(value)).sum(), inputs, create_graph=True)
        along = torch.stack([(g * d).sum() for g, d in zip(first, directions, strict=True)]).sum()
        found = torch.autograd.grad(along, inputs, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]

    args = (*inputs, case.slope, case.fault)
    try:
        found = second(case.solve(PICARD, taken.adjoint, tolerance=TIGHT, args=args).value)
    except RuntimeError:
        return  # as it should where there are none
    for name, one, other in zip("wx", found, second(case.answer(*args)), strict=True):
        off = distance(one, other)
        expect(
            off <= 1e-4,
            f"second derivatives of {name} are {off:.1e} away from the right ones: raise a RuntimeError in backward "
            "where torch.is_grad_enabled(), since this adjoint does not have them.",
        )


def serves_a_layer_that_is_used_twice(taken: Taken) -> None:
    layer, x = _layer(taken), _inputs()
    found = _pulled(layer, x, layer(layer(x)))
    between = layer(x).detach().requires_grad_()
    second_w, v = _pulled(layer, between, layer(between))
    first_w, grad_x = torch.autograd.grad(layer(x), (_weight(layer), x), v)
    off = max(distance(found[0], first_w + second_w), distance(found[1], grad_x))
    expect(off <= 1e-9, f"the gradient through two calls of one layer is {off:.1e} away from that of one at a time.")


def leaves_frozen_parameters_and_no_grad_alone(taken: Taken) -> None:
    layer, x = _layer(taken), _inputs()
    _, expected = _pulled(layer, x, layer(x))
    _weight(layer).requires_grad_(False)
    value = layer(x)
    (found,) = torch.autograd.grad(value, x, weights(value))
    expect(distance(found, expected) <= 1e-12, "the gradient of the input changes where a parameter is frozen.")
    expect(not _weight(layer).requires_grad, "a frozen parameter came back with requires_grad.")
    expect(not layer(x.detach()).requires_grad, "a value that depends on nothing to be differentiated has a graph.")
    with torch.no_grad():
        expect(not layer(x).requires_grad, "a value under no_grad has a graph.")


def fires_hooks_of_parameters_once(taken: Taken) -> None:
    layer, x = _layer(taken), _inputs()
    fired: list[str] = []
    _weight(layer).register_hook(lambda grad: fired.append("hook"))
    _weight(layer).register_post_accumulate_grad_hook(lambda parameter: fired.append("post-accumulate hook"))
    layer(x).sum().backward()
    expect(
        sorted(fired) == ["hook", "post-accumulate hook"],
        f"one backward fired {fired}: never call .backward() or accumulate into .grad in backward; take products by "
        "torch.autograd.grad with respect to the state alone.",
    )


def counts_every_call(taken: Taken) -> None:
    for max_steps in (1, 3, 400):
        case = make_case(fixed_point, batch=(3,))
        x, f = case.x.clone().requires_grad_(), Counted(case.f)
        solution = case.solve(PICARD, taken.adjoint, max_steps, f=f, args=replace(case, x=x).args)
        for when in ("the solve", "backward"):
            told = solution.evaluations + solution.adjoint.evaluations
            expect(
                f.calls == told,
                f"{f.calls} calls were made and {told} told after {when}, with max_steps={max_steps}: add each to "
                "report.evaluations.",
            )
            if when == "the solve":
                solution.value.sum().backward()


def reports_truly_or_nothing(taken: Taken) -> None:
    case = make_case(fixed_point, batch=(2, 3))
    x = case.x.clone().requires_grad_()
    solution = replace(case, x=x).solve(PICARD, taken.adjoint)
    report = solution.adjoint
    before = [name for name in ("status", "residual", "steps") if getattr(report, name) is not None]
    expect(not before, f"{', '.join(before)} of the report are filled in before backward has run.")
    solution.value.sum().backward()
    for name in ("status", "residual", "steps"):
        found = getattr(report, name)
        expect(
            found is None or (isinstance(found, Tensor) and found.shape == (2, 3) and not found.requires_grad),
            f"{name} of the report must be None or a plain tensor of the batch's shape, (2, 3): reshape it to "
            "problem.layout.batch_shape.",
        )
    if report.status is not None:
        expect((report.status == Status.CONVERGED).all(), f"a plain backward solve reports {report.status.tolist()}.")


def tells_a_backward_solve_that_fails(taken: Taken) -> None:
    turn = torch.eye(3, dtype=torch.float64)
    turn[0, 1] = 1.0

    def solve(on_failure: str) -> tuple[Tensor, Any]:
        x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        solution = fixed_point(
            lambda z: z @ turn + x, torch.zeros_like(x), solver=PICARD, adjoint=taken.adjoint, on_failure=on_failure
        )
        return solution.value.sum(), solution.adjoint

    loss, report = solve("ignore")
    loss.backward()
    if report.status is None:
        return  # it solves nothing, or does not say so
    expect(
        (report.status != Status.CONVERGED).all(),
        "a gradient that does not exist (I - J is singular) is reported as CONVERGED.",
    )
    for on_failure, told in (("raise", SolveError), ("warn", ConvergenceWarning)):
        loss, _ = solve(on_failure)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", ConvergenceWarning)
                loss.backward()
        except (SolveError, ConvergenceWarning) as error:
            expect(isinstance(error, told), f'on_failure="{on_failure}" gave {type(error).__name__}.')
            continue
        raise AssertionError(
            f'a backward solve that fails says nothing with on_failure="{on_failure}": call '
            'failures.tell("backward solve", status, residual).'
        )


def works_under_autocast(taken: Taken) -> None:
    layer, x = _layer(taken, torch.float32), _inputs(torch.float32)
    expected = _pulled(layer, x, layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = layer(x)
    found = _pulled(layer, x, value)
    for name, one, other in zip(("parameter", "input"), found, expected, strict=True):
        off = distance(one, other) if one.isfinite().all() else float("inf")
        expect(
            off <= 0.25 and one.dtype == torch.float32,
            f"under autocast to bfloat16 the gradient of a {name} is {off:.1e} away from that in float32.",
        )


def works_under_checkpoints(taken: Taken) -> None:
    layer, x = _layer(taken), _inputs()
    expected = _pulled(layer, x, layer(x))
    for reentrant in (False, True):
        layer.zero_grad()
        x = x.detach().requires_grad_()
        value = checkpoint(layer, x, use_reentrant=reentrant)
        (value * weights(x)).sum().backward()
        for name, grad, other in zip(("parameter", "input"), (_weight(layer).grad, x.grad), expected, strict=True):
            off = float("inf") if grad is None else distance(grad, other)
            expect(
                off <= 1e-9,
                f"under torch.utils.checkpoint (use_reentrant={reentrant}) the gradient of a {name} is {off:.1e} off.",
            )


def leaves_inputs_and_settings_alone(taken: Taken) -> None:
    case = make_case(fixed_point, "nested", (3,))
    z0, v = case.z0, weights(case.x)
    x = case.x.clone().requires_grad_()
    args = replace(case, x=x).args
    with settings_untouched(), untouched({"the start z0": z0, "an argument": args, "the incoming gradient": v}):
        rows = case.join(case.solve(PICARD, taken.adjoint, z0=z0, args=args).value)
        torch.autograd.grad(rows, x, v)


def takes_empty_batches_and_empty_states(taken: Taken) -> None:
    for batch, n in (((0,), 3), ((1,), 3), ((2,), 0), ((0,), 0)):
        case = make_case(fixed_point, batch=batch, n=n)
        _, grad_w, grad_x = gradients(case, PICARD, taken.adjoint)
        expect(grad_w.isfinite().all() and grad_x.isfinite().all(), f"the gradient is not finite, on {case}.")


def differentiates_compiled_functions(taken: Taken) -> None:
    case = make_case(fixed_point, batch=(3,))
    x = case.x.clone().requires_grad_()
    pulled = []
    for f in (image, compiled_anew(image)):
        value = case.solve(PICARD, taken.adjoint, f=f, args=replace(case, x=x).args).value
        pulled.append(torch.autograd.grad(value, x, weights(x))[0])
    off = distance(*pulled)
    expect(off <= 1e-6, f"the gradient of a function under torch.compile is {off:.1e} away from that without.")


def leaves_no_reference_cycles(taken: Taken) -> None:
    layer = _layer(taken)

    def forward() -> Any:
        return layer.solve(_inputs() * 1)

    def both() -> Any:
        x = _inputs()
        solution = layer.solve(x * 1)
        torch.autograd.grad(solution.value.sum(), x)
        return solution

    freed(forward)
    freed(both)
