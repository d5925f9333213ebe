"""The law of the batch: what becomes of a sample depends on that sample, not on its company."""

from typing import Any, NamedTuple

import pytest
import torch
from cases import CONJUGATE, DOUBLE, EASY, IMPLICIT, NEWTONS, Case, cases
from cases import SOLVERS as ALL
from cases import Found as Everything
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from maps import Cell, expanding, generator, leaves, matrix, normal, same, split, tanh_map, width
from torch import Tensor

import equilibria as eq

LAW = settings(derandomize=True, max_examples=60, deadline=None)
SOLVERS = [eq.Picard(), eq.Picard(relaxation=0.4), eq.Anderson(), eq.Anderson(relaxation=0.4), eq.Anderson(history=12)]
ADJOINTS = [
    eq.Implicit(),
    eq.Implicit(solver=eq.GMRES(restart=3)),
    eq.Implicit(solver=eq.Anderson()),
    eq.Phantom(2),
    eq.Unrolled(),
]


class Found(NamedTuple):
    """What became of some samples."""

    value: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    gradient: Tensor
    adjoint_status: Tensor | None
    adjoint_steps: Tensor | None

    def take(self, rows) -> "Found":
        return Found(*(None if field is None else field[rows] for field in self))


def solve(f, x: Tensor, slope: Tensor, **options) -> Found:
    """Everything that is said about each sample; the loss weighs entries unevenly, and samples alike."""
    x = x.clone().requires_grad_()
    sol = eq.fixed_point(f, torch.zeros_like(x), x, slope, on_failure="ignore", **options)
    v = torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype).expand_as(x)
    (gradient,) = torch.autograd.grad(sol.value, x, v)
    value = sol.value.detach()
    return Found(value, sol.status, sol.steps, sol.residual, gradient, sol.adjoint.status, sol.adjoint.steps)


def agree(one: Found, other: Found, tight: bool) -> None:
    assert torch.equal(one.status, other.status)
    if tight:
        assert torch.equal(one.steps, other.steps)
        bounds = {"rtol": 1e-9, "atol": 1e-11, "equal_nan": True}
    else:
        assert (one.steps - other.steps).abs().max() <= 1
        bounds = {"rtol": 1e-3, "atol": 1e-4, "equal_nan": True}  # a step more or less, at the tolerance of 1e-4
    torch.testing.assert_close(one.value, other.value, **bounds)
    torch.testing.assert_close(one.gradient, other.gradient, **bounds)
    if one.adjoint_status is not None:
        assert torch.equal(one.adjoint_status, other.adjoint_status)
        assert (one.adjoint_steps - other.adjoint_steps).abs().max() <= (0 if tight else 1)


# Every entry, solver, adjoint, structure and dtype, alone and in company.


