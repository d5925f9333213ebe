"""Minima against SciPy and closed forms; constraints; gradients; what is refused."""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import normal
from torch import Tensor

import equilibria as eq

DTYPE = torch.float64


def rosenbrock(z: Tensor) -> Tensor:
    return (100 * (z[:, 1:] - z[:, :-1] ** 2) ** 2 + (1 - z[:, :-1]) ** 2).sum(dim=1)


def smooth(z: Tensor, a: Tensor) -> Tensor:
    return torch.logsumexp(z, dim=1) + 0.5 * ((z - a) ** 2).sum(dim=1)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 3), batch=st.integers(1, 4))
def test_lbfgs_finds_what_scipy_finds(seed: int, n: int, batch: int) -> None:
    start = torch.ones(batch, n, dtype=DTYPE) + 0.5 * normal(batch, n, seed=seed)
    solution = eq.argmin(rosenbrock, start, max_steps=1000)
    for row in range(batch):
        reference = scipy.optimize.minimize(
            lambda z: rosenbrock(torch.from_numpy(z)[None]).item(), start[row].numpy(), method="BFGS"
        )
        value = rosenbrock(solution.value)[row].item()
        assert value <= reference.fun + 1e-8


@pytest.mark.parametrize("solver", [eq.LBFGS(), eq.LBFGS(history=1), eq.Newton(), eq.Newton(eq.Dense()), eq.Broyden()])
def test_convex_minima(solver: eq.Solver) -> None:
    a = normal(4, 6, seed=0)
    solution = eq.argmin(smooth, torch.zeros_like(a), a, solver=solver)
    z = solution.value
    gradient = torch.softmax(z, dim=1) + z - a
    assert gradient.square().mean(dim=1).sqrt().max() < 1e-8
    torch.testing.assert_close(solution.residual, gradient.square().mean(dim=1).sqrt(), rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_gradient_descent_with_momentum(momentum: float) -> None:
    a = normal(4, 6, seed=0)
    solution = eq.argmin(smooth, torch.zeros_like(a), a, solver=eq.GradientDescent(0.4, momentum))
    torch.testing.assert_close(solution.value, eq.argmin(smooth, torch.zeros_like(a), a).value, rtol=1e-7, atol=1e-7)


@given(seed=st.integers(0, 10_000), batched=st.booleans())
def test_equality_constraints_of_a_quadratic_have_their_closed_form(seed: int, batched: bool) -> None:
    a = normal(3, 5, seed=seed)
    A, b = normal(*((3, 2, 5) if batched else (2, 5)), seed=seed + 1), normal(*((3, 2) if batched else (2,)), seed=seed)
    solution = eq.argmin(lambda z, a: 0.5 * ((z - a) ** 2).sum(dim=1), torch.zeros_like(a), a, equality=(A, b))
    rows = A if batched else A.expand(3, 2, 5)
    gap = (rows @ a[:, :, None])[:, :, 0] - b
    multiplier = torch.linalg.solve(rows @ rows.mT, gap)
    expected = a - (rows.mT @ multiplier[:, :, None])[:, :, 0]
    torch.testing.assert_close(solution.value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(solution.aux, multiplier, rtol=1e-4, atol=1e-5)


def test_equality_constraints_as_scipy_has_them() -> None:
    a, A, b = normal(2, 5, seed=0), normal(2, 5, seed=1), normal(2, seed=2)
    solution = eq.argmin(smooth, torch.zeros_like(a), a, equality=(A, b))
    for row in range(2):
        reference = scipy.optimize.minimize(
            lambda z, row=row: smooth(torch.from_numpy(z)[None], a[row : row + 1]).item(),
            np.zeros(5),
            constraints={"type": "eq", "fun": lambda z: A.numpy() @ z - b.numpy()},
            options={"ftol": 1e-12},
        )
        np.testing.assert_allclose(solution.value[row].detach().numpy(), reference.x, atol=1e-5)


def test_gradients_of_minima() -> None:
    a = normal(2, 4, seed=0).requires_grad_()
    for adjoint in (None, eq.Implicit(rtol=1e-12), eq.Implicit(eq.ConjugateGradient(), rtol=1e-12), eq.Unrolled()):
        assert torch.autograd.gradcheck(
            lambda a, adjoint=adjoint: eq.argmin(smooth, torch.zeros_like(a), a, atol=1e-11, adjoint=adjoint).value,
            a,
            atol=1e-6,
        )


def test_gradients_through_constraints() -> None:
    a, A, b = (normal(*shape, seed=i).requires_grad_() for i, shape in enumerate([(2, 4), (2, 4), (2,)]))
    adjoint = eq.Implicit(rtol=1e-12)
    assert torch.autograd.gradcheck(
        lambda a, A, b: eq.argmin(smooth, torch.zeros_like(a), a, equality=(A, b), atol=1e-12, adjoint=adjoint).value,
        (a, A, b),
    )


def test_a_state_of_several_leaves_and_aux() -> None:
    def objective(z: dict[str, Tensor], a: Tensor) -> tuple[Tensor, Tensor]:
        value = ((z["u"] - a) ** 2).sum(dim=1) + (z["v"] ** 4).sum(dim=(1, 2)) + (z["v"] - 1).square().sum(dim=(1, 2))
        return value, z["u"].sum(dim=1)

    a = normal(3, 2, seed=0)
    z0 = {"u": torch.zeros(3, 2, dtype=DTYPE), "v": torch.zeros(3, 2, 2, dtype=DTYPE)}
    solution = eq.argmin(objective, z0, a, has_aux=True)
    torch.testing.assert_close(solution.value["u"], a, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(solution.aux, solution.value["u"].sum(dim=1))


def test_samples_without_a_minimum_are_told() -> None:
    def objective(z: Tensor) -> Tensor:  # the second sample falls for ever
        return torch.stack([z[0].square().sum(), z[1].sum()])

    solution = eq.argmin(objective, torch.ones(2, 3, dtype=DTYPE), on_failure="ignore", max_steps=50)
    assert solution.status.tolist() == [eq.Status.CONVERGED, eq.Status.MAX_STEPS]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: eq.argmin(lambda z: z, torch.zeros(2, 3)), "one floating scalar a sample"),
        (lambda: eq.argmin(lambda z: z.sum(), torch.zeros(2, 3)), "one floating scalar a sample"),
        (lambda: eq.argmin(3, torch.zeros(2, 3)), "objective must be callable"),
        (
            lambda: eq.argmin(lambda z: z.sum(1), torch.zeros(2, 3), equality=(torch.ones(1, 4), torch.ones(1))),
            "equality",
        ),
        (lambda: eq.root(lambda z: z, torch.ones(2, 3), solver=eq.LBFGS()), r"eq\.argmin"),
        (lambda: eq.GradientDescent(0.0), "step_size must be"),
        (lambda: eq.GradientDescent(0.1, 1.0), r"momentum must be in \[0, 1\)"),
        (lambda: eq.LBFGS(history=0), "history must be"),
        (lambda: eq.Newton(linear_solver=eq.GMRES), "must be an instance"),
        (lambda: eq.Newton(linear_rtol=2.0), "linear_rtol must be"),
        (lambda: eq.Broyden(history=True), "history must be"),
        (lambda: eq.Neumann(0), "terms must be"),
        (lambda: eq.Implicit(order=3), "order must be one of 1, 2"),
        (lambda: eq.Dense(max_size=-1), "max_size must be"),
    ],
)
def test_refusals(call, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()
