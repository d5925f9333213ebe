"""The law of company, half precision: where a solve stalls, what default tolerances meet, and scales of the loss."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from maps import Cell, matrix, normal
from torch import Tensor, nn
from torch.nn import functional

import equilibria as eq

DOUBLE = torch.float64
ADJOINTS = [eq.Implicit(), eq.Phantom(3), eq.OneStep(), eq.Unrolled(), eq.Unrolled(checkpoint=True)]
HALVES = [torch.bfloat16, torch.float16]


def cell(n: int = 8, **options) -> Cell:
    return Cell(n, **{"dtype": torch.float32, **options})


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, seed=3, dtype=dtype)


# Half precision throughout.


@given(
    seed=st.integers(0, 1000),
    n=st.sampled_from([8, 13, 32, 100]),
    gain=st.floats(0.05, 0.95),
    solver=st.sampled_from([eq.Picard(), eq.Anderson(), eq.Broyden()]),
    dtype=st.sampled_from(HALVES),
    autocast=st.booleans(),
)
def test_a_tolerance_below_half_precision_ends_stalled_and_not_at_the_cap(seed, n, gain, solver, dtype, autocast):
    narrow = torch.float32 if autocast else dtype
    w, x = matrix(n, seed, gain, narrow), normal(3, n, seed=seed + 1, dtype=narrow)
    options: dict[str, Any] = {"rtol": 1e-6, "max_steps": 400, "on_failure": "ignore"}
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        sol = eq.fixed_point(lambda z: torch.tanh(z @ w + x), torch.zeros_like(x), solver=solver, **options)
    # Rounding may meet the tolerance by chance, at a state that is its own image.
    assert ((sol.status == eq.Status.STALLED) | (sol.residual <= 1e-6)).all()
    assert sol.evaluations <= 120
    assert (sol.residual < 2 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("solver", [eq.Newton(), eq.Broyden()])
def test_a_root_to_a_tolerance_below_half_precision_ends_stalled(solver, dtype):
    w, x = matrix(32, 0, 0.8, dtype), normal(24, 32, seed=1, dtype=dtype)
    g = lambda z: z - torch.tanh(z @ w + x)  # noqa: E731
    sol = eq.root(g, torch.zeros_like(x), solver=solver, atol=1e-7, max_steps=400, on_failure="ignore")
    assert ((sol.status == eq.Status.STALLED) | (sol.residual <= 1e-7)).all()
    assert (sol.status == eq.Status.STALLED).any()
    assert sol.evaluations <= 120


class Attention(nn.Module):
    """A post-norm transformer block with its input injected."""

    def __init__(self, width: int = 96, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, z, x):
        q, k, v = self.qkv(z).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        y = self.first(x + 0.3 * z + self.out(attended))
        return self.second(y + self.down(functional.gelu(self.up(y))))


class Wide(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 512), nn.Linear(512, width), nn.LayerNorm(width)

    def forward(self, z, x):
        return self.norm(x + self.down(torch.relu(self.up(z))))


class Convolution(nn.Module):
    """The residual block of multiscale equilibrium models."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(width, 64, 3, padding=1), nn.Conv2d(64, width, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(4, 64), nn.GroupNorm(4, width), nn.GroupNorm(4, width)])

    def forward(self, z, x):
        y = self.norms[1](x + 0.3 * self.down(self.norms[0](torch.relu(self.up(z)))))
        return self.norms[2](torch.relu(0.3 * z + y))


DEEP = [(Attention, (2, 16, 96)), (Wide, (6, 256)), (Convolution, (2, 32, 8, 8))]


@pytest.mark.parametrize(("kind", "shape"), DEEP)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_default_tolerances_are_met_by_healthy_models(dtype, autocast, kind, shape):
    torch.manual_seed(0)
    plain = kind()
    x = inputs(*shape).requires_grad_()
    v = normal(*shape, seed=5, dtype=torch.float32)
    want = torch.autograd.grad(eq.DEQ(plain, rtol=1e-5, max_steps=200)(x), (x, *plain.parameters()), v)
    half = kind()
    half.load_state_dict(plain.state_dict())
    if not autocast:
        half, x, v = half.to(dtype), x.detach().to(dtype).requires_grad_(), v.to(dtype)
    for solver in (eq.Anderson(), eq.Broyden(), eq.Picard()):
        layer = eq.DEQ(half, solver=solver, on_failure="raise")
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            sol = layer.solve(x)
        got = torch.autograd.grad(sol.value, (x, *half.parameters()), v)
        assert (sol.adjoint.status == eq.Status.CONVERGED).all()
        for a, b in zip(got, want, strict=True):
            assert (a.float() - b).norm() < 0.15 * b.norm() + 1e-3


