"""The law of honesty: what a solve says about itself is true of what it returns, whatever became of it."""

import dataclasses
import itertools
import warnings

import pytest
import torch
from cases import IMPLICIT, Case, Samples, cases
from cases import Found as Everything
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from maps import STRUCTURES, Cell, Counted, join, leaves, matrix, normal, residual, same, split, tanh_map, width
from torch import Tensor, nn

import equilibria as eq

DOUBLE = torch.float64
LAW = settings(derandomize=True, max_examples=200, deadline=None)
SOLVERS = [eq.Picard(), eq.Picard(relaxation=0.3), eq.Anderson(), eq.Anderson(history=2, relaxation=0.4)]
ADJOINTS = [eq.Implicit(), eq.Phantom(3), eq.OneStep(), eq.Unrolled(), eq.Unrolled(checkpoint=True)]
QUIET = {"on_failure": "ignore"}


def near(a: Tensor, b: Tensor) -> bool:
    """Equal to the rounding of a sum, where residuals of any size are compared."""
    eps = torch.finfo(a.dtype).eps
    return torch.allclose(a, b.to(a.dtype), rtol=64 * eps, atol=0, equal_nan=True)


# Every entry, solver, adjoint, structure and dtype.


def true_adjoint_residual(case: Case, samples: Samples, found: Everything) -> Tensor:
    """|v + J^T u - u| / |v| at the value returned, where u is the gradient of what is added to f; sample by sample."""
    u = -found.shift if case.entry == "argmin" else found.shift
    left = []
    for i in range(len(samples)):
        z = found.value[i : i + 1].clone().requires_grad_()
        image = case.image_at(z, samples.take([i]))
        (product,) = torch.autograd.grad(image, z, u[i : i + 1], materialize_grads=True)
        left.append((samples.v[i] + product[0] - u[i]).norm() / samples.v[i].norm())
    return torch.stack(left)


@settings(derandomize=True, max_examples=160, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=cases(dtypes=(DOUBLE, torch.float32, torch.bfloat16)),
    max_steps=st.sampled_from([1, 2, 3, 4, 7, 40]),
    norm=st.sampled_from([eq.rms_norm, eq.max_norm]),
)
def test_all_that_is_said_is_true_whatever_solves_and_whatever_becomes_of_it(case, max_steps, norm):
    case = case.given(max_steps=max_steps, norm=norm)
    samples = case.samples()
    found = case.solve(samples)
    sol, relative = found.solution, case.entry in ("fixed_point", "deq")
    half = case.dtype == torch.bfloat16
    nonfinite, converged = found.status == eq.Status.NONFINITE, found.status == eq.Status.CONVERGED

    # The residual is that of the value, and the tolerance is met where that is said, in every leaf.
    sizes, scales = case.truth(samples, found, norm)
    ratios = [torch.where(a == 0, a, a / b) for a, b in zip(sizes, scales, strict=True)] if relative else sizes
    true = torch.stack([ratio.to(found.residual.dtype) for ratio in ratios]).amax(dim=0)
    if case.entry == "equality":  # a sum in another order
        torch.testing.assert_close(found.residual, true, rtol=1e-3, atol=2e-2 if half else 1e-5, equal_nan=True)
    else:
        assert near(found.residual, true)
    rtol = ({DOUBLE: 1e-8, torch.float32: 1e-4}.get(case.dtype, 1e-2)) if relative else 0.0
    atol = rtol / 100 if relative else {DOUBLE: 1e-8, torch.float32: 1e-5}.get(case.dtype, 1e-2)
    slack = 2e-2 if case.entry == "equality" and half else 1e-5 if case.entry == "equality" and not case.tight else 0.0
    for size, scale in zip(sizes, scales, strict=True):
        assert (size <= (rtol * scale + atol) * 1.001 + slack)[converged].all()
    assert found.value.isfinite().all()
    assert found.residual[~nonfinite].isfinite().all()
    assert not (found.residual < 0).any()

    # Every call is counted, and no more are made than allowed; a transform looks at f once, to see what it captures.
    looks = 1 + (case.entry in ("argmin", "equality")) if case.transformed else 0
    if case.adjoint != eq.Unrolled(checkpoint=True):  # what a checkpoint computes again is torch's own
        assert found.calls == sol.evaluations + sol.adjoint.evaluations + looks
    assert 1 <= found.steps.min() <= found.steps.max() == sol.evaluations <= max_steps

    for i, kind in enumerate(case.kinds):
        if kind in ("nan", "infinite"):
            assert nonfinite[i]
            assert found.steps[i] == 1
        if kind == "diverges" and not relative and case.entry != "root":
            assert not converged[i]  # it has no minimum
    for gradient in (found.x, found.slope, found.shift):
        assert not gradient[nonfinite].any()
        assert gradient.isfinite().all()
    assert found.w.isfinite().all()

    plain = case.solve(samples, grad=False)
    assert torch.equal(plain.value, found.value)
    assert torch.equal(plain.status, found.status)
    assert torch.equal(plain.steps, found.steps)
    assert torch.equal(plain.residual.nan_to_num(-1), found.residual.nan_to_num(-1))

    # The backward solve's own report.
    if found.adjoint_residual is None or found.adjoint_status is None:
        return
    assert (found.adjoint_status[nonfinite] == eq.Status.NONFINITE).all()
    assert found.adjoint_residual[~nonfinite].isfinite().all()
    good = ~nonfinite
    if case.entry == "equality" or half or not good.any():
        return
    rows = good.nonzero().flatten()
    true = true_adjoint_residual(case, samples.take(rows), found.take(rows))
    said, done = found.adjoint_residual[rows], found.adjoint_status[rows] == eq.Status.CONVERGED
    size = found.shift[rows].norm(dim=1) / samples.v[rows].norm(dim=1)
    noise = 2000 * torch.finfo(case.dtype).eps * (1 + size)
    assert (true <= 1.05 * said + noise).all()
    if case.adjoint.order == 1:
        assert (said <= 1.05 * true + noise).all()
    assert (true <= (1.05e-8 if case.tight else 1.05e-4) + noise)[done].all()


@settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=cases(adjoints=IMPLICIT, dtypes=(DOUBLE,), transforms=False),
    policy=st.sampled_from(["raise", "warn"]),
    products=st.integers(1, 3),
)
def test_failures_forward_and_backward_are_told_by_one_policy_with_their_number(case, policy, products):
    adjoint = dataclasses.replace(case.adjoint, max_steps=products, rtol=1e-13)
    case = case.but(adjoint=adjoint).given(max_steps=25)
    samples = case.samples()
    quiet = case.solve(samples)
    assert quiet.adjoint_status is not None
    backward = quiet.adjoint_status.clone()
    backward[quiet.status == eq.Status.NONFINITE] = eq.Status.CONVERGED  # left out, and told about by the forward solve
    if policy == "raise":
        told = quiet.status if (quiet.status != eq.Status.CONVERGED).any() else backward
        what = "solve: " if told is quiet.status else "backward solve: "
        if (told == eq.Status.CONVERGED).all():
            case.given(on_failure=policy).solve(samples)
            return
        with pytest.raises(eq.SolveError) as caught:
            case.given(on_failure=policy).solve(samples)
        assert torch.equal(caught.value.status, told)
        assert str(caught.value).startswith(what)
        sentences = [str(caught.value)]
    else:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            case.given(on_failure=policy).solve(samples)
        sentences = [str(w.message) for w in seen if issubclass(w.category, eq.ConvergenceWarning)]
        if case.adjoint.order == 1:
            causes = [len(set(t.tolist()) - {eq.Status.CONVERGED}) for t in (quiet.status, backward)]
            assert len(sentences) == sum(causes)
    for what, status in (("solve", quiet.status), ("backward solve", backward)):
        if case.adjoint.order == 2 and what == "backward solve":
            continue  # two of them, of which the report is the last
        for cause in set(status.tolist()) - {eq.Status.CONVERGED}:
            count, all_of_them = int((status == cause).sum()), len(status)
            word = f"{what}: {count} of {all_of_them} sample{'s' if all_of_them != 1 else ''} ("
            remedy = eq.Status(cause).remedy
            if policy == "raise" and not sentences[0].startswith(f"{what}:"):
                continue
            assert any(word in sentence and remedy in sentence for sentence in sentences)


# The residual.


