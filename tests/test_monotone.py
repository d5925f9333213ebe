"""Monotone equilibria: one point whatever the weights, found from anywhere, whose motion has a bound."""

import copy
import io
import math
import re
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import generator, normal
from torch import Tensor, nn

import equilibria as eq
from equilibria.nn.monotone.activation import Activation
from equilibria.nn.monotone.coupling import norm_bound

DOUBLE = torch.float64
LAW = settings(derandomize=True, max_examples=40, deadline=None)
SPLITTINGS = [eq.PeacemanRachford(), eq.ForwardBackward()]
OPERATORS = {
    "dense": (lambda margin: eq.nn.MonotoneLinear(3, 12, margin), (3,)),
    "convolutional": (lambda margin: eq.nn.MonotoneConv2d(2, 3, (4, 6), margin=margin), (2, 4, 6)),
    "multi-tier": (lambda margin: eq.nn.MonotoneConv2d(1, (2, 3, 2), (8, 4), margin=margin), (1, 8, 4)),
}
ACTIVATIONS = [
    nn.ReLU(),
    torch.relu,
    nn.Hardtanh(-0.5, 1.0),
    nn.Tanh(),
    torch.tanh,
    nn.Softshrink(0.3),
    nn.Sigmoid(),
    nn.Softplus(),
    nn.LeakyReLU(0.2),
    nn.ELU(),
]


def made(kind: str, seed: int = 0, scale: float = 1.0, margin: float = 0.1, **options):
    """A layer in float64, its weights A and B `scale` times as large as they are drawn, and a batch of inputs."""
    build, shape = OPERATORS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        operator = build(margin).double()
    with torch.no_grad():
        for name, weight in operator.named_parameters():
            if name.startswith(("A", "B")):
                weight *= scale
    return eq.nn.MonotoneDEQ(operator, **options), normal(4, *shape, seed=seed)


def flat(value) -> Tensor:
    parts = value if isinstance(value, tuple) else (value,)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def dense(kind: str, layer) -> tuple[Tensor, Tensor]:
    """I - W and U as matrices, from the definition: A and B applied to every unit vector, by loops over the kernel."""
    operator = layer.operator
    if kind == "dense":
        a, b, u = operator.A, operator.B, operator.U
    else:
        tiers = operator.frame.tiers

        def matrix(blocks, sources, targets):
            rows = sum(math.prod(t) for t in targets)
            out = torch.zeros(rows, sum(math.prod(s) for s in sources), dtype=DOUBLE)
            for (i, j), kernel in blocks.items():
                (_, h, w), (_, th, tw) = sources[j], targets[i]
                top = sum(math.prod(t) for t in targets[:i])
                left = sum(math.prod(s) for s in sources[:j])
                stride, reach = h // th, kernel.shape[-1] // 2
                for o in range(kernel.shape[0]):
                    for c in range(kernel.shape[1]):
                        for y in range(th):
                            for x in range(tw):
                                for dy in range(kernel.shape[2]):
                                    for dx in range(kernel.shape[3]):
                                        row = top + (o * th + y) * tw + x
                                        sy, sx = (stride * y + dy - reach) % h, (stride * x + dx - reach) % w
                                        out[row, left + (c * h + sy) * w + sx] += kernel[o, c, dy, dx]
            return out

        def lower(same, down):
            blocks = {(k, k): weight.detach() for k, weight in enumerate(same)}
            blocks |= {(k + 1, k): weight.detach() for k, weight in enumerate(down)}
            return matrix(blocks, tiers, tiers)

        a, b = lower(operator.A, operator.A_down), lower(operator.B, operator.B_down)
        u = matrix({(0, 0): operator.U.detach()}, ((operator.in_channels, *operator.size),), tiers)
    rate = operator.margin * torch.eye(len(a), dtype=DOUBLE) + a.T @ a - b + b.T
    return rate.detach(), u.detach()


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_linear_part_is_what_its_formula_says(kind):
    layer, _ = made(kind, scale=2.0)
    rate, u = dense(kind, layer)
    coupling = layer.operator.coupling(DOUBLE)
    z = normal(5, len(rate), seed=1)
    assert torch.allclose(z - coupling.product(z), z @ rate.T, atol=1e-12)
    assert torch.allclose(z - coupling.transposed.product(z), z @ rate, atol=1e-12)
    v = normal(5, len(rate), seed=2)
    back = coupling.resolvent(v, 0.7)
    assert torch.allclose(back + 0.7 * back @ rate.T, v, atol=1e-10)
    x = normal(5, *OPERATORS[kind][1], seed=3)
    zero = layer.operator.inject(torch.zeros_like(x))
    assert torch.allclose(layer.operator.inject(x) - zero, x.flatten(1) @ u.T, atol=1e-12)


