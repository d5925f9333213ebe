"""Neural ODEs, steady states and implicit steps against closed forms, long integration and finite differences."""

import copy
import io
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import normal
from torch import Tensor, nn

import equilibria as eq

DTYPE = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


class Driven(nn.Module):
    """A field with parameters, an input, and the time."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        for parameter in self.parameters():
            parameter.data = 0.7 * normal(*parameter.shape, seed=seed)

    def forward(self, t: Tensor, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x) * torch.cos(t) - 0.3 * z


class Oscillator(nn.Module):
    """A field on a dictionary, whose input is a frequency for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.damping = nn.Parameter(torch.tensor(0.2, dtype=DTYPE))

    def forward(self, t: Tensor, z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"p": z["q"], "q": -(x**2) * z["p"] - self.damping * z["q"] + 0.1 * torch.sin(t)}


class Relaxing(nn.Module):
    """A flow with one steady state, stable for small weights."""

    def __init__(self, width: int, scale: float = 0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale * normal(width, width, seed=3) / width**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + x) - z


class Decay(nn.Module):
    """A stiff linear flow to the input, one rate for each entry."""

    def __init__(self, *rates: float) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor(rates, dtype=DTYPE))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.rates * (x - z)


def double_well(z: Tensor) -> Tensor:
    return z - z**3


def quiet(layer: Callable[..., nn.Module], *args: Any, **options: Any) -> Any:
    """A layer of a closure, which says that its parameters are not registered."""
    with pytest.warns(UserWarning, match=r"no nn\.Module"):
        return layer(*args, **options)


def total(value: Any) -> Tensor:
    leaves = [value] if isinstance(value, Tensor) else list(value.values())
    return torch.stack(
        [(leaf * torch.linspace(1, 2, leaf.numel(), dtype=DTYPE).view_as(leaf)).sum() for leaf in leaves]
    ).sum()


def gradients(field: nn.Module, z0: Any, x: Tensor, t: Tensor, adjoint: bool, trajectory: bool) -> list[Tensor]:
    layer = eq.nn.ODELayer(field, adjoint=adjoint, **TIGHT)
    loss = total(layer(z0, x, times=t, trajectory=trajectory))
    starts = [z0] if isinstance(z0, Tensor) else list(z0.values())
    return list(torch.autograd.grad(loss, [*starts, x, t, *field.parameters()]))


