"""Quadratic programs: against an interior-point solver, the Karush-Kuhn-Tucker system and certificates."""

import copy
import pickle
from typing import NamedTuple

import clarabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor

import equilibria as eq
from equilibria.nn.quadratic.inputs import gather
from equilibria.nn.quadratic.program import equilibrate
from equilibria.nn.quadratic.search import proven
from equilibria.status import Status


class Problem(NamedTuple):
    P: Tensor
    q: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor


def draw(seed: int, n: int, equalities: int, inequalities: int, batch: int = 1, rank: int | None = None) -> Problem:
    """Feasible programs; strictly convex ones unless a rank is given."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=g, dtype=torch.float64)

    factor = normal(n, rank or n)
    P = factor @ factor.mT / n + (0.01 * torch.eye(n, dtype=torch.float64) if rank is None else 0)
    inside, A, G = normal(n), normal(equalities, n), normal(inequalities, n)
    room = torch.rand(batch, inequalities, generator=g, dtype=torch.float64)
    return Problem(P, normal(n), A, _times(A, inside), G, _times(G, inside) + room)


def sizes(seed: int) -> tuple[int, int, int]:
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 101, (), generator=g))
    equalities = int(torch.randint(0, n // 3 + 1, (), generator=g))
    return n, equalities, int(torch.randint(1, 2 * n, (), generator=g))


def infeasible(seed: int) -> Problem:
    """A combination of the constraints bounds a row from below, by more than the last constraint allows."""
    n, equalities, inequalities = sizes(seed)
    P, q, A, b, G, h = draw(seed, n, equalities, inequalities, rank=None if seed % 2 else max(n // 2, 1))
    g = torch.Generator().manual_seed(seed + 1)
    y = torch.rand(1, inequalities, generator=g, dtype=torch.float64)
    row = -_times(G.mT, y)
    gap = 0.3 * (1 + 9 * torch.rand(1, generator=g, dtype=torch.float64))
    return Problem(P, q, A, b, torch.cat([G, row[:, None]], 1), torch.cat([h, (-(h * y).sum(1) - gap)[:, None]], 1))


def unbounded(seed: int) -> Problem:
    """The cost falls along a direction that no constraint ends."""
    n, equalities, inequalities = sizes(seed)
    P, q, A, _, G, _ = draw(seed, n, equalities, inequalities, rank=max(n // 2, 1))
    g = torch.Generator().manual_seed(seed + 1)
    d = torch.nn.functional.normalize(torch.randn(1, n, generator=g, dtype=torch.float64))
    across = torch.eye(n, dtype=torch.float64) - d[:, :, None] * d[:, None, :]
    P, A = across @ P @ across, A @ across
    G = G @ across - torch.rand(1, inequalities, 1, generator=g, dtype=torch.float64) * d[:, None]
    inside = torch.randn(1, n, generator=g, dtype=torch.float64)
    q = q - ((q * d).sum(1) + 0.1 + torch.rand(1, generator=g, dtype=torch.float64))[:, None] * d
    return Problem(P, q, A, _times(A, inside), G, _times(G, inside) + 0.1)


def reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """Solution and multipliers of one program by an interior-point method."""
    P, q, A, b, G, h = (part[0].detach().numpy() for part in problem)
    options = clarabel.DefaultSettings()
    options.verbose = False
    options.tol_gap_abs = options.tol_gap_rel = options.tol_feas = 1e-11
    cones = [clarabel.ZeroConeT(len(b)), clarabel.NonnegativeConeT(len(h))]
    rows = sparse.csc_matrix(np.vstack([A, G]))
    solver = clarabel.DefaultSolver(sparse.csc_matrix(np.triu(P)), q, rows, np.concatenate([b, h]), cones, options)
    found = solver.solve()
    assert "Solved" in str(found.status)
    x, y = (torch.tensor(part, dtype=torch.float64) for part in (found.x, found.z))
    # An interior point comes near; with its active set, corrected where it is wrong, the system is linear.
    p, n = len(b), len(x)
    C, d = torch.tensor(np.vstack([A, G])), torch.tensor(np.concatenate([b, h]))
    for _ in range(5):
        active = y > d - C @ x
        active[:p] = True
        rows = C[active]
        system = torch.cat(
            [torch.cat([torch.tensor(P), rows.T], 1), torch.cat([rows, torch.zeros(2 * (len(rows),))], 1)]
        )
        exact = torch.linalg.solve(system, torch.cat([torch.tensor(-q), d[active]]))
        x, y = exact[:n], torch.zeros_like(y).masked_scatter(active, exact[n:])
    assert (y[p:] >= 0).all()
    assert ((C @ x)[p:] <= d[p:] + 1e-9).all()
    return x, y


def reference_gradients(problem: Problem, x: Tensor, y: Tensor, weights: Tensor) -> list[Tensor]:
    """Those of weights'x, by differentiated Karush-Kuhn-Tucker conditions: Amos and Kolter (2017), equations 7, 8."""
    P, _, A, b, G, h = (part[0].detach() for part in problem)
    p, n, m = len(b), len(x), len(h)
    nu, lam = y[:p], y[p:]
    system = torch.zeros(n + m + p, n + m + p, dtype=torch.float64)
    system[:n, :n], system[:n, n : n + m], system[:n, n + m :] = P, G.T * lam, A.T
    system[n : n + m, :n], system[n : n + m, n : n + m], system[n + m :, :n] = G, torch.diag(G @ x - h), A
    d = -torch.linalg.solve(system, torch.cat([weights, torch.zeros(m + p, dtype=torch.float64)]))
    dx, dl, dn = d[:n], d[n : n + m], d[n + m :]
    dP = (dx[:, None] * x + x[:, None] * dx) / 2
    return [dP, dx, dn[:, None] * x + nu[:, None] * dx, -dn, (lam * dl)[:, None] * x + lam[:, None] * dx, -lam * dl]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)) if wanted.numel() else 0.0


