"""Diagnostics against dense linear algebra, closed forms, and maps whose behaviour is known."""

import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import Cell, join, matrix, normal, split, tanh_map, width
from torch import Tensor

import equilibria as eq

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import equilibria.diagnostics.plots as plots

D = eq.diagnostics
F64 = torch.float64
STRUCTURE = st.sampled_from(["tensor", "tuple", "dict", "nested"])


def linear(matrices: Tensor) -> Callable[[Tensor], Tensor]:
    """f(z) = A z, with a matrix of its own for each sample."""
    return lambda z: torch.einsum("bij,bj->bi", matrices, z)


def matrices(kind: str, batch: int, n: int, seed: int) -> Tensor:
    a = normal(batch, n, n, seed=seed)
    if kind == "symmetric":
        return a + a.mT
    if kind == "skew":
        return a - a.mT  # complex pairs alone
    if kind == "orthogonal":
        return torch.linalg.qr(a).Q
    if kind == "nilpotent":
        return torch.triu(a, diagonal=1)
    if kind == "rank one":
        return a[:, :, :1] * a[:, :1]
    if kind == "zero":
        return torch.zeros_like(a)
    if kind == "identity":
        return torch.eye(n, dtype=F64).expand(batch, n, n).clone()
    if kind == "graded":
        return a * torch.logspace(0, -8, n, dtype=F64)
    assert kind == "general"
    return a


KINDS = ["general", "symmetric", "skew", "orthogonal", "nilpotent", "rank one", "zero", "identity", "graded"]
NORMAL = ["symmetric", "skew", "orthogonal", "zero", "identity"]
CASES = {
    "kind": st.sampled_from(KINDS),
    "batch": st.integers(1, 4),
    "n": st.integers(1, 12),
    "seed": st.integers(0, 99),
}


@given(**CASES)
def test_norm_and_radius_are_those_of_the_dense_matrix(kind: str, batch: int, n: int, seed: int):
    a = matrices(kind, batch, n, seed)
    z = torch.zeros(batch, n, dtype=F64)
    norm = torch.linalg.svdvals(a).amax(dim=1)
    torch.testing.assert_close(D.operator_norm(linear(a), z, rtol=1e-6), norm, rtol=1e-6, atol=1e-12)
    if kind != "nilpotent":  # whose eigenvalues no method in floating point finds
        radius = torch.linalg.eigvals(a).abs().amax(dim=1)
        # The rtol is that of a perturbed Jacobian: the condition of the eigenvalue multiplies it.
        torch.testing.assert_close(D.spectral_radius(linear(a), z, rtol=1e-9), radius, rtol=1e-6, atol=1e-7)


@given(kind=st.sampled_from(NORMAL), batch=st.integers(1, 3), n=st.integers(1, 12), seed=st.integers(0, 99))
def test_normal_jacobians_have_no_non_normality(kind: str, batch: int, n: int, seed: int):
    a = matrices(kind, batch, n, seed)
    measure = D.non_normality(linear(a), torch.zeros(batch, n, dtype=F64), rtol=1e-6)
    assert bool((measure >= 0).all())
    assert bool((measure <= 1e-6).all())


def test_non_normality_of_a_jordan_block_and_of_a_nilpotent_one():
    a = torch.tensor([[[0.5, 3.0], [0.0, 0.5]], [[0.0, 1.0], [0.0, 0.0]]], dtype=F64)
    measure = D.non_normality(linear(a), torch.zeros(2, 2, dtype=F64))
    expected = 1 - 0.5 / torch.linalg.svdvals(a[0])[0]
    torch.testing.assert_close(measure[0], expected, rtol=1e-6, atol=0)
    assert measure[1] > 1 - 1e-7


@given(n=st.integers(100, 160), seed=st.integers(0, 20))
@settings(max_examples=5)
def test_large_jacobians_converge_long_before_their_size(n: int, seed: int):
    a = normal(2, n, n, seed=seed) / math.sqrt(n)
    a[0] = a[0] * torch.logspace(0, -2, n, dtype=F64)
    z = torch.zeros(2, n, dtype=F64)
    norm = torch.linalg.svdvals(a).amax(dim=1)
    torch.testing.assert_close(D.operator_norm(linear(a), z, max_steps=60), norm, rtol=2e-3, atol=0)


