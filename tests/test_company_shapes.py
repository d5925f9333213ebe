"""The law of company, tensors of every kind: empty batches, batches of one, any strides, subclasses, inference mode."""

import copy

import pytest
import torch
from maps import Cell, matrix, normal, same, tanh_map
from torch import Tensor, nn

import equilibria as eq

DOUBLE = torch.float64
ADJOINTS = [eq.Implicit(), eq.Phantom(3), eq.OneStep(), eq.Unrolled(), eq.Unrolled(checkpoint=True)]


def cell(n: int = 8, **options) -> Cell:
    return Cell(n, **{"dtype": torch.float32, **options})


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, seed=3, dtype=dtype)


ENTRIES = [
    *(("fixed_point", solver, a) for solver in (eq.Picard(), eq.Anderson(), eq.Broyden()) for a in ADJOINTS),
    ("fixed_point", eq.Newton(), eq.Implicit()),
    *(
        ("fixed_point", eq.Anderson(), eq.Implicit(solver=solver))
        for solver in (eq.Picard(), eq.BiCGSTAB(), eq.Dense(), eq.ConjugateGradient(), eq.GMRES())
    ),
    ("fixed_point", eq.Anderson(), eq.Neumann(2)),
    ("fixed_point", eq.Anderson(), eq.Implicit(order=2)),
    *(("root", solver, eq.Implicit()) for solver in (eq.Newton(), eq.Newton(linear_solver=eq.Dense()), eq.Broyden())),
    ("root", eq.Broyden(), eq.Unrolled()),
    *(("argmin", solver, None) for solver in (eq.LBFGS(), eq.Newton(), eq.GradientDescent(0.2))),
]


@pytest.mark.parametrize(("entry", "solver", "adjoint"), ENTRIES)
def test_an_empty_batch_and_a_batch_of_one(entry, solver, adjoint):
    w = matrix(6, 0, 0.5).requires_grad_()
    f = {
        "fixed_point": tanh_map(),
        "root": lambda z, w, x: z - torch.tanh(z @ w + x),
        "argmin": lambda z, w, x: ((z - x) ** 2).sum(dim=1) + torch.logsumexp(z @ w, dim=1),
    }[entry]
    solve = getattr(eq, entry)
    several = normal(3, 6, seed=1)
    want = solve(f, torch.zeros_like(several), w, several, solver=solver, adjoint=adjoint)
    for count in (0, 1):
        x = several[:count].clone().requires_grad_()
        with torch.no_grad():
            plain = solve(f, torch.zeros_like(x), w, x, solver=solver, adjoint=adjoint)
        sol = solve(f, torch.zeros_like(x), w, x, solver=solver, adjoint=adjoint)
        assert same(plain.value, sol.value)
        assert sol.value.shape == (count, 6)
        assert sol.status.shape == sol.steps.shape == sol.residual.shape == (count,)
        assert sol.converged.all()
        assert plain.evaluations == sol.evaluations >= 1
        assert count or sol.evaluations == 1
        torch.testing.assert_close(sol.value, want.value[:count], rtol=1e-10, atol=1e-12)
        dw, dx = torch.autograd.grad(sol.value.square().sum(), (w, x))
        assert dx.shape == (count, 6)
        assert dw.isfinite().all()
        assert bool((dw != 0).any()) == (count > 0)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", [eq.Picard(), eq.Anderson(), eq.Broyden(), eq.Newton()])