@settings(max_examples=10)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 4),
    width=st.integers(1, 4),
    falling=st.booleans(),
    trajectory=st.booleans(),
)
def test_adjoint_and_direct_gradients_agree(seed: int, batch: int, width: int, falling: bool, trajectory: bool) -> None:
    t = torch.tensor([0.9, 0.4, 0.0] if falling else [0.1, 0.5, 1.1], dtype=DTYPE, requires_grad=True)
    z0, x = (normal(batch, width, seed=seed + k).requires_grad_() for k in range(2))
    pairs = zip(*(gradients(Driven(width, seed), z0, x, t, way, trajectory) for way in (True, False)), strict=True)
    for adjoint, direct in pairs:
        torch.testing.assert_close(adjoint, direct, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trajectory", [True, False])
def test_adjoint_and_direct_gradients_agree_on_a_tree(trajectory: bool) -> None:
    t = torch.tensor([0.0, 0.7, 1.5], dtype=DTYPE, requires_grad=True)
    z0 = {name: normal(3, 2, seed=k).requires_grad_() for k, name in enumerate("pq")}
    x = normal(3, 1, seed=4).requires_grad_()
    pairs = zip(*(gradients(Oscillator(), z0, x, t, way, trajectory) for way in (True, False)), strict=True)
    for adjoint, direct in pairs:
        torch.testing.assert_close(adjoint, direct, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_of_the_flow_are_those_of_finite_differences(adjoint: bool, method: str) -> None:
    field = Driven(2)
    options = TIGHT if method == "dopri5" else {"step_size": 0.01}
    layer = eq.nn.ODELayer(field, method=method, adjoint=adjoint, **options)
    inputs = (normal(2, 2, seed=1).requires_grad_(), normal(2, 2, seed=2).requires_grad_())
    t = torch.tensor([0.0, 0.3], dtype=DTYPE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, x, t: layer(z, x, times=t), (*inputs, t), atol=1e-5)


@pytest.mark.parametrize("adjoint", [True, False])
def test_what_a_field_captures_gets_its_gradient(adjoint: bool) -> None:
    w = torch.tensor([0.8], dtype=DTYPE, requires_grad=True)
    rate = w**2  # not a leaf
    layer = quiet(eq.nn.ODELayer, lambda t, z: -rate * z, adjoint=adjoint, **TIGHT)
    (slope,) = torch.autograd.grad(layer(torch.ones(1, 1, dtype=DTYPE)).sum(), w)
    torch.testing.assert_close(slope, torch.tensor([-1.6 * math.exp(-0.64)], dtype=DTYPE), rtol=1e-7, atol=0)


@pytest.mark.parametrize("adjoint", [True, False])
def test_an_input_made_from_a_parameter_of_the_field_counts_once(adjoint: bool) -> None:
    field = Driven(2)
    layer = eq.nn.ODELayer(field, adjoint=adjoint, **TIGHT)
    z0 = normal(3, 2, seed=5)

    def loss(bias: Tensor) -> Tensor:
        field.linear.bias.data = bias
        return layer(z0, torch.sin(field.linear.bias).expand(3, 2)).sum()

    bias = field.linear.bias.detach().clone()
    (slope,) = torch.autograd.grad(loss(bias), field.linear.bias)
    step = 1e-5 * torch.eye(2, dtype=DTYPE)
    central = torch.stack([(loss(bias + d) - loss(bias - d)).detach() / 2e-5 for d in step])
    torch.testing.assert_close(slope, central, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_scale_of_the_loss_changes_nothing(scale: float) -> None:
    field, z0, x = Driven(3).float(), normal(2, 3, seed=0).float(), normal(2, 3, seed=1).float()
    layer = eq.nn.ODELayer(field)
    slopes = [torch.autograd.grad((s * layer(z0, x)).sum(), field.linear.weight)[0] / s for s in (1.0, scale)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=1e-7)


def test_second_derivatives_come_from_direct_gradients_alone() -> None:
    z = normal(2, 2, seed=0).requires_grad_()
    direct = eq.nn.ODELayer(Driven(2), method="rk4", step_size=0.25, adjoint=False)
    assert torch.autograd.gradgradcheck(lambda z: direct(z, torch.zeros_like(z)), (z,))
    with pytest.raises(RuntimeError, match="adjoint=False"):
        torch.autograd.grad(eq.nn.ODELayer(Driven(2))(z, z.detach()).sum(), z, create_graph=True)


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), company=st.integers(1, 5), stiffness=st.floats(1, 50))
def test_the_accuracy_of_a_sample_does_not_depend_on_its_company(seed: int, company: int, stiffness: float) -> None:
    # One fast sample among many that hardly move: a mean over the batch would hide its error.
    rate = torch.cat([torch.full((1, 1), stiffness, dtype=DTYPE), torch.zeros(20 * company, 1, dtype=DTYPE)])
    z0 = 1 + normal(len(rate), 1, seed=seed).abs()
    layer = quiet(eq.nn.ODELayer, lambda t, z, rate: -rate * z, rtol=1e-6, atol=1e-9)
    alone, among = layer(z0[:1], rate[:1]), layer(z0, rate)
    exact = z0 * torch.exp(-rate)
    assert (among - exact)[0].abs() <= (alone - exact[:1]).abs()[0] * (1 + 1e-6) + 1e-15
    report = layer.solve(z0, rate)
    assert (report.residual <= 1).all()
    assert report.residual[0] > 0


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("where", ["state", "input"])
def test_a_sample_with_nan_fails_alone(adjoint: bool, method: str, where: str) -> None:
    field = Driven(2)
    layer = eq.nn.ODELayer(field, method=method, adjoint=adjoint, on_failure="ignore", **TIGHT)
    z0, x = normal(4, 2, seed=0), normal(4, 2, seed=1)
    (z0 if where == "state" else x)[1, 0] = torch.nan
    z0.requires_grad_()
    x.requires_grad_()
    sol = layer.solve(z0, x)
    assert sol.status.tolist() == [0, eq.Status.NONFINITE, 0, 0]
    torch.testing.assert_close(sol.value[1], z0[1], equal_nan=True)
    good = torch.tensor([0, 2, 3])
    sums = [
        torch.autograd.grad(value.sum(), [z0, x, field.linear.weight])
        for value in (sol.value, layer(z0[good], x[good]))
    ]
    for with_nan, without in zip(*sums, strict=True):
        torch.testing.assert_close(with_nan, without, rtol=1e-7, atol=1e-9)
    assert (sums[0][0][1] == 0).all()
    assert (sums[0][1][1] == 0).all()


def test_a_sample_that_blows_up_is_told_and_the_others_arrive() -> None:
    z0 = torch.tensor([[0.5], [1.0]], dtype=DTYPE)
    layer = quiet(eq.nn.ODELayer, lambda t, z: z**2, times=(0.0, 1.5))
    with pytest.warns(eq.ConvergenceWarning, match=r"1 of 2 samples \(1\)"):
        sol = layer.solve(z0)
    assert sol.status[0] == 0
    assert sol.status[1] in (eq.Status.STALLED, eq.Status.NONFINITE)
    torch.testing.assert_close(sol.value, torch.tensor([[2.0], [1.0]], dtype=DTYPE), rtol=1e-6, atol=0)
    layer.on_failure = "raise"
    with pytest.raises(eq.SolveError, match="sample"):
        layer(z0)


def test_evaluations_are_counted_and_bounded_both_ways() -> None:
    calls = []

    class Counted(Driven):
        def forward(self, t: Tensor, z: Tensor, x: Tensor) -> Tensor:
            calls.append(t)
            return super().forward(t, z, x)

    z0 = normal(2, 2, seed=0).requires_grad_()
    layer = eq.nn.ODELayer(Counted(2))
    sol = layer.solve(z0, z0.detach())
    assert len(calls) == sol.evaluations + sol.adjoint.evaluations
    sol.value.sum().backward()
    assert len(calls) == sol.evaluations + sol.adjoint.evaluations
    assert (sol.adjoint.steps == sol.adjoint.evaluations - 1).all()
    layer = eq.nn.ODELayer(Counted(2), max_steps=20, on_failure="ignore")
    sol = layer.solve(z0, z0.detach())
    assert (sol.status == eq.Status.MAX_STEPS).all()
    assert sol.evaluations == 20
    torch.testing.assert_close(sol.value, z0)


def test_a_backward_integration_that_fails_is_told() -> None:
    z0 = normal(2, 2, seed=0).requires_grad_()
    layer = eq.nn.ODELayer(Driven(2), on_failure="raise", max_steps=100)
    sol = layer.solve(z0, z0.detach())
    with pytest.raises(eq.SolveError, match="backward"):
        # The gradient of a trajectory restarts at each of many times, and the budget is that of all of them.
        total(layer(z0, z0.detach(), times=torch.linspace(0, 1, 60), trajectory=True)).backward()
    assert sol.converged.all()


def test_company_of_the_flow() -> None:
    layer = eq.nn.ODELayer(Driven(3).float())
    z0, x = normal(4, 3, seed=0).float(), normal(4, 3, seed=1).float()
    before = z0.clone()
    expected = layer(z0, x)
    assert torch.equal(z0, before)
    assert layer(z0[:0], x[:0]).shape == (0, 3)
    assert layer(z0[:0], x[:0], trajectory=True).shape == (2, 0, 3)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            value = layer(z0, x)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=0.05, atol=0.05)
        torch.autograd.grad(value.sum(), layer.field.linear.weight)
    half = copy.deepcopy(layer).bfloat16()
    assert half(z0.bfloat16(), x.bfloat16()).dtype == torch.bfloat16
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(z0, x), expected)
    with eq.monitor(nn.Sequential(layer)) as reports:
        layer(z0, x).sum().backward()
    assert reports[0].evaluations > 0
    assert reports[0].adjoint.evaluations > 0
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda z, x: layer(z[None], x[None]))(z0, x)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "dopri6"}, "method must be one of"),
        ({"step_size": 0.1}, "chooses its own"),
        ({"times": (0.0,)}, "at least two"),
        ({"times": (0.0, 1.0, 1.0)}, "all rise or all fall"),
        ({"max_steps": 0}, "max_steps"),
        ({"rtol": -1.0}, "rtol"),
        ({"on_failure": "shout"}, "on_failure"),
    ],
)
def test_meaningless_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        eq.nn.ODELayer(Driven(2), **options)


