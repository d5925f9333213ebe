"""The law of purity: a solve is one function of its inputs, and changes nothing but what its caller may see change."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import Counted, matrix, normal, same
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import equilibria as eq

DOUBLE = torch.float64
LAW = settings(derandomize=True, max_examples=40, deadline=None)
ADJOINTS = {
    "implicit": eq.Implicit(),
    "implicit-2": eq.Implicit(order=2),
    "implicit-picard": eq.Implicit(solver=eq.Picard()),
    "neumann": eq.Neumann(4),
    "phantom": eq.Phantom(3),
    "onestep": eq.OneStep(),
    "unrolled": eq.Unrolled(),
    "unrolled-checkpoint": eq.Unrolled(checkpoint=True),
}
EXACT = [adjoint for adjoint in ADJOINTS.values() if not isinstance(adjoint, (eq.Neumann, eq.Phantom, eq.OneStep))]
adjoints = pytest.mark.parametrize("adjoint", [pytest.param(a, id=name) for name, a in ADJOINTS.items()])


class Cell(nn.Module):
    """tanh(part(A z + x)), with any part in between."""

    def __init__(self, *parts: nn.Module, n: int = 6, norm: float = 0.5) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n)
        self.parts = nn.Sequential(*parts)
        with torch.no_grad():
            self.linear.weight.copy_(matrix(n, 7, norm))
        self.double()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.parts(self.linear(z) + x))


def inputs(batch: int = 8, n: int = 6, seed: int = 3) -> Tensor:
    return normal(batch, n, seed=seed)


def buffers(module: nn.Module) -> list[Tensor]:
    return [b.detach().clone() for b in module.buffers()]


def gradients(layer: nn.Module, x: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    return torch.autograd.grad(layer(x).square().sum(), tuple(layer.parameters()))


# Buffers.

NORMS = {
    "batch": lambda: nn.BatchNorm1d(6),
    "batch-cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "spectral": lambda: spectral_norm(nn.Linear(6, 6)),
}
norms = pytest.mark.parametrize("norm", NORMS)


@norms
@adjoints
@pytest.mark.parametrize("grad", [True, False])
def test_statistics_move_once_for_each_forward(norm, adjoint, grad):
    cell = Cell(NORMS[norm]())
    layer, x = eq.DEQ(cell, adjoint=adjoint), inputs()
    for _ in range(2):
        twin = copy.deepcopy(cell)
        with torch.set_grad_enabled(grad):
            z = layer(x)
        moved = buffers(cell)
        if grad:
            z.sum().backward()
        assert all(same(a, b) if a.is_floating_point() else a == b for a, b in zip(buffers(cell), moved, strict=True))
        # As far as one call of the cell at the equilibrium moves them.
        twin(z.detach(), x)
        for got, want in zip(moved, buffers(twin), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert any(
            not torch.equal(got, old)
            for got, old in zip(
                moved,
                buffers(
                    eq.DEQ(Cell(NORMS[norm]())),
                ),
                strict=True,
            )
        )


@norms
def test_statistics_stay_in_eval_and_after_a_solve_that_fails(norm):
    cell = Cell(NORMS[norm]())
    layer, x = eq.DEQ(cell, on_failure="raise", max_steps=2, rtol=1e-12), inputs()
    before, held = buffers(cell), list(cell.buffers())
    with pytest.raises(eq.SolveError):
        layer(x)
    with pytest.raises(RuntimeError):
        layer(x[:, :5], z0=torch.zeros(8, 6, dtype=DOUBLE))  # the cell itself fails
    eq.DEQ(cell.eval())(x).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(buffers(cell), before, strict=True))
    assert all(a is b for a, b in zip(cell.buffers(), held, strict=True))


@norms
@pytest.mark.parametrize("adjoint", EXACT, ids=repr)
def test_gradients_through_normalisation_in_training(norm, adjoint):
    # Spectral normalisation sharpens its vectors at every call: with them held, all evaluations are of one function.
    cell = Cell(NORMS[norm]())
    x = inputs().requires_grad_()
    wanted = (x, *cell.parameters())
    results = []
    for a in (eq.Unrolled(), adjoint):
        twin = copy.deepcopy(cell)
        layer = eq.DEQ(twin, solver=eq.Picard(), adjoint=a, rtol=1e-13, max_steps=200, on_failure="raise")
        loss = layer(x).square().sum()
        results.append(torch.autograd.grad(loss, (x, *twin.parameters()), retain_graph=True))
        again = torch.autograd.grad(loss, (x, *twin.parameters()))
        torch.testing.assert_close(again, results[-1], rtol=1e-12, atol=1e-14)
    assert len(results[0]) == len(wanted)
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)


def test_buffers_that_nothing_moves_are_the_same_tensors_and_shared_ones_stay_shared():
    cell = Cell(nn.BatchNorm1d(6), nn.BatchNorm1d(6))
    cell.parts[1].running_mean = cell.parts[0].running_mean
    cell.register_buffer("mask", torch.ones(6))
    held = dict(cell.named_buffers(remove_duplicate=False))
    twin = copy.deepcopy(cell)
    z = eq.DEQ(cell)(inputs())
    now = dict(cell.named_buffers(remove_duplicate=False))
    assert all(now[name] is held[name] for name in held)
    assert now["mask"]._version == 0
    twin(z.detach(), inputs())
    torch.testing.assert_close(cell.parts[0].running_mean, twin.parts[0].running_mean, rtol=1e-5, atol=1e-6)


def test_statistics_move_once_also_where_the_start_leaves_them_as_they_are():
    # A mean of zeros is zero: at the start of the solve, and nowhere else.
    class OfState(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6, affine=False)

        def forward(self, z, x):
            return torch.tanh(0.3 * self.norm(z) + x)

    cell, x = OfState().double(), inputs()
    z = eq.DEQ(cell, rtol=1e-12, max_steps=200)(x)
    assert cell.norm.num_batches_tracked == 1
    torch.testing.assert_close(cell.norm.running_mean, 0.1 * z.mean(dim=0), rtol=1e-9, atol=0)


def test_a_layer_inside_a_cell_moves_its_statistics_once_too():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = eq.DEQ(Cell(nn.BatchNorm1d(6)), rtol=1e-8, max_steps=200)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * self.inner(z + x)

    layer = eq.DEQ(Outer())
    layer(inputs()).sum().backward()
    layer(inputs()).sum().backward()
    assert layer.cell.inner.cell.parts[0].num_batches_tracked == 2


def test_a_module_given_to_the_functions_moves_its_statistics_once():
    cell, x = Cell(nn.BatchNorm1d(6)), inputs()
    zeros = torch.zeros_like(x)
    eq.fixed_point(cell, zeros, x, batch_dims=0).value.sum().backward()
    assert cell.parts[0].num_batches_tracked == 1

    class Rest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return z - self.cell(z, x)

    eq.root(Rest(), zeros, x, batch_dims=0).value.sum().backward()
    assert cell.parts[0].num_batches_tracked == 2


def test_statistics_of_a_compiled_cell_move_once():
    torch._dynamo.reset()
    cell = Cell(nn.BatchNorm1d(6))
    twin = copy.deepcopy(cell)
    compiled = eq.DEQ(torch.compile(cell, backend="aot_eager"))
    for _ in range(2):
        torch.testing.assert_close(compiled(inputs()), eq.DEQ(twin)(inputs()), rtol=1e-6, atol=1e-8)
    for got, want in zip(buffers(cell), buffers(twin), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert cell.parts[0].num_batches_tracked == 2


def test_a_buffer_that_a_cell_replaces_is_replaced_once_and_keeps_no_graph():
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6).double()
            self.register_buffer("last", torch.zeros(1, 6, dtype=DOUBLE))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            out = 0.3 * torch.tanh(self.linear(z)) + x + self.last.mean()
            self.last = out
            return out

    layer = eq.DEQ(Remembers())
    z = layer(inputs())
    torch.testing.assert_close(layer.cell.last, z.detach(), rtol=1e-6, atol=1e-6)
    assert not layer.cell.last.requires_grad
    z.sum().backward()


# Cells that couple samples.


class Mean(nn.Module):
    """Depends on the mean over the batch."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix(6, 0, 0.5))
        self.strength = strength

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + x + self.strength * z.mean(dim=0, keepdim=True))


