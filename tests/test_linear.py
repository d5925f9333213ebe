"""Linear solvers against dense algebra, sample by sample, and what they say where there is nothing to solve."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import generator, normal
from torch import Tensor

import equilibria as eq

GENERAL = [eq.GMRES(), eq.GMRES(restart=4), eq.BiCGSTAB(), eq.Dense()]
EVERY = [*GENERAL, eq.ConjugateGradient()]
RTOL, LEVEL = 1e-10, 4e-15


def systems(batch: int, n: int, seed: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Well-conditioned matrices, (batch, n, n), and right-hand sides."""
    noise = torch.randn(batch, n, n, generator=generator(seed), dtype=torch.float64) * 0.4 / n**0.5
    eye = torch.eye(n, dtype=torch.float64)
    matrices = eye + noise
    return (matrices @ matrices.mT + eye if symmetric else matrices), normal(batch, n, seed=seed + 1)


def solve(solver: eq.LinearSolver, matrices: Tensor, b: Tensor, max_steps: int = 300) -> eq.LinearSolution:
    return solver.solve(lambda x: (matrices @ x[:, :, None])[:, :, 0], b, RTOL, LEVEL, max_steps, bool)


@pytest.mark.parametrize("solver", EVERY, ids=repr)
@settings(max_examples=40)
@given(batch=st.integers(1, 5), n=st.integers(1, 24), seed=st.integers(0, 10_000))
def test_agrees_with_a_dense_solve(solver: eq.LinearSolver, batch: int, n: int, seed: int) -> None:
    matrices, b = systems(batch, n, seed, symmetric=solver == eq.ConjugateGradient())
    found = solve(solver, matrices, b)
    assert (found.status == eq.Status.CONVERGED).all()
    torch.testing.assert_close(found.x, torch.linalg.solve(matrices, b), rtol=1e-8, atol=1e-8)
    left = (b - (matrices @ found.x[:, :, None])[:, :, 0]).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(found.residual, left, rtol=1e-3, atol=1e-13)


@pytest.mark.parametrize("solver", EVERY, ids=repr)
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_a_sample_is_solved_alike_in_any_company(solver: eq.LinearSolver, seed: int) -> None:
    matrices, b = systems(5, 12, seed, symmetric=solver == eq.ConjugateGradient())
    matrices[1] = torch.nan
    matrices[2] *= 1e-3 + torch.rand(12, 1, generator=generator(seed), dtype=torch.float64)  # takes longer
    b[3] = 0
    together = solve(solver, matrices, b)
    for row in (0, 3, 4):
        alone = solve(solver, matrices[row : row + 1], b[row : row + 1])
        torch.testing.assert_close(together.x[row], alone.x[0], rtol=1e-9, atol=1e-11)
        assert together.status[row] == alone.status[0]
        assert together.steps[row] == alone.steps[0]
    assert together.status[1] == eq.Status.NONFINITE
    assert (together.x[3] == 0).all()
    assert together.status[3] == eq.Status.CONVERGED


@pytest.mark.parametrize("solver", EVERY, ids=repr)
@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 10))
def test_a_singular_system_without_solution_is_never_called_solved(solver: eq.LinearSolver, seed: int, n: int) -> None:
    matrices, _ = systems(3, n, seed, symmetric=True)
    values, vectors = torch.linalg.eigh(matrices)
    values = torch.cat([torch.zeros(3, 1, dtype=torch.float64), values[:, 1:]], dim=1)
    matrices = vectors @ (values[:, :, None] * vectors.mT)
    found = solve(solver, matrices, vectors[:, :, 0] + vectors[:, :, -1])  # half outside the range
    assert not (found.status == eq.Status.CONVERGED).any()
    assert (found.residual > 0.1).all()


def test_breakdown_is_told() -> None:
    rotation = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]], dtype=torch.float64)
    b = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert solve(eq.ConjugateGradient(), -rotation @ rotation.mT, b).status[0] in (
        eq.Status.BREAKDOWN,
        eq.Status.CONVERGED,
    )
    indefinite = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))[None]
    assert solve(eq.ConjugateGradient(), indefinite, torch.ones(1, 2, dtype=torch.float64) * 2).status[0] == 4
    singular = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))[None]
    assert solve(eq.Dense(), singular, torch.ones(1, 2, dtype=torch.float64)).status[0] == eq.Status.BREAKDOWN


def test_stagnation_is_data_and_leaves_the_budget_where_something_takes_over() -> None:
    # A cyclic shift: restarted GMRES gains next to nothing in any cycle shorter than the state.
    shift = torch.roll(torch.eye(12, dtype=torch.float64), 1, dims=0)[None]
    b = torch.zeros(1, 12, dtype=torch.float64)
    b[0, 0] = 1
    found = solve(eq.GMRES(restart=4, give_up=True), shift, b, max_steps=300)
    assert found.status[0] == eq.Status.MAX_STEPS
    assert found.products <= 20  # hopeless after a cycle
    found = solve(eq.GMRES(restart=4), shift, b, max_steps=300)
    assert found.status[0] == eq.Status.MAX_STEPS
    assert 290 <= found.products <= 300
    # Where a cycle gains nothing at all the next one would be the same.
    still = torch.zeros(1, 12, dtype=torch.float64)
    still[0, :6] = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    turn = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * 6)[None]
    assert solve(eq.GMRES(restart=1), turn, still, max_steps=300).products <= 6
    assert solve(eq.GMRES(restart=12), shift, b).status[0] == eq.Status.CONVERGED


@pytest.mark.parametrize("solver", [eq.GMRES(), eq.BiCGSTAB(), eq.ConjugateGradient()], ids=repr)
def test_products_are_counted_and_held_to_the_limit(solver: eq.LinearSolver) -> None:
    matrices, b = systems(3, 40, 0, symmetric=True)
    for allowed in (1, 2, 3, 7, 60):
        calls = 0

        def operator(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return (matrices @ x[:, :, None])[:, :, 0]

        found = solver.solve(operator, b, RTOL, LEVEL, allowed, bool)
        assert found.products == calls <= max(allowed, 2)
        assert int(found.steps.max()) == found.products


def test_too_large_for_dense_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"Dense\(max_size=8\).*eq\.GMRES\(\)"):
        eq.Dense(max_size=8).solve(lambda x: x, torch.ones(1, 9), 1e-4, 1e-6, 10, bool)


@pytest.mark.parametrize("seed", range(6))
def test_what_the_others_need_is_not_taken_from_the_products_that_a_sample_may_use(seed: int) -> None:
    # Products that round coarsely make samples begin new cycles at different products, near the limit or not.
    matrices, b = systems(5, 12, seed, symmetric=False)
    size = torch.linspace(0.2, 1.5, 5, dtype=torch.float64)
    matrices = torch.eye(12, dtype=torch.float64) + size[:, None, None] * (
        matrices - torch.eye(12, dtype=torch.float64)
    )

    def found(rows: list[int], allowed: int) -> eq.LinearSolution:
        def operator(x: Tensor) -> Tensor:
            return torch.stack([matrices[i] @ row for i, row in zip(rows, x, strict=True)]).bfloat16().double()

        return eq.GMRES(restart=5).solve(operator, b[rows], 1e-3, 1e-4, allowed, bool)

    for allowed in range(3, 24):
        together = found([0, 1, 2, 3, 4], allowed)
        assert (together.steps <= allowed).all()
        for i in range(5):
            alone = found([i], allowed)
            assert alone.steps[0] == together.steps[i]
            assert alone.status[0] == together.status[i]
            torch.testing.assert_close(alone.x[0], together.x[i], rtol=1e-9, atol=1e-12)
