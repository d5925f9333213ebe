"""The law of gradients: exact where they claim to be, zero where a sample failed, and never wrong in silence."""

import dataclasses
from typing import Any

import pytest
import torch
from cases import IMPLICIT, UNROLLED, Case, Samples, cases, image, objective
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from maps import (
    STRUCTURES,
    Cell,
    Counted,
    expanding,
    join,
    leaves,
    matrix,
    normal,
    same,
    split,
    tanh_map,
    width,
)
from torch import Tensor, nn

import equilibria as eq

DOUBLE = torch.float64
TIGHT = {"rtol": 1e-12, "atol": 0.0, "max_steps": 200, "on_failure": "ignore"}

SOLVERS = {
    "picard": eq.Picard(),
    "picard-relaxed": eq.Picard(relaxation=0.85),
    "anderson": eq.Anderson(),
    "anderson-relaxed": eq.Anderson(relaxation=0.7),
    "anderson-long": eq.Anderson(history=12),  # longer than the state
    "broyden": eq.Broyden(),
    "newton": eq.Newton(),
    "newton-dense": eq.Newton(eq.Dense()),
}
UNROLLABLE = {name: solver for name, solver in SOLVERS.items() if not name.startswith("newton")}
EXACT = {
    "implicit": eq.Implicit(rtol=1e-12),
    "implicit-gmres": eq.Implicit(solver=eq.GMRES(), rtol=1e-12),
    "implicit-gmres-restarted": eq.Implicit(solver=eq.GMRES(restart=2), rtol=1e-12, max_steps=400),
    "implicit-picard": eq.Implicit(solver=eq.Picard(), rtol=1e-12, max_steps=200),
    "implicit-anderson": eq.Implicit(solver=eq.Anderson(), rtol=1e-12),
    "implicit-broyden": eq.Implicit(solver=eq.Broyden(), rtol=1e-12),
    "implicit-bicgstab": eq.Implicit(solver=eq.BiCGSTAB(), rtol=1e-12),
    "implicit-dense": eq.Implicit(solver=eq.Dense()),
    "implicit-order-2": eq.Implicit(rtol=1e-12, order=2),
    "unrolled": eq.Unrolled(),
    "unrolled-checkpoint": eq.Unrolled(checkpoint=True),
}
EVERY = {
    **EXACT,
    "phantom": eq.Phantom(steps=3),
    "phantom-relaxed": eq.Phantom(3, relaxation=0.5),
    "one": eq.OneStep(),
    "neumann": eq.Neumann(3),
}
FIRST_ORDER = [eq.Implicit(), eq.Implicit(solver=eq.Picard()), eq.Phantom(2), eq.OneStep(), eq.Neumann(2)]


def named(table: dict):
    return [pytest.param(value, id=name) for name, value in table.items()]


PAIRS = [
    pytest.param(solver, adjoint, id=f"{a}-{b}")
    for a, solver in SOLVERS.items()
    for b, adjoint in EXACT.items()
    if a in UNROLLABLE or not isinstance(adjoint, eq.Unrolled)
]