def test_dropout_inside_a_field_is_named() -> None:
    with pytest.raises(ValueError, match="VariationalDropout"):
        eq.nn.ODELayer(nn.Sequential(nn.Dropout(0.5)))(torch.zeros(1, 1))


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 4))
def test_the_steady_state_is_where_long_integration_ends_for_fewer_evaluations(seed: int, batch: int) -> None:
    field, x = Relaxing(4), normal(batch, 4, seed=seed)
    found = eq.nn.SteadyState(field).solve(x)
    flow = quiet(eq.nn.ODELayer, lambda t, z, x: field(z, x), times=(0.0, 60.0), rtol=1e-8)
    reached = flow.solve(torch.zeros_like(x), x)
    torch.testing.assert_close(found.value, reached.value, rtol=0, atol=1e-6)
    assert found.evaluations < reached.evaluations / 5


@settings(max_examples=15)
@given(z0=st.floats(0.05, 3), sign=st.sampled_from([-1.0, 1.0]))
def test_the_steady_state_is_the_one_that_the_flow_goes_to(z0: float, sign: float) -> None:
    layer = quiet(eq.nn.SteadyState, double_well)
    z = layer(z0=torch.full((1, 1), sign * z0, dtype=DTYPE))
    torch.testing.assert_close(z, torch.full_like(z, sign), rtol=0, atol=1e-8)
    assert layer.stable(z).all()