@LAW
@given(
    kind=st.sampled_from(sorted(OPERATORS)), seed=st.integers(0, 99), scale=st.floats(0, 10), margin=st.floats(0.01, 2)
)
def test_the_margin_and_the_size_are_bounds(kind, seed, scale, margin):
    layer, _ = made(kind, seed, scale, margin)
    rate, _ = dense(kind, layer) if kind == "dense" else (torch.eye(1), None)
    coupling = layer.operator.coupling(DOUBLE)
    symmetric = (coupling.rate + coupling.rate.mH) / 2
    assert torch.linalg.eigvalsh(symmetric).min() >= margin * (1 - 1e-9)
    exact = torch.linalg.matrix_norm(coupling.rate, 2).max()
    assert exact * (1 - 1e-12) <= coupling.size <= 1.1 * exact
    if kind == "dense":
        assert torch.allclose(torch.linalg.matrix_norm(rate, 2), exact)


def test_a_norm_bound_of_nothing_and_of_the_unusual():
    assert norm_bound(torch.zeros(2, 3, 3)) < 1e-18
    assert norm_bound(1e-15 * torch.eye(3)[None]) < 1.1e-15
    assert 1e15 <= norm_bound(1e15 * torch.eye(3)[None]) < 1.1e15
    assert norm_bound(torch.full((1, 2, 2), torch.nan)).isnan()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.Softshrink(0.3)])
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("kind", OPERATORS)
def test_one_hundred_starts_end_in_one_point(kind, scale, activation):
    exact = {"rtol": 1e-12, "atol": 1e-13, "max_steps": 20_000, "on_failure": "raise"}
    layer, x = made(kind, scale=scale, margin=0.5, activation=activation, **exact)
    x = x[:1].repeat_interleave(100, 0)
    found = []
    # Forward-backward takes some L / m steps for each digit, 900 at the largest weights.
    for solver in SPLITTINGS if scale < 20 else SPLITTINGS[:1]:
        layer.solver = solver
        start = normal(100, flat(layer(x[:1])).shape[1], seed=7) * torch.logspace(-2, 3, 100, dtype=DOUBLE)[:, None]
        found.append(flat(layer.solve(x, z0=layer.operator.state(start)).value))
    points = torch.cat(found)
    assert (points - points[0]).abs().max() <= 1e-8 * max(1.0, points[0].abs().max().item())
    # It is the equilibrium of the equation as written.
    rate, _ = dense(kind, layer)
    image = layer.activation(points - points @ rate.T + layer.operator.inject(x[:1]))
    assert (image - points).abs().max() <= 1e-9 * max(1.0, points.abs().max().item())


@LAW
@given(
    kind=st.sampled_from(sorted(OPERATORS)),
    seed=st.integers(0, 99),
    scale=st.floats(0, 5),
    margin=st.floats(0.1, 2),
    activation=st.sampled_from(ACTIVATIONS),
    solver=st.sampled_from(SPLITTINGS),
)
def test_splittings_converge_forward_and_backward_whatever_the_weights(kind, seed, scale, margin, activation, solver):
    options = {"activation": activation, "solver": solver, "rtol": 1e-8, "max_steps": 20_000, "on_failure": "raise"}
    layer, x = made(kind, seed, scale, margin, **options)
    solution = layer.solve(3 * x)
    assert solution.converged.all()
    flat(solution.value).square().sum().backward()
    assert (solution.adjoint.status == eq.Status.CONVERGED).all()
    assert (solution.adjoint.residual <= 1e-8).all()


