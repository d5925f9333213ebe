"""The law of company, precision: autocast, and states of several dtypes."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
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


# Autocast.


class Normed(nn.Module):
    """A post-norm cell, of float32 output though its products may be narrower, as normalisations have it on a GPU."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(n, n), nn.LayerNorm(n)
        with torch.no_grad():
            self.linear.weight.copy_(matrix(n, 7, 0.3))

    def forward(self, z, x):
        return self.norm((self.linear(z) + x).float())


@pytest.mark.parametrize("kind", [cell, Normed])
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(dtype, adjoint, kind):
    layer = eq.DEQ(kind(8), adjoint=adjoint, on_failure="raise")
    x = inputs(4, 8).requires_grad_()
    v = normal(4, 8, seed=5, dtype=torch.float32)
    full = torch.autograd.grad(layer(x), (x, *layer.parameters()), v)
    with torch.autocast("cpu", dtype=dtype):
        z = layer(x)
    assert z.dtype == torch.float32
    half = torch.autograd.grad(z, (x, *layer.parameters()), v)  # backward runs outside of autocast
    for got, want in zip(half, full, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("kind", [cell, Normed])
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_with_layers_around_whose_outputs_are_half_precision(dtype, kind):
    model = nn.Sequential(nn.Linear(8, 8), eq.DEQ(kind(8), on_failure="raise"), nn.Linear(8, 2))
    with torch.autocast("cpu", dtype=dtype):
        loss = model(inputs(4, 8)).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_module_in_half_precision_throughout(dtype, adjoint):
    layer = eq.DEQ(cell().to(dtype), adjoint=adjoint, on_failure="raise")
    x = inputs(4, 8).to(dtype).requires_grad_()
    sol = layer.solve(x)
    assert sol.value.dtype == dtype
    with torch.no_grad():  # the residual is that of the value in its own dtype
        image = layer.cell(sol.value, x).float()
        true = eq.rms_norm(image - sol.value.float()) / eq.rms_norm(image)
    torch.testing.assert_close(sol.residual, true, rtol=1e-5, atol=0)
    sol.value.float().square().sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())


def test_a_state_in_float32_around_a_cell_in_bfloat16_is_finer_than_one_in_bfloat16():
    half = cell(64, norm=0.9).bfloat16()
    x = inputs(4, 64).bfloat16()
    f = lambda z: half(z.bfloat16(), x)  # noqa: E731
    options = {"max_steps": 60, "on_failure": "ignore", "rtol": 1e-6}
    narrow = eq.fixed_point(f, torch.zeros(4, 64, dtype=torch.bfloat16), **options)
    wide = eq.fixed_point(f, torch.zeros(4, 64, dtype=torch.bfloat16), state_dtype=torch.float32, **options)
    assert narrow.value.dtype == torch.bfloat16
    assert wide.value.dtype == torch.float32
    assert wide.residual.max() < narrow.residual.max()
    wide.value.sum().backward()
    assert half.linear.weight.grad.isfinite().all()


# Every solver and entry point.

ENTRIES: list[tuple[str, eq.Solver, eq.Adjoint]] = [
    *(("fixed_point", solver, eq.Implicit()) for solver in (eq.Picard(), eq.Anderson(), eq.Broyden(), eq.Newton())),
    *(("fixed_point", solver, eq.Unrolled()) for solver in (eq.Picard(), eq.Anderson(), eq.Broyden())),
    *(("fixed_point", eq.Anderson(), adjoint) for adjoint in (eq.Neumann(6), eq.Implicit(order=2))),
    *(
        ("fixed_point", eq.Anderson(), eq.Implicit(solver=solver))
        for solver in (eq.Picard(), eq.Broyden(), eq.BiCGSTAB(), eq.Dense())
    ),
    *(
        ("root", solver, eq.Implicit())
        for solver in (eq.Newton(), eq.Newton(linear_solver=eq.Dense()), eq.Broyden(), eq.Anderson())
    ),
    *(("root", solver, eq.Unrolled()) for solver in (eq.Broyden(), eq.Anderson())),
    *(
        ("argmin", solver, eq.Implicit(solver=eq.ConjugateGradient()))
        for solver in (eq.LBFGS(), eq.Newton(), eq.GradientDescent(0.3))
    ),
]