def test_an_unstable_steady_state_is_told() -> None:
    layer = quiet(eq.nn.SteadyState, double_well, solver=eq.Newton())
    z = layer(z0=torch.tensor([[0.1], [2.0]], dtype=DTYPE))
    assert layer.stable(z).tolist() == [False, True]
    torch.testing.assert_close(layer.abscissa(z), torch.tensor([1.0, -2.0], dtype=DTYPE), rtol=0, atol=1e-6)
    spiral = torch.tensor([[0.1, -2.0], [2.0, 0.1]], dtype=DTYPE)
    turning = quiet(eq.nn.SteadyState, lambda z, grow: z @ spiral * grow)
    grow = torch.tensor([[1.0], [-1.0], [torch.nan]], dtype=DTYPE)
    abscissa = turning.abscissa(torch.zeros(3, 2, dtype=DTYPE), grow)
    torch.testing.assert_close(abscissa, torch.tensor([0.1, -0.1, torch.nan], dtype=DTYPE), equal_nan=True)


@pytest.mark.parametrize(
    "solver", [eq.nn.PseudoTransient(), eq.nn.PseudoTransient(linear_solver=eq.Dense()), eq.Newton()]
)
def test_gradients_of_the_steady_state_are_those_of_finite_differences(solver: eq.Solver) -> None:
    field = Relaxing(3)
    layer = eq.nn.SteadyState(field, solver=solver, rtol=1e-12, atol=1e-12)
    x = normal(2, 3, seed=0).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    (slope,) = torch.autograd.grad(layer(x).sum(), field.weight)
    flow = quiet(eq.nn.ODELayer, lambda t, z, x: field(z, x), times=(0.0, 60.0))
    (reference,) = torch.autograd.grad(flow(torch.zeros_like(x), x.detach()).sum(), field.weight)
    torch.testing.assert_close(slope, reference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [eq.nn.SteadyState, lambda field, **o: eq.nn.ImplicitStep(field, 0.5, **o)])