@LAW
@given(
    seed=st.integers(0, 999),
    gain=st.sampled_from([0.3, 0.95, 1.5, 4.0, 50.0]),
    scale=st.sampled_from([1e-12, 1e-6, 1.0, 1e6, 1e12]),
    solver=st.sampled_from(SOLVERS),
    structure=st.sampled_from(sorted(STRUCTURES)),
    batch_dims=st.integers(0, 2),
    norm=st.sampled_from([eq.rms_norm, eq.max_norm]),
    max_steps=st.sampled_from([1, 2, 3, 7, 100]),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
    grad=st.booleans(),
)
def test_the_residual_is_that_of_the_returned_value(
    seed, gain, scale, solver, structure, batch_dims, norm, max_steps, dtype, grad
):
    n, batch = width(structure), (2, 3)[:batch_dims]
    w, x = matrix(n, seed, gain, dtype), scale * normal(*batch, n, seed=seed + 1, dtype=dtype)
    linear = seed % 2  # grows without bound where the gain is above one; the other is held by tanh

    def f(z):
        rows = join(z, batch_dims) @ w + x
        return split(rows if linear else rows.tanh(), structure)

    counted = Counted(f)
    z0 = split(normal(*batch, n, seed=seed + 2, dtype=dtype), structure)
    with torch.set_grad_enabled(grad):
        sol = eq.fixed_point(counted, z0, solver=solver, norm=norm, max_steps=max_steps, batch_dims=batch_dims, **QUIET)
    true = residual(f, sol.value, norm=norm, batch_dims=batch_dims)
    assert near(sol.residual, true)
    assert sol.residual.shape == sol.status.shape == sol.steps.shape == batch
    assert counted.calls == sol.evaluations + sol.adjoint.evaluations
    assert sol.steps.max() == sol.evaluations <= max_steps
    assert sol.steps.min() >= 1
    rtol = 1e-8 if dtype == DOUBLE else 1e-4
    for leaf_new, leaf_old in zip(leaves(f(sol.value)), leaves(sol.value), strict=True):
        new, old = (t.reshape(max(1, torch.Size(batch).numel()), *t.shape[batch_dims:]) for t in (leaf_new, leaf_old))
        bound = rtol * norm(new) + rtol / 100
        done = sol.converged.flatten()
        assert (norm(new - old) <= bound * 1.001)[done].all()


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_calls_are_counted_and_backward_counts_its_own(solver, adjoint):
    w, x = matrix(4, 0, 0.7).requires_grad_(), normal(3, 4, seed=1)
    f = Counted(tanh_map())
    sol = eq.fixed_point(f, torch.zeros(3, 4, dtype=DOUBLE), w, x, solver=solver, adjoint=adjoint, max_steps=300)
    assert f.calls == sol.evaluations + sol.adjoint.evaluations
    sol.value.sum().backward()
    if adjoint != eq.Unrolled(checkpoint=True):  # what a checkpoint computes again is torch's own
        assert f.calls == sol.evaluations + sol.adjoint.evaluations


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("grad", [False, True])
def test_calls_are_counted_where_samples_fail_and_aux_is_asked_for(grad, adjoint):
    w, x = matrix(4, 0, 3.0).requires_grad_(), normal(3, 4, seed=1)
    x[1, 0] = torch.nan
    f = Counted(lambda z: (torch.tanh(z @ w + x), {"seen": z + 1}))
    for max_steps in (1, 2, 5):
        f.calls = 0
        with torch.set_grad_enabled(grad):
            sol = eq.fixed_point(
                f, torch.zeros(3, 4, dtype=DOUBLE), adjoint=adjoint, max_steps=max_steps, has_aux=True, **QUIET
            )
        assert f.calls == sol.evaluations + sol.adjoint.evaluations
        torch.testing.assert_close(sol.aux["seen"], sol.value.detach() + 1, rtol=0, atol=0, equal_nan=True)
        assert not sol.aux["seen"].requires_grad


def test_one_step_returns_the_start_with_its_residual():
    w, x, z0 = matrix(4, 0, 0.5), normal(3, 4, seed=1), normal(3, 4, seed=2)
    for solver, adjoint in itertools.product(SOLVERS, ADJOINTS):
        sol = eq.fixed_point(tanh_map(), z0, w, x, solver=solver, adjoint=adjoint, max_steps=1, **QUIET)
        assert same(sol.value, z0)
        assert near(sol.residual, residual(tanh_map(), z0, w, x))
        assert sol.evaluations == 1
        assert sol.steps.tolist() == [1, 1, 1]