@pytest.mark.parametrize("solver", [None, eq.GMRES(), eq.BiCGSTAB(), eq.Dense(), eq.Picard()], ids=repr)
@pytest.mark.parametrize("strength", [0.05, 0.3, 2.0])
def test_a_cell_that_couples_samples_has_its_gradient_by_batch_dims_0_and_is_told_otherwise(solver, strength):
    x, cell = inputs().requires_grad_(), Mean(strength)
    wanted = (x, cell.weight)
    options = {"solver": eq.Picard(), "rtol": 1e-10, "max_steps": 300, "on_failure": "ignore"}
    v = normal(8, 6, seed=11)
    want = torch.autograd.grad(eq.DEQ(cell, adjoint=eq.Unrolled(), batch_dims=0, **options)(x), wanted, v)
    adjoint = eq.Implicit(solver=solver)
    joint = eq.DEQ(cell, adjoint=adjoint, batch_dims=0, **options).solve(x)
    torch.testing.assert_close(torch.autograd.grad(joint.value, wanted, v), want, rtol=1e-6, atol=1e-8)
    split = eq.DEQ(cell, adjoint=adjoint, **options).solve(x)
    got = torch.autograd.grad(split.value, wanted, v)
    if any((a - b).norm() > 1e-6 * b.norm() for a, b in zip(got, want, strict=True)):
        assert (split.adjoint.status != eq.Status.CONVERGED).any()
        assert split.adjoint.residual.max() > 1e-9
    # BiCGSTAB, which measures at the end on its own, does not get there.
    said = r"backward solve: .* " + ("max_steps" if solver == eq.BiCGSTAB() else "batch_dims=0")
    with pytest.warns(eq.ConvergenceWarning, match=said):
        eq.DEQ(cell, adjoint=adjoint, **options | {"on_failure": "warn"})(x).backward(v)


