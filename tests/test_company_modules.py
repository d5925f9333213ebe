"""The law of company, the life of a module: copies, files, other processes, other dtypes, checkpoints around it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from maps import Cell, normal, same
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