def differences(one: Everything, other: Everything, kinds: list[str], case: Case) -> list[Any]:
    """What is said differently about the same samples, in words."""
    bounds = {"rtol": 1e-9, "atol": 1e-10} if case.tight else {"rtol": 1e-3, "atol": 1e-3}
    steps = 0 if case.tight else 1
    pairs = getattr(case.adjoint, "solver", None) == eq.BiCGSTAB()
    found: list[Any] = []
    for i, kind in enumerate(kinds):
        if kind == "wanders":
            continue  # chaotic: no law for its own answer, only for that of its company
        for name in ("status", "adjoint_status"):
            a, b = getattr(one, name), getattr(other, name)
            if a is not None and a[i] != b[i]:
                found.append((kind, name, a[i].item(), b[i].item()))
        for name in ("steps", "adjoint_steps"):
            a, b = getattr(one, name), getattr(other, name)
            # One step of BiCGSTAB is two products. Its residual falls unsteadily and carries the rounding of all steps
            # before, so that rounding, which differs between processors, decides when it is done, in float64 too.
            allowed = (2 if kind in EASY else 20) if name == "adjoint_steps" and pairs else steps
            if a is not None and (a[i] - b[i]).abs() > allowed:
                found.append((kind, name, a[i].item(), b[i].item()))
        for name in ("value", "x", "slope", "shift"):
            a, b = getattr(one, name)[i], getattr(other, name)[i]
            unlike = bounds
            unsolved = one.adjoint_status is not None and int(one.adjoint_status[i]) != eq.Status.CONVERGED
            known = one.adjoint_residual is not None and other.adjoint_residual is not None
            if (pairs or unsolved) and known and name != "value":
                # What a gradient is known to is what was left of its equation, and how the equation magnifies that.
                left = max(float(one.adjoint_residual[i].nan_to_num()), float(other.adjoint_residual[i].nan_to_num()))
                unlike = {key: max(bound, 100 * left) for key, bound in bounds.items()}
            if not torch.allclose(a, b, equal_nan=True, **unlike):
                found.append((kind, name, a.tolist(), b.tolist()))
        a, b = one.residual[i], other.residual[i]
        if case.tight and not torch.allclose(a, b, rtol=1e-4, atol=1e-10, equal_nan=True):
            found.append((kind, "residual", a.item(), b.item()))
    return found


@settings(derandomize=True, max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(batch_dims=(1, 1, 2)), order=st.randoms(use_true_random=False))
def test_what_becomes_of_a_sample_is_the_same_alone_in_any_batch_order_and_company(case, order):
    samples = case.samples()
    together = case.solve(samples)
    rows = list(range(len(samples)))
    order.shuffle(rows)
    for some in (rows, rows[:1], rows[: order.randint(1, 4)]):
        apart = case.solve(samples.take(some))
        assert not differences(apart, together.take(some), [case.kinds[i] for i in some], case)


@pytest.mark.parametrize(
    ("entry", "number"), [pytest.param(e, i, id=f"{e}-{i}") for e in ALL for i in range(len(ALL[e])) if e != "deq"]
)
def test_every_solver_of_every_entry_in_the_company_of_every_kind(entry, number):
    adjoints = [CONJUGATE, *IMPLICIT] if entry == "argmin" else IMPLICIT
    kinds = ("plain", "wanders", "slow", "nan", "done", "late", "plain", "diverges", "wanders")
    adjoint = adjoints[number % len(adjoints)]
    case = Case(entry, ALL[entry][number], adjoint, "dict", 1, DOUBLE, number, kinds).given(max_steps=25)
    samples = case.samples()
    together = case.solve(samples)
    for some in ([0], [2], [5, 4, 6], [7]):
        apart = case.solve(samples.take(some))
        assert not differences(apart, together.take(some), [kinds[i] for i in some], case)


@settings(derandomize=True, max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(batch_dims=(1,), dtypes=(DOUBLE,)))
def test_and_in_a_batch_of_many(case):
    few = len(case.kinds)
    case = case.but(kinds=case.kinds + ("plain", "slow", "done", "nan", "diverges") * 12)
    samples = case.samples()
    together = case.solve(samples)
    for some in (list(range(few)), [0], [few]):
        apart = case.solve(samples.take(some))
        assert not differences(apart, together.take(some), [case.kinds[i] for i in some], case)
    # The gradient of what all share is the sum of what each adds.
    halves = [case.solve(samples.take(slice(*ends))).w for ends in ((0, 31), (31, len(samples)))]
    if "wanders" not in case.kinds:
        torch.testing.assert_close(together.w, halves[0] + halves[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", NEWTONS, ids=repr)
def test_the_line_search_of_one_sample_costs_no_other_a_step(solver):
    # From afar the arc tangent has to be approached by halved steps, from near by none.
    z0 = torch.tensor([[2.0], [3.0], [0.3], [20.0]], dtype=DOUBLE)
    for max_steps in (100, 12, 9):
        options = {"solver": solver, "on_failure": "ignore", "max_steps": max_steps}
        together = eq.root(torch.atan, z0, **options)
        assert together.evaluations <= max_steps
        for i in range(4):
            alone = eq.root(torch.atan, z0[i : i + 1], **options)
            assert (alone.steps, alone.status) == (together.steps[i], together.status[i])
            torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-12, atol=1e-12)


def contracting(seed: int, n: int, dtype: torch.dtype):
    """Samples that converge at different rates: tanh(slope z W + x), each with a slope of its own."""
    w = matrix(n, seed, 1.0, dtype)

    def f(z, x, slope):
        return torch.tanh(slope * (z @ w) + x)

    x = normal(6, n, seed=seed + 1, dtype=dtype)
    slope = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3, 0.8], dtype=dtype)[:, None]
    return f, x, slope