def problem(structure: str, batch_dims: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    n, batch = width(structure), (2, 3)[:batch_dims]
    w = matrix(n, seed, 0.3).requires_grad_()
    x = normal(*batch, n, seed=seed + 1).requires_grad_()
    return torch.zeros(*batch, n, dtype=DOUBLE), w, x


# Every entry, solver, adjoint, structure and dtype.


def oracle(case: Case, samples: Samples, z: Tensor) -> tuple[Tensor, ...]:
    """The gradients that the adjoint of a case promises at rows z, sample by sample, by dense algebra."""
    w = case.weights().requires_grad_()
    sums, each = torch.zeros_like(w), []
    for i in range(len(samples)):
        one = samples.take([i])
        inputs = tuple(t.clone().requires_grad_() for t in (one.x, one.slope, torch.zeros_like(one.x)))

        def go(row: Tensor, inputs: Any = inputs, one: Samples = one) -> Tensor:  # where plain iteration goes
            at = (w, inputs[0], inputs[1], one.code, inputs[2])
            if case.entry not in ("argmin", "equality"):
                return image(row[None], *at)[0]
            row = row if row.requires_grad else row.detach().requires_grad_()
            (slope,) = torch.autograd.grad(objective(row[None], *at).sum(), row, create_graph=True)
            return row - slope

        pulled = torch.autograd.functional.jacobian(go, z[i]).mT
        eye, v, kind = torch.eye(case.n, dtype=z.dtype), samples.v[i], case.adjoint
        if case.entry == "equality":
            a, none = case.constraint(), torch.zeros(1, dtype=z.dtype)
            system = torch.cat([torch.cat([eye - pulled, a.mT], 1), torch.cat([a, none[None]], 1)])
            u = torch.linalg.solve(system, torch.cat([v, none]))[:-1]
        elif isinstance(kind, (eq.Phantom, eq.OneStep, eq.Neumann)):
            length = kind.relaxation if isinstance(kind, eq.Phantom) else 1.0
            terms = getattr(kind, "steps", getattr(kind, "terms", 1))
            step = (1 - length) * eye + length * pulled
            u = length * sum((torch.linalg.matrix_power(step, k) @ v for k in range(terms)), torch.zeros_like(v))
        else:
            u = torch.linalg.solve(eye - pulled, v)
        row = z[i].clone().requires_grad_()
        more, *rest = torch.autograd.grad(go(row), (w, *inputs), u, materialize_grads=True)
        sums = sums + more
        each.append(torch.cat([t[0] for t in rest]))
    return sums, *torch.stack(each).split([case.n, 1, case.n], dim=1)


def tightened(case: Case) -> Case:
    adjoint = case.adjoint
    if isinstance(adjoint, eq.Implicit):
        adjoint = dataclasses.replace(adjoint, rtol=1e-11 if case.tight else 1e-5, max_steps=150)
    # The tightest that the dtype can be asked for without a stall.
    limits = {"rtol": 1e-11 if case.tight else 1e-5, "atol": 0.0}
    if case.entry not in ("fixed_point", "deq"):
        limits = {"atol": 1e-10 if case.tight else 1e-5}
    if isinstance(adjoint, eq.Unrolled):  # of no step the gradient is nothing
        case = case.but(kinds=tuple("plain" if kind == "done" else kind for kind in case.kinds))
    return case.but(adjoint=adjoint).given(max_steps=120, **limits)


@settings(derandomize=True, max_examples=140, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(hard=False), exponent=st.sampled_from([-8, -4, -1, 0, 1, 4, 8]))
def test_the_gradient_is_that_of_dense_algebra_at_any_scale_of_the_loss_and_as_often_as_asked(case, exponent):
    case, scale = tightened(case), 10.0**exponent
    samples = case.samples()
    attached = case.attach(samples)
    got = attached.pull(samples.v * scale)
    again = attached.pull(samples.v * scale)
    report = attached.solution.adjoint
    assert same(got, again)
    if not attached.solution.converged.all() and not isinstance(case.adjoint, (eq.Implicit, eq.Neumann)):
        return  # the gradient of steps that go elsewhere
    if isinstance(case.adjoint, eq.Implicit) and not (report.residual <= (1e-9 if case.tight else 1e-3)).all():
        return  # told, and held by the law of honesty
    want = oracle(case, samples, attached.value)
    # The derivative of an iteration lags behind the iteration, most of all where it learns as it goes.
    bound = (1e-3 if isinstance(case.adjoint, eq.Unrolled) else 1e-7) if case.tight else 3e-2
    if case.entry == "equality" and not isinstance(case.adjoint, eq.Implicit):
        want = ()  # a series that does not converge for a saddle
    for one, other in zip(got, want, strict=bool(want)):
        torch.testing.assert_close(one / scale, other, rtol=bound, atol=bound * (1 + other.abs().max().item()))

    # A part of the batch has its gradient, and the rest has none.
    part = torch.zeros_like(samples.v)
    part[::2] = samples.v[::2] * scale
    rest = samples.v * scale - part
    first, second = attached.pull(part), attached.pull(rest)
    for one, other in zip(first[1:], second[1:], strict=True):
        assert not one[1::2].any()
        assert not other[::2].any()
    for one, other, both in zip(first, second, got, strict=True):
        torch.testing.assert_close(
            (one + other) / scale, both / scale, rtol=bound, atol=bound * (1 + both.abs().max().item() / scale)
        )


@settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=cases(
        hard=False, dtypes=(DOUBLE,), adjoints=(*[eq.Implicit(order=2)] * 4, *IMPLICIT[:4], *UNROLLED, eq.Phantom(2))
    )
)
def test_second_derivatives_are_right_or_refused_in_every_mode(case):
    case = tightened(case.but(kinds=tuple("plain" if kind == "slow" else kind for kind in case.kinds[:2])))
    samples = case.samples()
    weights = samples.v.reshape(*case.shape(len(samples)), case.n)
    direction = normal(*weights.shape, seed=case.seed + 9)

    def first(shift: Tensor, create_graph: bool = False) -> Tensor:
        loss = lambda shift: (weights * case.value(samples, shift).sin()).sum()  # noqa: E731
        if case.transformed:
            return torch.func.grad(loss)(shift)
        shift = shift if shift.requires_grad else shift.detach().requires_grad_()
        return torch.autograd.grad(loss(shift), shift, create_graph=create_graph)[0]

    zeros = torch.zeros_like(weights)
    if case.transformed:
        (got,) = torch.func.vjp(first, zeros)[1](direction)  # the Hessian is symmetric
    else:
        shift = zeros.clone().requires_grad_()
        if not (isinstance(case.adjoint, eq.Unrolled) or getattr(case.adjoint, "order", 0) == 2):
            with pytest.raises(RuntimeError, match=r"create_graph"):
                first(shift, create_graph=True)
            return
        (got,) = torch.autograd.grad(first(shift, create_graph=True), shift, direction)
    plain = case.but(transformed=False)
    attached = plain.attach(samples)
    attached.pull(samples.v)
    residual = attached.solution.adjoint.residual
    if not attached.solution.converged.all() or (residual is not None and not (residual <= 1e-9).all()):
        return  # told, and held by the law of honesty
    step = 1e-4
    case = plain.but(adjoint=eq.Implicit(rtol=1e-12))
    want = (first(zeros + step * direction) - first(zeros - step * direction)) / (2 * step)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# Against finite differences.

SHAPES = [("tensor", 1), ("tuple", 1), ("dict", 1), ("nested", 1), ("nested", 0), ("nested", 2)]


@pytest.mark.parametrize(
    ("solver", "adjoint", "structure", "batch_dims"),
    # Every solver on every structure, and every adjoint on every structure: pairs of the two have a test of their own.
    [pytest.param(s, EXACT["implicit"], *shape, id=f"{a}-{shape}") for a, s in SOLVERS.items() for shape in SHAPES]
    + [pytest.param(eq.Anderson(), d, *shape, id=f"{b}-{shape}") for b, d in EXACT.items() for shape in SHAPES],
)
def test_gradcheck_for_every_solver_adjoint_and_structure(solver, adjoint, structure, batch_dims):
    zeros, w, x = problem(structure, batch_dims)
    f, z0 = tanh_map(structure, batch_dims), split(zeros, structure)
    options = {"solver": solver, "adjoint": adjoint, "batch_dims": batch_dims, **TIGHT}

    def solve(w, x):  # w is captured, x is an argument
        return tuple(leaves(eq.fixed_point(lambda z, x: f(z, w, x), z0, x, **options).value))

    # Random projections of the whole Jacobian; the tests below look at every entry.
    assert torch.autograd.gradcheck(solve, (w, x), fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("solver", "adjoint"), PAIRS)
