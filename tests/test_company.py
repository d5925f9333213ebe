"""The law of company: implicit layers live with the rest of PyTorch, and leave no trace but their result."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from maps import Cell, matrix, normal, same, tanh_map
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import equilibria as eq

DOUBLE = torch.float64
ADJOINTS = [eq.Implicit(), eq.Phantom(3), eq.OneStep(), eq.Unrolled(), eq.Unrolled(checkpoint=True)]


def cell(n: int = 8, **options) -> Cell:
    return Cell(n, **{"dtype": torch.float32, **options})


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normal(*shape, seed=3, dtype=dtype)


# A layer is a module like any other.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_layer_can_be_copied_and_pickled(copied):
    layer = eq.DEQ(cell(), solver=eq.Anderson(history=3), adjoint=eq.Phantom(2), rtol=1e-5, norm=eq.max_norm)
    x = inputs(3, 8)
    layer(x)
    twin = copied(layer)
    assert repr(twin) == repr(layer)
    assert same(twin(x), layer(x))
    with torch.no_grad():
        twin.cell.linear.weight.zero_()
    assert not same(twin(x), layer(x))


def test_a_layer_that_has_warned_can_be_copied_and_pickled():
    layer = eq.DEQ(cell(norm=5.0), max_steps=2)
    with pytest.warns(eq.ConvergenceWarning):
        layer(inputs(3, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(layer)(inputs(3, 8))
        pickle.loads(pickle.dumps(layer))(inputs(3, 8))


def test_state_dicts_hold_the_cell_and_nothing_else():
    layer, other = eq.DEQ(cell()), eq.DEQ(cell(norm=0.1), solver=eq.Picard())
    assert set(layer.state_dict()) == {"cell.linear.weight", "cell.linear.bias"}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = inputs(3, 8)
    torch.testing.assert_close(other(x), layer(x), rtol=1e-3, atol=1e-3)


def test_solutions_and_errors_can_be_pickled():
    sol = eq.fixed_point(tanh_map(), torch.zeros(2, 4, dtype=DOUBLE), matrix(4, 0, 0.5), normal(2, 4, seed=0))
    again = pickle.loads(pickle.dumps(sol))
    assert same(again.value, sol.value)
    resumed = eq.fixed_point(
        tanh_map(), torch.zeros(2, 4, dtype=DOUBLE), matrix(4, 0, 0.5), normal(2, 4, seed=0), state=again.state
    )
    assert resumed.evaluations == 1
    with pytest.raises(eq.SolveError) as caught:
        eq.fixed_point(lambda z: 2 * z + 1, torch.zeros(2, 4), solver=eq.Picard(), max_steps=3)
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value)
    assert torch.equal(error.status, caught.value.status)


def test_repr_shows_every_option():
    options = {
        "solver": eq.Anderson(history=3),
        "adjoint": eq.Phantom(steps=2, relaxation=0.5),
        "rtol": 1e-5,
        "atol": 0.25,
        "max_steps": 17,
        "eval_max_steps": 23,
        "norm": eq.max_norm,
        "on_failure": "ignore",
        "batch_dims": 2,
        "readout": torch.relu,
    }
    text = repr(eq.DEQ(cell(), **options))
    for name, value in options.items():
        shown = getattr(value, "__name__", None) or repr(value)
        assert f"{name}={shown}" in text, name
    assert "Linear(" in text


def test_readout_maps_what_a_call_returns_and_not_the_solution():
    layer = eq.DEQ(cell(), readout=lambda z: z[:, -2:])
    x = inputs(3, 8)
    assert layer(x).shape == (3, 2)
    assert same(layer(x), layer.solve(x).value[:, -2:].clone())


def test_eval_has_a_cap_of_its_own():
    layer = eq.DEQ(cell(norm=0.99), max_steps=3, eval_max_steps=5, on_failure="ignore", rtol=1e-6)
    x = inputs(3, 8)
    assert layer.train().solve(x).evaluations == 3
    assert layer.eval().solve(x).evaluations == 5


def test_starts_and_warm_starts_of_a_layer():
    layer = eq.DEQ(cell(), rtol=1e-5)
    x = inputs(3, 8)
    sol = layer.solve(x)
    assert layer.solve(x, state=sol.state).evaluations == 1
    assert layer.solve(x, z0=sol.value).evaluations == 1
    assert same(layer(x, state=sol.state), sol.value)


def test_keyword_and_further_inputs_reach_the_cell():
    class Gated(nn.Module):
        def forward(self, z, x, gate, *, shift):
            return gate * z + x + shift

    x, gate, shift = inputs(3, 4), torch.full((3, 1), 0.5, requires_grad=True), torch.ones(4, requires_grad=True)
    z = eq.DEQ(Gated(), rtol=1e-6)(x, gate, shift=shift)
    torch.testing.assert_close(z, 2 * (x + 1), rtol=1e-4, atol=1e-4)
    z.sum().backward()
    torch.testing.assert_close(shift.grad, torch.full((4,), 6.0), rtol=1e-3, atol=0)
    assert gate.grad.isfinite().all()


# Modes and checkpoints.


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_activation_checkpointing_around_a_layer(adjoint, reentrant):
    layer = eq.DEQ(cell(), adjoint=adjoint, rtol=1e-5)
    head = nn.Linear(8, 2)
    x = inputs(3, 8).requires_grad_()
    body = lambda x: head(layer(x))  # noqa: E731
    wanted = (x, *layer.parameters(), *head.parameters())

    def gradients(loss):
        for t in wanted:
            t.grad = None
        loss.backward()
        return [t.grad for t in wanted]

    want = gradients(body(x).sum())
    got = gradients(checkpoint(body, x, use_reentrant=reentrant).sum())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("adjoint", [eq.Implicit(), eq.Phantom(2), eq.Unrolled()])
def test_activation_checkpointing_inside_a_cell(adjoint):
    class Saving(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, z, x):
            return checkpoint(self.inner, z, x, use_reentrant=False)

    plain = cell()
    x = inputs(3, 8)
    gradients = []
    for c in (plain, Saving(plain)):
        loss = eq.DEQ(c, adjoint=adjoint, rtol=1e-5)(x).sum()
        gradients.append(torch.autograd.grad(loss, tuple(plain.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_the_value_is_the_same_and_holds_no_graph(mode):
    layer = eq.DEQ(cell())
    x = inputs(3, 8)
    with mode():
        z = layer(x)
        again = layer.solve(x, state=layer.solve(x).state)
    assert not z.requires_grad
    assert torch.equal(z.clone(), layer(x).detach())
    assert again.evaluations == 1


def test_grad_can_be_turned_on_inside_no_grad():
    layer = eq.DEQ(cell())
    with torch.no_grad(), torch.enable_grad():
        assert layer(inputs(3, 8)).requires_grad


# No trace.


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_inputs_random_state_and_settings_stay_as_they_were(adjoint):
    layer = eq.DEQ(cell(), adjoint=adjoint)
    x, z0 = inputs(3, 8).requires_grad_(), inputs(3, 8) / 2
    before = [t.detach().clone() for t in (x, z0, *layer.parameters())]
    random = torch.get_rng_state()
    settings = (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())
    sol = layer.solve(x, z0=z0)
    sol.value.sum().backward()
    eq.diagnostics.spectral_radius(lambda z: layer.cell(z, x), sol.value.detach())
    assert torch.equal(torch.get_rng_state(), random)
    assert settings == (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())
    for t, old in zip((x, z0, *layer.parameters()), before, strict=True):
        assert same(t, old)
    assert z0.grad is None


def test_what_comes_back_can_be_changed_in_place():
    layer = eq.DEQ(cell(), rtol=1e-5)
    x = inputs(3, 8)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            sol = layer.solve(x, z0=x)
            expected = sol.value.detach().clone()
            sol.value.mul_(0)
            assert layer.solve(x, state=sol.state).evaluations == 1
            torch.testing.assert_close(layer.solve(x, state=sol.state).value.detach(), expected)
    assert same(x, inputs(3, 8))
    z = layer(x)
    z = z.add_(1)
    z.sum().backward()
    torch.testing.assert_close(
        layer.cell.linear.bias.grad, torch.autograd.grad(layer(x).sum(), layer.cell.linear.bias)[0]
    )


class Mark:
    """Lives as long as the node of a graph that it is given to."""


def marked(node) -> list[weakref.ref]:
    """Marks on all nodes of a graph that are not leaves."""
    marks, nodes, seen = [], [node], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or not node.next_functions:
            continue
        seen.add(node)
        node.metadata["mark"] = mark = Mark()
        marks.append(weakref.ref(mark))
        nodes += [following for following, _ in node.next_functions]
    return marks


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("broken", [False, True])
def test_a_graph_without_a_backward_is_freed_by_reference_counting(adjoint, broken):
    layer = eq.DEQ(cell(), adjoint=adjoint, on_failure="ignore")
    gc.collect()
    gc.disable()
    try:
        x = inputs(3, 8)
        if broken:
            x[1] = torch.nan
        x = (x * 1).requires_grad_()
        hidden = x * 2
        sol = layer.solve(hidden)
        watched = [weakref.ref(t) for t in (hidden, sol.value, sol)]
        watched += marked(sol.value.grad_fn)
        assert len(watched) > 6
        del hidden, sol
        assert [ref() for ref in watched] == [None] * len(watched)
        # And with one.
        z = layer(x * 2)
        watched = marked(z.grad_fn)
        z.sum().backward()
        del z
        assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        gc.enable()


class Births(TorchDispatchMode):
    """Remembers the tensors that operations make, to see which of them are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.born: list[weakref.ref] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.born += [weakref.ref(t) for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]
        return made

    def kept(self) -> int:
        """Bytes of memory that are still held."""
        storages = [t.untyped_storage() for ref in self.born if (t := ref()) is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_memory_of_implicit_does_not_grow_with_steps_and_that_of_unrolled_does():
    kept = {}
    for adjoint in (eq.Implicit(), eq.Phantom(2), eq.OneStep(), eq.Unrolled(), eq.Unrolled(checkpoint=True)):
        for max_steps in (10, 40):
            layer = eq.DEQ(cell(norm=9.0), adjoint=adjoint, rtol=0.0, max_steps=max_steps, on_failure="ignore")
            x = inputs(3, 8)
            with Births() as births:
                sol = layer.solve(x)
                value, evaluations = sol.value, sol.evaluations
                del sol
            assert evaluations == max_steps
            assert value.requires_grad
            kept[adjoint, max_steps] = births.kept()
            del value
            assert births.kept() == 0
        if not isinstance(adjoint, eq.Unrolled):
            assert kept[adjoint, 10] == kept[adjoint, 40] > 0
    assert kept[eq.Unrolled(), 40] > 3 * kept[eq.Unrolled(), 10]
    assert kept[eq.Unrolled(checkpoint=True), 40] < kept[eq.Unrolled(), 40]


def test_the_history_of_a_solver_is_all_that_a_solution_keeps():
    layer = eq.DEQ(cell(norm=9.0), solver=eq.Anderson(history=3), rtol=0.0, max_steps=40, on_failure="ignore")
    sol = layer.solve(inputs(3, 8))
    kept = [t for t in torch.utils._pytree.tree_leaves(sol.state) if isinstance(t, torch.Tensor)]
    assert not any(t.requires_grad for t in kept)
    assert sum(t.numel() for t in kept) <= (2 * 3 + 3) * 3 * 8 + 100


# Monitor.


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = eq.DEQ(cell(), rtol=1e-6)

    def forward(self, z, x):
        return 0.5 * self.inner(z + x)


def test_monitor_reports_every_call_of_every_layer_inside():
    model = nn.ModuleDict({"a": eq.DEQ(cell()), "b": eq.DEQ(Outer(), adjoint=eq.OneStep())})
    outside = eq.DEQ(cell())
    x = inputs(3, 8)
    with eq.monitor(model) as reports, eq.monitor(model["a"]) as alone:
        loss = (model["a"](x) + model["b"](x) + outside(x)).sum()
        model["a"](x)
    assert [r.name for r in alone] == ["", ""]
    assert [r.name for r in reports if r.name != "b.cell.inner"] == ["a", "b", "a"]
    inner = [r for r in reports if r.name == "b.cell.inner"]
    (outer,) = (r for r in reports if r.name == "b")
    assert len(inner) == outer.evaluations + outer.adjoint.evaluations
    count = len(reports)
    loss.backward()
    assert reports[0].adjoint.status is not None  # filled in after the block has ended
    assert (reports[0].adjoint.status == eq.Status.CONVERGED).all()
    assert reports[-1].adjoint.status is None  # never differentiated
    model["a"](x)
    assert len(reports) == count
    for report in reports:
        assert report.status.shape == report.steps.shape == report.residual.shape == (3,)
        assert not report.residual.requires_grad


def test_monitor_ends_with_its_block_also_when_the_block_fails():
    from equilibria.nn import monitor as module

    with pytest.raises(KeyError), eq.monitor(nn.Linear(1, 1)):
        raise KeyError
    assert module is not None
    model = eq.DEQ(cell())
    with eq.monitor(model) as reports, torch.no_grad():
        model(inputs(2, 8))
    assert [r.evaluations > 1 for r in reports] == [True]