def test_steps_say_when_each_sample_stopped():
    # z <- z / 10 from 10 ** k: converges where 0.9 z <= 1e-3 at evaluation k + 5 (0.9e-3 at z = 1e-3 ...).
    z0 = torch.tensor([[1.0], [100.0], [0.001], [0.0]], dtype=DOUBLE)
    sol = eq.fixed_point(lambda z: z / 10, z0, solver=eq.Picard(), atol=0.95e-3, rtol=0.0)
    assert sol.steps.tolist() == [4, 6, 1, 1]
    assert sol.evaluations == 6
    torch.testing.assert_close(sol.value.flatten(), torch.tensor([1e-3, 1e-3, 1e-3, 0.0], dtype=DOUBLE))
    # A solve of one sample alone ends there.
    for row, steps in zip(z0, sol.steps.tolist(), strict=True):
        f = Counted(lambda z: z / 10)
        with torch.no_grad():
            eq.fixed_point(f, row[None], solver=eq.Picard(), atol=0.95e-3, rtol=0.0)
        assert f.calls == steps


# Statuses.


def test_nan_from_the_first_evaluation_returns_the_start():
    x = torch.tensor([[1.0], [torch.nan], [torch.inf]], dtype=DOUBLE)
    z0 = torch.tensor([[0.1], [0.2], [0.3]], dtype=DOUBLE)
    for solver in SOLVERS:
        sol = eq.fixed_point(lambda z, x: 0.5 * z.tanh() + x, z0, x, solver=solver, **QUIET)
        assert sol.status.tolist() == [eq.Status.CONVERGED, eq.Status.NONFINITE, eq.Status.NONFINITE]
        assert same(sol.value[1:], z0[1:])
        assert sol.steps[1:].tolist() == [1, 1]
        assert not sol.residual[1:].isfinite().any()


def test_a_start_that_is_not_finite_is_the_status_of_its_sample():
    z0 = torch.tensor([[0.1], [torch.nan], [torch.inf]], dtype=DOUBLE)
    for solver in SOLVERS:
        sol = eq.fixed_point(lambda z: 0.5 * z + 1, z0, solver=solver, max_steps=300, **QUIET)
        assert sol.status.tolist() == [eq.Status.CONVERGED, eq.Status.NONFINITE, eq.Status.NONFINITE]


@LAW
@given(solver=st.sampled_from(SOLVERS), seed=st.integers(0, 99), grad=st.booleans())
def test_nan_later_returns_the_best_iterate_before_it(solver, seed, grad):
    # Finite on the way, until a coordinate leaves the domain of the root.
    x = normal(5, 3, seed=seed)
    limit = torch.linspace(1, 40, 5, dtype=DOUBLE)[:, None]
    f = lambda z: x - 2.5 * z + 0 * torch.sqrt(limit - z)  # noqa: E731
    seen: list[tuple[Tensor, Tensor]] = []
    with torch.set_grad_enabled(grad):
        sol = eq.fixed_point(
            f,
            torch.zeros(5, 3, dtype=DOUBLE),
            solver=solver,
            callback=lambda it: seen.append((it.value, it.residual)),
            max_steps=60,
            **QUIET,
        )
    assert sol.value.isfinite().all()
    assert near(sol.residual, residual(f, sol.value))
    for i in range(5):
        lowest = torch.stack([r[i] for _, r in seen[: int(sol.steps[i])]]).nan_to_num(torch.inf).min()
        if not sol.converged[i]:
            assert sol.residual[i] == lowest
        if sol.status[i] == eq.Status.NONFINITE:
            assert not seen[int(sol.steps[i]) - 1][1][i].isfinite()


def test_samples_that_run_out_return_their_best_iterate():
    # Grows away from the equilibrium: the first iterate is the best.
    z0 = torch.tensor([[1.0], [-1.0]], dtype=DOUBLE)
    sol = eq.fixed_point(lambda z: 2 * z + 10, z0, solver=eq.Picard(), max_steps=9, rtol=1e-12, **QUIET)
    assert sol.status.tolist() == [eq.Status.MAX_STEPS] * 2
    walk, best = z0, []
    for _ in range(9):
        best.append(residual(lambda z: 2 * z + 10, walk))
        walk = 2 * walk + 10
    assert torch.equal(sol.residual, torch.stack(best).amin(dim=0))
    assert near(sol.residual, residual(lambda z: 2 * z + 10, sol.value))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_slow_is_not_stalled(dtype):
    x = normal(3, 4, seed=0, dtype=dtype)
    for radius in (0.99, 0.999, -0.999):
        sol = eq.fixed_point(
            lambda z, r=radius: r * z + x,
            torch.zeros(3, 4, dtype=dtype),
            solver=eq.Picard(),
            rtol=1e-7,
            max_steps=60,
            **QUIET,
        )
        assert sol.status.tolist() == [eq.Status.MAX_STEPS] * 3