def equation(entry: str, w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """One function for each entry point, whose products are with w."""
    symmetric = w + w.mT

    def objective(z: Tensor, x: Tensor) -> Tensor:
        return (z * z / 2 - x * z).sum(dim=1) + functional.softplus(z @ symmetric).sum(dim=1) / 4

    return {
        "fixed_point": lambda z, x: torch.tanh(z @ w + x),
        "root": lambda z, x: z - torch.tanh(z @ w + x),
        "argmin": objective,
    }[entry]


@pytest.mark.parametrize(("entry", "solver", "adjoint"), ENTRIES)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_solver_under_autocast_and_backward_outside_of_it(dtype, entry, solver, adjoint):
    w = matrix(12, 7, 0.6, torch.float32).requires_grad_()
    x = inputs(4, 12).requires_grad_()
    f, z0, v = equation(entry, w), torch.zeros(4, 12), normal(4, 12, seed=5, dtype=torch.float32)
    solve = getattr(eq, entry)
    full = torch.autograd.grad(solve(f, z0, x, solver=solver, adjoint=adjoint).value, (w, x), v)
    with torch.autocast("cpu", dtype=dtype):
        sol = solve(f, z0, x, solver=solver, adjoint=adjoint)
    assert sol.value.dtype == torch.float32
    # The few steps that a loose tolerance takes have a gradient of their own.
    bound = 0.2 if isinstance(adjoint, eq.Unrolled) else 0.05
    for got, want in zip(torch.autograd.grad(sol.value, (w, x), v), full, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < bound * want.norm()


@pytest.mark.parametrize(("entry", "solver", "adjoint"), ENTRIES)
def test_autocast_reaches_the_function_and_not_the_algebra_of_the_solver(entry, solver, adjoint):
    w = matrix(12, 7, 0.9, torch.float32).requires_grad_()
    x = inputs(4, 12).requires_grad_()
    plain = equation(entry, w)

    def shielded(z, x):
        assert torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False):
            return plain(z, x)

    tolerance = {"rtol": 1e-5} if entry == "fixed_point" else {"atol": 1e-5}
    if isinstance(adjoint, eq.Implicit):
        adjoint = dataclasses.replace(adjoint, rtol=1e-5)
    solve = getattr(eq, entry)
    want = solve(plain, torch.zeros(4, 12), x, solver=solver, adjoint=adjoint, **tolerance)
    with torch.autocast("cpu", dtype=torch.float16):
        got = solve(shielded, torch.zeros(4, 12), x, solver=solver, adjoint=adjoint, **tolerance)
    assert torch.equal(got.value, want.value)
    assert torch.equal(got.steps, want.steps)
    gradients = [torch.autograd.grad(sol.value.square().sum(), (w, x)) for sol in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_long_state_does_not_overflow_under_autocast_in_float16():
    n = 200_000  # the sum of its squares is no number of float16
    x = inputs(1, n)
    for solver in (eq.Anderson(), eq.Broyden()):
        with torch.autocast("cpu", dtype=torch.float16):
            sol = eq.fixed_point(lambda z: torch.sin(0.9 * z) + x, torch.zeros(1, n), solver=solver, rtol=1e-3)
        assert sol.evaluations < 20


@pytest.mark.parametrize("dtype", HALVES)
def test_part_of_a_cell_may_leave_autocast(dtype):
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.coarse, self.fine = cell(), nn.Linear(8, 8)
            self.seen = set()

        def forward(self, z, x):
            y = self.coarse(z, x)
            with torch.autocast("cpu", enabled=False):
                fine = self.fine(y.float())
            self.seen.add((y.dtype, fine.dtype))
            return torch.tanh(0.5 * fine + x)

    torch.manual_seed(0)
    layer = eq.DEQ(Careful(), on_failure="raise")
    x = inputs(4, 8)
    want = torch.autograd.grad(layer(x).square().sum(), tuple(layer.parameters()))
    layer.cell.seen.clear()
    with torch.autocast("cpu", dtype=dtype):
        loss = layer(x).square().sum()
    got = torch.autograd.grad(loss, tuple(layer.parameters()))
    # The same in backward, which evaluates the cell again.
    assert layer.cell.seen == {(torch.promote_types(dtype, torch.float32), torch.float32)} or layer.cell.seen == {
        (dtype, torch.float32)
    }
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


# Several dtypes.


def test_leaves_of_several_dtypes_each_keep_their_own():
    w = {torch.float64: matrix(6, 1, 0.5), torch.float32: matrix(6, 2, 0.5, torch.float32)}
    w[torch.bfloat16] = matrix(6, 3, 0.5).bfloat16()
    parameters = [t.requires_grad_() for t in w.values()]
    x = inputs(3, 6, dtype=DOUBLE)

    def f(z):
        total = sum(leaf.double() for leaf in z.values()) / 3
        return {key: torch.tanh(total.to(leaf.dtype) @ w[leaf.dtype] + x.to(leaf.dtype)) for key, leaf in z.items()}

    start = {str(i): torch.zeros(3, 6, dtype=dtype) for i, dtype in enumerate(w)}
    for adjoint in ADJOINTS:
        sol = eq.fixed_point(f, start, adjoint=adjoint)
        assert [leaf.dtype for leaf in sol.value.values()] == list(w)
        image = f(sol.value)
        ratios = []
        for key, leaf in sol.value.items():
            wide = [t.detach().double() for t in (image[key], leaf)]
            ratios.append(eq.rms_norm(wide[0] - wide[1]) / eq.rms_norm(wide[0]))
        torch.testing.assert_close(sol.residual, torch.stack(ratios).amax(dim=0), rtol=1e-6, atol=1e-9)
        assert (sol.residual < 1e-2).all()  # the coarsest decides what is asked for
        gradients = torch.autograd.grad(sum(leaf.double().sum() for leaf in sol.value.values()), parameters)
        assert [g.dtype for g in gradients] == list(w)
        assert all(g.isfinite().all() and g.norm() > 0 for g in gradients)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_state_in_float64_around_a_cell_in_float32(adjoint):
    narrow = cell()
    x = inputs(3, 8).requires_grad_()
    sol = eq.fixed_point(lambda z: narrow(z.float(), x), torch.zeros(3, 8, dtype=DOUBLE), adjoint=adjoint)
    assert sol.value.dtype == sol.residual.dtype == DOUBLE
    want = eq.fixed_point(narrow, torch.zeros(3, 8), x, adjoint=adjoint).value
    torch.testing.assert_close(sol.value.float(), want, rtol=1e-3, atol=1e-3)
    got = torch.autograd.grad(sol.value.sum(), (x, *narrow.parameters()))
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), (x, *narrow.parameters())), rtol=1e-2, atol=1e-2)
    with pytest.raises(TypeError, match="its dtype may be lower than the state's"):
        eq.fixed_point(lambda z: narrow(z, x).double(), torch.zeros(3, 8))


