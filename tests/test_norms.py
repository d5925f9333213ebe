"""Norms: what a tolerance is measured by, at every size of number that a dtype holds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import normal

import equilibria as eq

LAW = settings(derandomize=True, max_examples=60, deadline=None)


@LAW
@given(
    exponent=st.integers(-36, 17),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_norms_are_those_of_exact_arithmetic(exponent, shape, dtype, seed):
    leaf = (10.0**exponent * normal(4, *shape, seed=seed)).to(dtype)
    leaf[2] = 0
    exact = leaf.double().reshape(4, math.prod(shape))
    rms, largest = exact.square().mean(dim=1).sqrt(), exact.abs().amax(dim=1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    got = eq.rms_norm(leaf)
    assert got.dtype == eq.max_norm(leaf).dtype == wide
    assert torch.equal(eq.max_norm(leaf).double(), largest)
    if exponent > -16 or wide == torch.float64:
        torch.testing.assert_close(got.double(), rms, rtol=1e-5, atol=0)
    else:  # squares underflow in float32
        assert (got.double() <= rms * (1 + 1e-5)).all()
        assert (got.double() >= rms / math.prod(shape) ** 0.5 * (1 - 1e-5)).all()
    assert (got == 0).tolist() == (exact == 0).all(dim=1).tolist()


@pytest.mark.parametrize("norm", [eq.rms_norm, eq.max_norm])
def test_numbers_that_are_not_finite_stay_so_and_nothing_is_zero(norm):
    leaf = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0], [0.0, 0.0]])
    assert norm(leaf).isnan().tolist() == [True, False, False]
    assert norm(leaf)[1:].tolist() == [torch.inf, 0.0]
    assert norm(torch.zeros(3, 0)).tolist() == [0.0, 0.0, 0.0]
    assert norm(torch.zeros(0, 3)).shape == (0,)
    assert norm(torch.full((2,), -3.0)).tolist() == [3.0, 3.0]


def test_a_tiny_state_is_iterated_as_any_other():
    x = torch.tensor([[1e-30, 2e-30], [1.0, 2.0]])
    sol = eq.fixed_point(lambda z: 0.5 * z + x, torch.zeros(2, 2), solver=eq.Picard(), rtol=1e-4, atol=0.0)
    assert sol.steps[0] == sol.steps[1] > 10
    assert sol.residual.min() > 0
    torch.testing.assert_close(sol.value[0], 2 * x[0], rtol=1e-3, atol=0)