@LAW
@given(
    seed=st.integers(0, 999),
    n=st.sampled_from([1, 2, 5, 16]),
    solver=st.sampled_from(SOLVERS),
    adjoint=st.sampled_from(ADJOINTS),
    dtype=st.sampled_from([DOUBLE, torch.float32]),
)
def test_alone_in_a_batch_and_in_any_order(seed, n, solver, adjoint, dtype):
    f, x, slope = contracting(seed, n, dtype)
    options = {"solver": solver, "adjoint": adjoint}
    together = solve(f, x, slope, **options)
    tight = dtype == DOUBLE
    order = torch.randperm(6, generator=generator(seed))
    agree(solve(f, x[order], slope[order], **options), together.take(order), tight)
    for i in range(6):
        agree(solve(f, x[i : i + 1], slope[i : i + 1], **options), together.take(slice(i, i + 1)), tight)


@LAW
@given(
    seed=st.integers(0, 999),
    solver=st.sampled_from(SOLVERS),
    adjoint=st.sampled_from(ADJOINTS),
    dtype=st.sampled_from([DOUBLE, torch.float32]),
    neighbour=st.sampled_from(["nan", "infinite", "diverges", "wanders", "slow", "is done at once"]),
)
def test_beside_a_sample_that_fails(seed, solver, adjoint, dtype, neighbour):
    f, x, slope = contracting(seed, 4, dtype)
    if neighbour in ("diverges", "wanders", "slow"):
        w = matrix(4, seed, 1.0, dtype)
        held = neighbour == "wanders"  # an expanding map held by a sine: never settles

        def f(z, x, slope):  # slope is negative for the neighbour alone
            linear = slope.abs() * (z @ w) + x
            other = 3 * torch.sin(7 * linear) if held else linear
            return torch.where(slope < 0, other, torch.tanh(linear))

        slope = slope.clone()
        slope[2] = -0.999 if neighbour == "slow" else -4.0
    else:
        x = x.clone()
        x[2, 1] = {"nan": torch.nan, "infinite": torch.inf}.get(neighbour, x[2, 1].item())
        if neighbour == "is done at once":
            x[2] = 0
    rest = [0, 1, 3, 4, 5]
    options = {"solver": solver, "adjoint": adjoint}
    together = solve(f, x, slope, **options).take(rest)
    agree(solve(f, x[rest], slope[rest], **options), together, dtype == DOUBLE)
    assert together.value.isfinite().all()
    assert together.gradient.isfinite().all()


@pytest.mark.parametrize("solver", [eq.Picard(relaxation=0.3), eq.Anderson(relaxation=0.3)])
@pytest.mark.parametrize("adjoint", ADJOINTS[:2])
def test_on_a_map_that_expands(solver, adjoint):
    x, a = normal(4, 3, seed=0), torch.tensor([[0.5], [-0.2], [0.1], [0.9]], dtype=DOUBLE)
    f = lambda z, x, a: expanding(z, a, x)  # noqa: E731
    options = {"solver": solver, "adjoint": adjoint, "max_steps": 300}
    together = solve(f, x, a, **options)
    assert (together.status == eq.Status.CONVERGED).all()
    for i in range(4):
        agree(solve(f, x[i : i + 1], a[i : i + 1], **options), together.take(slice(i, i + 1)), tight=True)