def test_a_residual_that_waits_for_the_last_step_is_not_stalled():
    # A chain of 30: plain iteration is exact after 31 evaluations, and the residual does not fall before.
    shift = torch.diag(torch.ones(30, dtype=DOUBLE), 1)
    z0 = torch.zeros(1, 31, dtype=DOUBLE)
    x = torch.zeros(1, 31, dtype=DOUBLE)
    x[0, 0] = 1
    sol = eq.fixed_point(lambda z: z @ shift + x, z0, solver=eq.Picard(), rtol=1e-12)
    assert sol.converged.all()
    assert sol.steps.item() == 32


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("solver", [eq.Picard(), eq.Anderson()])
def test_below_rounding_it_stalls_and_says_so(solver, dtype):
    w, x = matrix(64, 0, 0.7, dtype), normal(4, 64, seed=1, dtype=dtype)
    tiny = torch.finfo(dtype).eps / 1000
    zeros = torch.zeros(4, 64, dtype=dtype)
    sol = eq.fixed_point(tanh_map(), zeros, w, x, solver=solver, rtol=tiny, max_steps=500, **QUIET)
    assert ((sol.status == eq.Status.STALLED) | (sol.residual == 0)).all()
    assert (sol.residual < 100 * torch.finfo(dtype).eps).all()
    assert sol.evaluations < 500


def test_a_half_precision_cell_stalls_where_its_rounding_is():
    w, x = matrix(64, 0, 0.9, torch.bfloat16), normal(4, 64, seed=1, dtype=torch.bfloat16)
    sol = eq.fixed_point(
        lambda z: torch.tanh(z.bfloat16() @ w + x), torch.zeros(4, 64), rtol=1e-6, max_steps=400, **QUIET
    )
    assert ((sol.status == eq.Status.STALLED) | (sol.residual <= 1e-6)).all()
    assert (sol.status == eq.Status.STALLED).any()
    assert (sol.residual < 1e-2).all()


# Failures are told, by policy.

CAUSES = {
    eq.Status.MAX_STEPS: (lambda z: 2 * z + 1, {"max_steps": 5}, "max_steps"),
    eq.Status.NONFINITE: (lambda z: z * torch.nan, {}, "NaN"),
    eq.Status.STALLED: (
        lambda z: torch.tanh(z @ matrix(64, 0, 0.7) + 1),
        {"rtol": 1e-20, "max_steps": 400},
        "rounding",
    ),
}


def start(n: int = 64) -> Tensor:
    return normal(2, n, seed=3)


@pytest.mark.parametrize("cause", CAUSES)
def test_raise_says_which_samples_how_and_what_to_try(cause):
    f, options, word = CAUSES[cause]
    options = {"solver": eq.Picard(), **options}
    with pytest.raises(eq.SolveError, match=word) as caught:
        eq.fixed_point(f, start(), **options)
    assert (caught.value.status == cause).any()
    assert "sample" in str(caught.value)
    assert cause.remedy in str(caught.value)
    assert caught.value.residual.shape == (2,)
    with pytest.warns(eq.ConvergenceWarning, match=word):
        sol = eq.fixed_point(f, start(), on_failure="warn", **options)
    assert (sol.status == cause).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = eq.fixed_point(f, start(), on_failure="ignore", **options)
        with torch.no_grad():
            eq.fixed_point(f, start(), on_failure="ignore", **options)
    assert same(quiet.value, sol.value)


def test_the_error_names_the_samples_that_failed_and_no_others():
    x = torch.zeros(5, 1, dtype=DOUBLE)
    x[1], x[3] = torch.nan, torch.nan
    with pytest.raises(eq.SolveError, match=r"2 of 5 samples \(1, 3\)"):
        eq.fixed_point(lambda z: 0.5 * z + x, torch.ones(5, 1, dtype=DOUBLE))


