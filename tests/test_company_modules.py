"""The law of company, the life of a module: copies, files, other processes, other dtypes, checkpoints around it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from maps import Cell, matrix, normal, same, tanh_map
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import equilibria as eq

DOUBLE = torch.float64
ADJOINTS = [eq.Implicit(), eq.Phantom(3), eq.OneStep(), eq.Unrolled(), eq.Unrolled(checkpoint=True)]


def cell(n: int = 8, **options) -> Cell:
    return Cell(n, **{"dtype": torch.float32, **options})


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, seed=3, dtype=dtype)


class Outer(nn.Module):
    """A cell with a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = eq.DEQ(cell(), rtol=1e-6, adjoint=eq.Implicit(rtol=1e-6))

    def forward(self, z, x):
        return 0.5 * self.inner(z + x)


class Buffered(nn.Module):
    """A cell with a buffer and a weight that it ties."""

    def __init__(self, n: int = 8, device: str | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(n, n, device=device)
        self.second = nn.Linear(n, n, bias=False, device=device)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.full((n,), 0.3, device=device))

    def forward(self, z, x):
        return torch.tanh(self.scale * self.second(torch.tanh(self.first(z))) + x)


# Copies and files.


def shallow(layer: nn.Module) -> nn.Module:
    return copy.copy(layer)