def test_a_solve_whose_samples_move_each_other_after_they_stopped_says_so():
    # The first is done at once and waits; the second, slow, moves the equilibrium of the first meanwhile.
    rate = torch.tensor([[0.0], [0.9]], dtype=DOUBLE)
    f = lambda z: rate * z + 1 + 0.5 * z.roll(1, dims=0)  # noqa: E731
    start = torch.tensor([[1.0], [0.0]], dtype=DOUBLE)
    options = {"solver": eq.Picard(), "rtol": 1e-6, "max_steps": 500}
    sol = eq.fixed_point(f, start, **options, on_failure="ignore")
    assert sol.steps[0] == 1
    image = f(sol.value)
    torch.testing.assert_close(sol.residual, ((image - sol.value) / image).abs()[:, 0])
    assert sol.status.tolist() == [eq.Status.COUPLED, eq.Status.CONVERGED]
    with pytest.raises(eq.SolveError, match="batch_dims=0"):
        eq.fixed_point(f, start, **options)
    together = eq.fixed_point(f, start, batch_dims=0, rtol=1e-10)
    torch.testing.assert_close(together.value, f(together.value), rtol=1e-9, atol=0)


def test_batchnorm_in_training_makes_one_problem_of_the_batch():
    cell, x = Cell(nn.BatchNorm1d(6)), inputs()
    layer = eq.DEQ(cell, rtol=1e-9)
    sol = layer.solve(x)
    assert sol.status.shape == sol.steps.shape == sol.residual.shape == (8,)
    assert (sol.steps == sol.evaluations).all()
    sol.value.sum().backward()
    assert sol.adjoint.status.tolist() == eq.Status.CONVERGED
    x = x * torch.linspace(0, 5, 8, dtype=DOUBLE)[:, None]
    steps = eq.DEQ(cell.eval(), rtol=1e-9).solve(x).steps  # its statistics are then constants
    assert steps.unique().numel() > 1
    with pytest.raises(ValueError, match=r"1 samples in shapes .* 8 samples"):
        layer.solve(x, state=sol.state)


# Dropout.


def dropped(p: float = 0.3, **options) -> Cell:
    return Cell(eq.nn.VariationalDropout(p), nn.Linear(6, 6), eq.nn.VariationalDropout(p), **options)