def test_several_causes_are_all_told():
    x = torch.tensor([[torch.nan], [1.0], [0.0]], dtype=DOUBLE)
    slope = torch.tensor([[0.5], [2.0], [0.5]], dtype=DOUBLE)
    options = {"solver": eq.Picard(), "max_steps": 5}
    with pytest.raises(eq.SolveError) as caught:
        eq.fixed_point(lambda z: slope * z + x, torch.zeros(3, 1, dtype=DOUBLE), **options)
    for cause in (eq.Status.MAX_STEPS, eq.Status.NONFINITE):
        assert cause.remedy in str(caught.value)
    assert caught.value.status.tolist() == [eq.Status.NONFINITE, eq.Status.MAX_STEPS, eq.Status.CONVERGED]


# A backward solve that fails while the forward solve converges at its start.


def unsolvable(adjoint, on_failure):
    """z = 0 for all: the forward solve is done at once, and (I - J) is singular: no gradient exists."""
    x = torch.zeros(2, 3, dtype=DOUBLE, requires_grad=True)
    turn = torch.eye(3, dtype=DOUBLE)
    turn[0, 1] = 1.0
    return x, eq.fixed_point(
        lambda z: z @ turn + x, torch.zeros(2, 3, dtype=DOUBLE), adjoint=adjoint, on_failure=on_failure
    )


BACKWARD = [
    eq.Implicit(max_steps=30),
    eq.Implicit(solver=eq.GMRES(), max_steps=30),
    eq.Implicit(solver=eq.Picard(), max_steps=30),
    eq.Implicit(solver=eq.Anderson(), max_steps=30),
]


@pytest.mark.parametrize("adjoint", BACKWARD)
def test_a_backward_solve_that_fails_says_so(adjoint):
    _, sol = unsolvable(adjoint, "raise")
    with pytest.raises(eq.SolveError, match="backward"):
        sol.value[:, 1].sum().backward()
    _, sol = unsolvable(adjoint, "warn")
    with pytest.warns(eq.ConvergenceWarning, match="backward"):
        sol.value[:, 1].sum().backward()
    _, sol = unsolvable(adjoint, "ignore")
    assert sol.adjoint.status is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sol.value[:, 1].sum().backward()
    assert (sol.adjoint.status != eq.Status.CONVERGED).all()
    assert (sol.adjoint.residual > 1e-3).all()


@pytest.mark.parametrize("adjoint", [eq.Implicit(), *BACKWARD])
@pytest.mark.parametrize("seed", range(5))
def test_the_residual_of_a_backward_solve_is_that_of_its_gradient(adjoint, seed):
    # f(z) = z A + x: the gradient of x is the u of u = v + A u itself.
    a, v = matrix(6, seed, [0.5, 0.9, 1.2, 2.0, 5.0][seed]), normal(3, 6, seed=seed + 10)
    v[1] = 0
    x = torch.zeros(3, 6, dtype=DOUBLE, requires_grad=True)
    sol = eq.fixed_point(lambda z: z @ a + x, torch.zeros(3, 6, dtype=DOUBLE), adjoint=adjoint, **QUIET)
    (u,) = torch.autograd.grad(sol.value, x, v)
    true = (v + u @ a.T - u).norm(dim=1) / v.norm(dim=1)
    done = sol.adjoint.status == eq.Status.CONVERGED
    true[1] = 0
    torch.testing.assert_close(sol.adjoint.residual, true, rtol=1e-3, atol=1e-13)
    assert (true[done] <= 1.001e-8).all()
    assert done[1]
    assert sol.adjoint.steps.shape == (3,)
    assert (sol.adjoint.steps <= (200 if adjoint.solver is None else adjoint.max_steps)).all()
    if adjoint.solver is None or isinstance(adjoint.solver, eq.GMRES):
        assert done.all()  # six dimensions are six products


def test_warnings_come_once_for_each_cause_and_layer():
    class Expands(nn.Module):
        def forward(self, z, x):
            return 2 * z + x

    layers = [eq.DEQ(Expands(), solver=eq.Picard(), max_steps=4) for _ in range(2)]
    x = normal(2, 3, seed=0)
    for layer in layers:
        with pytest.warns(eq.ConvergenceWarning, match="max_steps") as caught:
            layer(x)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(x)
        with pytest.warns(eq.ConvergenceWarning, match="NaN"):
            layer(x * torch.nan)