def by_pickle(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def by_file(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", [cell, Outer, Buffered])
@pytest.mark.parametrize("copied", [shallow, copy.deepcopy, by_pickle, by_file])
def test_every_kind_of_copy_gives_the_same_value_and_gradient(copied, kind):
    layer = eq.DEQ(kind(), solver=eq.Broyden(), rtol=1e-5)
    x = inputs(3, 8)
    want = layer(x)
    gradients = torch.autograd.grad(want.sum(), tuple(layer.parameters()))
    twin = copied(layer)
    got = twin(x)
    assert same(got, want)
    assert same(torch.autograd.grad(got.sum(), tuple(twin.parameters())), gradients)
    assert repr(twin) == repr(layer)


def test_a_solution_and_its_state_can_be_copied_without_a_warning():
    start = {"a": torch.zeros(2, 2, dtype=DOUBLE), "b": (torch.zeros(2, 1, dtype=DOUBLE), torch.zeros(2, 1))}
    f = lambda z: {"a": 0.5 * z["a"] + 1, "b": (0.2 * z["b"][0] + 1, torch.cos(z["b"][1]))}  # noqa: E731
    with torch.no_grad():
        sol = eq.fixed_point(f, start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for copied in (copy.copy, copy.deepcopy, by_pickle, by_file):
            twin = copied(sol)
            assert twin.state.layout == sol.state.layout
            assert eq.fixed_point(f, start, state=twin.state).evaluations == 1
            wrong = {"a": start["a"], "b": [*start["b"]]}
            with pytest.raises(ValueError, match="state comes from"):
                eq.fixed_point(f, wrong, state=twin.state)


def test_options_of_a_copy_are_its_own():
    layer = eq.DEQ(cell(), max_steps=1, on_failure="ignore")
    for copied in (shallow, copy.deepcopy, by_pickle):
        twin = copied(layer)
        twin.max_steps, twin.solver = 40, eq.Picard()
        assert twin.solve(inputs(3, 8)).converged.all()
        assert layer.max_steps == 1
        assert not layer.solve(inputs(3, 8)).converged.any()


# State dicts.


def test_a_state_dict_is_loaded_strictly():
    layer = eq.DEQ(Buffered())
    state = layer.state_dict()
    assert set(state) == {"cell.first.weight", "cell.first.bias", "cell.second.weight", "cell.scale"}
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({k: v for k, v in state.items() if k != "cell.scale"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**state, "solver": torch.zeros(1)})


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return eq.DEQ(Buffered(), rtol=1e-5)


def skipped() -> nn.Module:
    layer = eq.DEQ(torch.nn.utils.skip_init(Buffered), rtol=1e-5)
    layer.cell.second.weight = layer.cell.first.weight
    return layer


def emptied() -> nn.Module:
    layer = on_meta().to_empty(device="cpu")
    layer.cell.second.weight = layer.cell.first.weight
    return layer


@pytest.mark.parametrize(("make", "assign"), [(on_meta, True), (skipped, False), (emptied, False), (emptied, True)])
def test_a_layer_made_without_memory_is_the_one_whose_state_it_loads(make, assign):
    layer = eq.DEQ(Buffered(), rtol=1e-5)
    twin = make()
    twin.load_state_dict({name: t.clone() for name, t in layer.state_dict().items()}, assign=assign)
    x = inputs(3, 8)
    assert same(twin(x), layer(x))
    twin(x).sum().backward()
    assert twin.cell.first.weight.grad.isfinite().all()


# Other dtypes and processes.


@pytest.mark.parametrize("kind", [cell, Outer, Buffered])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_layer_moves_to_another_dtype(dtype, kind):
    layer = eq.DEQ(kind())
    if kind is Outer:
        layer.cell.inner.rtol, layer.cell.inner.adjoint = None, eq.Implicit()
    x = inputs(3, 8)
    want = layer(x).detach()
    moved = {torch.float64: layer.double, torch.bfloat16: layer.bfloat16, torch.float16: layer.half}[dtype]()
    assert moved is layer
    sol = layer.solve(x.to(dtype))
    assert sol.value.dtype == dtype
    sol.value.float().sum().backward()
    assert all(p.dtype == p.grad.dtype == dtype for p in layer.parameters())
    torch.testing.assert_close(sol.value.float(), want, rtol=3e-2, atol=3e-2)
    assert layer.to(torch.float32)(x).dtype == torch.float32


def elsewhere(rank: int, layer: nn.Module, sol: eq.Solution, x: Tensor, queue) -> None:
    """What another process does with a layer, a solution and its warm start, and sends back."""
    torch.set_num_threads(1)
    again = layer.solve(x, state=sol.state)
    with torch.no_grad():
        layer.cell.linear.bias.add_(1)  # seen here too, where memory is shared
    queue.put(pickle.dumps((again, repr(layer))))


def test_layers_and_solutions_travel_between_processes():
    layer = eq.DEQ(cell(), rtol=1e-5).share_memory()
    assert all(p.is_shared() for p in layer.parameters())
    x = inputs(3, 8)
    with torch.no_grad():
        sol = layer.solve(x)
    before = layer.cell.linear.bias.detach().clone()
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with torch.no_grad():
        torch.multiprocessing.spawn(elsewhere, (layer, sol, x, queue), nprocs=1)
    again, shown = pickle.loads(queue.get())
    assert again.evaluations == 1
    assert same(again.value, sol.value)
    assert shown == repr(layer)
    torch.testing.assert_close(layer.cell.linear.bias.detach(), before + 1)


# Checkpoints.


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("kind", "adjoint"),
    [
        *((cell, a) for a in (*ADJOINTS, eq.Implicit(order=2), eq.Implicit(solver=eq.Picard()), eq.Neumann(3))),
        *((Outer, a) for a in (eq.Implicit(), eq.Phantom(1))),
    ],
)
def test_a_checkpointed_block_around_layers_gives_the_same_gradients(kind, adjoint, reentrant):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), eq.DEQ(kind(), adjoint=adjoint, rtol=1e-3), nn.Tanh(), eq.DEQ(cell(), adjoint=adjoint)]
    block = nn.Sequential(*layers)
    head = nn.Linear(8, 2)
    x = inputs(3, 8).requires_grad_()
    wanted = (x, *block.parameters(), *head.parameters())

    def gradients(loss):
        for t in wanted:
            t.grad = None
        loss.backward()
        return [t.grad for t in wanted]

    want = gradients(head(block(x)).square().sum())
    calls = []
    layers[1].cell.register_forward_hook(lambda *_: calls.append(1))
    got = gradients(head(checkpoint(block, x, use_reentrant=reentrant)).square().sum())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    got = gradients(head(checkpoint_sequential(block, 2, x, use_reentrant=reentrant)).square().sum())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        calls.clear()
        block(x)
        once = len(calls)
    calls.clear()
    gradients(head(checkpoint(block, x, use_reentrant=reentrant)).square().sum())
    assert len(calls) >= 2 * once  # it was solved again in backward, and so nothing was kept


@pytest.mark.parametrize(
    ("kind", "adjoint"),
    [
        *((cell, a) for a in (eq.Implicit(order=2), eq.Implicit(solver=eq.Picard()), eq.OneStep(), eq.Neumann(3))),
        (Outer, eq.Implicit()),
    ],
)
def test_a_checkpoint_inside_a_cell_with_other_adjoints(adjoint, kind):
    plain = kind()
    x = inputs(3, 8)
    gradients = []
    for save in (False, True):

        def f(z, save=save):
            return checkpoint(plain, z, x, use_reentrant=False) if save else plain(z, x)

        value = eq.fixed_point(f, torch.zeros(3, 8), adjoint=adjoint, rtol=1e-5).value
        gradients.append(torch.autograd.grad(value.sum(), tuple(plain.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-7)


# Shapes and tensors of every kind.

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
