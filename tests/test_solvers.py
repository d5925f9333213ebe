"""What each solver promises: of fixed points, of linear systems, and of spectra."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from maps import Counted, generator, join, matrix, normal, residual, split, tanh_map, width
from torch import Tensor

import equilibria as eq
from equilibria.linear import Basis

DOUBLE = torch.float64
LAW = settings(derandomize=True, max_examples=60, deadline=None)


def chain(length: int, width: int, scale: float, seed: int, linear: bool = False):
    """A network of `length` layers as one map on the stack of its activations: nilpotent, whatever the scale.

    Returns the map, a start, and the activations that evaluating the network layer by layer gives.
    """
    weights = [scale * torch.linalg.qr(matrix(width, seed + k, 1.0)).Q for k in range(length)]
    x = normal(2, width, seed=seed + 100)
    layer = (lambda h, w: h @ w) if linear else (lambda h, w: torch.tanh(h @ w))

    def f(z: Tensor) -> Tensor:
        activations = z.reshape(2, length, width).unbind(1)
        return torch.stack([layer(h, w) for h, w in zip((x, *activations), weights, strict=False)], dim=1).flatten(1)

    truth = [x]
    for w in weights:
        truth.append(layer(truth[-1], w))
    return f, torch.zeros(2, length * width, dtype=DOUBLE), torch.stack(truth[1:], dim=1).flatten(1)


# Fixed points.


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0, 30.0])
@pytest.mark.parametrize("length", [1, 8, 24])
def test_plain_iteration_is_exact_in_one_evaluation_more_than_there_are_layers(length, scale, linear):
    f, zeros, truth = chain(length, 4, scale, seed=0, linear=linear)
    sol = eq.fixed_point(f, zeros, solver=eq.Picard(), rtol=0.0, atol=0.0)
    assert sol.evaluations == length + 1
    assert torch.equal(sol.value, truth)
    assert (sol.residual == 0).all()


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("history", [2, 6, 20])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("length", [8, 24])
def test_anderson_solves_embedded_networks_or_says_that_it_did_not(length, scale, history, linear):
    for seed in range(3):
        f, zeros, truth = chain(length, 4, scale, seed=10 * seed, linear=linear)
        cap = 100 if history == 6 else 400
        sol = eq.fixed_point(f, zeros, solver=eq.Anderson(history=history), max_steps=cap, on_failure="ignore")
        assert torch.allclose(sol.residual, residual(f, sol.value), rtol=1e-10)
        done = sol.converged
        # One and the same bound as for anyone: the residual, times what the network amplifies.
        error = (sol.value - truth).norm(dim=1) / truth.norm(dim=1)
        assert (error[done] < 1e-7 * max(1.0, scale) ** length * length).all()
        if history == 6:  # the default is safeguarded well enough to get there
            assert done.all(), (seed, sol.status, sol.residual)


def test_plain_turns_of_anderson_grow_until_one_is_long_enough():
    f, zeros, truth = chain(60, 4, 3.0, seed=0, linear=True)
    sol = eq.fixed_point(f, zeros, max_steps=400)
    torch.testing.assert_close(sol.value, truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_anderson_beats_plain_iteration_on_symmetric_maps_that_contract_slowly(seed):
    q = torch.linalg.qr(matrix(20, seed, 1.0)).Q
    radius = torch.linspace(-0.99, 0.99, 20, dtype=DOUBLE)
    a, x = q @ torch.diag(radius) @ q.T, normal(3, 20, seed=seed + 50)
    f = lambda z: z @ a + x  # noqa: E731
    zeros = torch.zeros(3, 20, dtype=DOUBLE)
    plain = eq.fixed_point(f, zeros, solver=eq.Picard(), max_steps=5000)
    fast = eq.fixed_point(f, zeros, solver=eq.Anderson(), max_steps=5000)
    assert fast.evaluations < plain.evaluations / 4
    # On a linear map with a full history it is GMRES: as many evaluations as there are dimensions.
    full = eq.fixed_point(f, zeros, solver=eq.Anderson(history=25), max_steps=5000)
    assert full.evaluations <= 25


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_history_longer_than_the_state_breaks_nothing(n, dtype):
    w, x = matrix(n, 0, 0.9, dtype), normal(4, n, seed=1, dtype=dtype)
    zeros = torch.zeros(4, n, dtype=dtype)
    for history in (1, n, n + 1, 3 * n + 5):
        sol = eq.fixed_point(tanh_map(), zeros, w, x, solver=eq.Anderson(history=history), max_steps=60)
        assert sol.value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_dependent_columns_of_the_history_break_nothing(dtype):
    # All differences lie on a line (rank one), in a plane (rank two), or are one and the same.
    x = normal(4, 30, seed=3, dtype=dtype)
    for rank in (1, 2):
        u = torch.linalg.qr(normal(30, rank, seed=rank)).Q.to(dtype)
        rates = torch.tensor([0.9, -0.8], dtype=dtype)[:rank]
        f = lambda z, u=u, rates=rates: ((z @ u) * rates) @ u.T + x  # noqa: E731
        sol = eq.fixed_point(f, torch.zeros(4, 30, dtype=dtype), solver=eq.Anderson(history=10))
        assert sol.evaluations <= 3 * rank + 5
        curved = lambda z, u=u, rates=rates: torch.tanh((z @ u) * rates) @ u.T + x  # noqa: E731
        for history in (6, 20):
            options = {"solver": eq.Anderson(history=history), "rtol": 10 * torch.finfo(dtype).eps}
            assert eq.fixed_point(curved, torch.zeros(4, 30, dtype=dtype), **options).evaluations <= 25
    same_step = eq.fixed_point(lambda z: z + 1, torch.zeros(2, 3, dtype=dtype), max_steps=30, on_failure="ignore")
    assert same_step.value.isfinite().all()
    assert (same_step.status == eq.Status.MAX_STEPS).all()


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_anderson_solves_linear_maps_of_low_rank_to_the_last_digits_in_as_many_steps(rank):
    # Its regulariser stays out of the way.
    u = torch.linalg.qr(normal(30, rank, seed=rank)).Q
    rates, x = torch.linspace(-0.95, 0.9, rank, dtype=DOUBLE), normal(4, 30, seed=3)
    f = lambda z: ((z @ u) * rates) @ u.T + x  # noqa: E731
    sol = eq.fixed_point(f, torch.zeros(4, 30, dtype=DOUBLE), rtol=1e-12)
    assert sol.evaluations <= rank + 4


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_anderson_finds_equilibria_of_maps_that_expand(dtype):
    x = normal(4, 5, seed=0, dtype=dtype)
    slope = -torch.linspace(0.5, 6, 5, dtype=dtype)
    f = lambda z: slope * z + 0.2 * torch.sin(z) + x  # noqa: E731
    sol = eq.fixed_point(f, torch.zeros(4, 5, dtype=dtype), solver=eq.Anderson(relaxation=0.3), max_steps=60)
    assert sol.converged.all()


def test_the_scale_of_a_problem_is_nothing_to_anderson():
    w, x = matrix(8, 0, 0.95), normal(3, 8, seed=1)
    steps = []
    for scale in (1e-60, 1e-9, 1.0, 1e9, 1e60):
        f = lambda z, s=scale: s * torch.tanh(z / s @ w + x)  # noqa: E731
        steps.append(eq.fixed_point(f, torch.zeros(3, 8, dtype=DOUBLE), rtol=1e-9).steps)
    for other in steps:
        assert (other - steps[2]).abs().max() <= 1


@LAW
@given(seed=st.integers(0, 9999), gain=st.floats(0.1, 0.97), n=st.integers(1, 12), history=st.integers(1, 12))
def test_anderson_converges_wherever_plain_iteration_contracts(seed, gain, n, history):
    w, x = matrix(n, seed, gain), normal(3, n, seed=seed + 1)
    zeros = torch.zeros(3, n, dtype=DOUBLE)
    sol = eq.fixed_point(tanh_map(), zeros, w, x, solver=eq.Anderson(history=history), max_steps=1000)
    true = eq.fixed_point(tanh_map(), zeros, w, x, solver=eq.Picard(), rtol=1e-12, max_steps=5000)
    torch.testing.assert_close(sol.value, true.value, rtol=1e-5, atol=1e-5 * true.value.abs().max().item())


def test_relaxation_is_what_it_says():
    seen: list[eq.Iterate] = []
    f = lambda z: 1 - 3 * z  # noqa: E731
    eq.fixed_point(f, torch.ones(1, 1, dtype=DOUBLE), solver=eq.Picard(0.25), callback=seen.append, max_steps=3)
    assert [it.value.item() for it in seen] == [1.0, 0.25]  # 0.75 * 1 + 0.25 * (1 - 3): the equilibrium is 0.25


# Linear systems.


def gmres(a: Tensor, b: Tensor, rtol: float = 1e-10, restart: int = 20, max_steps: int = 200):
    """Solve a x = b for a batch of matrices (batch, n, n); returns the solution and the calls made."""
    operator = Counted(lambda x: torch.einsum("bij,bj->bi", a, x))
    level = 16 * torch.finfo(b.dtype).eps
    found = eq.GMRES(restart=restart).solve(operator, b, rtol=rtol, level=level, max_steps=max_steps, agree=bool)
    assert operator.calls == found.products <= max_steps
    assert (found.steps <= max_steps).all()
    return found


def true_residual(a: Tensor, x: Tensor, b: Tensor) -> Tensor:
    left = torch.einsum("bij,bj->bi", a.double(), x.double()) - b.double()
    return left.norm(dim=1) / b.double().norm(dim=1)


@LAW
@given(
    seed=st.integers(0, 9999),
    n=st.integers(1, 12),
    shift=st.sampled_from([0.0, 1.0, 3.0]),
    restart=st.sampled_from([1, 3, 20]),
    max_steps=st.sampled_from([1, 2, 3, 8, 200]),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
)
def test_gmres_is_right_where_it_says_so(seed, n, shift, restart, max_steps, dtype):
    a = torch.stack([matrix(n, seed + k, 1.0) for k in range(4)]) + shift * torch.eye(n, dtype=DOUBLE)
    a, b = a.to(dtype), normal(4, n, seed=seed + 9, dtype=dtype)
    rtol = 1e-10 if dtype == DOUBLE else 1e-4
    found = gmres(a, b, rtol=rtol, restart=restart, max_steps=max_steps)
    true = true_residual(a, found.x, b)
    done = found.status == eq.Status.CONVERGED
    slack = 1e-13 if dtype == DOUBLE else 1e-5
    assert (true[done] <= rtol + slack * found.x.norm(dim=1)[done]).all()
    assert torch.allclose(found.residual.double(), true, rtol=0.1, atol=slack * (1 + found.x.norm(dim=1).max().item()))
    assert (found.residual <= true_residual(a, b, b) * 1.01 + slack).all()  # never worse than where it started
    if max_steps < 200:
        return
    if shift == 3.0:
        assert done.all()
    if restart == 20 and dtype == DOUBLE and torch.linalg.cond(a).max() < 1e4:
        assert done.all()
        assert (found.steps <= n + 3).all()
        want = torch.linalg.solve(a, b)
        torch.testing.assert_close(found.x, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())


def test_gmres_of_a_right_hand_side_of_zeros_is_zeros_at_once():
    a = torch.stack([matrix(5, k, 1.0) for k in range(3)])
    b = normal(3, 5, seed=0)
    b[1] = 0
    found = gmres(a, b)
    assert (found.status == eq.Status.CONVERGED).all()
    assert (found.x[1] == 0).all()
    assert found.residual[1] == 0
    assert found.steps[1] <= 1
    zeros = gmres(a, torch.zeros(3, 5, dtype=DOUBLE))
    assert zeros.products <= 1
    assert (zeros.x == 0).all()


@LAW
@example(seed=0, n=3, rank=1, consistent=False, restart=2, dtype=DOUBLE)  # x of 1e15
@given(
    seed=st.integers(0, 9999),
    n=st.integers(1, 10),
    rank=st.integers(0, 9),
    consistent=st.booleans(),
    restart=st.sampled_from([1, 2, 20]),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
)
def test_gmres_of_singular_systems_is_never_wrongly_done(seed, n, rank, consistent, restart, dtype):
    rank = min(rank, n - 1)
    left, right = torch.linalg.qr(matrix(n, seed, 1.0)).Q, torch.linalg.qr(matrix(n, seed + 1, 1.0)).Q
    a = (left[:, :rank] @ right[:rank]).to(dtype).expand(3, n, n)
    b = normal(3, n, seed=seed + 2, dtype=dtype)
    if consistent:
        b = torch.einsum("bij,bj->bi", a, b)
    found = gmres(a, b, restart=restart, rtol=1e-8 if dtype == DOUBLE else 1e-4)
    assert found.x.isfinite().all()
    done = (found.status == eq.Status.CONVERGED) & (b.norm(dim=1) > 0)
    bound = (1e-8 if dtype == DOUBLE else 1e-4) + 16 * torch.finfo(dtype).eps * (found.x.norm(dim=1) / b.norm(dim=1))
    assert (true_residual(a, found.x, b)[done] <= bound.double()[done]).all()
    if not consistent:
        reach = torch.linalg.lstsq(a.double(), b.double()[:, :, None]).solution[:, :, 0]
        impossible = true_residual(a, reach, b) > 1e-3
        assert not (done & impossible).any()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_gmres_of_stiff_systems_is_right_where_it_says_so(dtype):
    # Norms up to 1e5: the recurrence for the residual rounds to that, and only a product tells.
    rtol = 1e-9 if dtype == DOUBLE else 1e-4
    n = 20
    spectra = {
        "outlier": torch.cat([torch.ones(n - 2, dtype=DOUBLE), torch.tensor([1e4, 1e-2], dtype=DOUBLE)]),
        "wide": torch.logspace(-1, 5, n, dtype=DOUBLE),
        "small": torch.logspace(-4, 0, n, dtype=DOUBLE),
        "middling": torch.logspace(-2, 0, n, dtype=DOUBLE),
    }
    for seed, (name, spectrum) in enumerate(spectra.items()):
        q = torch.linalg.qr(matrix(n, seed, 1.0)).Q
        a = (q @ torch.diag(spectrum) @ q.T).to(dtype)[None]
        b = normal(1, n, seed=seed + 5, dtype=dtype)
        found = gmres(a, b, rtol=rtol)
        true = true_residual(a, found.x, b).item()
        # Its own arithmetic cannot see below the rounding of A x.
        seen = torch.finfo(dtype).eps * spectrum.max().item() * (found.x.norm() / b.norm()).item()
        if found.status.item() == eq.Status.CONVERGED:
            assert true <= rtol + seen, name
        assert abs(found.residual.item() - true) <= 0.1 * true + seen, name
        own = (b - torch.einsum("bij,bj->bi", a, found.x)).norm().item() / b.norm().item()
        # A product at the same point may round otherwise where its operand lies elsewhere in memory.
        assert max(found.residual.item(), 0.1 * rtol) + seen > 0.3 * own, name
        if seen < 0.3 * rtol:  # elsewhere no solver can know
            assert found.status.item() == eq.Status.CONVERGED, name
            assert found.steps <= n + 4


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_krylov_vectors_are_orthonormal_to_rounding_on_stiff_operators_too(dtype):
    q = torch.linalg.qr(matrix(30, 0, 1.0)).Q
    a = (q @ torch.diag(torch.logspace(-3, 3, 30, dtype=DOUBLE)) @ q.T).to(dtype)
    first = normal(2, 30, seed=1, dtype=dtype)
    basis = Basis(first / first.norm(dim=1, keepdim=True))
    for k in range(12):
        basis.extend(basis[k] @ a)
    vectors = torch.stack([basis[k] for k in range(13)], dim=1)
    eye = torch.eye(13, dtype=dtype).expand(2, 13, 13)
    bound = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(torch.bmm(vectors, vectors.mT), eye, rtol=0, atol=bound)


def test_gmres_of_a_shift_does_not_pretend():
    # The cyclic shift is the worst case: nothing improves before the last vector.
    n = 12
    a = torch.roll(torch.eye(n, dtype=DOUBLE), 1, dims=0)[None]
    b = torch.zeros(1, n, dtype=DOUBLE)
    b[0, 0] = 1
    full = gmres(a, b, restart=n)
    assert full.status.item() == eq.Status.CONVERGED
    short = gmres(a, b, restart=n - 2)
    assert short.status.item() == eq.Status.MAX_STEPS
    assert short.residual.item() == pytest.approx(true_residual(a, short.x, b).item())


@pytest.mark.parametrize("when", [1, 2, 4])
def test_gmres_beside_an_operator_that_turns_nan(when):
    a = torch.stack([matrix(6, k, 1.0) + 2 * torch.eye(6, dtype=DOUBLE) for k in range(3)])
    b = normal(3, 6, seed=0)
    calls = [0]

    def operator(x):
        calls[0] += 1
        y = torch.einsum("bij,bj->bi", a, x)
        if calls[0] >= when:
            y = y.clone()
            y[1, 2] = torch.nan
        return y

    found = eq.GMRES().solve(operator, b, rtol=1e-10, level=1e-15, max_steps=50, agree=bool)
    alone = gmres(a[[0, 2]], b[[0, 2]])
    assert found.status.tolist() == [0, eq.Status.NONFINITE, 0]
    torch.testing.assert_close(found.x[[0, 2]], alone.x, rtol=1e-12, atol=0)
    assert torch.equal(found.steps[[0, 2]], alone.steps)
    assert found.x[1].isfinite().all()


def test_gmres_reports_steps_of_each_sample_on_its_own():
    # Sample k has k distinct eigenvalues, of which the start b solves for one, and its residual takes a product.
    n = 6
    a = torch.stack([torch.diag(1.0 + torch.arange(n, dtype=DOUBLE).clamp(max=k - 1)) for k in range(1, n + 1)])
    found = gmres(a, torch.ones(n, n, dtype=DOUBLE))
    assert found.steps.tolist() == list(range(1, n + 1))
    assert (found.status == eq.Status.CONVERGED).all()


# The backward solve's fallback.


def test_restarted_gmres_stagnates_on_a_nilpotent_jacobian_and_plain_iteration_takes_over():
    f, zeros, _ = chain(48, 2, 1.0, seed=0, linear=True)
    x = torch.zeros_like(zeros, requires_grad=True)
    g = lambda z: f(z) + x  # noqa: E731
    v = torch.zeros_like(zeros)
    v[:, -2:] = 1
    (want,) = torch.autograd.grad(eq.fixed_point(g, zeros, solver=eq.Picard(), adjoint=eq.Unrolled()).value, x, v)
    sol = eq.fixed_point(g, zeros, solver=eq.Picard())
    (got,) = torch.autograd.grad(sol.value, x, v)
    assert (sol.adjoint.status == eq.Status.CONVERGED).all()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    alone = eq.fixed_point(g, zeros, solver=eq.Picard(), adjoint=eq.Implicit(solver=eq.GMRES()), on_failure="ignore")
    torch.autograd.grad(alone.value, x, v)
    assert (alone.adjoint.status != eq.Status.CONVERGED).all()


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("length", [8, 64])
def test_recurrent_back_propagation_is_exact_on_networks_however_far_their_gradients_lie_apart(length, scale):
    # Up to 1e94 apart, or down to 1e-128: what matters is each layer's own gradient, and not its share of the norm.
    f, zeros, _ = chain(length, 3, scale, seed=0, linear=True)
    x = torch.zeros_like(zeros, requires_grad=True)
    v = torch.zeros_like(zeros)
    v[:, -3:] = 1
    (want,) = torch.autograd.grad(
        eq.fixed_point(lambda z: f(z) + x, zeros, solver=eq.Picard(), adjoint=eq.Unrolled(), rtol=0.0).value, x, v
    )
    adjoint = eq.Implicit(solver=eq.Picard(), rtol=0.0)
    sol = eq.fixed_point(lambda z: f(z) + x, zeros, solver=eq.Picard(), adjoint=adjoint, rtol=0.0)
    (got,) = torch.autograd.grad(sol.value, x, v)
    assert (sol.adjoint.status == eq.Status.CONVERGED).all()
    assert (sol.adjoint.residual == 0).all()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    if scale == 3.0:  # the default hands over to plain iteration
        sol = eq.fixed_point(lambda z: f(z) + x, zeros, solver=eq.Picard())
        (got,) = torch.autograd.grad(sol.value, x, v)
        assert (sol.adjoint.status == eq.Status.CONVERGED).all()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


class _CountedProduct(torch.autograd.Function):
    """The identity, which counts how often it is differentiated."""

    calls = 0

    @staticmethod
    def forward(ctx, z):
        return z.view_as(z)

    @staticmethod
    def backward(ctx, *grads):
        _CountedProduct.calls += 1
        return grads[0]


def test_the_fallback_ends_when_the_samples_it_is_for_are_solved():
    f, zeros, _ = chain(48, 2, 1.0, seed=0, linear=True)
    keep = torch.tensor([[1.0], [0.01]], dtype=DOUBLE)  # the second sample is easy for GMRES
    x = torch.zeros_like(zeros, requires_grad=True)
    sol = eq.fixed_point(lambda z: f(_CountedProduct.apply(z) * keep) + x, zeros, solver=eq.Picard())
    v = torch.zeros_like(zeros)
    v[:, -2:] = 1
    _CountedProduct.calls = 0
    torch.autograd.grad(sol.value, x, v)
    assert (sol.adjoint.status == eq.Status.CONVERGED).all()
    assert _CountedProduct.calls == sol.adjoint.steps.max()


# Spectra.


def radius(a: Tensor, **options) -> Tensor:
    """Of the maps z -> a z, for a batch of matrices."""
    zeros = torch.zeros(a.shape[:2], dtype=a.dtype)
    return eq.diagnostics.spectral_radius(lambda z: torch.einsum("bij,bj->bi", a, z), zeros, **options)


@LAW
@given(seed=st.integers(0, 9999), n=st.integers(1, 30), batch=st.integers(1, 4))
def test_spectral_radius_is_the_largest_eigenvalue(seed, n, batch):
    a = torch.randn(batch, n, n, generator=generator(seed), dtype=DOUBLE)
    want = torch.linalg.eigvals(a).abs().amax(dim=1)
    torch.testing.assert_close(radius(a), want, rtol=5e-2, atol=0)  # 1e-3 by the condition of such eigenvalues
    torch.testing.assert_close(radius(a, rtol=1e-10), want, rtol=1e-6, atol=0)


def test_spectral_radius_of_rotations_symmetric_and_signed_maps():
    angle = torch.linspace(0.1, 3.1, 7, dtype=DOUBLE)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).reshape(7, 2, 2)
    torch.testing.assert_close(radius(0.9 * turn), torch.full((7,), 0.9, dtype=DOUBLE), rtol=1e-9, atol=0)
    both = torch.diag(torch.tensor([0.8, -0.8, 0.1], dtype=DOUBLE))[None]
    torch.testing.assert_close(radius(both), torch.tensor([0.8], dtype=DOUBLE), rtol=1e-9, atol=0)
    one = torch.tensor([[[-3.0]], [[0.5]], [[0.0]]], dtype=DOUBLE)
    torch.testing.assert_close(radius(one), torch.tensor([3.0, 0.5, 0.0], dtype=DOUBLE), rtol=1e-12, atol=0)


def test_spectral_radius_of_small_nilpotent_maps_is_small():
    for n in (2, 3, 4):
        shift = torch.diag(torch.ones(n - 1, dtype=DOUBLE), 1)[None]
        assert radius(shift).item() < 1e-3
        q = torch.linalg.qr(matrix(n, n, 1.0)).Q
        assert radius(q.T @ shift @ q).item() < 1e-3
    assert radius(torch.zeros(2, 5, 5, dtype=DOUBLE)).tolist() == [0.0, 0.0]


def test_spectral_radius_of_a_sample_depends_on_no_other():
    a = torch.randn(5, 40, 40, generator=generator(0), dtype=DOUBLE) / 40**0.5
    a[3] = torch.eye(40) * 0.3
    together = radius(a, rtol=1e-4)
    for i in range(5):
        torch.testing.assert_close(radius(a[i : i + 1], rtol=1e-4), together[i : i + 1], rtol=1e-10, atol=0)
    a[1, 0, 0] = torch.nan
    broken = radius(a, rtol=1e-4)
    assert broken[1].isnan()
    torch.testing.assert_close(broken[[0, 2, 3, 4]], together[[0, 2, 3, 4]], rtol=1e-10, atol=0)


def test_spectral_radius_says_when_it_missed():
    a = torch.randn(2, 60, 60, generator=generator(0), dtype=DOUBLE)
    with pytest.warns(eq.ConvergenceWarning, match="2 of 2 samples"):
        radius(a, max_steps=5, rtol=1e-6)


@pytest.mark.parametrize("structure", ["tuple", "nested"])
def test_spectral_radius_at_an_equilibrium_of_any_structure(structure):
    n = width(structure)
    w, x = matrix(n, 0, 0.9), normal(3, n, seed=1)
    sol = eq.fixed_point(tanh_map(structure), split(torch.zeros(3, n, dtype=DOUBLE), structure), w, x, rtol=1e-12)
    got = eq.diagnostics.spectral_radius(tanh_map(structure), sol.value, w, x, rtol=1e-8)
    z = join(sol.value, 1).detach()
    jacobian = w.T * (1 - z.square())[:, :, None]
    torch.testing.assert_close(got, torch.linalg.eigvals(jacobian).abs().amax(dim=1), rtol=1e-6, atol=0)
    assert not got.requires_grad


def test_spectral_radius_of_nothing_and_of_a_joint_problem():
    assert eq.diagnostics.spectral_radius(lambda z: z, torch.zeros(0, 3)).shape == (0,)
    assert eq.diagnostics.spectral_radius(lambda z: z, torch.zeros(3, 0)).tolist() == [0, 0, 0]
    joint = eq.diagnostics.spectral_radius(lambda z: 0.5 * z.flip(0), torch.zeros(3, 2), batch_dims=0)
    assert joint.shape == ()
    assert joint.item() == pytest.approx(0.5)
    two = eq.diagnostics.spectral_radius(lambda z: 0.5 * z, torch.zeros(3, 2, 4), batch_dims=2)
    assert two.shape == (3, 2)