@adjoints
def test_dropout_is_fixed_within_a_solve_and_its_backward(adjoint):
    layer = eq.DEQ(dropped(), adjoint=adjoint, rtol=1e-11, max_steps=100, on_failure="raise")
    x = inputs()
    want = gradients(layer, x)
    torch.manual_seed(0)
    loss = layer(x).square().sum()
    layer(inputs(seed=9))  # draws new masks before the backward of the first
    torch.rand(17)
    torch.testing.assert_close(torch.autograd.grad(loss, tuple(layer.parameters())), want, rtol=1e-12, atol=0)
    if adjoint in EXACT:
        unrolled = eq.DEQ(layer.cell, solver=eq.Picard(), adjoint=eq.Unrolled(), rtol=1e-13, max_steps=100)
        torch.testing.assert_close(gradients(unrolled, x), want, rtol=1e-7, atol=1e-9)


def test_dropout_drops_its_share_and_draws_anew_for_each_call():
    class Identity(nn.Module):
        def __init__(self, *dropouts: nn.Module) -> None:
            super().__init__()
            self.dropouts = nn.ModuleList(dropouts)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.cat([dropout(x[:, :2000]) for dropout in self.dropouts], dim=1)

    layer = eq.DEQ(Identity(*(eq.nn.VariationalDropout(0.25) for _ in range(2))))
    x = torch.ones(4, 4000)
    first, second = layer(x), layer(x)
    for z in (first, second):
        assert z.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
        assert 0.22 < (z == 0).float().mean() < 0.28
    halves = [first[:, :2000], first[:, 2000:], second[:, :2000], second[:, 2000:]]
    for i, one in enumerate(halves):
        for other in halves[i + 1 :]:
            assert 0.3 < ((one == 0) != (other == 0)).float().mean() < 0.45  # independent: 2 * 0.25 * 0.75
    assert torch.equal(layer.eval()(x), x)


def test_dropout_shares_masks_along_dimensions():
    torch.manual_seed(0)
    for dims in (1, (1,), -2):
        y = eq.nn.VariationalDropout(0.5, shared_dims=dims)(torch.ones(3, 7, 40))
        assert (y == y[:, :1]).all()
        assert (y == 0).any()
        assert (y != 0).any()
        assert not (y[0] == y[1]).all()


def test_dropout_outside_of_a_cell_draws_at_every_call():
    dropout = eq.nn.VariationalDropout(0.5)
    x = torch.ones(1000)
    assert not torch.equal(dropout(x), dropout(x))
    torch.manual_seed(3)
    first = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x))
    assert torch.equal(eq.nn.VariationalDropout(0.0)(x), x)
    infinite = torch.full((1000,), torch.inf)
    assert not dropout(infinite).isnan().any()


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, True, "half"])
def test_meaningless_probabilities_are_refused(p):
    with pytest.raises((ValueError, TypeError), match=r"p must be .*\[0, 1\)"):
        eq.nn.VariationalDropout(p)
    with pytest.raises(TypeError, match="shared_dims"):
        eq.nn.VariationalDropout(0.5, shared_dims="time")


def test_a_seed_decides_the_masks_and_the_generator_moves_once_a_forward():
    layer, x = eq.DEQ(dropped()), inputs()
    quiets = (eq.DEQ(dropped()).eval(), eq.DEQ(dropped(p=0.0)))
    torch.manual_seed(5)
    a = layer(x)
    b = layer(x)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    again = layer(x)
    assert same(again, a)
    assert not torch.equal(a, b)
    assert same(layer(x), b)
    assert torch.equal(torch.get_rng_state(), state)
    again.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)  # backward draws nothing
    for quiet in quiets:
        quiet(x).sum().backward()
        assert torch.equal(torch.get_rng_state(), state)