def test_another_default_dtype_changes_nothing():
    layer = eq.DEQ(cell())
    w, x = matrix(8, 0, 0.5, torch.float32), inputs(3, 8)
    solves = [
        lambda: layer.solve(x),
        lambda: eq.root(lambda z: z - torch.tanh(z @ w + x), torch.zeros_like(x)),
        lambda: eq.argmin(lambda z: ((z - x) ** 2).sum(dim=1) + (z**4).sum(dim=1), torch.zeros_like(x)),
    ]
    before = [solve() for solve in solves]
    try:
        torch.set_default_dtype(DOUBLE)
        after = [solve() for solve in solves]
        gradients = torch.autograd.grad(after[0].value.sum(), tuple(layer.parameters()))
    finally:
        torch.set_default_dtype(torch.float32)
    for old, new in zip(before, after, strict=True):
        assert new.value.dtype == new.residual.dtype == torch.float32
        assert torch.equal(old.value, new.value)
        assert torch.equal(old.steps, new.steps)
    assert all(g.dtype == torch.float32 for g in gradients)
    torch.testing.assert_close(gradients, torch.autograd.grad(before[0].value.sum(), tuple(layer.parameters())))


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_weights_that_a_fused_layer_has_cast_keep_their_gradients(adjoint):
    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, z, x):
            return 0.3 * self.layer(z) + x

    layer = eq.DEQ(Encoded(), adjoint=adjoint).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(normal(2, 3, 8, seed=0, dtype=torch.float32)).float().square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None] == []