@LAW
@given(
    seed=st.integers(0, 99),
    step=st.floats(0.01, 20),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_an_implicit_step_solves_its_equation(seed, step, activation):
    v = 5 * normal(3, 7, seed=seed)
    wrapped = Activation(activation)
    z = wrapped.proximal(v, step)
    # By bisection: z = activation(a) with step a + (1 - step) activation(a) = v.
    low, high = torch.full_like(v, -1e4), torch.full_like(v, 1e4)
    for _ in range(200):
        middle = (low + high) / 2
        above = step * middle + (1 - step) * activation(middle) > v
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    assert torch.allclose(z, activation(low), rtol=1e-9, atol=1e-9)
    assert torch.allclose(wrapped.proximal(v, 1.0), activation(v), rtol=1e-12, atol=1e-12)
    each = step * torch.ones(3, 1, dtype=DOUBLE)
    assert torch.equal(wrapped.proximal(v, each), z)


def test_an_implicit_step_has_derivatives_of_all_orders():
    v = normal(2, 3, seed=1).requires_grad_()
    step = torch.tensor([[0.4], [2.5]], dtype=DOUBLE, requires_grad=True)
    wrapped = Activation(nn.Tanh())
    assert torch.autograd.gradcheck(wrapped.proximal, (v, step))
    assert torch.autograd.gradgradcheck(wrapped.proximal, (v, step))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.LeakyReLU(0.2)])
@pytest.mark.parametrize("solver", [*SPLITTINGS, eq.ForwardBackward(0.2), eq.PeacemanRachford(0.5), eq.Anderson()])
@pytest.mark.parametrize("kind", OPERATORS)
def test_gradients_are_those_of_finite_differences(kind, solver, activation):
    layer, x = made(kind, margin=1.0, solver=solver, activation=activation, rtol=1e-11, max_steps=3000)
    names, weights = zip(*layer.named_parameters(), strict=True)
    direction = normal(2, flat(layer(x[:2])).shape[1], seed=3)

    def loss(x, weights):
        return (flat(torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))) * direction).sum()

    x = x[:2].clone().requires_grad_()
    gradients = torch.autograd.grad(loss(x, weights), (x, *weights))
    for k, (tensor, gradient) in enumerate(zip((x, *weights), gradients, strict=True)):
        along = normal(*tensor.shape, seed=10 + k)
        h = 1e-6
        moved = []
        for sign in (1, -1):
            changed = [t.detach() + sign * h * along if j == k else t.detach() for j, t in enumerate((x, *weights))]
            moved.append(loss(changed[0], changed[1:]).detach())
        difference = (moved[0] - moved[1]) / (2 * h)
        assert torch.allclose((gradient * along).sum(), difference, rtol=1e-6, atol=1e-7), names[k - 1] if k else "x"