@pytest.mark.parametrize("dtype", HALVES)
def test_newton_under_autocast_where_its_products_evaluate_the_cell_again(dtype):
    torch.manual_seed(0)
    attention, inject = Attention(width=16), nn.Linear(16, 16)
    x = inputs(2, 4, 16).to(dtype)  # as it comes from a layer under autocast; without it the product below is an error

    def f(z):
        return attention(z, inject(x))

    with torch.autocast("cpu", dtype=dtype):
        sol = eq.fixed_point(f, torch.zeros(2, 4, 16), solver=eq.Newton())
        want = eq.fixed_point(f, torch.zeros(2, 4, 16), solver=eq.Picard())
    torch.testing.assert_close(sol.value, want.value, rtol=5e-2, atol=5e-2)
    sol.value.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_in_half_precision_are_near_those_in_float32(dtype, adjoint):
    plain, half = cell(32), cell(32).to(dtype)
    x, v = inputs(4, 32), normal(4, 32, seed=5, dtype=torch.float32)
    gradients = []
    for c in (plain, half):
        kind = c.linear.weight.dtype
        mine = x.to(kind).requires_grad_()
        z = eq.DEQ(c, adjoint=adjoint, on_failure="raise")(mine)
        gradients.append(torch.autograd.grad(z, (mine, *c.parameters()), v.to(kind)))
    for want, got in zip(*gradients, strict=True):
        assert got.dtype == dtype
        assert (got.float() - want).norm() < 0.1 * want.norm()


# Loss scales.


@pytest.mark.parametrize("adjoint", [eq.Implicit(), eq.Implicit(solver=eq.Broyden()), eq.Phantom(2), eq.Unrolled()])
def test_training_in_float16_with_a_gradient_scaler(adjoint):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), eq.DEQ(cell(), adjoint=adjoint, on_failure="raise"), nn.Linear(8, 1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)  # too large: it has to be found out
    x, losses, scales = inputs(16, 8), [], []
    for _ in range(40):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (model(x) - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert scales[0] == 2.0**29  # the first gradient overflowed, which raised nothing, and was skipped
    assert 2.0**10 <= scales[-1] == scales[-2] < 2.0**29
    assert losses[0] == losses[1]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_scale_changes_nothing_in_float16(autocast):
    layer = eq.DEQ(cell() if autocast else cell().half(), on_failure="raise")
    x = inputs(64, 8) if autocast else inputs(64, 8).half()
    gradients = []
    for scale in (1.0, 2.0**16):
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            loss = layer(x).float().square().mean()
        (gradient,) = torch.autograd.grad(scale * loss, layer.cell.linear.weight)
        gradients.append(gradient.float() / scale)
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


class Convolutions(nn.Module):
    """Two convolutions and three normalisations; in half precision the products of its backward round a lot."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in (64, 32, 32))

    def forward(self, z, x):
        y = self.norms[1](x + self.down(self.norms[0](torch.relu(self.up(z)))))
        return self.norms[2](torch.relu(z + y))


@pytest.mark.parametrize("seed", range(4))
def test_a_backward_solve_that_rounds_at_its_tolerance_is_met(seed):
    torch.manual_seed(seed)
    layer = eq.DEQ(Convolutions().bfloat16(), max_steps=100)
    sol = layer.solve(torch.randn(2, 32, 8, 8).bfloat16())
    sol.value.float().square().sum().backward()
    assert not (sol.adjoint.status == eq.Status.STALLED).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_inside_of_autocast_solves_in_full_precision(dtype):
    torch.manual_seed(0)
    n = 400
    weight = (torch.randn(n, n) * 0.6 / n**0.5).requires_grad_()
    x = torch.randn(8, n)
    results = []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=dtype):
            options = {"adjoint": eq.Implicit(rtol=1e-4), "on_failure": "ignore"}  # half precision stalls above that
            sol = eq.fixed_point(lambda z: torch.tanh(z @ weight + x), torch.zeros(8, n), **options)
            loss = sol.value.float().square().sum()
            results += [torch.autograd.grad(loss, weight)[0]] if inside else []
        results += [] if inside else [torch.autograd.grad(loss, weight)[0]]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