def test_warnings_of_backward_come_once_and_point_to_the_users_line():
    layer = eq.DEQ(Cell(4), adjoint=eq.Implicit(max_steps=1, rtol=1e-15), rtol=1e-12)
    x = normal(2, 4, seed=0)
    loss = layer(x).sum()
    with pytest.warns(eq.ConvergenceWarning, match="backward") as caught:
        loss.backward()
    assert [c.filename for c in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x).sum().backward()


# Tolerances.


@pytest.mark.parametrize(
    ("compute", "rtol"), [(DOUBLE, 1e-8), (torch.float32, 1e-4), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)]
)
def test_default_tolerances_follow_the_dtype_that_f_computes_in(compute, rtol):
    w = matrix(8, 0, 0.8).to(compute)

    def f(z, x):
        return torch.tanh(z.to(compute) @ w + x.to(compute))

    x, zeros = normal(3, 8, seed=1), torch.zeros(3, 8, dtype=DOUBLE)
    default = eq.fixed_point(f, zeros, x, solver=eq.Picard(), **QUIET)
    written = eq.fixed_point(f, zeros, x, solver=eq.Picard(), rtol=rtol, atol=rtol / 100, **QUIET)
    other = eq.fixed_point(f, zeros, x, solver=eq.Picard(), rtol=rtol / 10, atol=rtol / 100, **QUIET)
    assert torch.equal(default.steps, written.steps)
    assert not torch.equal(default.steps, other.steps)
    assert default.converged.all()


def test_atol_is_nothing_where_rtol_is_given_alone():
    # Entries of 1e-9: an absolute tolerance of 1e-6 would be met at once.
    x = torch.full((1, 3), 1e-9)
    f = lambda z: 0.5 * z + x  # noqa: E731
    assert eq.fixed_point(f, torch.zeros(1, 3)).steps.item() == 1
    sol = eq.fixed_point(f, torch.zeros(1, 3), rtol=1e-4)
    torch.testing.assert_close(sol.value, 2 * x, rtol=2e-4, atol=0)
    # And an absolute tolerance alone keeps the relative default.
    wide = eq.fixed_point(f, torch.zeros(1, 3), atol=0.0)
    assert torch.equal(wide.steps, eq.fixed_point(f, torch.zeros(1, 3), rtol=1e-4, atol=0.0).steps)


def test_the_worst_leaf_decides():
    slow = torch.tensor(0.99, dtype=DOUBLE)
    f = lambda z: {"fast": 0.1 * z["fast"] + 1, "slow": slow * z["slow"] + 1e-3}  # noqa: E731
    z0 = {"fast": torch.zeros(2, 50, dtype=DOUBLE), "slow": torch.zeros(2, 1, dtype=DOUBLE)}
    sol = eq.fixed_point(f, z0, solver=eq.Picard(), rtol=1e-6, max_steps=3000)
    alone = eq.fixed_point(lambda z: slow * z + 1e-3, z0["slow"], solver=eq.Picard(), rtol=1e-6, max_steps=3000)
    assert torch.equal(sol.steps, alone.steps)
    assert near(sol.residual, residual(f, sol.value))


def test_max_norm_lets_no_entry_hide():
    # One of 10,000 entries is slow: the mean hides it, the maximum does not.
    slope = torch.full((10_000,), 0.1, dtype=DOUBLE)
    slope[17] = 0.99
    f = lambda z: slope * z + 1  # noqa: E731
    zeros = torch.zeros(1, 10_000, dtype=DOUBLE)
    options = {"solver": eq.Picard(), "rtol": 1e-2, "max_steps": 2000}
    hidden = eq.fixed_point(f, zeros, **options)
    shown = eq.fixed_point(f, zeros, norm=eq.max_norm, **options)
    assert hidden.evaluations < shown.evaluations
    image = f(shown.value)
    assert (image - shown.value).abs().max() <= 1e-2 * image.abs().max()