def test_a_direction_that_the_start_hardly_holds_is_found():
    n = 4000
    diagonal = torch.ones(n, dtype=F64)
    diagonal[7] = 1.5
    found = D.operator_norm(lambda z: z * diagonal, torch.zeros(1, n, dtype=F64))
    torch.testing.assert_close(found, torch.tensor([1.5], dtype=F64), rtol=1e-3, atol=0)


@given(structure=STRUCTURE, batch_dims=st.integers(0, 2), seed=st.integers(0, 20))
@settings(max_examples=30)
def test_any_structure_and_any_batch_dimensions(structure: str, batch_dims: int, seed: int):
    n = width(structure)
    shape = (2, 3)[:batch_dims]
    w, x = matrix(n, seed, 0.9), normal(*shape, n, seed=seed + 1)
    f = tanh_map(structure, batch_dims)
    point = normal(*shape, n, seed=seed + 2)
    slope = 1 - torch.tanh(point @ w + x) ** 2
    dense = slope[..., :, None] * w.T
    z = split(point, structure)
    torch.testing.assert_close(
        D.operator_norm(f, z, w, x, batch_dims=batch_dims, rtol=1e-6), torch.linalg.svdvals(dense)[..., 0]
    )
    values = D.spectrum(f, z, w, x, batch_dims=batch_dims).values
    expected = torch.linalg.eigvals(dense)
    assert values.shape == expected.shape
    torch.testing.assert_close(values.abs().sort(dim=-1)[0], expected.abs().sort(dim=-1)[0])
    history = D.trace(f, z, w, x, batch_dims=batch_dims)
    assert history.residual.shape == (len(history.evaluations), *shape)
    paths = D.path_independence(f, z, w, x, batch_dims=batch_dims, starts=3)
    assert paths.alignment.shape == shape
    assert paths.status.shape == (*shape, 3)
    assert bool((paths.alignment > 1 - 1e-9).all())


@given(
    kind=st.sampled_from([k for k in KINDS if k not in ("nilpotent", "graded")]),
    n=st.integers(1, 10),
    seed=st.integers(0, 50),
)
def test_the_spectrum_is_that_of_the_dense_matrix_each_eigenvalue_once(kind: str, n: int, seed: int):
    a = matrices(kind, 1, n, seed)
    found = D.spectrum(linear(a), torch.zeros(1, n, dtype=F64))
    values = found.values[0][~torch.isnan(found.residuals[0])]
    expected = torch.linalg.eigvals(a[0])
    apart = (values[:, None] - expected[None]).abs()
    size = 1e-7 * (1 + float(expected.abs().max()))
    assert bool((apart.amin(dim=0) < size).all())  # every eigenvalue is found
    assert bool((apart.amin(dim=1) < size).all())  # and nothing else
    if kind in ("zero", "identity"):
        assert len(values) == 1
    assert bool((found.residuals[0].nan_to_num(0) < size).all())


def test_ritz_values_of_few_steps_carry_their_true_residuals():
    a = normal(1, 40, 40, seed=3)
    a = a + a.mT
    found = D.spectrum(linear(a), torch.zeros(1, 40, dtype=F64), max_steps=15)
    eigenvalues = torch.linalg.eigvalsh(a[0])
    distance = (found.values[0].real[:, None] - eigenvalues).abs().amin(dim=1)
    assert bool((distance <= found.residuals[0] + 1e-9).all())  # holds for symmetric matrices
    assert float(found.residuals[0].max()) > 1e-3


SPECTRAL: list[Callable[..., Tensor]] = [D.operator_norm, D.spectral_radius, D.non_normality]


