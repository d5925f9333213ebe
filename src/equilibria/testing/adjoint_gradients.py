"""Laws of adjoints: the value that they leave alone, and the gradient that they give it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equilibria.adjoints import Adjoint
from equilibria.fixed_point import fixed_point
from equilibria.solvers import Picard
from equilibria.status import Status
from equilibria.testing.cases import LATE_NAN, STRUCTURES, UNSOLVABLE, Case, make_case
from equilibria.testing.found import agree, find, gradients, own_weights, weights
from equilibria.testing.laws import distance, expect, same

PICARD = Picard()  # of all solvers the one with nothing of its own to differentiate
TIGHT = 1e-11


@dataclass(frozen=True)
class Taken:
    """An adjoint, and whether its gradient is that of the equilibrium or an approximation."""

    adjoint: Adjoint
    exact: bool


def leaves_the_value_to_the_solver(taken: Taken) -> None:
    contracting, expanding = make_case(fixed_point), make_case(fixed_point, linear=True)
    expanding = replace(expanding, w=2 * expanding.w)
    for case in (contracting, expanding, make_case(fixed_point, "nested", (2, 2))):
        for max_steps in (1, 3, 40):
            with torch.no_grad():
                quiet = case.solve(PICARD, taken.adjoint, max_steps)
            x = case.x.clone().requires_grad_()
            solution = replace(case, x=x).solve(PICARD, taken.adjoint, max_steps)
            expect(
                same(solution.value, quiet.value),
                f"the value is not the solver's bit for bit, with max_steps={max_steps}, on {case}: return outcome.z "
                "plus a term of value zero that carries the gradient, and not f(z).",
            )
            expect(
                same((solution.status, solution.steps, solution.residual), (quiet.status, quiet.steps, quiet.residual)),
                f"status, steps or residual are not the solver's, with max_steps={max_steps}, on {case}: return the "
                "outcome as solve gave it.",
            )


def keeps_the_sign_of_zero(taken: Taken) -> None:
    a = torch.tensor([[0.5], [0.25]], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[-0.0, 0.0], [-0.0, 1.0]], dtype=torch.float64)
    solution = fixed_point(
        lambda z: a * z, start, solver=PICARD, adjoint=taken.adjoint, max_steps=1, on_failure="ignore"
    )
    expect(same(solution.value, start), f"{start.tolist()} came back as {solution.value.tolist()}: add -0.0, not 0.0.")


def agrees_with_a_dense_solve(taken: Taken) -> None:
    if not taken.exact:
        return
    for structure, batch in zip(STRUCTURES, ((5,), (3,), (2, 2), ()), strict=True):
        case = make_case(fixed_point, structure, batch, seed=1)
        _, grad_w, grad_x = gradients(case, PICARD, taken.adjoint, tolerance=TIGHT)
        for name, found, expected in zip("wx", (grad_w, grad_x), _dense(case), strict=True):
            off = distance(found, expected)
            expect(off <= 1e-5, f"the gradient of {name} is {off:.1e} away from that of a dense solve, on {case}.")


def _dense(case: Case) -> tuple[Tensor, Tensor]:
    """The implicit function theorem with matrices: u = (I - J^T)^{-1} v, and the products of u with df/dw and df/dx."""
    w, x = case.w.clone().requires_grad_(), case.x.clone().requires_grad_()
    z = case.answer().requires_grad_()
    image = case.image(z, w, x, case.slope, case.fault)
    n = z.shape[-1]
    rows = [torch.autograd.grad(image[..., i].sum(), z, retain_graph=True)[0] for i in range(n)]
    transposed = torch.stack(rows, dim=-1)  # J^T of each sample
    u = torch.linalg.solve(torch.eye(n, dtype=z.dtype) - transposed, own_weights(case)[..., None])[..., 0]
    grad_w, grad_x = torch.autograd.grad(image, (w, x), u.detach())
    return grad_w, grad_x


def passes_gradcheck(taken: Taken) -> None:
    if not taken.exact:
        return
    case = make_case(fixed_point, "dict", (2,), seed=2)

    def value(w: Tensor, x: Tensor) -> Tensor:
        args = (w, x, case.slope, case.fault)
        return case.join(case.solve(PICARD, taken.adjoint, tolerance=TIGHT, args=args).value)

    inputs = [tensor.clone().requires_grad_() for tensor in (case.w, case.x)]
    torch.autograd.gradcheck(value, inputs, atol=1e-5, rtol=1e-4, fast_mode=True)


def reaches_captured_tensors(taken: Taken) -> None:
    case = make_case(fixed_point, batch=(3,))
    _, *expected = gradients(case, PICARD, taken.adjoint, tolerance=TIGHT)
    w, x = case.w.clone().requires_grad_(), case.x.clone().requires_grad_()
    solution = fixed_point(
        lambda z: torch.tanh(case.slope * (z @ w) + x),
        torch.zeros_like(x),
        solver=PICARD,
        adjoint=taken.adjoint,
        rtol=TIGHT,
        max_steps=400,
    )
    found = torch.autograd.grad(solution.value, (w, x), own_weights(case), allow_unused=True)
    for name, one, other in zip("wx", found, expected, strict=True):
        expect(
            one is not None and distance(one, other) <= 1e-8,
            f"a tensor {name} that the function captures gets {'no' if one is None else 'another'} gradient than as an "
            "argument: attach the gradient through an evaluation of problem.apply, so that autograd finds it.",
        )


def is_linear_in_the_incoming_gradient(taken: Taken) -> None:
    case = make_case(fixed_point, n=5, batch=(3,), seed=3)
    x = case.x.clone().requires_grad_()
    value = replace(case, x=x).solve(PICARD, taken.adjoint, tolerance=TIGHT).value
    first, second = weights(x), weights(x).flip(-1).square()

    def pull(v: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, v, retain_graph=True)[0]

    off = distance(pull(first - 3 * second), pull(first) - 3 * pull(second))
    expect(
        off <= (1e-6 if taken.exact else 1e-2),
        f"the gradient of v - 3 w is {off:.1e} away from that of v less three times that of w.",
    )
    zero = pull(torch.zeros_like(x))
    expect((zero == 0).all(), "an incoming gradient of zeros does not give zeros.")
    v = first.clone()
    v[1] = 0
    expect((pull(v)[1] == 0).all(), "a sample that the loss does not see gets a gradient.")


def keeps_its_accuracy_at_every_scale_of_the_loss(taken: Taken) -> None:
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        case = make_case(fixed_point, dtype=dtype, seed=4)
        x = case.x.clone().requires_grad_()
        value = replace(case, x=x).solve(PICARD, taken.adjoint).value
        (expected,) = torch.autograd.grad(value, x, weights(x), retain_graph=True)
        for scale in (1e-8, 1e8):
            (found,) = torch.autograd.grad(value, x, scale * weights(x), retain_graph=True)
            off = distance(found / scale, expected)
            expect(
                off <= bound,
                f"a loss times {scale:g} changes the gradient by {off:.1e} of itself, on {case}: measure the residual "
                "of the backward solve against the incoming gradient.",
            )


def gives_the_same_gradient_twice(taken: Taken) -> None:
    case = make_case(fixed_point, batch=(3,), seed=5)
    x = case.x.clone().requires_grad_()
    value = replace(case, x=x).solve(PICARD, taken.adjoint).value
    first, second = (torch.autograd.grad(value, x, weights(x), retain_graph=True)[0] for _ in range(2))
    expect(same(first, second), "two backwards over one graph differ: change nothing that backward reads.")


def treats_a_sample_alike_in_any_company(taken: Taken) -> None:
    for dtype in (torch.float64, torch.float32):
        case = make_case(fixed_point, n=5, dtype=dtype, seed=6)
        together = find(case, PICARD, taken.adjoint)
        order = [3, 0, 5, 1, 4, 2]
        agree(find(case.take(order), PICARD, taken.adjoint), together.take(order), "in another order", case)
        for row in (1,):
            agree(find(case.take([row]), PICARD, taken.adjoint), together.take([row]), "alone", case)
        rest = [0, 1, 3, 4, 5]
        for fault, where in ((torch.nan, "beside a sample of NaN"), (UNSOLVABLE, "beside one that never converges")):
            beside = find(case.spoil(2, fault), PICARD, taken.adjoint, max_steps=200)
            agree(beside.take(rest), together.take(rest), where, case)


def gives_samples_of_nan_no_gradient(taken: Taken) -> None:
    rest = [0, 1, 3]
    for fault, when in ((torch.nan, "from the start"), (LATE_NAN, "after the start")):
        case = make_case(fixed_point, batch=(4,), seed=7)
        _, expected, _ = gradients(case.take(rest), PICARD, taken.adjoint, tolerance=TIGHT)
        solution, grad_w, grad_x = gradients(case.spoil(2, fault), PICARD, taken.adjoint, tolerance=TIGHT)
        where = f"NaN {when} in sample 2 of 4"
        expect(solution.status[2] == Status.NONFINITE, f"{where}: the status is {solution.status.tolist()}.")
        expect((grad_x[2] == 0).all(), f"{where}: the gradient of its input is {grad_x[2].tolist()} and not zero.")
        off = distance(grad_w, expected)
        expect(
            off <= 1e-8,
            f"{where}: the gradient of a shared weight is {off:.1e} away from that without the sample; 0 * nan is nan, "
            "so evaluate it elsewhere, as `sealed` of equilibria.adjoints does for the adjoints of the library.",
        )


def keeps_the_gradient_of_samples_that_ran_out_of_steps(taken: Taken) -> None:
    case = make_case(fixed_point, batch=(3,), seed=8)
    solution, _, grad_x = gradients(case, PICARD, taken.adjoint, max_steps=3, tolerance=1e-12)
    expect((solution.status == Status.MAX_STEPS).all(), f"the statuses are {solution.status.tolist()}.")
    expect(
        grad_x.isfinite().all() and (grad_x != 0).any(dim=-1).all(),
        "samples at the cap of evaluations lose their gradient: only NONFINITE ones have none.",
    )