def test_gradcheck_of_every_entry(solver, adjoint, captured):
    w, x = matrix(2, 0, 0.2).requires_grad_(), normal(2, 2, seed=1).requires_grad_()
    options = {"solver": solver, "adjoint": adjoint, **TIGHT}

    def f(z, w, x):
        first, second = z["h"], z["c"][0]
        rows = torch.tanh(torch.cat([first, second], dim=1) @ w + x)
        return {"h": rows[:, :1], "c": (rows[:, 1:],)}

    def solve(w, x):
        zeros = torch.zeros(2, 1, dtype=DOUBLE)
        z0 = {"h": zeros, "c": (zeros,)}
        sol = (
            eq.fixed_point(lambda z: f(z, w, x), z0, **options) if captured else eq.fixed_point(f, z0, w, x, **options)
        )
        return sol.value["h"], sol.value["c"][0]

    assert torch.autograd.gradcheck(solve, (w, x), check_undefined_grad=False)


@pytest.mark.parametrize(
    "adjoint",
    [
        eq.Implicit(rtol=1e-12),
        eq.Implicit(solver=eq.GMRES(), rtol=1e-12),
        eq.Implicit(solver=eq.Picard(relaxation=0.3), rtol=1e-12, max_steps=300),
        eq.Implicit(solver=eq.Anderson(relaxation=0.3), rtol=1e-12),
        eq.Unrolled(),
        eq.Unrolled(checkpoint=True),
    ],
)
@pytest.mark.parametrize("solver", [eq.Picard(relaxation=0.3), eq.Anderson(relaxation=0.3)])
def test_gradcheck_on_a_map_that_expands(solver, adjoint):
    a = torch.tensor([0.5, -0.3, 0.2], dtype=DOUBLE, requires_grad=True)
    x = normal(2, 3, seed=0).requires_grad_()
    zeros = torch.zeros(2, 3, dtype=DOUBLE)

    def solve(a, x):
        sol = eq.fixed_point(expanding, zeros, a, x, solver=solver, adjoint=adjoint, **TIGHT)
        assert (sol.residual < 1e-12).all()
        return sol.value

    assert torch.autograd.gradcheck(solve, (a, x))


@pytest.mark.parametrize("solver", named(UNROLLABLE))
def test_gradcheck_of_the_start_of_an_unrolled_iteration(solver):
    _, w, x = problem("tensor", 1)
    z0 = normal(2, 4, seed=3).requires_grad_()
    options = {"solver": solver, "adjoint": eq.Unrolled(), "max_steps": 3, "on_failure": "ignore", "rtol": 1e-13}
    assert torch.autograd.gradcheck(lambda z, w: eq.fixed_point(tanh_map(), z, w, x, **options).value, (z0, w))


# The value is the solver's, whatever the adjoint.