@pytest.mark.parametrize("part", range(8))
def test_values_and_gradients_are_those_of_a_reference_on_200_programs(part: int):
    layer = eq.nn.QPLayer(on_failure="raise")
    for seed in range(25 * part, 25 * part + 25):
        problem = Problem(*(tensor.requires_grad_() for tensor in draw(seed, *sizes(seed))))
        x, y = reference(problem)
        solution = layer.solve(*problem)
        assert _relative(solution.value[0], x) < 1e-6
        assert float(solution.residual) < 1e-8
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = torch.autograd.grad((solution.value[0] * weights).sum(), problem)
        for ours, wanted in zip(found, reference_gradients(problem, x, y, weights), strict=True):
            assert _relative(ours[0], wanted) < 1e-6


def test_flat_programs_have_the_cost_of_the_reference():
    layer = eq.nn.QPLayer(on_failure="raise")
    for seed in range(12):
        n, equalities, inequalities = sizes(seed)
        problem = draw(seed, n, equalities, n + inequalities, rank=max(n // 2, 1))
        x, _ = reference(problem)
        z = layer(*problem)[0]
        P, q = problem.P[0], problem.q[0]
        costs = [float(v @ P @ v / 2 + q @ v) for v in (x, z)]
        assert costs[1] == pytest.approx(costs[0], rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("part", range(5))
def test_50_of_50_infeasible_programs_are_told(part: int):
    for seed in range(10 * part, 10 * part + 10):
        assert eq.nn.QPLayer(on_failure="ignore").solve(*infeasible(seed)).status.tolist() == [Status.INFEASIBLE]


@pytest.mark.parametrize("part", range(2))
def test_20_of_20_unbounded_programs_are_told(part: int):
    for seed in range(10 * part, 10 * part + 10):
        solution = eq.nn.QPLayer(on_failure="ignore").solve(*unbounded(seed))
        assert solution.status.tolist() == [Status.UNBOUNDED]
        assert not solution.value.any()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(0, 2), st.integers(0, 8))
def test_gradients_are_finite_differences(seed: int, n: int, equalities: int, inequalities: int):
    problem = draw(seed, n, min(equalities, n - 1), inequalities)
    layer = eq.nn.QPLayer(on_failure="ignore")
    solution = layer.solve(*problem)
    assert bool(solution.converged.all())
    # Away from kinks: no constraint is about to become active, or to cease to be.
    report = solution.aux
    if inequalities and float(torch.maximum(report.slack, report.inequality).min()) < 1e-3:
        return
    assert not bool(report.degenerate.any())
    inputs = tuple(tensor.requires_grad_() for tensor in problem)
    assert torch.autograd.gradcheck(lambda *parts: layer(*parts), inputs, atol=1e-5, rtol=1e-3)


def test_second_derivatives():
    layer = eq.nn.QPLayer(adjoint=eq.Implicit(order=2), on_failure="raise")
    problem = draw(3, 4, 1, 3)
    inputs = tuple(tensor.requires_grad_() for tensor in problem[:2])
    assert torch.autograd.gradgradcheck(lambda P, q: layer(P, q, *problem[2:]), inputs)
    once = eq.nn.QPLayer(on_failure="raise")
    (gradient,) = torch.autograd.grad(once(*problem[:2], *problem[2:]).sum(), problem.P, create_graph=False)
    assert torch.isfinite(gradient).all()
    with pytest.raises(RuntimeError, match="order=2"):
        torch.autograd.grad(once(*inputs, *problem[2:]).sum(), inputs, create_graph=True)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 12))