def test_company_of_equilibria_of_flows(make: Callable[..., nn.Module]) -> None:
    field = Relaxing(3).float()
    layer = make(field, on_failure="ignore")
    x = normal(4, 3, seed=1).float()
    x[2, 1] = torch.nan
    args = (x,) if isinstance(layer, eq.nn.SteadyState) else (torch.zeros_like(x), x)
    sol = layer.solve(*args)
    assert sol.status.tolist() == [0, 0, eq.Status.NONFINITE, 0]
    (slope,) = torch.autograd.grad(sol.value.sum(), field.weight)
    assert torch.isfinite(slope).all()
    good = [arg[[0, 1, 3]] for arg in args]
    torch.testing.assert_close(slope, torch.autograd.grad(layer(*good).sum(), field.weight)[0], rtol=1e-4, atol=1e-5)
    assert layer(*(arg[:0] for arg in args)).shape == (0, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(*good), layer(*good).float(), rtol=0.1, atol=0.1)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(*good), layer(*good))
    with eq.monitor(layer) as reports:
        layer(*good)
    assert [report.name for report in reports] == ["equilibrium"]
    jacobian = torch.func.jacrev(lambda x: layer(*good[:-1], x).sum(dim=0))(good[-1])
    assert torch.isfinite(jacobian).all()


@pytest.mark.parametrize(("theta", "order"), [(1.0, 1), (0.5, 2)])
def test_the_order_of_convergence(theta: float, order: int) -> None:
    errors = []
    for steps in (8, 16, 32):
        layer = quiet(eq.nn.ImplicitStep, lambda z: z * (1 - z), 1.0 / steps, theta, rtol=1e-12, atol=1e-13)
        z = torch.full((1, 1), 0.2, dtype=DTYPE)
        for _ in range(steps):
            z = layer(z)
        errors.append(abs(z.item() - 1 / (1 + 4 * math.exp(-1))))
    for coarse, fine in pairwise(errors):
        assert abs(math.log2(coarse / fine) - order) < 0.1


@settings(max_examples=15)
@given(rate=st.floats(1e-2, 1e6), step=st.floats(1e-2, 10), theta=st.floats(0.5, 1))
def test_steps_on_a_stiff_linear_flow_have_their_closed_form_and_never_grow(
    rate: float, step: float, theta: float
) -> None:
    layer = eq.nn.ImplicitStep(Decay(rate), step, theta, on_failure="raise")
    z0, x = torch.ones(1, 1, dtype=DTYPE), torch.zeros(1, 1, dtype=DTYPE)
    z1 = layer(z0, x)
    factor = (1 - (1 - theta) * step * rate) / (1 + theta * step * rate)
    torch.testing.assert_close(z1, torch.full_like(z1, factor), rtol=1e-6, atol=1e-6)
    assert z1.abs().item() <= 1 + 1e-9


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_gradients_through_several_steps_are_those_of_finite_differences(theta: float) -> None:
    layer = eq.nn.ImplicitStep(Decay(1.0, 50.0), 0.1, theta, rtol=1e-12, atol=1e-13)

    def steps(z: Tensor, x: Tensor, h: Tensor, rates: Tensor) -> Tensor:
        for _ in range(3):
            z = torch.func.functional_call(layer, {"equilibrium.cell.field.rates": rates}, (z, x), {"step": h})
        return z

    h = torch.tensor(0.2, dtype=DTYPE, requires_grad=True)
    rates = layer.field.rates.detach().clone().requires_grad_()
    z, x = (normal(2, 2, seed=k).requires_grad_() for k in range(2))
    assert torch.autograd.gradcheck(steps, (z, x, h, rates), atol=1e-5)


def test_meaningless_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="step"):
        eq.nn.ImplicitStep(Decay(1.0), 0.0)
    with pytest.raises(ValueError, match="theta"):
        eq.nn.ImplicitStep(Decay(1.0), 0.1, 0.0)
    with pytest.raises(ValueError, match="growth"):
        eq.nn.PseudoTransient(growth=1.0)
    with pytest.raises(TypeError, match="instance"):
        eq.nn.SteadyState(Decay)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eq.nn.SteadyState(Decay(1.0))