@pytest.mark.parametrize("measure", SPECTRAL)
def test_what_did_not_converge_warns_in_the_users_own_line(measure: Callable[..., Tensor]):
    a = normal(3, 60, 60, seed=1)
    with pytest.warns(eq.ConvergenceWarning, match=f"{measure.__name__}: 3 of 3 samples missed") as caught:
        measure(linear(a), torch.zeros(3, 60, dtype=F64), rtol=1e-12, max_steps=4)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("measure", SPECTRAL)
def test_a_sample_without_a_finite_jacobian_is_nan_and_leaves_others_alone(measure: Callable[..., Tensor]):
    a = matrices("general", 3, 6, 0)
    good = measure(linear(a), torch.zeros(3, 6, dtype=F64))
    a[1, 0, 0] = torch.nan
    found = measure(linear(a), torch.zeros(3, 6, dtype=F64))
    assert torch.isnan(found).tolist() == [False, True, False]
    torch.testing.assert_close(found[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("measure", SPECTRAL)
def test_empty_batches_empty_states_and_constant_functions(measure: Callable[..., Tensor]):
    assert measure(torch.tanh, torch.zeros(0, 3)).shape == (0,)
    assert measure(torch.tanh, torch.zeros(2, 0)).tolist() == [0, 0]
    assert measure(torch.ones_like, torch.zeros(2, 3)).tolist() == [0, 0]


@pytest.mark.parametrize("measure", SPECTRAL)
def test_options_that_mean_nothing_are_refused(measure: Callable[..., Tensor]):
    z = torch.zeros(1, 2)
    for value in (0, -1e-3, math.inf, None, True):
        with pytest.raises((TypeError, ValueError), match="rtol must be"):
            measure(torch.tanh, z, rtol=value)
    with pytest.raises(ValueError, match="max_steps must be"):
        measure(torch.tanh, z, max_steps=0)
    with pytest.raises(TypeError, match="f must be callable"):
        measure(3, z)


def test_half_precision_and_float32_give_the_dtype_of_the_state():
    a = matrices("general", 2, 8, 5)
    norm = torch.linalg.svdvals(a)[:, 0]
    found = D.operator_norm(linear(a.float()), torch.zeros(2, 8))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), norm, rtol=1e-3, atol=0)
    half = D.operator_norm(linear(a.bfloat16()), torch.zeros(2, 8, dtype=torch.bfloat16), rtol=1e-2)
    torch.testing.assert_close(half.double(), norm, rtol=2e-2, atol=0)


