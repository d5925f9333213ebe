"""The problems that every solver of equations is tried on, in batch, beside SciPy; and some without a solution."""

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import equilibria as eq

DTYPE = torch.float64
NEWTON, DENSE_NEWTON, BROYDEN = eq.Newton(), eq.Newton(eq.Dense()), eq.Broyden(history=200)


def neighbours(z: Tensor) -> tuple[Tensor, Tensor]:
    return F.pad(z[:, :-1], (1, 0)), F.pad(z[:, 1:], (0, 1))


def rosenbrock(z: Tensor) -> Tensor:
    return torch.stack([10 * (z[:, 1] - z[:, 0] ** 2), 1 - z[:, 0]], dim=1)


def broyden_tridiagonal(z: Tensor) -> Tensor:
    before, after = neighbours(z)
    return (3 - 2 * z) * z - before - 2 * after + 1


def discrete_boundary_value(z: Tensor) -> Tensor:
    before, after = neighbours(z)
    h = 1 / (z.shape[1] + 1)
    t = h * torch.arange(1, z.shape[1] + 1, dtype=z.dtype)
    return 2 * z - before - after + h**2 * (z + t + 1) ** 3 / 2


def bratu(z: Tensor) -> Tensor:
    before, after = neighbours(z)
    return before - 2 * z + after + torch.exp(z) / (z.shape[1] + 1) ** 2


def kepler(z: Tensor) -> Tensor:
    eccentricity = torch.linspace(0, 0.95, len(z), dtype=z.dtype)[:, None]
    return z - eccentricity * torch.sin(z) - torch.linspace(0.1, 3, len(z), dtype=z.dtype)[:, None]


def powell_singular(z: Tensor) -> Tensor:
    a, b, c, d = z.unbind(dim=1)
    return torch.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2], dim=1)


def spread(start: list[float] | Tensor, noise: float = 0.1) -> Tensor:
    """Four starts around one."""
    generator = torch.Generator().manual_seed(0)
    start = torch.as_tensor(start, dtype=DTYPE)
    return start + noise * torch.randn(4, len(start), generator=generator, dtype=DTYPE)


GRID = torch.arange(1, 31, dtype=DTYPE) / 31
PROBLEMS = {
    "rosenbrock": (rosenbrock, spread([-1.2, 1.0])),
    "broyden tridiagonal": (broyden_tridiagonal, spread(-torch.ones(40))),
    "discrete boundary value": (discrete_boundary_value, spread(GRID * (GRID - 1), 0.01)),
    "bratu": (bratu, spread(torch.zeros(25))),
    "kepler": (kepler, torch.linspace(0.1, 3, 8, dtype=DTYPE)[:, None]),
}


@pytest.mark.parametrize("solver", [NEWTON, DENSE_NEWTON, BROYDEN], ids=["newton", "dense newton", "broyden"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_solved_in_batch_as_scipy_solves_one(name: str, solver: eq.Solver) -> None:
    g, start = PROBLEMS[name]
    solution = eq.root(g, start, solver=solver, max_steps=400)
    assert bool(solution.converged.all())
    assert g(solution.value).square().mean(dim=1).sqrt().max() <= 1e-8

    def alone(z: np.ndarray, row: int) -> np.ndarray:
        return g(start.clone().index_put((torch.tensor([row]),), torch.from_numpy(z)))[row].numpy()

    for row in range(len(start)):
        reference = scipy.optimize.root(alone, start[row].numpy(), args=(row,), method="hybr", options={"xtol": 1e-12})
        assert reference.success
        np.testing.assert_allclose(solution.value[row].numpy(), reference.x, atol=1e-5)


@pytest.mark.parametrize("solver", [NEWTON, DENSE_NEWTON], ids=["newton", "dense newton"])
def test_powell_singular(solver: eq.Solver) -> None:
    solution = eq.root(powell_singular, spread([3.0, -1.0, 0.0, 1.0]), solver=solver)
    assert bool(solution.converged.all())
    assert solution.value.abs().max() < 1e-3  # the Jacobian vanishes at the root: the residual is its square


@pytest.mark.parametrize("solver", [NEWTON, DENSE_NEWTON, BROYDEN, eq.Anderson(), eq.Picard()], ids=repr)
@pytest.mark.parametrize(
    "g",
    [
        lambda z: z**2 + 1,
        lambda z: torch.stack([z[:, 0] + z[:, 1] - 1, z[:, 0] + z[:, 1] - 2], dim=1),
        lambda z: torch.cosh(z),
    ],
    ids=["z^2 + 1", "parallel lines", "cosh"],
)
def test_no_solution_is_never_called_one(g, solver: eq.Solver) -> None:
    start = torch.tensor([[0.5, 0.2], [2.0, -1.0]], dtype=DTYPE)
    solution = eq.root(g, start, solver=solver, max_steps=150, on_failure="ignore")
    assert not bool(solution.converged.any())
    true = g(solution.value).square().mean(dim=1).sqrt()
    torch.testing.assert_close(solution.residual, true)


def test_poisson_by_jacobi_sweeps() -> None:
    n = 24
    source = torch.rand(2, n, n, generator=torch.Generator().manual_seed(0), dtype=DTYPE)

    def sweep(u: Tensor) -> Tensor:
        p = F.pad(u, (1, 1, 1, 1))
        return (p[:, :-2, 1:-1] + p[:, 2:, 1:-1] + p[:, 1:-1, :-2] + p[:, 1:-1, 2:] + source / (n + 1) ** 2) / 4

    line = torch.diag(torch.full((n,), 2.0, dtype=DTYPE)) - torch.diag(torch.ones(n - 1, dtype=DTYPE), 1)
    line = line - torch.diag(torch.ones(n - 1, dtype=DTYPE), -1)
    eye = torch.eye(n, dtype=DTYPE)
    matrix = torch.kron(line, eye) + torch.kron(eye, line)
    exact = torch.linalg.solve(matrix, source.reshape(2, -1).T / (n + 1) ** 2).T.reshape(2, n, n)
    for solver in (eq.Anderson(), eq.Anderson(history=20), eq.Broyden(history=100), eq.Newton()):
        solution = eq.fixed_point(sweep, torch.zeros(2, n, n, dtype=DTYPE), solver=solver, rtol=1e-10, max_steps=700)
        torch.testing.assert_close(solution.value, exact, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "solver", [eq.Anderson(), eq.Anderson(relaxation=0.3), eq.Broyden(), eq.Newton(), eq.Newton(eq.Dense())], ids=repr
)
@given(seed=st.integers(0, 10_000))
def test_linear_maps_that_expand(solver: eq.Solver, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=DTYPE)).Q
    A = Q @ torch.diag(torch.tensor([-3, 2.5, 0.5, -0.5, 0.2, -3], dtype=DTYPE)) @ Q.T
    b = torch.randn(4, 6, generator=generator, dtype=DTYPE)
    solution = eq.fixed_point(lambda z: z @ A + b, torch.zeros_like(b), solver=solver)
    exact = torch.linalg.solve(torch.eye(6, dtype=DTYPE) - A, b.T).T
    torch.testing.assert_close(solution.value, exact, rtol=1e-6, atol=1e-6)


def test_broyden_memory_grows_with_steps_taken_not_with_steps_allowed() -> None:
    def ranks(max_steps: int) -> int:
        b = torch.ones(2, 50, dtype=DTYPE)
        solution = eq.fixed_point(lambda z: torch.cos(z) * b, b, solver=eq.Broyden(history=1000), max_steps=max_steps)
        assert solution.state.memory.left is not None
        return solution.state.memory.left.shape[1]

    assert ranks(50) == ranks(5000) <= 16