def test_dropout_in_closures_roots_and_minima():
    dropout = eq.nn.VariationalDropout(0.5)
    w, x = matrix(6, 0, 0.4).requires_grad_(), inputs()
    zeros = torch.zeros_like(x)
    f = Counted(lambda z: torch.tanh(dropout(z @ w + x)))
    seen: list[eq.Iterate] = []
    sol = eq.fixed_point(f, zeros, callback=seen.append)
    assert f.calls == sol.evaluations + 1
    assert len(seen) == sol.evaluations  # none is spent on looking whether f is random
    sol.value.sum().backward()
    root = eq.root(lambda z: z - torch.tanh(dropout(z @ w.detach() + x)), zeros)
    assert root.converged.all()
    low = eq.argmin(lambda z: ((z - dropout(x)) ** 2).sum(dim=1), zeros)
    share = (low.value.abs() < 1e-6).double().mean()
    assert 0.2 < share < 0.8
    torch.testing.assert_close(low.value[low.value.abs() > 1e-6], 2 * x[low.value.abs() > 1e-6])


@pytest.mark.parametrize("inner", [eq.Implicit(rtol=1e-12), eq.OneStep(), eq.Unrolled()], ids=repr)
def test_dropout_inside_an_inner_layer_is_part_of_the_outer_function(inner):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = eq.nn.VariationalDropout(0.3)
            self.inner = eq.DEQ(dropped(), adjoint=inner, rtol=1e-12, max_steps=100)
            self.last = eq.nn.VariationalDropout(0.3)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.4 * self.last(self.inner(self.first(z) + x))

    torch.manual_seed(1)
    layer = eq.DEQ(Outer(), rtol=1e-10, on_failure="raise")
    x = inputs()
    want = gradients(layer, x)
    torch.manual_seed(0)
    loss = layer(x).square().sum()
    layer(x)
    torch.testing.assert_close(torch.autograd.grad(loss, tuple(layer.parameters())), want, rtol=1e-9, atol=1e-12)
    if inner != eq.OneStep():
        unrolled = eq.DEQ(layer.cell, solver=eq.Picard(), adjoint=eq.Unrolled(), rtol=1e-12, max_steps=100)
        torch.testing.assert_close(gradients(unrolled, x), want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_a_layer_with_dropout_draw_the_same_masks(reentrant):
    layer = eq.DEQ(dropped(), rtol=1e-10)
    x = inputs().requires_grad_()
    want = gradients(layer, x)
    torch.manual_seed(0)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(tuple(p.grad for p in layer.parameters()), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_a_cell_with_dropout_is_refused_in_words(reentrant):
    class Saving(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * checkpoint(self.parts, self.linear(z) + x, use_reentrant=reentrant))

    layer = eq.DEQ(Saving(eq.nn.VariationalDropout(0.3)))
    loss = layer(inputs()).sum()
    # A reentrant checkpoint refuses any `torch.autograd.grad`, in words of its own.
    with pytest.raises(RuntimeError, match="use_reentrant" if reentrant else "put the checkpoint around the layer"):
        loss.backward()


def test_dropout_in_company():
    torch._dynamo.reset()
    cell, x = dropped(), inputs()
    layer = eq.DEQ(cell, rtol=1e-10)
    want = gradients(layer, x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(gradients(twin, x), want, rtol=1e-12, atol=0)
    compiled = eq.DEQ(torch.compile(cell, backend="aot_eager"), rtol=1e-10)
    torch.testing.assert_close(gradients(compiled, x), want, rtol=1e-8, atol=1e-10)
    names = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    torch.manual_seed(0)
    got = torch.func.grad(loss)({name: p.detach() for name, p in names.items()})
    torch.testing.assert_close(tuple(got[name] for name in names), want, rtol=1e-7, atol=1e-9)
    half = eq.DEQ(copy.deepcopy(cell).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = half(x.float())
    z.sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


# Random functions that have no fixed point.


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, None], x[:, None].expand(-1, 3, -1), x[:, None].expand(-1, 3, -1))[0][:, 0]


class Recurs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(6, 6, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x[:, None])[0][:, 0]


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (nn.RReLU, "RReLU"),
        (Functional, "Functional"),
        (Attends, "MultiheadAttention"),
        (Recurs, "GRU"),
        (lambda: nn.Dropout(0.5), "Dropout"),
        (lambda: nn.AlphaDropout(0.5), "AlphaDropout"),
        (lambda: nn.FeatureAlphaDropout(0.5), "FeatureAlphaDropout"),
    ],
    ids=["rrelu", "functional", "attention", "recurrent", "dropout", "alpha", "feature"],
)
def test_stock_random_layers_are_named_and_leave_no_hook_behind(part, name):
    from torch.nn.modules import module

    torch.manual_seed(0)
    cell, x = Cell(part()), inputs()
    for solve in (eq.DEQ(cell), lambda x: eq.fixed_point(cell, torch.zeros_like(x), x)):
        with pytest.raises(ValueError, match=name):
            solve(x)
    assert not module._global_forward_hooks
    assert not module._global_forward_pre_hooks
    if part is not Functional:  # which is random in eval() too
        assert eq.DEQ(cell.eval(), on_failure="raise", rtol=1e-3)(x).isfinite().all()