@pytest.mark.parametrize("structure", ["tuple", "dict", "nested"])
@pytest.mark.parametrize("batch_dims", [1, 2])
def test_for_states_of_several_leaves(structure, batch_dims):
    n = width(structure)
    w, x = matrix(n, 0, 0.8), normal(*(3, 2)[:batch_dims], n, seed=1)
    f = tanh_map(structure, batch_dims)
    zeros = torch.zeros_like(x)
    together = eq.fixed_point(f, split(zeros, structure), w, x, batch_dims=batch_dims)
    for i in range(3):
        row = slice(i, i + 1)
        alone = eq.fixed_point(f, split(zeros[row], structure), w, x[row], batch_dims=batch_dims)
        assert torch.equal(alone.steps, together.steps[row])
        for one, all_of_them in zip(leaves(alone.value), leaves(together.value), strict=True):
            torch.testing.assert_close(one, all_of_them[row], rtol=1e-10, atol=1e-12)


def test_a_sample_whose_acceleration_is_suspended_beside_one_that_improves_at_every_step():
    n = 48
    shift = 3 * torch.diag(torch.ones(n - 2, dtype=DOUBLE), 2)  # a chain: plain iteration has to take its turn
    steady = 0.85 * torch.linalg.qr(matrix(n, 0, 1.0)).Q
    x = normal(3, n, seed=1)
    maps = torch.stack([shift, steady, shift.flip(0, 1)])

    def solve(rows):
        f = lambda z: torch.einsum("bi,bij->bj", z, maps[rows]) + x[rows]  # noqa: E731
        return eq.fixed_point(f, torch.zeros(len(rows), n, dtype=DOUBLE), max_steps=300, rtol=1e-10)

    together = solve([0, 1, 2])
    for i in range(3):
        alone = solve([i])
        assert alone.steps.item() == together.steps[i]
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-10, atol=1e-10)


def test_two_batch_dimensions_are_one_of_their_product():
    w, x = matrix(4, 0, 0.9), normal(2, 3, 4, seed=1)
    folded = eq.fixed_point(tanh_map(), torch.zeros(6, 4, dtype=DOUBLE), w, x.reshape(6, 4))
    two = eq.fixed_point(tanh_map("tensor", 2), torch.zeros(2, 3, 4, dtype=DOUBLE), w, x, batch_dims=2)
    assert torch.equal(two.steps.flatten(), folded.steps)
    torch.testing.assert_close(two.value.reshape(6, 4), folded.value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (3, 0), (0, 0), (1, 1)])
def test_batches_of_none_and_of_one_and_states_of_nothing(shape, solver, adjoint):
    w = (matrix(shape[1], 0, 0.5) if shape[1] else torch.zeros(0, 0, dtype=DOUBLE)).requires_grad_()
    x = normal(*shape, seed=1).requires_grad_()
    sol = eq.fixed_point(tanh_map(), torch.zeros(*shape, dtype=DOUBLE), w, x, solver=solver, adjoint=adjoint)
    assert sol.value.shape == shape
    assert sol.status.shape == sol.steps.shape == sol.residual.shape == shape[:1]
    assert sol.converged.all()
    grad_w, grad_x = torch.autograd.grad(sol.value.sum(), (w, x))
    assert grad_x.shape == shape
    assert grad_w.isfinite().all()
    if 0 in shape:
        assert sol.evaluations == 1
        assert (grad_w == 0).all()


def test_an_empty_batch_through_a_layer():
    layer = eq.DEQ(Cell(4, dtype=torch.float32))
    for x in (torch.zeros(0, 4), torch.zeros(0, 4, requires_grad=True)):
        layer(x).sum().backward()
        assert all((p.grad == 0).all() for p in layer.parameters())