def test_a_sample_is_the_same_alone_and_in_any_company(seed: int, n: int, inequalities: int):
    good, poor, never = draw(seed, n, 1, inequalities, batch=3), unbounded(seed % 20), draw(seed, n, 1, inequalities)
    layer = eq.nn.QPLayer(on_failure="ignore")
    never = never._replace(h=never.h - 100, G=torch.cat([never.G[:, :-1], 0 * never.G[:, -1:]], 1))
    nan = never._replace(q=never.q * torch.nan)
    together = Problem(*(torch.cat(parts) for parts in zip(nan, good, never, strict=True)))
    found = layer.solve(*together)
    assert found.status.tolist() == [Status.NONFINITE, 0, 0, 0, Status.INFEASIBLE]
    assert torch.isfinite(found.value).all()
    assert layer.solve(*poor).status.tolist() == [Status.UNBOUNDED]
    for k in range(3):
        alone = layer.solve(*(part[k : k + 1] for part in good))
        # Rounding may send the acceleration another way, to the same point within the tolerance.
        assert alone.status.tolist() == [0]
        assert float(found.residual[k + 1]) <= 1e-8
        assert _relative(found.value[k + 1], alone.value[0]) < 1e-6


def test_a_bad_sample_gives_shared_parameters_no_gradient():
    P = torch.eye(2, dtype=torch.float64).repeat(4, 1, 1)
    P[1, 0, 0], P[2, 0, 0], P[3, 0, 0] = torch.nan, -1.0, 0.0
    shared = torch.nn.Parameter(torch.tensor([-1.0, -2.0], dtype=torch.float64))
    layer = eq.nn.QPLayer(q=shared, on_failure="ignore")
    given = P.requires_grad_()
    solution = layer.solve(P=given)
    assert solution.status.tolist() == [0, Status.NONFINITE, Status.NONCONVEX, Status.UNBOUNDED]
    solution.value.sum().backward()
    assert shared.grad is not None
    assert torch.allclose(shared.grad, torch.tensor([-1.0, -1.0], dtype=torch.float64))
    assert given.grad is not None
    assert not given.grad[1:].any()


def test_failures_follow_the_policy():
    box = {"P": torch.eye(1), "q": torch.ones(1), "G": torch.tensor([[1.0], [-1.0]]), "h": torch.tensor([0.0, -1.0])}
    with pytest.raises(eq.SolveError, match="no point satisfies"):
        eq.nn.QPLayer(**box, on_failure="raise")()
    layer = eq.nn.QPLayer(**box)
    with pytest.warns(eq.ConvergenceWarning, match="relax b or h"):
        layer()
    layer()  # is told once