def test_strides_of_inputs_and_of_the_start_change_nothing(solver, adjoint):
    if isinstance(solver, eq.Newton) and isinstance(adjoint, eq.Unrolled):
        adjoint = eq.Implicit(solver=eq.Dense())  # directions of their own cannot be unrolled
    w = matrix(8, 0, 0.5).requires_grad_()
    f = tanh_map()
    base = normal(8, 4, seed=2)
    row = normal(1, 8, seed=4)

    def outcome(x, z0):
        x = x.detach().requires_grad_()
        sol = eq.fixed_point(f, z0, w, x, solver=solver, adjoint=adjoint)
        return sol.value, sol.residual, sol.steps, *torch.autograd.grad(sol.value.square().sum(), (w, x))

    cases = [
        (base.mT, torch.zeros(8, 4, dtype=DOUBLE).mT),  # transposed
        (normal(4, 16, seed=5)[:, ::2], normal(8, 16, seed=6)[::2, ::2]),  # with gaps
        (row.expand(4, 8), torch.zeros((), dtype=DOUBLE).expand(4, 8)),  # of zero stride
        (base.mT.flip(0), row.expand(4, 8)),
    ]
    for x, z0 in cases:
        before = z0.clone()
        want = outcome(x.contiguous(), z0.contiguous())
        got = outcome(x, z0)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        assert same(z0, before)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_images_that_lie_channels_last(adjoint):
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, z, x):
            return torch.tanh(0.5 * self.conv(z) + x)

    torch.manual_seed(0)
    plain = eq.DEQ(Convolution(), adjoint=adjoint, rtol=1e-5)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x = inputs(2, 4, 5, 5)
    want, got = plain(x), last(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), tuple(last.parameters())),
        torch.autograd.grad(want.square().sum(), tuple(plain.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("adjoint", [*ADJOINTS, eq.Neumann(2), eq.Implicit(order=2)])
@pytest.mark.parametrize("kind", [lambda t: t.requires_grad_(), nn.Parameter], ids=["leaf", "parameter"])
def test_a_start_that_requires_grad(kind, adjoint):
    layer = eq.DEQ(cell(), adjoint=adjoint)
    x, z0 = inputs(3, 8), kind(inputs(3, 8) / 2)
    before = z0.detach().clone()
    want = layer.solve(x, z0=z0.detach())
    sol = layer.solve(x, z0=z0)
    assert same(sol.value, want.value)
    assert type(sol.value) is Tensor
    sol.value.sum().backward()
    assert same(z0, before)
    if isinstance(adjoint, eq.Unrolled):
        # The start's part in the iterate that was reached.
        assert 0 < z0.grad.norm() < 0.1 * z0.norm()
    else:
        assert z0.grad is None  # an equilibrium does not depend on where the search for it began
    want.value.sum().backward()


class Named(Tensor):
    """A tensor of a subclass that stays one through every operation."""


def test_a_start_or_an_input_of_a_subclass():
    layer = eq.DEQ(cell())
    x = inputs(3, 8)
    want = layer(x)
    for named in (layer(x.as_subclass(Named)), layer(x, z0=torch.zeros(3, 8).as_subclass(Named))):
        torch.testing.assert_close(named.as_subclass(Tensor), want)
        gradients = torch.autograd.grad(named.sum(), tuple(layer.parameters()))
        torch.testing.assert_close(
            [g.as_subclass(Tensor) for g in gradients], list(torch.autograd.grad(layer(x).sum(), [*layer.parameters()]))
        )


@pytest.mark.parametrize(("entry", "solver", "adjoint"), [*ENTRIES[::5], *ENTRIES[-7:]])
def test_inference_mode_in_every_entry_point(entry, solver, adjoint):
    w, x = matrix(6, 0, 0.5), normal(3, 6, seed=1)
    f = {
        "fixed_point": tanh_map(),
        "root": lambda z, w, x: z - torch.tanh(z @ w + x),
        "argmin": lambda z, w, x: ((z - x) ** 2).sum(dim=1) + torch.logsumexp(z @ w, dim=1),
    }[entry]
    solve = getattr(eq, entry)
    want = solve(f, torch.zeros_like(x), w, x, solver=solver, adjoint=adjoint)
    with torch.inference_mode():
        sol = solve(f, torch.zeros_like(x), w, x.clone(), solver=solver, adjoint=adjoint)
        assert solve(f, torch.zeros_like(x), w, x, solver=solver, adjoint=adjoint, state=sol.state).evaluations <= 2
    assert sol.converged.all()
    assert torch.equal(sol.value.clone(), want.value)
    assert torch.equal(sol.steps.clone(), want.steps)


def test_products_with_what_inference_mode_made_are_refused_in_words():
    with torch.inference_mode():
        x = normal(3, 6, seed=1)
        for solve in (
            lambda: eq.root(lambda z: x * z - 1, torch.ones(3, 6, dtype=DOUBLE)),
            lambda: eq.argmin(lambda z: (x * z - 1).square().sum(dim=1), torch.ones(3, 6, dtype=DOUBLE)),
        ):
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
                solve()