@LAW
@given(seed=st.integers(0, 999), solver=st.sampled_from(SOLVERS), grad=st.booleans())
def test_a_sample_that_has_stopped_never_changes_again(seed, solver, grad):
    f, x, slope = contracting(seed, 4, DOUBLE)
    x[3, 0] = torch.nan
    seen: list[eq.Iterate] = []
    with torch.set_grad_enabled(grad):
        sol = eq.fixed_point(
            f,
            torch.zeros_like(x),
            x,
            slope,
            solver=solver,
            adjoint=eq.Unrolled(),
            callback=seen.append,
            on_failure="ignore",
        )
    for i in range(6):
        stop = int(sol.steps[i])
        for it in seen[stop - 1 :]:
            assert it.status[i] == sol.status[i]
            assert not it.active[i] or it is seen[-1]
        for it in seen[stop:]:  # a failed sample goes back to its best iterate once, after it has failed
            assert same(it.value[i], sol.value[i])
        if sol.converged[i]:
            assert same(seen[stop - 1].value[i], sol.value[i])


def test_a_frozen_sample_keeps_its_best_iterate_while_others_run_for_long():
    slope = torch.tensor([[0.1], [3.0], [0.98]], dtype=DOUBLE)
    limit = torch.tensor([[9.0], [50.0], [1e9]], dtype=DOUBLE)
    f = lambda z: slope * z + 1 + 0 * torch.sqrt(limit - z)  # noqa: E731
    zeros = torch.zeros(3, 1, dtype=DOUBLE)
    options = {"solver": eq.Picard(), "on_failure": "ignore", "max_steps": 3000}
    sol = eq.fixed_point(f, zeros, **options)
    assert sol.status.tolist() == [0, eq.Status.NONFINITE, 0]
    assert sol.steps[1] < 10 < sol.steps[2]
    assert sol.residual[1] == pytest.approx(
        (3 * sol.value[1] + 1 - sol.value[1]).abs().item() / (3 * sol.value[1] + 1).item()
    )


@pytest.mark.parametrize("solver", [None, eq.GMRES(restart=4), eq.Picard(), eq.Anderson()])
def test_backward_solves_do_not_depend_on_each_other(solver):
    # One sample's Jacobian is singular, one gradient is zero, one is huge: the others must not know.
    slope = torch.tensor([[0.5], [1.0], [0.9], [0.2], [0.7]], dtype=DOUBLE)
    w = torch.linalg.qr(matrix(5, 0, 1.0)).Q
    v = normal(5, 5, seed=2) * torch.tensor([1.0, 1.0, 0.0, 1e9, 1.0], dtype=DOUBLE)[:, None]

    def gradient(rows):
        x = torch.zeros(len(rows), 5, dtype=DOUBLE, requires_grad=True)
        q = slope[rows]
        jacobian = torch.where(q == 1, torch.eye(5, dtype=DOUBLE)[:, None], (w[:, None] * q))  # rows of the product
        f = lambda z: torch.einsum("bi,ibj->bj", z, jacobian) + x  # noqa: E731
        sol = eq.fixed_point(
            f,
            torch.zeros(len(rows), 5, dtype=DOUBLE),
            adjoint=eq.Implicit(solver=solver, max_steps=400),
            on_failure="ignore",
        )
        (g,) = torch.autograd.grad(sol.value, x, v[rows])
        return g, sol.adjoint

    together, report = gradient([0, 1, 2, 3, 4])
    assert report.status[1] != eq.Status.CONVERGED
    for i in (0, 2, 3, 4):
        alone, its = gradient([i])
        assert its.status.item() == report.status[i] == eq.Status.CONVERGED
        assert its.steps.item() == report.steps[i]
        torch.testing.assert_close(alone[0], together[i], rtol=1e-10, atol=0)