@pytest.mark.parametrize("solver", SPLITTINGS)
def test_gradients_agree_with_a_dense_solve_and_with_unrolling(solver):
    options = {"activation": nn.Tanh(), "solver": solver, "rtol": 1e-13, "atol": 0.0, "max_steps": 5000}
    layer, x = made("convolutional", margin=1.0, **options)
    taken = []
    for adjoint in (None, eq.Implicit(), eq.Implicit(eq.Dense(), max_steps=500), eq.Unrolled()):
        layer.adjoint = adjoint
        layer.zero_grad()
        flat(layer(x)).square().sum().backward()
        taken.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
    for other in taken[1:]:
        assert torch.allclose(taken[0], other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("adjoint", [eq.Implicit(order=2), eq.Unrolled()])
@pytest.mark.parametrize("solver", SPLITTINGS)
def test_second_derivatives(solver, adjoint):
    options = {"activation": nn.Tanh(), "solver": solver, "adjoint": adjoint, "rtol": 1e-13, "atol": 0.0}
    operator = eq.nn.MonotoneLinear(2, 3, margin=1.0).double()
    layer = eq.nn.MonotoneDEQ(operator, max_steps=3000, **options)
    x = normal(2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(layer, (x,), atol=1e-4)


def test_splitting_methods_give_no_second_derivatives_and_say_so():
    with pytest.raises(ValueError, match="order=2"):
        made("dense", adjoint=eq.Implicit(eq.PeacemanRachford(), order=2))
    layer, x = made("dense", activation=nn.Tanh())
    with pytest.raises(RuntimeError, match="order=2"):
        torch.autograd.grad(layer(x.requires_grad_()).sum(), x, create_graph=True)


@settings(LAW, max_examples=8)
@given(kind=st.sampled_from(sorted(OPERATORS)), seed=st.integers(0, 99), solver=st.sampled_from(SPLITTINGS))
def test_a_sample_is_the_same_in_any_company(kind, seed, solver):
    layer, x = made(kind, seed, 2.0, solver=solver, activation=nn.Tanh(), on_failure="ignore")
    x = x * torch.tensor([1.0, 100.0, torch.nan, 0.0], dtype=DOUBLE).reshape(-1, *(1,) * (x.ndim - 1))
    x.requires_grad_()
    together = layer.solve(x)
    value = flat(together.value)
    assert together.status[2] == eq.Status.NONFINITE
    value[[0, 1, 3]].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    for k in (0, 1, 3):
        mine = x[k : k + 1].detach().requires_grad_()
        alone = layer.solve(mine)
        assert alone.steps[0] == together.steps[k]
        assert torch.allclose(flat(alone.value)[0], value[k], rtol=1e-12, atol=1e-13)
        flat(alone.value).square().sum().backward()
        assert torch.allclose(mine.grad[0], x.grad[k], rtol=1e-9, atol=1e-11)
    assert (x.grad[2] == 0).all()


@pytest.mark.parametrize("kind", OPERATORS)
def test_no_two_of_a_thousand_pairs_move_further_apart_than_the_bound(kind):
    layer, x = made(kind, margin=0.3, rtol=1e-10, activation=nn.ReLU(), max_steps=5000)
    bound = layer.lipschitz()
    a = normal(1000, *x.shape[1:], seed=5)
    b = a + normal(1000, *x.shape[1:], seed=6) * torch.logspace(-4, 1, 1000, dtype=DOUBLE).reshape(
        -1, *(1,) * (x.ndim - 1)
    )
    with torch.no_grad():
        za, zb = flat(layer(a)), flat(layer(b))
        ratio = (za - zb).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
        assert ratio.max() <= bound
        readout = nn.Linear(za.shape[1], 5).double()
        read = lambda z: readout(flat(z))  # noqa: E731
        bounds = layer.lipschitz(read)
        difference = readout(za) - readout(zb)
        apart = (difference[:, :, None] - difference[:, None]).abs() / (a - b).flatten(1).norm(dim=1)[:, None, None]
        assert (apart.amax(dim=0) <= bounds + 1e-9).all()
        assert torch.allclose(bounds, bounds.mT, rtol=1e-12)
        assert (bounds.diagonal() == 0).all()
    rate, u = dense(kind, layer)
    assert bound <= torch.linalg.matrix_norm(u, 2) / layer.operator.margin * (1 + 1e-9)
    # The bounds from frequencies are those of the dense matrices.
    s = (rate + rate.T) / 2
    root = torch.linalg.cholesky(torch.linalg.inv(s))
    reach = torch.linalg.matrix_norm(root.T @ u, 2)
    v = readout.weight.detach()
    pair = v[0] - v[1]
    expected = ((u.T @ torch.linalg.solve(s, pair)).norm() + reach * (root.T @ pair).norm()) / 2
    assert torch.allclose(bounds[0, 1], expected)
    assert torch.allclose(
        bound, (torch.linalg.matrix_norm(torch.linalg.solve(s, u), 2) + reach * torch.linalg.eigvalsh(s)[0] ** -0.5) / 2
    )


def attack(layer, readout, x: Tensor, radius: Tensor, steps: int = 100) -> Tensor:
    """The best of projected gradient steps within each sample's radius: its lowest margin of the predicted class."""
    with torch.no_grad():
        label = readout(layer(x)).argmax(dim=1)
    shape = (-1, *(1,) * (x.ndim - 1))
    delta = torch.randn(x.shape, generator=generator(3), dtype=x.dtype)
    delta = delta / delta.flatten(1).norm(dim=1).reshape(shape) * radius.reshape(shape) / 2
    lowest = torch.full_like(radius, torch.inf)
    for _ in range(steps):
        delta.requires_grad_()
        logits = readout(layer(x + delta))
        other = logits.scatter(1, label[:, None], -torch.inf).amax(dim=1)
        margin = logits.gather(1, label[:, None])[:, 0] - other
        lowest = torch.minimum(lowest, margin.detach())
        (gradient,) = torch.autograd.grad(margin.sum(), delta)
        norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(shape)
        delta = delta.detach() - gradient / norm * radius.reshape(shape) / 4
        length = delta.flatten(1).norm(dim=1).reshape(shape)
        delta = delta * (radius.reshape(shape) * (1 - 1e-9) / length.clamp(min=1e-12)).clamp(max=1)
    return lowest


@pytest.mark.parametrize("kind", OPERATORS)
def test_no_attack_within_the_certified_radius_changes_a_prediction(kind):
    layer, _ = made(kind, margin=0.5, rtol=1e-9, activation=nn.ReLU())
    x = normal(20, *OPERATORS[kind][1], seed=4)
    head = nn.Linear(flat(layer(x)).shape[1], 3).double()
    readout = lambda z: head(flat(z))  # noqa: E731
    radius = layer.certified_radius(x, readout)
    assert radius.shape == (20,)
    assert (radius > 0).sum() >= 18
    assert (attack(layer, readout, x, radius, steps=40) >= -1e-7).all()
    # Far enough out one succeeds: the attack is one, and the radius is no more than it should be.
    assert (attack(layer, readout, x, 8 * radius, steps=40) < 0).any()


def test_a_certificate_counts_the_error_of_the_solve():
    layer, _ = made("dense", margin=0.5)
    x = normal(50, 3, seed=4)
    head = nn.Linear(12, 3).double()
    layer.rtol = 1e-10
    exact = layer.certified_radius(x, head)
    truth = head(layer(x)).argmax(dim=1)
    layer.rtol, layer.atol = 0.1, 0.0
    rough = layer.certified_radius(x, head)
    assert (rough <= exact + 1e-9).all() or (rough <= exact * 1.5).all()
    wrong = head(layer(x)).argmax(dim=1) != truth
    assert (rough[wrong] == 0).all()
    layer.max_steps, layer.on_failure = 1, "ignore"
    assert (layer.certified_radius(x, head) == 0).float().mean() > 0.5
    layer.max_steps = 1000
    x[0] = torch.nan
    assert layer.certified_radius(x, head)[0] == 0


def test_a_readout_that_is_not_affine_is_refused():
    layer, x = made("dense")
    head = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with pytest.raises(ValueError, match="affine"):
        layer.certified_radius(x, head)
    with pytest.raises(ValueError, match="classes"):
        layer.lipschitz(lambda z: z.sum(dim=1))


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_weights_are_worked_out_once_a_call(kind, monkeypatch):
    layer, x = made(kind)
    counts = []
    build = type(layer.operator).coupling
    monkeypatch.setattr(
        type(layer.operator), "coupling", lambda self, dtype: counts.append(dtype) or build(self, dtype)
    )
    flat(layer(x)).sum().backward()
    assert len(counts) == 1
    with torch.no_grad():
        layer.operator.U *= 2
    before = flat(layer(x))
    assert len(counts) == 2
    assert not torch.allclose(before, flat(layer(x / 2)))


def test_a_warm_start_takes_up_where_a_solve_ended():
    for solver in SPLITTINGS:
        layer, x = made("dense", solver=solver)
        cold = layer.solve(x)
        warm = layer.solve(x, state=cold.state)
        assert (warm.steps <= 2).all()
        near = layer.solve(x + 1e-4, state=cold.state)
        assert (near.steps < cold.steps).all()
        assert torch.allclose(near.value, layer(x + 1e-4), atol=1e-6)


@pytest.mark.parametrize("kind", OPERATORS)
def test_in_other_precisions_and_in_company(kind):
    layer, x = made(kind, rtol=1e-3)
    truth = flat(layer(x))
    single = copy.deepcopy(layer).float()
    assert flat(single(x.float())).dtype == torch.float32
    assert torch.allclose(flat(single(x.float())).double(), truth, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = single(x.bfloat16())
    assert flat(cast).dtype == torch.float32
    half = copy.deepcopy(layer).bfloat16()
    assert torch.allclose(flat(half(x.bfloat16())).double(), truth, atol=0.3)
    flat(half(x.bfloat16())).sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in half.parameters())
    with pytest.raises(TypeError, match="convert"):
        single(x)
    assert flat(layer(x[:0])).shape == (0, truth.shape[1])
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other, _ = made(kind, seed=5, rtol=1e-3)
    other.load_state_dict(torch.load(file))
    assert torch.equal(flat(other(x)), truth)
    whole = io.BytesIO()
    torch.save(layer, whole)
    whole.seek(0)
    assert torch.equal(flat(torch.load(whole, weights_only=False)(x)), truth)
    layer.eval()
    x = x.clone().requires_grad_()
    flat(layer(x)).sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.inference_mode():
        assert torch.allclose(flat(layer(x)), truth)
    with eq.monitor(nn.Sequential(layer)) as reports:
        layer(x)
    assert [report.name for report in reports] == ["0"]


def test_what_makes_no_sense_is_told():
    layer, x = made("dense")
    for activation, words in [
        (nn.GELU(), r"slopes from -0.13 to 1.13"),
        (nn.SiLU(), "slopes"),
        (nn.Softmax(dim=-1), "each entry"),
        (lambda a: 2 * a, "slopes from 2.00 to 2.00"),
        (nn.PReLU(), "parameters"),
    ]:
        with pytest.raises(ValueError, match=words):
            made("dense", activation=activation)
    with pytest.raises(TypeError, match="MonotoneLinear"):
        eq.nn.MonotoneDEQ(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"\(batch, 3\)"):
        layer(x[:, :2])
    with pytest.raises(TypeError, match="floating"):
        layer(x.long())
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(layer)(x[:, None])
    for solver in SPLITTINGS:
        with pytest.raises(TypeError, match=r"eq.Anderson\(\)"):
            eq.fixed_point(torch.cos, torch.zeros(1, 1), solver=solver)
        with pytest.raises(ValueError, match="step_size"):
            type(solver)(-1.0)
    cosine = lambda z: a * torch.cos(z)  # noqa: E731
    a = torch.ones(1, 1, requires_grad=True)
    value = eq.fixed_point(cosine, torch.zeros(1, 1), adjoint=eq.Implicit(eq.PeacemanRachford())).value
    with pytest.raises(TypeError, match="MonotoneDEQ"):
        value.sum().backward()
    for arguments, words in [
        ((1, 4, 7), None),
        ((1, (4, 4), 7), "divisible by 2"),
        ((1, (), 8), "at least one"),
        ((1, 4, 8, 4), "odd"),
        ((1, (4, 4), 2, 5), "turn"),
        ((1, 4, 8, 3, 0.0), "margin"),
        ((0, 4, 8), "in_channels"),
    ]:
        if words is None:
            eq.nn.MonotoneConv2d(*arguments)
            continue
        with pytest.raises(ValueError, match=words):
            eq.nn.MonotoneConv2d(*arguments)


def test_too_few_steps_are_a_status_and_a_warning():
    layer, x = made("dense", max_steps=3)
    with pytest.warns(eq.ConvergenceWarning, match="4 of 4"):
        solution = layer.solve(x)
    assert (solution.status == eq.Status.MAX_STEPS).all()
    rate, _ = dense("dense", layer)
    image = layer.activation(solution.value - solution.value @ rate.T + layer.operator.inject(x))
    residual = eq.rms_norm(image - solution.value) / eq.rms_norm(image)
    assert torch.allclose(solution.residual, residual)


def test_rounding_that_large_weights_amplify_is_told_as_such():
    layer, x = made("dense", scale=30.0, rtol=1e-7, atol=0.0, on_failure="ignore", max_steps=5000)
    layer = layer.float()
    for solver in SPLITTINGS[:1]:
        layer.solver = solver
        solution = layer.solve(x.float())
        assert (solution.status == eq.Status.STALLED).all()
        assert (solution.steps < 1000).all()
        exact = layer.double().solve(x).value
        layer.float()
        assert torch.allclose(solution.value.double(), exact, atol=0.05 * float(exact.abs().max()))


def test_weights_that_are_not_finite_are_told_as_such():
    layer, x = made("dense", on_failure="ignore")
    with torch.no_grad():
        layer.operator.A[0, 0] = torch.nan
    for solver in SPLITTINGS:
        layer.solver = solver
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            solution = layer.solve(x)
        assert (solution.status == eq.Status.NONFINITE).all()
        assert solution.value.isfinite().all()


def test_the_blocks_of_the_page_print_what_it_says():
    page = (Path(__file__).parents[1] / "docs" / "monotone.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    for code, wanted in blocks:
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == wanted
    assert len(blocks) == 1