def test_noise_without_a_module_is_refused_and_random_numbers_that_change_nothing_are_not():
    x = inputs()
    with pytest.raises(ValueError, match="draws random numbers: two calls"):
        eq.fixed_point(lambda z: 0.5 * z + torch.randn_like(z), torch.zeros_like(x))
    sol = eq.fixed_point(lambda z: 0.5 * z + x + 0 * torch.randn_like(z), torch.zeros_like(x))
    assert sol.converged.all()


# Inputs and global state.

ENTRIES = {
    "picard": (eq.fixed_point, eq.Picard()),
    "anderson": (eq.fixed_point, eq.Anderson()),
    "broyden": (eq.fixed_point, eq.Broyden()),
    "newton": (eq.fixed_point, eq.Newton()),
    "newton-dense": (eq.root, eq.Newton(linear_solver=eq.Dense())),
    "newton-bicgstab": (eq.root, eq.Newton(linear_solver=eq.BiCGSTAB())),
    "broyden-root": (eq.root, eq.Broyden()),
    "lbfgs": (eq.argmin, eq.LBFGS()),
    "gradient-descent": (eq.argmin, eq.GradientDescent(0.4)),
    "newton-argmin": (eq.argmin, eq.Newton()),
}


@LAW
@given(
    entry=st.sampled_from(sorted(ENTRIES)),
    adjoint=st.sampled_from(sorted(ADJOINTS)),
    dtype=st.sampled_from([DOUBLE, torch.float32]),
    bad=st.booleans(),
    seed=st.integers(0, 999),
)
def test_inputs_random_state_and_settings_stay_as_they_were(entry, adjoint, dtype, bad, seed):
    solve, solver = ENTRIES[entry]
    how = ADJOINTS[adjoint]
    if isinstance(solver, eq.Newton) and isinstance(how, eq.Unrolled):
        how = eq.Implicit()  # refused in words
    w, x, z0 = (
        matrix(4, seed, 0.4, dtype),
        normal(5, 4, seed=seed, dtype=dtype),
        normal(5, 4, seed=seed + 1, dtype=dtype),
    )
    x[1] = torch.nan if bad else x[1]
    f = {
        eq.fixed_point: lambda z, w, x: torch.tanh(z @ w + x),
        eq.root: lambda z, w, x: z - torch.tanh(z @ w + x),
        eq.argmin: lambda z, w, x: (0.5 * (z - x) ** 2 + 0.1 * torch.cosh(z @ w)).sum(dim=1),
    }[solve]
    w.requires_grad_()
    tensors = (w, x, z0)
    before = [t.detach().clone() for t in tensors]
    versions = [t._version for t in tensors]
    random = torch.get_rng_state()
    modes = (
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_inference_mode_enabled(),
    )
    sol = solve(f, z0, w, x, solver=solver, adjoint=how, on_failure="ignore")
    state = [t.clone() for t in torch.utils._pytree.tree_leaves(sol.state) if isinstance(t, Tensor)]
    sol.value.sum().backward()
    again = solve(f, z0, w, x, solver=solver, adjoint=how, state=sol.state, on_failure="ignore")
    again.value.sum().backward()
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == (
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_inference_mode_enabled(),
    )
    assert [t._version for t in tensors] == versions
    for t, old in zip(tensors, before, strict=True):
        assert same(t, old)
    kept = [t for t in torch.utils._pytree.tree_leaves(sol.state) if isinstance(t, Tensor)]
    for t, old in zip(kept, state, strict=True):  # a warm start reads the state and leaves it
        torch.testing.assert_close(t, old, rtol=0, atol=0, equal_nan=True)
    assert x.grad is None
    assert z0.grad is None