@pytest.mark.parametrize("max_steps", [1, 7, 60])
@pytest.mark.parametrize("adjoint", named(EVERY))
@pytest.mark.parametrize("solver", [eq.Picard(), eq.Picard(relaxation=0.3), eq.Anderson(relaxation=0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_value_with_grad_is_the_value_without_bit_for_bit(solver, adjoint, max_steps, dtype):
    a = torch.tensor([0.5, -0.3, 0.2], dtype=dtype, requires_grad=True)
    x = normal(5, 3, seed=0, dtype=dtype)
    x[0, 0] = -0.0
    x[3, 1] = torch.nan
    z0 = torch.zeros(5, 3, dtype=dtype)
    for f in (expanding, lambda z, a, x: torch.tanh(a * z + x), lambda z, a, x: x * (1 + a * z * 0)):
        options = {"solver": solver, "max_steps": max_steps, "on_failure": "ignore"}
        with torch.no_grad():
            plain = eq.fixed_point(f, z0, a, x, **options)
        attached = eq.fixed_point(f, z0, a, x, adjoint=adjoint, **options)
        assert attached.value.requires_grad
        assert same(attached.value, plain.value)
        assert torch.equal(attached.status, plain.status)
        assert torch.equal(attached.steps, plain.steps)
        assert same(attached.residual, plain.residual)


# Against other ways to the same number.


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("adjoint", named({k: v for k, v in EXACT.items() if k.startswith("implicit")}))
def test_implicit_agrees_with_a_dense_solve(adjoint, seed):
    zeros, w, x = problem("tensor", 1, seed)
    v = normal(2, 4, seed=seed + 5)
    z = eq.fixed_point(tanh_map(), zeros, w, x, adjoint=adjoint, **TIGHT).value
    got_w, got_x = torch.autograd.grad(z, (w, x), v)
    want_w, want_x = torch.zeros_like(w), torch.zeros_like(x)
    for i in range(2):
        point = z[i].detach()
        jacobian = (1 - torch.tanh(point @ w + x[i]).square())[:, None] * w.T
        u = torch.linalg.solve(torch.eye(4, dtype=DOUBLE) - jacobian.T, v[i])
        more_w, more_x = torch.autograd.grad(torch.tanh(point @ w + x[i]), (w, x), u)
        want_w, want_x = want_w + more_w, want_x + more_x
    torch.testing.assert_close(got_w, want_w, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got_x, want_x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_implicit_agrees_with_unrolling_to_convergence(structure):
    zeros, w, x = problem(structure, 1)
    gradients = []
    for solver, adjoint in [(eq.Anderson(), eq.Implicit(rtol=1e-13)), (eq.Picard(), eq.Unrolled())]:
        sol = eq.fixed_point(
            tanh_map(structure), split(zeros, structure), w, x, solver=solver, adjoint=adjoint, **TIGHT
        )
        loss = sum(((k + 1) * leaf.sin()).sum() for k, leaf in enumerate(leaves(sol.value)))
        gradients.append(torch.autograd.grad(loss, (w, x)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("relaxation", [1.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_phantom_is_the_gradient_of_its_steps(steps, relaxation):
    zeros, w, x = problem("tensor", 1)
    z = eq.fixed_point(tanh_map(), zeros, w, x, adjoint=eq.Phantom(steps, relaxation), **TIGHT).value
    got = torch.autograd.grad(z.sin().sum(), (w, x))
    walk = z.detach()
    for _ in range(steps):
        walk = (1 - relaxation) * walk + relaxation * tanh_map()(walk, w, x)
    want = torch.autograd.grad(walk, (w, x), z.detach().cos())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_one_step_is_a_phantom_of_one_step():
    zeros, w, x = problem("tensor", 1)
    gradients = []
    for adjoint in (eq.OneStep(), eq.Phantom(1)):
        z = eq.fixed_point(tanh_map(), zeros, w, x, adjoint=adjoint, **TIGHT).value
        gradients.append(torch.autograd.grad(z.sin().sum(), (w, x)))
    assert same(gradients[0], gradients[1])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("adjoint", [eq.Implicit(), eq.Implicit(solver=eq.Picard()), eq.Implicit(solver=eq.Anderson())])
@pytest.mark.parametrize("exponent", [-8, -3, 3, 8])
def test_the_scale_of_the_loss_changes_no_digit_of_the_gradient(exponent, adjoint, dtype):
    w = matrix(4, 0, 0.8, dtype).requires_grad_()
    x = normal(3, 4, seed=1, dtype=dtype).requires_grad_()
    z = eq.fixed_point(tanh_map(), torch.zeros(3, 4, dtype=dtype), w, x, adjoint=adjoint).value
    v = normal(3, 4, seed=2, dtype=dtype)
    scale = torch.tensor(10.0**exponent, dtype=dtype)
    reference = torch.autograd.grad(z, (w, x), v, retain_graph=True)
    scaled = torch.autograd.grad(z, (w, x), v * scale)
    bound = 100 * torch.finfo(dtype).eps
    for one, other in zip(reference, scaled, strict=True):
        torch.testing.assert_close(other / scale, one, rtol=bound, atol=bound * one.abs().max().item())


def test_scales_of_loss_that_differ_between_samples_do_not_mix():
    w, x = matrix(4, 0, 0.8), normal(3, 4, seed=1).requires_grad_()
    z = eq.fixed_point(tanh_map(), torch.zeros(3, 4, dtype=DOUBLE), w, x).value
    scale = torch.tensor([[1e-12], [1.0], [1e12]], dtype=DOUBLE)
    (even,) = torch.autograd.grad(z, x, torch.ones_like(z), retain_graph=True)
    (uneven,) = torch.autograd.grad(z, x, torch.ones_like(z) * scale)
    torch.testing.assert_close(uneven / scale, even, rtol=1e-10, atol=0)


@pytest.mark.parametrize("adjoint", named(EVERY))
def test_two_backwards_over_one_graph_are_equal(adjoint):
    zeros, w, x = problem("tensor", 1)
    z = eq.fixed_point(tanh_map(), zeros, w, x, adjoint=adjoint, **TIGHT).value
    once = torch.autograd.grad(z.sum(), (w, x), retain_graph=True)
    twice = torch.autograd.grad(z.sum(), (w, x))
    assert same(once, twice)


# Second derivatives.


@pytest.mark.parametrize("adjoint", FIRST_ORDER)
def test_second_derivatives_of_first_order_adjoints_are_refused_in_words(adjoint):
    zeros, w, x = problem("tensor", 1)
    z = eq.fixed_point(tanh_map(), zeros, w, x, adjoint=adjoint, **TIGHT).value
    with pytest.raises(RuntimeError, match=r"create_graph.*eq\.Unrolled\(\)"):
        torch.autograd.grad(z.sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match=r"create_graph.*eq\.Unrolled\(\)"):
        torch.autograd.functional.hessian(
            lambda x: eq.fixed_point(tanh_map(), zeros, w, x, adjoint=adjoint, **TIGHT).value.sum(), x
        )


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("solver", named(UNROLLABLE))
def test_unrolled_has_second_derivatives(solver, checkpoint):
    w = matrix(2, 0, 0.4).requires_grad_()
    x = normal(2, 2, seed=1).requires_grad_()

    options = {**TIGHT, "rtol": 1e-10, "solver": solver, "adjoint": eq.Unrolled(checkpoint=checkpoint)}
    zeros = torch.zeros(2, 2, dtype=DOUBLE)

    def solve(w, x):
        return eq.fixed_point(lambda z: torch.tanh(z @ w + x), zeros, **options).value

    assert torch.autograd.gradgradcheck(solve, (w, x), atol=1e-4)


def second_order(name: str, solve, *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(solve, inputs), name
    assert torch.autograd.gradgradcheck(solve, inputs, atol=1e-5), name


@pytest.mark.parametrize(
    ("solver", "linear"),
    # Every solver, and every linear solver; pairs of the two are drawn by the law above.
    [pytest.param(solver, None, id=name) for name, solver in SOLVERS.items()]
    + [
        pytest.param(eq.Anderson(), linear, id=f"anderson-{linear!r}")
        for linear in (eq.GMRES(), eq.BiCGSTAB(), eq.Dense(), eq.Picard(), eq.Anderson(), eq.Broyden())
    ],
)
def test_second_derivatives_of_implicit(solver, linear):
    w, x = matrix(2, 0, 0.4).requires_grad_(), normal(2, 2, seed=1).requires_grad_()
    adjoint = eq.Implicit(solver=linear, rtol=1e-12, max_steps=200, order=2)
    zeros = torch.zeros(2, 2, dtype=DOUBLE)

    def solve(w, x):  # w is captured
        return eq.fixed_point(
            lambda z, x: torch.tanh(z @ w + x), zeros, x, solver=solver, adjoint=adjoint, **TIGHT
        ).value

    second_order("implicit", solve, w, x)


def test_second_derivatives_on_a_map_that_expands():
    a = torch.tensor([0.5, -0.3, 0.2], dtype=DOUBLE, requires_grad=True)
    x, zeros = normal(2, 3, seed=0).requires_grad_(), torch.zeros(2, 3, dtype=DOUBLE)
    options = {"solver": eq.Newton(), "adjoint": eq.Implicit(rtol=1e-12, order=2), **TIGHT}
    second_order("expanding", lambda a, x: eq.fixed_point(expanding, zeros, a, x, **options).value, a, x)


def test_second_derivatives_of_roots_and_minima():
    a = normal(2, 3, seed=0).exp().requires_grad_()
    ones, options = torch.ones(2, 3, dtype=DOUBLE), {"atol": 1e-12, "adjoint": eq.Implicit(rtol=1e-12, order=2)}
    second_order("root", lambda a: eq.root(lambda z, a: z**3 + a * z - 1, ones, a, **options).value, a)

    def objective(z, a):
        return torch.logsumexp(z, dim=1) + 0.5 * (a * (z - a) ** 2).sum(dim=1)

    second_order("argmin", lambda a: eq.argmin(objective, 0 * ones, a, **options).value, a)


def test_third_derivatives_of_implicit_are_refused_in_words():
    zeros, w, x = problem("tensor", 1)
    z = eq.fixed_point(tanh_map(), zeros, w, x, adjoint=eq.Implicit(order=2), **TIGHT).value
    (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"eq\.Unrolled\(\)"):
        torch.autograd.grad(first.sum(), x, create_graph=True)


@pytest.mark.parametrize("adjoint", [eq.Unrolled(), eq.Unrolled(checkpoint=True)])
def test_newton_unrolled_is_refused_in_words(adjoint):
    zeros, w, x = problem("tensor", 1)
    with pytest.raises(ValueError, match=r"Newton cannot be unrolled.*eq\.Implicit\(\)"):
        eq.fixed_point(tanh_map(), zeros, w, x, solver=eq.Newton(), adjoint=adjoint, **TIGHT)


# Samples that fail.


def nan_input(z, w, x):
    return torch.tanh(w * z * 0.3 + x)


def log(z, w, x):
    return torch.log(w * x + 0.1 * z * z)


def log_of_nothing(z, w, x):
    return torch.log(w * x) + 0.1 * z


def root(z, w, x):
    return torch.sqrt(0.1 * w * z + x)


def power(z, w, x):
    return (0.1 * w * z + x) ** 0.5


def reciprocal(z, w, x):
    return 1 / (w * x) + 0.1 * z


def matmul(z, w, x):
    mixed = torch.cat([z, x], dim=1) @ torch.stack([0.3 * w, 0.5 * w]).reshape(2, 1)
    return torch.log(mixed.exp() - x.clamp(max=0) * 1e3 * mixed) + 0 * w


def normed(z, w, x):
    wide = torch.cat([z, x, x * x], dim=1)
    return 0.2 * w * nn.functional.layer_norm(wide, (3,))[:, :1].softmax(dim=1) + 0.1 * (z + x)


BAD = {
    "nan": (nan_input, torch.nan),
    "infinite": (lambda z, w, x: 0.3 * w * z + x, torch.inf),
    "log of a negative number": (log, -5.0),
    "log of zero": (log_of_nothing, 0.0),
    "root of a negative number": (root, -5.0),
    "power of a negative number": (power, -5.0),
    "division by zero": (reciprocal, 0.0),
    "nan through a matrix product": (matmul, torch.nan),
    "nan through a normalisation": (normed, torch.nan),
    "infinity through a normalisation": (normed, torch.inf),
}


@pytest.mark.parametrize("adjoint", named(EVERY))
@pytest.mark.parametrize(("solver", "captured"), [(eq.Picard(), True), (eq.Anderson(relaxation=0.9), False)])
@pytest.mark.parametrize("bad", named(BAD))
def test_a_nonfinite_sample_gives_zero_gradient_and_disturbs_no_other(bad, solver, adjoint, captured):
    f, value = bad
    w = torch.tensor([0.8], dtype=DOUBLE, requires_grad=True)
    options = {"solver": solver, "adjoint": adjoint, "rtol": 1e-11, "on_failure": "ignore"}

    def gradients(entries: list[float], v: list[float]):
        x = torch.tensor(entries, dtype=DOUBLE)[:, None].requires_grad_()
        z0 = torch.ones(len(entries), 1, dtype=DOUBLE)
        if captured:
            sol = eq.fixed_point(lambda z: f(z, w, x), z0, **options)
        else:
            sol = eq.fixed_point(f, z0, w, x, **options)
        return sol, torch.autograd.grad(sol.value, (w, x), torch.tensor(v, dtype=DOUBLE)[:, None])

    sol, (got_w, got_x) = gradients([3.0, value, 2.0], [1.0, 1.0, -2.0])
    _, (want_w, want_x) = gradients([3.0, 2.0], [1.0, -2.0])
    assert sol.status.tolist() == [eq.Status.CONVERGED, eq.Status.NONFINITE, eq.Status.CONVERGED]
    assert got_x[1].item() == 0
    torch.testing.assert_close(got_w, want_w, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got_x[[0, 2]], want_x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("adjoint", named(EVERY))
@pytest.mark.parametrize(
    ("solver", "limit", "last"), [(eq.Picard(), 300, 6), (eq.Picard(), 3, 2), (eq.Anderson(), 3, 2)]
)
def test_nan_that_comes_up_late_gives_zero_gradient_too(solver, limit, last, adjoint):
    # The second sample walks upwards from 1 by factors of 3 until limit - z has no root.
    w = torch.tensor([0.5], dtype=DOUBLE, requires_grad=True)

    def f(z, w, slope):
        return w + slope * z + 0 * torch.sqrt(limit - z)

    def gradients(slopes):
        slope = torch.tensor(slopes, dtype=DOUBLE)[:, None].requires_grad_()
        z0 = torch.ones(len(slopes), 1, dtype=DOUBLE)
        options = {"solver": solver, "adjoint": adjoint, "rtol": 1e-11, "on_failure": "ignore"}
        sol = eq.fixed_point(f, z0, w, slope, **options)
        return sol, torch.autograd.grad(sol.value.sum(), (w, slope))

    sol, (got_w, got_slope) = gradients([0.5, 3.0, -0.4])
    _, (want_w, want_slope) = gradients([0.5, -0.4])
    assert sol.status.tolist() == [0, eq.Status.NONFINITE, 0]
    assert sol.steps[1] == last
    assert torch.isfinite(sol.value).all()
    assert got_slope[1].item() == 0
    torch.testing.assert_close(got_w, want_w, rtol=1e-12, atol=0)
    torch.testing.assert_close(got_slope[[0, 2]], want_slope, rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("adjoint", named(EVERY))
def test_where_every_sample_is_nonfinite_every_gradient_is_zero(adjoint, batch_dims):
    w = torch.tensor([0.5], dtype=DOUBLE, requires_grad=True)
    x = torch.tensor([[-5.0], [-4.0]], dtype=DOUBLE, requires_grad=True)
    z0 = torch.ones(2, 1, dtype=DOUBLE)
    for f in (log, root, power):
        sol = eq.fixed_point(f, z0, w, x, adjoint=adjoint, batch_dims=batch_dims, on_failure="ignore")
        assert (sol.status == eq.Status.NONFINITE).all()
        gradients = torch.autograd.grad(sol.value.nan_to_num().sum(), (w, x))
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("f", [lambda z, w, x: torch.tanh(w * z + x), log])
@pytest.mark.parametrize("adjoint", [eq.Unrolled(), eq.Unrolled(checkpoint=True), eq.Implicit(rtol=1e-12, order=2)])
@pytest.mark.parametrize("solver", [eq.Picard(), eq.Anderson()])
def test_second_derivatives_beside_a_nonfinite_sample(solver, adjoint, f):
    w = torch.tensor([0.4], dtype=DOUBLE, requires_grad=True)
    second = []
    for entries in ([1.0, torch.nan, 2.0], [1.0, 2.0]):
        x = 2 + torch.tensor(entries, dtype=DOUBLE)[:, None]
        options = {**TIGHT, "solver": solver, "adjoint": adjoint}
        z = eq.fixed_point(lambda z, x=x: f(z, w, x), torch.ones_like(x), **options).value
        (first,) = torch.autograd.grad(z.sum(), w, create_graph=True)
        second.append(torch.autograd.grad(first, w))
    torch.testing.assert_close(second[0], second[1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("adjoint", named(EVERY))
def test_a_cell_with_nan_in_one_sample_trains_on_the_others(adjoint):
    torch.manual_seed(0)
    layer = eq.DEQ(Cell(6), adjoint=adjoint, on_failure="ignore", rtol=1e-12, max_steps=100)
    head = nn.Linear(6, 2, dtype=DOUBLE)
    x = normal(4, 6, seed=1)
    broken = x.clone()
    broken[2, 3] = torch.nan

    def parameters_after(batch, rows):
        layer.zero_grad()
        layer(batch)[rows].square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    assert head(layer(broken)).isfinite().all()
    good = [0, 1, 3]
    torch.testing.assert_close(
        parameters_after(broken, slice(None)), parameters_after(x[good], slice(None)), rtol=1e-11, atol=1e-13
    )


def test_a_gradient_that_comes_in_as_nan_goes_on_as_nan():
    # Loss scalers look for it: hiding it would make them step.
    zeros, w, x = problem("tensor", 1)
    z = eq.fixed_point(tanh_map(), zeros, w, x).value
    v = torch.ones_like(z)
    v[0, 0] = torch.nan
    grad_w, grad_x = torch.autograd.grad(z, (w, x), v)
    assert grad_w.isnan().any()
    assert grad_x[0].isnan().any()
    assert grad_x[1].isfinite().all()


@pytest.mark.parametrize("adjoint", named(EVERY))
def test_a_sample_that_ran_out_of_steps_keeps_its_gradient(adjoint):
    w = torch.tensor([0.999], dtype=DOUBLE, requires_grad=True)
    x = torch.tensor([[1.0], [2.0]], dtype=DOUBLE, requires_grad=True)
    z0 = torch.zeros(2, 1, dtype=DOUBLE)
    sol = eq.fixed_point(
        lambda z, w, x: w * z + x, z0, w, x, solver=eq.Picard(), adjoint=adjoint, max_steps=5, on_failure="ignore"
    )
    assert sol.status.tolist() == [eq.Status.MAX_STEPS] * 2
    for gradient in torch.autograd.grad(sol.value.sum(), (w, x)):
        assert (gradient > 0).all()


# What gets gradients, and how often.


@pytest.mark.parametrize("adjoint", named(EVERY))
def test_frozen_parameters_and_inputs_that_need_none_get_none(adjoint):
    zeros, w, x = problem("tensor", 1)
    frozen = w.detach()
    z = eq.fixed_point(tanh_map(), zeros, frozen, x, adjoint=adjoint, **TIGHT).value
    z.sum().backward()
    assert frozen.grad is None
    assert x.grad is not None
    data = x.detach()
    z = eq.fixed_point(tanh_map(), zeros, w, data, adjoint=adjoint, **TIGHT).value
    z.sum().backward()
    assert data.grad is None
    assert w.grad is not None
    z = eq.fixed_point(tanh_map(), zeros, frozen, data, adjoint=adjoint, **TIGHT).value
    assert not z.requires_grad
    with torch.no_grad():
        assert not eq.fixed_point(tanh_map(), zeros, w, x, adjoint=adjoint, **TIGHT).value.requires_grad


@pytest.mark.parametrize("adjoint", named(EVERY))
def test_a_map_that_ignores_its_state_has_the_plain_gradient(adjoint):
    w = normal(3, seed=0).requires_grad_()
    z = eq.fixed_point(lambda z: torch.sin(w).expand(2, 3), torch.zeros(2, 3, dtype=DOUBLE), adjoint=adjoint).value
    (got,) = torch.autograd.grad(z.sum(), w)
    if isinstance(adjoint, eq.Phantom) and adjoint.relaxation < 1:
        got = got / (1 - (1 - adjoint.relaxation) ** adjoint.steps)
    torch.testing.assert_close(got, 2 * w.cos(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("adjoint", named(EVERY))
def test_a_layer_used_twice_adds_both_gradients(adjoint):
    layer = eq.DEQ(Cell(4), adjoint=adjoint, rtol=1e-13, max_steps=100, on_failure="ignore")
    x = normal(3, 4, seed=0)

    def gradient(loss):
        return torch.autograd.grad(loss, tuple(layer.parameters()))

    composed = gradient(layer(layer(x)).sum())
    inner = layer(x)
    middle = inner.detach().requires_grad_()
    outer = layer(middle).sum()
    (v,) = torch.autograd.grad(outer, middle, retain_graph=True)
    apart = [a + b for a, b in zip(gradient(outer), gradient((inner * v).sum()), strict=True)]
    torch.testing.assert_close(list(composed), apart, rtol=1e-11, atol=1e-13)


class Nested(nn.Module):
    """A cell whose own step solves for an equilibrium."""

    def __init__(self, adjoint) -> None:
        super().__init__()
        self.inner = eq.DEQ(Cell(3, norm=0.5), adjoint=adjoint, rtol=1e-14, max_steps=100, on_failure="ignore")
        self.mix = nn.Parameter(matrix(3, 3, 0.4))

    def forward(self, z, x):
        return torch.tanh(self.inner(z @ self.mix + x)) * 0.9


@pytest.mark.parametrize("inner", [eq.Implicit(rtol=1e-13), eq.Unrolled()])
@pytest.mark.parametrize("outer", [eq.Implicit(rtol=1e-12), eq.Implicit(solver=eq.Picard(), rtol=1e-12), eq.Unrolled()])
def test_gradcheck_of_an_equilibrium_inside_an_equilibrium(outer, inner):
    layer = eq.DEQ(Nested(inner), adjoint=outer, rtol=1e-13, max_steps=100, on_failure="ignore")
    x = normal(2, 3, seed=0).requires_grad_()
    parameters = tuple(layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def solve(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(solve, (x, *parameters), fast_mode=True)


def test_gradients_flow_in_eval_as_in_train():
    layer = eq.DEQ(Cell(4), rtol=1e-12)
    x = normal(3, 4, seed=0).requires_grad_()
    gradients = []
    for mode in (True, False):
        layer.train(mode)
        gradients.append(torch.autograd.grad(layer(x).sum(), (x, *layer.parameters())))
    assert same(gradients[0], gradients[1])


@pytest.mark.parametrize("adjoint", named(EVERY))
def test_hooks_on_parameters_fire_once_a_backward(adjoint):
    layer = eq.DEQ(Cell(4), adjoint=adjoint, rtol=1e-8)
    fired = Counted(lambda parameter: None)
    seen = Counted(lambda gradient: None)
    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(fired)
        parameter.register_hook(seen)
    layer(normal(3, 4, seed=0)).sum().backward()
    assert fired.calls == seen.calls == 2


def test_a_state_of_which_only_a_part_is_used_has_its_gradient():
    zeros, w, x = problem("nested", 1)
    sol = eq.fixed_point(tanh_map("nested"), split(zeros, "nested"), w, x, **TIGHT)
    (got,) = torch.autograd.grad(sol.value["b"].sum(), w, retain_graph=True)
    mask = torch.zeros(width("nested"), dtype=DOUBLE)
    mask[-2:] = 1
    (want,) = torch.autograd.grad((join(sol.value, 1) * mask).sum(), w)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


# What users do with a layer and with what it returns.


@pytest.mark.parametrize("adjoint", named(EVERY))
def test_hooks_on_the_output_and_its_second_use_see_one_gradient(adjoint):
    layer = eq.DEQ(Cell(4), adjoint=adjoint, rtol=1e-12, max_steps=100)
    x = normal(3, 4, seed=0).requires_grad_()
    z = layer(x)
    seen: list[Tensor] = []
    z.register_hook(seen.append)
    z.retain_grad()
    (z.sin().sum() + (z * z).sum()).backward()
    assert len(seen) == 1
    assert z.grad is not None
    torch.testing.assert_close(z.grad, z.detach().cos() + 2 * z.detach(), rtol=1e-14, atol=0)
    assert same(seen[0], z.grad)
    once = layer(x)
    (want,) = torch.autograd.grad(once.sin().sum() + (once * once).sum(), x)
    assert same(x.grad, want)


@pytest.mark.parametrize("adjoint", named(EVERY))
@pytest.mark.parametrize("structure", ["tensor", "nested"])
def test_a_value_that_is_changed_in_place_keeps_its_gradient(adjoint, structure):
    zeros, w, x = problem(structure, 1)

    def solve():
        f, z0 = tanh_map(structure), split(zeros, structure)
        return eq.fixed_point(f, z0, w, x, solver=eq.Picard(), adjoint=adjoint, **TIGHT).value

    want = torch.autograd.grad(sum(leaf.sum() for leaf in leaves(solve())), (w, x))
    z = solve()
    for leaf in leaves(z):
        leaf.mul_(3)
    got = torch.autograd.grad(sum(leaf.sum() for leaf in leaves(z)), (w, x))
    torch.testing.assert_close(got, tuple(3 * g for g in want), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("adjoint", named(EVERY))
def test_arguments_that_are_no_floating_tensors_pass_through(adjoint):
    zeros, w, x = problem("tensor", 1)
    order, mask = torch.tensor([2, 0, 1, 3]), torch.tensor([True, False, True, True])

    def f(z, w, x, order, mask, nothing, power, word):
        assert nothing is None
        assert (power, word) == (2, "kept")
        assert order.dtype == torch.int64
        return torch.tanh(torch.where(mask, z[:, order] @ w, 0) ** power + x)

    arguments = (order, mask, None, 2, "kept")
    z = eq.fixed_point(f, zeros, w, x, *arguments, adjoint=adjoint, **TIGHT).value
    got = torch.autograd.grad(z.sum(), (w, x))
    z = eq.fixed_point(lambda z: f(z, w, x, *arguments), zeros, adjoint=adjoint, **TIGHT).value
    assert same(got, torch.autograd.grad(z.sum(), (w, x)))
    if isinstance(adjoint, eq.Implicit):
        pulled = torch.func.grad(
            lambda w, x: eq.fixed_point(f, zeros, w, x, *arguments, adjoint=adjoint, **TIGHT).value.sum(), (0, 1)
        )(w.detach(), x.detach())
        torch.testing.assert_close(got, pulled, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("adjoint", named(EVERY))
def test_the_start_has_a_gradient_only_where_the_iteration_is_what_is_differentiated(adjoint):
    _, w, x = problem("tensor", 1)
    z0 = normal(2, 4, seed=3).requires_grad_()
    options = {"solver": eq.Picard(), "adjoint": adjoint, "max_steps": 3, "on_failure": "ignore"}
    z = eq.fixed_point(tanh_map(), z0, w, x, **options).value
    (gradient,) = torch.autograd.grad(z.sum(), z0, allow_unused=True)
    if isinstance(adjoint, eq.Unrolled):
        assert gradient.all()
    else:
        assert gradient is None


@pytest.mark.parametrize("adjoint", named(EVERY))
def test_frozen_parameters_of_a_layer_change_no_other_gradient_in_train_and_in_eval(adjoint):
    layer = eq.DEQ(Cell(4), adjoint=adjoint, rtol=1e-12, max_steps=100)
    x = normal(3, 4, seed=0).requires_grad_()
    weight, bias = layer.cell.linear.weight, layer.cell.linear.bias
    want = torch.autograd.grad(layer(x).square().sum(), (weight, bias, x))
    for frozen in ((weight,), (bias,), (weight, bias)):
        for training in (True, False):
            layer.train(training)
            for parameter in frozen:
                parameter.requires_grad_(False)
            free = [t for t in (weight, bias, x) if t.requires_grad]
            got = dict(zip(map(id, free), torch.autograd.grad(layer(x).square().sum(), free), strict=True))
            for t, value in zip((weight, bias, x), want, strict=True):
                assert id(t) not in got or torch.allclose(got[id(t)], value, rtol=1e-12, atol=1e-14)
            for parameter in frozen:
                parameter.requires_grad_(True)
    data = x.detach()
    layer.requires_grad_(False)
    assert not layer(data).requires_grad
    assert layer(x).requires_grad


class Inside(nn.Module):
    """A cell of one tensor, whose own step solves for an equilibrium of another structure."""

    def __init__(self, adjoint) -> None:
        super().__init__()
        self.w = nn.Parameter(matrix(width("nested"), 5, 0.5))
        self.mix = nn.Parameter(matrix(3, 3, 0.4))
        self.adjoint = adjoint

    def forward(self, z, x):
        rows = torch.cat([z @ self.mix, x, z[:, :1]], dim=1)[:, : width("nested")]
        rows = nn.functional.pad(rows, (0, width("nested") - rows.shape[1]))
        zeros = split(torch.zeros_like(rows), "nested")
        sol = eq.fixed_point(tanh_map("nested"), zeros, self.w, rows, **{**TIGHT, "adjoint": self.adjoint})
        return 0.8 * torch.tanh(sol.value["b"].sum(dim=1, keepdim=True) + sol.value["a"][0].sum(1, True) + 0 * z + x)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        pytest.param(EXACT[a], EXACT[b], id=f"{a}-{b}")
        for a, b in (("implicit", "implicit"), ("implicit-order-2", "unrolled"), ("unrolled", "implicit"))
    ],
)
def test_the_gradient_of_an_equilibrium_of_another_structure_inside_a_cell(outer, inner):
    cell = Inside(inner)
    x = normal(2, 3, seed=0).requires_grad_()
    layer = eq.DEQ(cell, adjoint=outer, rtol=1e-12, max_steps=100, on_failure="ignore")
    got = torch.autograd.grad(layer(x).sin().sum(), (x, cell.w, cell.mix))
    z = torch.zeros_like(x)
    for _ in range(30):
        z = cell(z, x)
    want = torch.autograd.grad(z.sin().sum(), (x, cell.w, cell.mix))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_the_hessian_of_transforms_is_that_of_order_two_and_of_unrolling():
    zeros, w, x = problem("dict", 1)
    w, x = w.detach(), x.detach()

    def loss(x, adjoint):
        sol = eq.fixed_point(tanh_map("dict"), split(zeros, "dict"), w, x, **{**TIGHT, "adjoint": adjoint})
        return join(sol.value, 1).sin().sum()

    first = torch.func.hessian(lambda x: loss(x, EXACT["implicit"]))(x)
    second = torch.autograd.functional.hessian(lambda x: loss(x, EXACT["implicit-order-2"]), x)
    third = torch.autograd.functional.hessian(lambda x: loss(x, eq.Unrolled()), x)
    torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(first, third, rtol=1e-5, atol=1e-6)