def test_degenerate_solutions_are_told_where_gradients_are_asked_for():
    G = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    layer = eq.nn.QPLayer(torch.eye(2, dtype=torch.float64), G=G, h=torch.full((2,), 0.5, dtype=torch.float64))
    q = torch.tensor([-2.0, 1.0], dtype=torch.float64, requires_grad=True)
    # Rows that repeat each other leave the solution its derivative.
    solution = layer.solve(q=q)
    assert not bool(solution.aux.degenerate)
    (gradient,) = torch.autograd.grad(solution.value.sum(), q)
    assert torch.allclose(gradient, torch.tensor([0.0, -1.0], dtype=torch.float64), atol=1e-9)
    assert solution.adjoint.status is not None
    assert int(solution.adjoint.status) == 0
    touching = torch.tensor([-0.5, 1.0], dtype=torch.float64)
    assert bool(layer.solve(q=touching).aux.degenerate)  # and nothing is told, since nobody differentiates
    with pytest.warns(eq.ConvergenceWarning, match="no single derivative"):
        layer.solve(q=touching.clone().requires_grad_())


def test_a_linear_program_with_many_solutions_is_degenerate_and_its_backward_fails_by_policy():
    G = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    layer = eq.nn.QPLayer(G=G, h=torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), on_failure="ignore")
    q = torch.tensor([[-1.0, -1.0], [-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    solution = layer.solve(q=q)
    assert solution.converged.all()
    assert solution.aux.degenerate.tolist() == [True, False]
    assert torch.allclose(solution.value[1], torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-9)
    solution.value[:, 0].sum().backward()
    assert solution.adjoint.status is not None
    assert int(solution.adjoint.status[0]) != Status.CONVERGED
    assert int(solution.adjoint.status[1]) == Status.CONVERGED


def test_an_infinite_bound_is_no_constraint():
    problem = draw(5, 6, 1, 4)
    layer = eq.nn.QPLayer(on_failure="raise")
    h = problem.h.clone()
    h[:, 2] = torch.inf
    keep = [0, 1, 3]
    without = problem._replace(G=problem.G[:, keep], h=problem.h[:, keep])
    solution = layer.solve(*problem._replace(h=h.requires_grad_()))
    assert torch.allclose(solution.value, layer(*without), atol=1e-10)
    assert float(solution.aux.slack[0, 2]) == torch.inf
    solution.value.sum().backward()
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()
    minus = problem._replace(h=torch.full_like(h, -torch.inf))
    assert eq.nn.QPLayer(on_failure="ignore").solve(*minus).status.tolist() == [Status.NONFINITE]


def test_badly_scaled_programs():
    problem = draw(7, 12, 2, 10)
    units = 10.0 ** torch.linspace(-3, 3, 12, dtype=torch.float64)
    rows = 10.0 ** torch.linspace(3, -3, 10, dtype=torch.float64)
    scaled = Problem(
        1e4 * units[:, None] * problem.P * units,
        1e4 * units * problem.q,
        problem.A * units,
        problem.b,
        rows[:, None] * problem.G * units,
        rows * problem.h,
    )
    layer = eq.nn.QPLayer(on_failure="raise")
    assert _relative(layer(*scaled) * units, layer(*problem)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_autocast(dtype: torch.dtype):
    parts = [part.to(dtype) for part in draw(2, 5, 1, 4)]
    layer = eq.nn.QPLayer(on_failure="raise")
    found = layer(*parts)
    assert found.dtype == dtype
    wanted = layer(*(part.double() for part in parts))
    assert _relative(found.double(), wanted) < 4 * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(*parts), found)


def test_leading_dimensions_broadcast_and_may_be_missing_or_empty():
    P, q, A, b, G, h = draw(4, 3, 1, 2, batch=6)
    layer = eq.nn.QPLayer(P=P[0], A=A[0], b=b[0], G=G[0], h=h[0], on_failure="raise")
    grid = q.reshape(2, 3, 3)
    found = layer.solve(q=grid)
    assert found.value.shape == (2, 3, 3)
    assert found.status.shape == (2, 3)
    assert found.aux.inequality.shape == (2, 3, 2)
    assert torch.allclose(layer(q=q[4]), found.value[1, 1], atol=1e-10)
    assert layer(q=q[:0]).shape == (0, 3)


def test_a_layer_learns_saves_and_is_seen_by_monitors():
    P, q, A, b, G, h = (part[0] for part in draw(6, 3, 1, 2))
    layer = eq.nn.QPLayer(P=P, q=torch.nn.Parameter(q), A=A, b=b, G=torch.nn.Parameter(G), h=h)
    assert [name for name, _ in layer.named_parameters()] == ["q", "G"]
    before = [part.clone() for part in layer.state_dict().values()]
    with eq.monitor(layer) as reports:
        layer().sum().backward()
    assert reports[0].adjoint.status is not None
    assert all(torch.equal(old, new) for old, new in zip(before, layer.state_dict().values(), strict=True))
    other = eq.nn.QPLayer(
        P=torch.zeros(3, 3).double(),
        q=torch.nn.Parameter(0 * q),
        A=0 * A,
        b=0 * b,
        G=torch.nn.Parameter(0 * G),
        h=0 * h,
    )
    other.load_state_dict(layer.state_dict())
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(), layer())
    assert "G=(2, 3)" in repr(layer)


def test_what_makes_no_sense_is_refused_in_a_sentence():
    eye, zeros = torch.eye(2), torch.zeros(2)
    layer = eq.nn.QPLayer(P=eye)
    refused = [
        (lambda: layer(q=torch.zeros(3)), ValueError, r"P must end in the shape \(3, 3\)"),
        (lambda: layer(q=[1.0]), TypeError, "floating tensor"),
        (lambda: layer(q=torch.zeros(2, dtype=torch.int64)), TypeError, "floating tensor"),
        (lambda: eq.nn.QPLayer(P=eye, A=eye)(), ValueError, "b is missing"),
        (lambda: eq.nn.QPLayer()(), ValueError, "There is no program"),
        (lambda: eq.nn.QPLayer(P=zeros), ValueError, "at least 2 dimensions"),
        (lambda: eq.nn.QPLayer(P=eye, max_steps=0), ValueError, "max_steps"),
        (lambda: eq.nn.QPLayer(P=eye, rtol=-1.0), ValueError, "rtol"),
        (lambda: eq.nn.QPLayer(P=eye, on_failure="shrug"), ValueError, "on_failure"),
        (lambda: eq.nn.QPLayer(P=eye, adjoint=eq.Unrolled()), ValueError, "cannot be unrolled"),
        (lambda: layer(q=torch.zeros(3, 2), P=eye.expand(2, 2, 2)), ValueError, "do not broadcast"),
        (lambda: torch.func.vmap(lambda q: layer(q=q))(eye), NotImplementedError, "leading dimensions"),
    ]
    for act, kind, words in refused:
        with pytest.raises(kind, match=words):
            act()


def test_a_search_that_is_cut_short_says_so_and_keeps_its_gradient():
    problem = draw(9, 20, 4, 30)
    layer = eq.nn.QPLayer(max_steps=3, on_failure="ignore")
    q = problem.q.requires_grad_()
    solution = layer.solve(*problem._replace(q=q))
    assert solution.status.tolist() == [Status.MAX_STEPS]
    assert int(solution.steps) <= 3
    assert float(solution.residual) > 1e-8
    solution.value.sum().backward()
    assert q.grad is not None
    assert q.grad.any()


def test_nothing_is_proven_of_programs_that_have_a_solution():
    for seed in range(6):
        problem = draw(seed, 12, 3, 20, rank=None if seed % 2 else 6)
        program = gather(dict(zip("PqAbGh", problem, strict=True))).program
        program = program.scaled(equilibrate(program))
        status, _ = proven(program, torch.randn(program.q.shape, dtype=torch.float64))
        assert status.tolist() == [Status.MAX_STEPS]


def test_a_cost_counts_by_its_symmetric_part():
    problem = draw(8, 5, 1, 4)
    skew = torch.randn(5, 5, dtype=torch.float64)
    P = (problem.P + skew - skew.mT).requires_grad_()
    layer = eq.nn.QPLayer(on_failure="raise")
    found = layer(P, *problem[1:])
    assert torch.allclose(found, layer(*problem), atol=1e-10)
    (gradient,) = torch.autograd.grad(found.sum(), P)
    assert torch.allclose(gradient, gradient.mT)