# Company of a solve: callback, aux, warm start.


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grad", [False, True])
def test_the_callback_sees_every_evaluation(solver, grad):
    w, x = matrix(4, 0, 0.8).requires_grad_(), normal(2, 3, 4, seed=1)
    seen: list[eq.Iterate] = []
    with torch.set_grad_enabled(grad):
        sol = eq.fixed_point(
            tanh_map("tensor", 2),
            torch.zeros(2, 3, 4, dtype=DOUBLE),
            w,
            x,
            solver=solver,
            adjoint=eq.Unrolled(),
            batch_dims=2,
            callback=seen.append,
            max_steps=300,
        )
    assert [it.evaluations for it in seen] == list(range(1, sol.evaluations + 1))
    for it in seen:
        assert it.residual.shape == it.status.shape == it.active.shape == (2, 3)
        assert not it.value.requires_grad
        assert near(it.residual, residual(tanh_map("tensor", 2), it.value, w, x, batch_dims=2))
        assert torch.equal(it.active, it.evaluations < sol.steps)
    assert same(seen[-1].value, sol.value)
    seen[-1].value.zero_()  # it is the callback's own copy
    assert sol.value.abs().min() > 0


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("grad", [False, True])
def test_aux_is_that_of_the_returned_value(grad, adjoint):
    slope = torch.tensor([[0.5], [2.0], [0.1], [1.0]], dtype=DOUBLE, requires_grad=True)
    x = torch.tensor([[1.0], [1.0], [torch.nan], [1.0]], dtype=DOUBLE)
    f = lambda z, x: (slope * z + x, (z * 3, "kept"))  # noqa: E731
    with torch.set_grad_enabled(grad):
        sol = eq.fixed_point(
            f,
            torch.ones(4, 1, dtype=DOUBLE),
            x,
            solver=eq.Picard(),
            adjoint=adjoint,
            max_steps=40,
            has_aux=True,
            **QUIET,
        )
    assert sol.status.tolist() == [0, eq.Status.MAX_STEPS, eq.Status.NONFINITE, eq.Status.MAX_STEPS]
    tripled, word = sol.aux
    assert same(tripled, sol.value.detach() * 3)
    assert word == "kept"
    assert not tripled.requires_grad


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_warm_start_at_the_solution_is_done_in_one_evaluation(solver):
    w, x = matrix(6, 0, 0.7), normal(3, 6, seed=1)
    zeros = torch.zeros(3, 6, dtype=DOUBLE)
    first = eq.fixed_point(tanh_map(), zeros, w, x, solver=solver, max_steps=300)
    again = eq.fixed_point(tanh_map(), zeros, w, x, solver=solver, state=first.state)
    assert again.evaluations == 1
    assert same(again.value, first.value)
    near_by = eq.fixed_point(tanh_map(), zeros, w, x + 1e-4, solver=solver, state=first.state, max_steps=300)
    cold = eq.fixed_point(tanh_map(), zeros, w, x + 1e-4, solver=solver, max_steps=300)
    assert near_by.evaluations < cold.evaluations
    torch.testing.assert_close(near_by.value, cold.value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_state_can_be_started_from_twice(solver):
    w, x = matrix(6, 0, 0.9), normal(3, 6, seed=1)
    zeros = torch.zeros(3, 6, dtype=DOUBLE)
    first = eq.fixed_point(tanh_map(), zeros, w, x, solver=solver, max_steps=9, **QUIET)
    runs = [eq.fixed_point(tanh_map(), zeros, w, x, solver=solver, state=first.state, max_steps=400) for _ in range(2)]
    assert same(runs[0].value, runs[1].value)
    assert torch.equal(runs[0].steps, runs[1].steps)


def test_a_state_of_another_solver_gives_its_point_alone():
    w, x = matrix(6, 0, 0.9), normal(3, 6, seed=1)
    zeros = torch.zeros(3, 6, dtype=DOUBLE)
    first = eq.fixed_point(tanh_map(), zeros, w, x, max_steps=5, **QUIET)
    other = eq.fixed_point(tanh_map(), zeros, w, x, solver=eq.Picard(), state=first.state, max_steps=2, **QUIET)
    plain = eq.fixed_point(tanh_map(), first.value, w, x, solver=eq.Picard(), max_steps=2, **QUIET)
    assert same(other.value, plain.value)


def test_a_state_that_knows_a_sample_of_nan_serves_the_next_solve():
    w, x = matrix(6, 0, 0.7), normal(3, 6, seed=1)
    zeros, broken = torch.zeros(3, 6, dtype=DOUBLE), x.clone()
    broken[1] = torch.nan
    for steps in (3, 300):
        first = eq.fixed_point(tanh_map(), zeros, w, broken, max_steps=steps, **QUIET)
        healed = eq.fixed_point(tanh_map(), zeros, w, x, state=first.state)
        torch.testing.assert_close(healed.value, eq.fixed_point(tanh_map(), zeros, w, x).value, rtol=1e-6, atol=1e-8)