def attention(q: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: 0.5 * torch.nn.functional.scaled_dot_product_attention(q, z, z)


def test_fused_attention_which_has_no_second_derivative_is_measured_exactly():
    q, z = normal(1, 2, 5, 4, seed=0, dtype=torch.float32), normal(1, 2, 5, 4, seed=1, dtype=torch.float32)
    dense = torch.autograd.functional.jacobian(attention(q), z).reshape(40, 40)
    found = D.operator_norm(attention(q), z, rtol=1e-5)
    torch.testing.assert_close(found[0], torch.linalg.svdvals(dense)[0], rtol=1e-5, atol=0)


class _Once(torch.autograd.Function):
    """tanh, whose derivative has none."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(torch.tanh(z))
        return torch.tanh(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _Refused.apply(gradients[0] * (1 - ctx.saved_tensors[0] ** 2))
        return gradients[0] * (1 - ctx.saved_tensors[0] ** 2)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("This function does not currently support double backward")


def test_functions_without_second_derivatives_are_measured_by_differences():
    w, z = matrix(6, 3, 0.8), normal(2, 6, seed=1)
    found = D.operator_norm(lambda z: _Once.apply(z @ w), z)
    expected = D.operator_norm(lambda z: torch.tanh(z @ w), z)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


# The batch law.


def rows(result: Any, k: int) -> list[Tensor]:
    """The numbers of sample k in a result whose tensors are indexed by sample first."""
    if isinstance(result, Tensor):
        return [result[k]]
    return [getattr(result, name)[k] for name in result.__dataclass_fields__]


@pytest.mark.parametrize("measure", [*SPECTRAL, D.spectrum, D.path_independence])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sample_is_measured_the_same_alone_and_in_any_batch(measure: Callable[..., Any], dtype: torch.dtype):
    a = matrices("general", 5, 7, 11).to(dtype)
    a = 0.8 * a / torch.linalg.matrix_norm(a, 2)[:, None, None]
    x = normal(5, 7, seed=12, dtype=dtype)

    def f(z: Tensor, a: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("bij,bj->bi", a, z) + x)

    a[3] = torch.nan  # a neighbour that fails
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", eq.ConvergenceWarning)
        together = measure(f, torch.zeros(5, 7, dtype=dtype), a, x)
    tolerance = {"rtol": 1e-10, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-3}
    for k in (0, 2, 4):
        alone = measure(f, torch.zeros(1, 7, dtype=dtype), a[k : k + 1], x[k : k + 1])
        for one, other in zip(rows(together, k), rows(alone, 0), strict=True):
            torch.testing.assert_close(one, other, equal_nan=True, **tolerance)


def test_traces_obey_the_batch_law():
    x = torch.tensor([[0.3], [2.0], [-1.0]], dtype=F64)
    slope = torch.tensor([[0.2], [0.9], [1.5]], dtype=F64)  # fast, slow, never

    def f(z: Tensor, a: Tensor, x: Tensor) -> Tensor:
        return x - a * z

    together = D.trace(f, torch.zeros(3, 1, dtype=F64), slope, x, solver=eq.Picard(), max_steps=60)
    assert together.solution.status.tolist() == [eq.Status.CONVERGED, eq.Status.MAX_STEPS, eq.Status.MAX_STEPS]
    for k in range(3):
        alone = D.trace(
            f, torch.zeros(1, 1, dtype=F64), slope[k : k + 1], x[k : k + 1], solver=eq.Picard(), max_steps=60
        )
        count = len(alone.evaluations)
        for name in ("residual", "step_size", "cosine"):
            one, other = getattr(together, name)[:, k], getattr(alone, name)[:, 0]
            torch.testing.assert_close(one[:count], other, equal_nan=True)
            assert bool(torch.isnan(one[count:]).all())


def everything(cell: Cell, x: Tensor) -> Iterator[Any]:
    z = torch.zeros_like(x)
    yield from (measure(cell, z, x) for measure in (*SPECTRAL, D.spectrum, D.path_independence, D.trace))
    yield D.gradient_quality(cell, z, x, adjoint=eq.OneStep(), parameters=cell.parameters())


def test_global_random_state_inputs_and_gradients_are_left_alone():
    cell, x = Cell(5), normal(2, 5, seed=1).requires_grad_()
    before, values = torch.get_rng_state(), x.detach().clone()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert len(list(everything(cell, x))) == 7
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, values)
    assert x.grad is None
    assert all(parameter.grad is None for parameter in cell.parameters())


# Path independence.


def test_a_map_with_two_equilibria_is_flagged_and_one_with_one_is_not():
    slope = torch.tensor([[0.5], [3.0], [3.0]], dtype=F64)
    bias = torch.tensor([[1.0], [0.0], [4.0]], dtype=F64)
    paths = D.path_independence(
        lambda z, a, b: torch.tanh(a * z + b), torch.zeros(3, 2, dtype=F64), slope, bias, solver=eq.Picard(), scale=2.0
    )
    assert paths.converged.tolist() == [8, 8, 8]
    assert bool((paths.alignment[[0, 2]] > 1 - 1e-12).all())
    assert bool((paths.distance[[0, 2]] < 1e-6).all())
    assert paths.alignment[1] < 0.5
    assert paths.distance[1] > 1
    torch.testing.assert_close(paths.distances, paths.distances.mT)
    assert bool((paths.distances.diagonal(dim1=1, dim2=2) == 0).all())


def test_the_alignment_is_the_mean_over_pairs():
    # From z0 = 0 nothing moves; every other start ends at its signs: the equilibria are known.
    paths = D.path_independence(
        lambda z: torch.tanh(20 * z), torch.zeros(1, 3, dtype=F64), solver=eq.Picard(), starts=5, seed=3
    )
    generator = torch.Generator().manual_seed(3)
    ends = [torch.zeros(3, dtype=F64)]
    torch.randn(3, generator=generator, dtype=F64)
    ends += [torch.randn(3, generator=generator, dtype=F64).sign() for _ in range(4)]
    cosines = [float(a @ b) / 3 for i, a in enumerate(ends) for b in ends[i + 1 :]]
    torch.testing.assert_close(paths.alignment, torch.tensor([sum(cosines) / 10], dtype=F64))


def test_equilibria_at_zero_agree_although_their_directions_are_rounding():
    for solver in (eq.Picard(), eq.Anderson()):
        paths = D.path_independence(lambda z: 0.5 * z, torch.zeros(2, 3), solver=solver)
        assert paths.alignment.tolist() == [1, 1]
        assert paths.distance.tolist() == [0, 0]


def test_equilibria_of_one_direction_are_told_apart_by_their_distance():
    # Near 1, z moves away; equilibria near 0.5 and 2 attract from either side.
    def f(z: Tensor) -> Tensor:
        return z + 0.25 * (torch.tanh(4 * (z - 1)) - torch.tanh(4 * (z - 0.5)) - torch.tanh(4 * (z - 2)))

    paths = D.path_independence(f, torch.ones(1, 1, dtype=F64) * 1.2, solver=eq.Picard(), max_steps=300, scale=0.6)
    assert paths.converged.tolist() == [8]
    assert paths.alignment[0] > 1 - 1e-9
    assert paths.distance[0] > 0.5


def test_starts_that_do_not_converge_are_counted_left_out_and_told():
    slope = torch.tensor([[0.5], [-2.0]], dtype=F64)
    with pytest.warns(eq.ConvergenceWarning, match="7 of 16 solves, of 1 of 2 samples") as caught:
        paths = D.path_independence(
            lambda z, a: torch.tanh(a * z), torch.zeros(2, 1, dtype=F64), slope, solver=eq.Picard()
        )
    assert caught[0].filename == __file__
    assert paths.converged.tolist() == [8, 1]  # the start at zero is an equilibrium
    assert torch.isnan(paths.alignment).tolist() == [False, True]
    assert torch.isnan(paths.distance).tolist() == [False, True]
    assert (paths.status[1] == eq.Status.CONVERGED).tolist() == [True] + 7 * [False]


def test_path_options_that_mean_nothing_are_refused():
    z = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="starts must be an integer of at least 2"):
        D.path_independence(torch.cos, z, starts=1)
    with pytest.raises(ValueError, match="scale must be finite and above 0"):
        D.path_independence(torch.cos, z, scale=0)
    with pytest.raises(TypeError, match="seed must be an integer"):
        D.path_independence(torch.cos, z, seed=0.5)  # pyright: ignore[reportArgumentType]


# Gradient quality.


@given(n=st.integers(1, 6), batch=st.integers(1, 3), seed=st.integers(0, 50), norm=st.sampled_from([0.3, 0.6, 0.9]))
@settings(max_examples=25)
def test_gradients_of_a_linear_map_against_their_closed_forms(n: int, batch: int, seed: int, norm: float):
    # z = A z + x: dL/dx is u (I - A)^{-1} for a gradient u of z; one step gives u, a phantom of k the first k powers.
    a, x = matrix(n, seed, norm), normal(batch, n, seed=seed + 1).requires_grad_()
    u = normal(batch, n, seed=seed + 2)
    eye = torch.eye(n, dtype=F64)
    exact = torch.linalg.solve((eye - a).T, u.T).T
    closed = {
        eq.Implicit(): exact,
        eq.Unrolled(): exact,
        eq.OneStep(): u,
        eq.Phantom(steps=3): u @ (eye + a + a @ a),
    }
    for adjoint, gradient in closed.items():
        found = D.gradient_quality(
            lambda z, x: z @ a.T + x,
            torch.zeros(batch, n, dtype=F64),
            x,
            adjoint=adjoint,
            parameters={"x": x},
            loss=lambda z: (z * u).sum(),
            max_steps=500,
        )
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0)
        error = torch.linalg.vector_norm(gradient - exact) / torch.linalg.vector_norm(exact)
        assert found.names == ("x", "all")
        assert found.dense
        # Forward and backward tolerance is 1e-8, relative to the gradient that comes in.
        torch.testing.assert_close(found.relative_error, error.expand(2), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.cosine, cosine.expand(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("max_size", [512, 0])
def test_exact_gradients_dense_or_iterative_rank_the_adjoints(dtype: torch.dtype, max_size: int):
    cell, x = Cell(6, 0.9, dtype), normal(4, 6, seed=2, dtype=dtype)
    names = dict(cell.named_parameters())
    z0 = torch.zeros(4, 6, dtype=dtype)
    adjoints = [eq.Implicit(), eq.Phantom(steps=4), eq.OneStep()]
    found = [D.gradient_quality(cell, z0, x, adjoint=a, parameters=names, max_size=max_size) for a in adjoints]
    assert found[0].names == ("linear.weight", "linear.bias", "all")
    assert all(one.dense == (max_size > 0) for one in found)
    errors = torch.stack([one.relative_error for one in found])
    assert bool((errors[0] < (1e-6 if dtype == torch.float64 else 1e-2)).all())
    assert bool((errors[0] < errors[1]).all())
    assert bool((errors[1] < errors[2]).all())
    assert bool((found[0].cosine > found[2].cosine).all())
    assert found[0].solution.adjoint.status is not None


def test_tensors_without_influence_have_no_error_and_no_cosine():
    cell, x = Cell(3), normal(2, 3, seed=2)
    unused = torch.ones(2, dtype=F64, requires_grad=True)
    found = D.gradient_quality(
        cell, torch.zeros(2, 3, dtype=F64), x, adjoint=eq.Implicit(), parameters=[cell.linear.bias, unused]
    )
    assert found.names == ("0", "1", "all")
    assert found.relative_error[1] == 0
    assert bool(torch.isnan(found.cosine[1]))


def test_without_an_equilibrium_there_is_no_exact_gradient():
    w = torch.tensor([2.0], dtype=F64, requires_grad=True)
    z0 = torch.zeros(1, 1, dtype=F64)
    with pytest.warns(eq.ConvergenceWarning, match="1 reach no equilibrium") as caught:
        found = D.gradient_quality(lambda z: torch.where(z > 0, -w, w), z0, adjoint=eq.OneStep(), parameters=[w])
    assert caught[0].filename == __file__
    assert bool(torch.isnan(found.relative_error).all())
    assert bool(torch.isnan(found.cosine).all())
    assert not bool(found.solution.converged)


def test_a_singular_adjoint_equation_is_told():
    w = torch.tensor([0.0], dtype=F64, requires_grad=True)
    z0 = torch.ones(1, 2, dtype=F64)
    with pytest.warns(eq.ConvergenceWarning, match="1 one whose adjoint"):
        found = D.gradient_quality(lambda z: z + w, z0, adjoint=eq.OneStep(), parameters=[w])
    assert bool(torch.isnan(found.relative_error).all())


def test_parameters_and_losses_that_make_no_sense_are_refused():
    cell, x, z0 = Cell(3), normal(2, 3, seed=2), torch.zeros(2, 3, dtype=F64)

    def quality(parameters: Any, loss: Any = None) -> None:
        D.gradient_quality(cell, z0, x, adjoint=eq.Implicit(), parameters=parameters, loss=loss)

    with pytest.raises(TypeError, match=r"write \[tensor\]"):
        quality(cell.linear.weight)
    with pytest.raises(ValueError, match="parameters is empty"):
        quality([])
    with pytest.raises(ValueError, match="'x' must be a tensor that requires grad"):
        quality({"x": x})
    with pytest.raises(ValueError, match="one scalar for the whole batch"):
        quality(cell.parameters(), lambda z: z.sum(dim=1))
    with pytest.raises(ValueError, match="depends on no tensor"):
        quality(cell.parameters(), lambda z: z.detach().sum())


# Traces.


def test_a_trace_is_what_the_solve_did():
    a = torch.tensor([[0.5], [-0.5]], dtype=F64)
    history = D.trace(lambda z, a: 1 + a * z, torch.zeros(2, 1, dtype=F64), a, solver=eq.Picard(), max_steps=20)
    k = torch.arange(20, dtype=F64)
    # z_k = (1 - a^k) / (1 - a), so that a step is a^k and the residual a^k over the next state.
    for sample, slope in enumerate((0.5, -0.5)):
        expected = abs(slope) ** k * (1 - slope) / (1 - slope ** (k + 1))
        torch.testing.assert_close(history.residual[:, sample], expected)
        torch.testing.assert_close(history.step_size[1:, sample], abs(slope) ** k[:-1])
        torch.testing.assert_close(history.cosine[2:, sample], torch.full((18,), math.copysign(1, slope), dtype=F64))
    assert bool(torch.isnan(history.step_size[0]).all())
    assert bool(torch.isnan(history.cosine[:2]).all())
    assert history.evaluations.tolist() == list(range(1, 21))
    assert history.solution.status.tolist() == 2 * [eq.Status.MAX_STEPS]


@given(structure=STRUCTURE, seed=st.integers(0, 20), solver=st.sampled_from([eq.Anderson(), eq.Picard(), eq.Broyden()]))
@settings(max_examples=20)
def test_the_last_row_of_a_trace_is_the_solution(structure: str, seed: int, solver: Any):
    n = width(structure)
    w, x = matrix(n, seed, 0.7), normal(4, n, seed=seed + 1)
    z0 = split(torch.zeros(4, n, dtype=F64), structure)
    history = D.trace(tanh_map(structure), z0, w, x, solver=solver)
    last = (history.solution.steps - 1)[None]
    torch.testing.assert_close(history.residual.gather(0, last)[0], history.solution.residual)
    solution = eq.fixed_point(tanh_map(structure), z0, w, x, solver=solver)
    assert torch.equal(join(solution.value, 1), join(history.solution.value, 1))
    assert len(history.evaluations) == solution.evaluations


# Plots.


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_each_result_has_a_plot_on_new_axes_or_given_ones():
    cell, x = Cell(5), normal(3, 5, seed=1)
    results = list(everything(cell, x))
    quality = results[-1]
    calls: list[tuple[Callable[..., Any], Any]] = [
        (plots.plot_spectrum, results[3]),
        (plots.plot_path_independence, results[4]),
        (plots.plot_trace, results[5]),
        (plots.plot_gradient_quality, quality),
        (plots.plot_gradient_quality, {"one step": quality, "again": quality}),
    ]
    for plot, result in calls:
        made = plot(result)
        assert made.get_xlabel()
        made.figure.canvas.draw()
        given = plt.figure().add_subplot()
        assert plot(result, given) is given


def test_plots_draw_what_failed_and_what_is_not_there():
    slope = torch.tensor([[-2.0], [torch.nan]], dtype=F64)

    def f(z: Tensor, a: Tensor) -> Tensor:
        return torch.tanh(a * z + 1)

    z = torch.ones(2, 1, dtype=F64)
    labels = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", eq.ConvergenceWarning)
        axes = [
            plots.plot_trace(D.trace(f, z, slope, solver=eq.Picard())),
            plots.plot_path_independence(D.path_independence(f, z, slope, solver=eq.Picard())),
            plots.plot_spectrum(D.spectrum(f, z, slope)),
        ]
    for ax in axes:
        ax.figure.canvas.draw()
        legend = ax.get_legend()
        assert legend is not None
        labels |= {text.get_text() for text in legend.get_texts()}
    assert {"failed", "starts that did not converge", "unit circle", "eigenvalue"} <= labels


def test_plots_name_the_extra_where_matplotlib_is_missing():
    program = """
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.pyplot"] = None
import equilibria
try:
    import equilibria.diagnostics.plots
except ImportError as error:
    assert "equilibria[viz]" in str(error), error
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
