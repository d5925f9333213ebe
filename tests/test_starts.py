"""Losses on iterates, starts from memory, and restarts: eq.nn.corrections, StartMemory, RandomStart, restarts."""

import copy
import gc
import io
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import STRUCTURES, Cell, join, matrix, normal, residual, same, split, width
from torch import Tensor, nn

import equilibria as eq

DOUBLE = torch.float64
LAW = settings(derandomize=True, max_examples=25, deadline=None)
SOLVERS = [eq.Picard(), eq.Picard(0.5), eq.Anderson(), eq.Broyden(), eq.Newton(eq.Dense())]
solvers = st.sampled_from(SOLVERS)
structures = st.sampled_from(sorted(STRUCTURES))
seeds = st.integers(0, 999)


class Tree(nn.Module):
    """tanh(s z W + x) on a state of any structure; a sample's slope s may make it fast, slow or never converge."""

    def __init__(self, structure: str = "tensor", dtype: torch.dtype = DOUBLE) -> None:
        super().__init__()
        self.structure = structure
        self.w = nn.Parameter(matrix(width(structure), 5, 0.9, dtype))
        self.calls: list[int] = []

    def initial_state(self, x: Tensor, slope: Tensor) -> Any:
        return split(torch.zeros_like(x), self.structure)

    def forward(self, z: Any, x: Tensor, slope: Tensor) -> Any:
        self.calls.append(len(x))
        return split(torch.tanh(slope * (join(z, 1) @ self.w) + x), self.structure)


def samples(slopes: list[float], structure: str = "tensor", seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(len(slopes), width(structure), seed=seed), torch.tensor(slopes, dtype=DOUBLE)[:, None]


def moved(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in inputs)


def rows(tree: Any, index: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf[index], tree)


def close(a: Any, b: Any, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def pulled(outputs: Any, inputs: Any) -> tuple[Tensor, ...]:
    """The gradient of a sum that tells entries apart."""
    flat = torch.cat([leaf.flatten() for leaf in pytree.tree_leaves(outputs)])
    return torch.autograd.grad((flat * torch.arange(1, len(flat) + 1).cos()).sum(), inputs, materialize_grads=True)


# Corrections.


def test_the_weights_fall_from_the_layer_s_own_output():
    layer = eq.DEQ(Cell(4))
    pairs = eq.nn.corrections(layer, normal(3, 4, seed=1), after=(1, 2, 5), decay=0.5)
    assert [weight for weight, _ in pairs] == [0.125, 0.25, 0.5, 1.0]
    assert [weight for weight, _ in eq.nn.corrections(layer, normal(3, 4, seed=1), after=())] == [1.0]


@LAW
@given(solver=solvers, structure=structures, seed=seeds)
def test_the_last_output_is_the_layer_s_own_with_its_gradient(solver, structure, seed):
    layer = eq.DEQ(Tree(structure), solver=solver, max_steps=200)
    inputs = moved(samples([0.3, 0.9, 0.6], structure, seed))
    (*_, (weight, value)), wanted = eq.nn.corrections(layer, *inputs, after=(1, 3)), layer(*inputs)
    assert weight == 1
    assert same(value, wanted)
    around = (*inputs, layer.cell.w)
    close(pulled(value, around), pulled(wanted, around))


@LAW
@given(structure=structures, seed=seeds, steps=st.integers(1, 4), relaxation=st.sampled_from([1.0, 0.6]))
def test_an_iterate_and_its_gradient_are_those_of_steps_taken_by_hand(structure, seed, steps, relaxation):
    adjoint = eq.Phantom(steps, relaxation=relaxation)
    layer = eq.DEQ(Tree(structure), solver=eq.Picard(), rtol=1e-12)
    inputs = moved(samples([0.7, 0.9], structure, seed))
    pairs = eq.nn.corrections(layer, *inputs, after=(1, 2, 4), adjoint=adjoint)
    around = (*inputs, layer.cell.w)
    z = layer.cell.initial_state(*inputs)
    for k in range(1, 5):
        with torch.no_grad():
            z = layer.cell(z, *inputs)
        if k in (1, 2, 4):
            _, found = pairs[(1, 2, 4).index(k)]
            close(found, z)
            at = z
            for _ in range(steps):
                at = pytree.tree_map(lambda a, b: torch.lerp(a, b, relaxation), at, layer.cell(at, *inputs))
            close(pulled(found, around), pulled(at, around))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_any_solver_s_iterates_are_those_that_its_callback_sees(solver):
    seen = []
    cell, inputs = Tree(), samples([0.9, 0.8])
    layer = eq.DEQ(cell, solver=solver, rtol=1e-10, max_steps=200)
    eq.fixed_point(
        cell, torch.zeros_like(inputs[0]), *inputs, solver=solver, rtol=1e-10, callback=seen.append, max_steps=200
    )
    after = tuple(range(1, min(len(seen), 5)))
    assert len(after) >= 2
    for step, (_, value) in zip(after, eq.nn.corrections(layer, *inputs, after=after)[:-1], strict=True):
        assert same(value, seen[step].value)


def test_the_implicit_gradient_at_an_iterate_is_that_of_a_dense_solve_there():
    layer = eq.DEQ(Cell(4), solver=eq.Picard())
    x = normal(1, 4, seed=1).requires_grad_()
    (_, value), _ = eq.nn.corrections(layer, x, after=(2,), adjoint=eq.Implicit(rtol=1e-13))
    v = normal(1, 4, seed=2)
    (found,) = torch.autograd.grad(value, x, v)
    at = value.detach()
    jacobian = torch.autograd.functional.jacobian(lambda z: layer.cell(z, x.detach())[0], at)[:, 0]
    through = torch.autograd.functional.jacobian(lambda x: layer.cell(at, x)[0], x.detach())[:, 0]
    close(found[0], through.T @ torch.linalg.solve(torch.eye(4, dtype=DOUBLE) - jacobian.T, v[0]))


@LAW
@given(solver=solvers, slopes=st.lists(st.sampled_from([0.0, 0.3, 0.9, 1.5, 3.0]), min_size=2, max_size=5), seed=seeds)
def test_a_sample_s_outputs_and_gradients_are_the_same_alone_and_in_company(solver, slopes, seed):
    layer = eq.DEQ(Tree(), solver=solver, on_failure="ignore", max_steps=25, adjoint=eq.OneStep())
    inputs = moved(samples(slopes, seed=seed))
    inputs[0].data[1, 2] = torch.nan
    company = [value for _, value in eq.nn.corrections(layer, *inputs, after=(1, 3, 6, 30))]
    for k in range(len(slopes)):
        own = moved(tuple(x[k : k + 1] for x in inputs))
        for got, (_, alone) in zip(company, eq.nn.corrections(layer, *own, after=(1, 3, 6, 30)), strict=True):
            close(got[k : k + 1], alone, rtol=1e-6, atol=1e-8)
            mine = torch.autograd.grad(got[k].sum(), inputs, retain_graph=True)
            close(tuple(g[k] for g in mine), tuple(g[0] for g in torch.autograd.grad(alone.sum(), own)), 1e-6, 1e-8)


def test_a_sample_that_had_stopped_gives_its_equilibrium():
    layer = eq.DEQ(Tree(), solver=eq.Picard(), rtol=1e-6, max_steps=200)
    inputs = samples([0.0, 0.99])
    assert layer.solve(*inputs).steps.tolist()[0] == 2
    values = [value for _, value in eq.nn.corrections(layer, *inputs, after=(3, 5, 199))]
    assert all(same(value[0], values[-1][0]) for value in values)
    assert not torch.equal(values[0][1], values[1][1])
    assert torch.equal(values[2], values[-1])  # all had stopped by then


class Late(nn.Module):
    """Walks up until its square root is NaN, where the input is above 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0, dtype=DOUBLE))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.where(x > 1, self.a * z + x + 0 * torch.sqrt(9 - z), torch.tanh(0.9 * self.a * z + x))


def test_samples_that_meet_nan_have_finite_outputs_and_spoil_no_gradient():
    layer = eq.DEQ(Late(), solver=eq.Picard(), on_failure="ignore", max_steps=200)
    x = torch.tensor([[0.5], [2.0], [torch.nan]], dtype=DOUBLE, requires_grad=True)
    assert layer.solve(x).status.tolist() == [0, 2, 2]
    pairs = eq.nn.corrections(layer, x, after=(1, 3, 5, 50))
    alone = x.detach()[:1].requires_grad_()
    both = zip(pairs, eq.nn.corrections(layer, alone, after=(1, 3, 5, 50)), strict=True)
    for k, ((_, value), (_, only)) in enumerate(both):
        assert value.isfinite().all()
        grads = torch.autograd.grad(value[:1].sum(), (x, layer.cell.a), retain_graph=True)
        close((grads[0][:1], grads[1]), torch.autograd.grad(only.sum(), (alone, layer.cell.a)))
        grads = torch.autograd.grad(value.sum(), (x, layer.cell.a))
        assert all(g.isfinite().all() for g in grads)
        # On its way up the second sample is an iterate like any other; once it has met NaN it has no gradient.
        assert (grads[0][1] != 0) == (k in (0, 1))
        assert grads[0][2] == 0
        if k >= 2:
            assert same(value[1:], pairs[-1][1][1:])  # also at the very step at which it does


def test_without_gradients_the_outputs_are_the_same_and_have_no_graph():
    layer, inputs = eq.DEQ(Tree()), samples([0.5, 0.9])
    wanted = eq.nn.corrections(layer, *inputs, after=(1, 2))
    with torch.no_grad():
        found = eq.nn.corrections(layer, *inputs, after=(1, 2))
    for (_, value), (_, other) in zip(found, wanted, strict=True):
        assert same(value, other)
        assert other.requires_grad
        assert not value.requires_grad


def test_one_solve_is_told_whose_evaluations_are_the_layer_s():
    layer, inputs = eq.DEQ(Tree()), samples([0.5, 0.9])
    with eq.monitor(layer) as reports:
        eq.nn.corrections(layer, *inputs, after=(1, 2, 3))
    assert len(reports) == 1
    calls, layer.cell.calls = len(layer.cell.calls), []
    layer(*inputs)
    assert calls == len(layer.cell.calls) + 3


def test_readout_keywords_and_modes_are_those_of_the_layer():
    layer = eq.DEQ(Tree("dict"), readout=lambda z: z["h"], eval_max_steps=2, on_failure="ignore")
    inputs = samples([0.9, 0.9], "dict")
    pairs = eq.nn.corrections(layer, inputs[0], slope=inputs[1], after=(1,), z0=layer.cell.initial_state(*inputs))
    assert [value.shape for _, value in pairs] == [(2, 3)] * 2
    assert torch.equal(pairs[-1][1], layer(*inputs))
    layer.eval()
    assert torch.equal(eq.nn.corrections(layer, *inputs, after=(1,))[-1][1], layer(*inputs))
    assert torch.equal(eq.nn.corrections(layer, *inputs, after=(1,), max_steps=9)[-1][1], layer(*inputs, max_steps=9))


class Masked(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.linear, self.part = nn.Linear(6, 6), part
        with torch.no_grad():
            self.linear.weight.copy_(matrix(6, 7, 0.5))
        self.double()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.part(self.linear(z)) + x)


def test_iterates_are_differentiated_under_the_masks_of_the_solve():
    layer, x = eq.DEQ(Masked(eq.nn.VariationalDropout(0.5)), solver=eq.Picard()), normal(4, 6, seed=1)
    torch.manual_seed(3)
    (_, value), _ = eq.nn.corrections(layer, x, after=(2,))
    found = torch.autograd.grad(value.sum(), layer.cell.linear.weight)
    moved_on = torch.rand(1)
    torch.manual_seed(3)
    layer.max_steps, layer.on_failure = 3, "ignore"
    layer.adjoint = eq.OneStep()
    wanted = layer(x, max_steps=3)  # the third evaluation is at the second iterate
    assert torch.rand(1) == moved_on
    assert same(value, wanted)
    close(found, torch.autograd.grad(wanted.sum(), layer.cell.linear.weight))


def test_statistics_move_as_in_a_call():
    layer, x = eq.DEQ(Masked(nn.BatchNorm1d(6)), on_failure="ignore"), normal(8, 6, seed=1)
    twin = copy.deepcopy(layer)
    pairs = eq.nn.corrections(layer, x, after=(1, 2))
    assert same(pairs[-1][1], twin(x))
    assert [value.shape for _, value in pairs] == [(8, 6)] * 3
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), twin.buffers(), strict=True))
    pulled([value for _, value in pairs], tuple(layer.parameters()))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_corrections_work_under_autocast(kind):
    layer, x = eq.DEQ(Cell(16, dtype=torch.float32)), normal(4, 16, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=kind):
        pairs = eq.nn.corrections(layer, x, after=(1, 2))
    loss = sum(weight * value.float().square().mean() for weight, value in pairs)
    loss.backward()
    single = sum(weight * value.square().mean() for weight, value in eq.nn.corrections(layer, x, after=(1, 2)))
    assert abs(loss - single) < 0.05 * single
    assert layer.cell.linear.weight.grad.isfinite().all()


def test_an_empty_batch_has_corrections():
    layer = eq.DEQ(Cell(4))
    pairs = eq.nn.corrections(layer, torch.zeros(0, 4, dtype=DOUBLE), after=(1, 2))
    assert [tuple(value.shape) for _, value in pairs] == [(0, 4)] * 3
    sum(value.sum() for _, value in pairs).backward()
    assert layer.cell.linear.weight.grad.norm() == 0


def test_graphs_of_iterates_are_freed_without_the_collector():
    def alive_after_a_call():
        layer = eq.DEQ(Cell(4))
        x = normal(3, 4, seed=1) * layer.cell.linear.bias
        eq.nn.corrections(layer, x, after=(1, 2))
        return weakref.ref(x)

    gc.disable()
    try:
        assert alive_after_a_call()() is None
    finally:
        gc.enable()


def test_corrections_refuse_what_makes_no_sense():
    layer, x = eq.DEQ(Cell(4)), normal(2, 4, seed=1)
    for after, error in ((3, TypeError), ((0,), ValueError), ((1.0,), TypeError), ((2, 2), ValueError)):
        with pytest.raises(error, match="after"):
            eq.nn.corrections(layer, x, after=after)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unroll"):
        eq.nn.corrections(layer, x, after=(1,), adjoint=eq.Unrolled())
    with pytest.raises(ValueError, match="decay"):
        eq.nn.corrections(layer, x, after=(1,), decay=0.0)
    with pytest.raises(TypeError, match=r"eq\.DEQ, not Cell"):
        eq.nn.corrections(layer.cell, x, after=(1,))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="outside of torch"):
        torch.func.grad(lambda x: eq.nn.corrections(layer, x, after=(1,))[0][1].sum())(x)
    with pytest.raises(eq.SolveError):
        eq.nn.corrections(eq.DEQ(Cell(4), max_steps=2, on_failure="raise"), x, after=(1,))


def test_training_on_iterates_makes_an_early_stop_accurate():
    """A teacher's function, learnt with and without corrections at equal updates, asked within 2 and 3 evaluations."""
    teacher = eq.DEQ(Wide(8), max_steps=200)
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        target = teacher(x)[:, :4]
    errors = {}
    for after in ((), (1, 2)):
        torch.manual_seed(2)
        layer = eq.DEQ(Wide(16, inputs=8), on_failure="ignore")
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        for _ in range(80):
            pairs = eq.nn.corrections(layer, x, after=after)
            loss = sum(weight * (z[:, :4] - target).square().mean() for weight, z in pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found = [eq.nn.corrections(layer, x, after=(k,))[0][1] for k in (1, 2)] + [layer(x)]
        errors[after] = [float((z[:, :4] - target).square().mean()) for z in found]
    plain, corrected = errors[()], errors[1, 2]
    assert corrected[0] < 0.5 * plain[0]
    assert corrected[1] < 0.7 * plain[1]
    assert corrected[2] < 1.5 * plain[2]


class Wide(nn.Module):
    def __init__(self, n: int, inputs: int | None = None) -> None:
        super().__init__()
        self.state, self.input = nn.Linear(n, n), nn.Linear(inputs or n, n)
        nn.init.orthogonal_(self.state.weight, 0.9)
        self.n = n

    def initial_state(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.n)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.state(z) + self.input(x))


# Memory of starts.


def index(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def remember(layer: eq.DEQ, memory: Any, indices: Tensor, *inputs: Any) -> eq.Solution:
    solution = layer.solve(*inputs, z0=memory.recall(indices, layer, *inputs))
    memory.store(indices, solution)
    return solution


@LAW
@given(structure=structures, seed=seeds)
def test_a_known_sample_starts_at_its_equilibrium_and_an_unknown_one_where_the_layer_does(structure, seed):
    layer, memory = eq.DEQ(Tree(structure)), eq.nn.StartMemory(9)
    inputs = samples([0.5, 0.9, 0.7], structure, seed)
    start = memory.recall(index(7, 2, 4), layer, *inputs)
    assert same(start, layer.cell.initial_state(*inputs))
    assert not layer.cell.calls
    first = remember(layer, memory, index(7, 2, 4), *inputs)
    assert same(memory.recall(index(7, 2, 4), layer, *inputs), first.value)
    assert layer.solve(*inputs, z0=memory.recall(index(7, 2, 4), layer, *inputs)).evaluations == 1
    mixed = memory.recall(index(7, 3, 4), layer, *inputs)
    assert same(rows(mixed, [0, 2]), rows(first.value, [0, 2]))
    assert all((leaf[1] == 0).all() for leaf in pytree.tree_leaves(mixed))


@settings(LAW, max_examples=60)
@given(structure=structures, seed=seeds, sizes=st.lists(st.sampled_from([0.0, 0.1, 1.0, 30.0]), min_size=3, max_size=3))
def test_whatever_is_held_a_recalled_start_has_no_higher_residual(structure, seed, sizes):
    layer, memory = eq.DEQ(Tree(structure)), eq.nn.StartMemory(3)
    inputs = samples([0.5, 0.9, 0.7], structure, seed)
    solution = layer.solve(*inputs)
    noise = normal(3, width(structure), seed=seed + 1) * torch.tensor(sizes, dtype=DOUBLE)[:, None]
    held = split(join(solution.value, 1).detach() + noise, structure)
    memory.store(torch.arange(3), eq.Solution(held, solution.status, solution.steps, solution.residual, 1))
    default = split(normal(3, width(structure), seed=seed + 2), structure)
    found = memory.recall(torch.arange(3), layer, *inputs, z0=default)
    before, after = (residual(layer.cell, z, *inputs) for z in (default, found))
    known = residual(layer.cell, held, *inputs)
    close(after, torch.minimum(before, known))
    for k in range(3):
        assert same(rows(found, [k]), rows(held if known[k] < before[k] else default, [k]))
        alone = memory.recall(index(k), layer, *(x[k : k + 1] for x in inputs), z0=rows(default, [k]))
        assert same(alone, rows(found, [k]))


def test_what_the_cell_has_left_behind_is_not_used():
    layer, memory, inputs = eq.DEQ(Tree()), eq.nn.StartMemory(2), samples([0.9, 0.9])
    remember(layer, memory, index(0, 1), *inputs)
    with torch.no_grad():
        layer.cell.w.mul_(-1)
    shifted = (inputs[0] * torch.tensor([[1.0], [-1.0]]), inputs[1])
    found = memory.recall(index(0, 1), layer, *shifted)
    assert (found[1] == 0).all()  # the equilibrium of another input is further away than zeros
    assert (residual(layer.cell, found, *shifted) <= 1).all()


def test_entries_age_by_calls_of_store():
    layer, memory, inputs = eq.DEQ(Tree()), eq.nn.StartMemory(9, max_age=1), samples([0.9])
    first = remember(layer, memory, index(5), *inputs)
    for age in range(4):
        known = same(memory.recall(index(5), layer, *inputs), first.value)
        assert known == (age <= 1)
        remember(layer, memory, index(age), *inputs)
    memory.max_age = None
    assert same(memory.recall(index(5), layer, *inputs), first.value)
    memory.clear()
    assert (memory.recall(index(5), layer, *inputs) == 0).all()


def test_only_equilibria_are_kept():
    layer = eq.DEQ(Tree(), solver=eq.Picard(), on_failure="ignore", max_steps=16)
    inputs = samples([0.3, 0.99, 0.3])
    inputs[0].mul_(0.1)
    inputs[0][2] = torch.nan
    memory = eq.nn.StartMemory(3)
    solution = remember(layer, memory, torch.arange(3), *inputs)
    assert solution.converged.tolist() == [True, False, False]
    assert "known=1" in repr(memory)
    fine = (torch.nan_to_num(inputs[0]), inputs[1])
    found = memory.recall(torch.arange(3), layer, *fine)
    assert same(found[0], solution.value[0])
    assert (found[1:] == 0).all()
    # A sample whose input is NaN has no residual to compare, so that it starts where the layer does.
    broken = (torch.where(torch.arange(3)[:, None] == 0, torch.nan, fine[0]), fine[1])
    assert (memory.recall(torch.arange(3), layer, *broken) == 0).all()


def test_of_a_sample_that_is_there_twice_the_last_equilibrium_is_kept():
    memory = eq.nn.StartMemory(4)
    value = torch.arange(5.0)[:, None]
    status = torch.tensor([0, 0, 1, 0, 1])
    solution = eq.Solution(value, status, status, torch.zeros(5), 1)
    memory.store(index(3, 3, 3, 1, 1), solution)
    assert memory.state_dict()["states"].flatten().tolist() == [0, 3, 0, 1]


def test_a_start_that_is_not_finite_gives_way_to_one_that_is():
    layer, memory = eq.DEQ(Tree()), eq.nn.StartMemory(1)
    inputs = samples([0.5])
    first = remember(layer, memory, index(0), *inputs)
    found = memory.recall(index(0), layer, *inputs, z0=torch.full_like(inputs[0], torch.inf))
    assert same(found, first.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_states_keep_their_dtype_and_are_data(dtype):
    layer, memory = eq.DEQ(Cell(4).to(dtype)), eq.nn.StartMemory(3, device="cpu")
    x = normal(2, 4, seed=1, dtype=dtype)
    solution = remember(layer, memory, index(0, 2), x)
    held = memory.state_dict()["states"]
    assert held.dtype == dtype
    assert held.shape == (3, 4)
    assert not held.requires_grad
    assert torch.equal(held[[0, 2]], solution.value)
    found = memory.recall(index(0, 2), layer, x)
    assert found.dtype == dtype
    found.zero_()
    assert torch.equal(held[[0, 2]], solution.value)


def test_a_memory_is_saved_loaded_copied_and_pickled():
    layer, memory, inputs = eq.DEQ(Tree("nested")), eq.nn.StartMemory(5, max_age=2), samples([0.5, 0.9], "nested")
    first = remember(layer, memory, index(4, 1), *inputs)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    loaded = eq.nn.StartMemory(5, max_age=2)
    loaded.load_state_dict(torch.load(file))
    for other in (loaded, copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert same(other.recall(index(4, 1), layer, *inputs), first.value)
        remember(layer, other, index(0, 2), *inputs)
    assert repr(memory) == "StartMemory(samples=5, max_age=2, device=None, known=2)"
    empty = eq.nn.StartMemory(5)
    loaded.load_state_dict(empty.state_dict())
    assert (join(loaded.recall(index(4, 1), layer, *inputs), 1) == 0).all()
    with pytest.raises(ValueError, match="is of 5 samples; this memory has 4"):
        eq.nn.StartMemory(4).load_state_dict(memory.state_dict())


def test_recalling_changes_and_draws_nothing_and_measures_under_the_masks_to_come():
    dropout = eq.DEQ(Masked(eq.nn.VariationalDropout(0.5)))
    x, memory = normal(4, 6, seed=1), eq.nn.StartMemory(4)
    torch.manual_seed(3)
    first = remember(dropout, memory, torch.arange(4), x)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    start = memory.recall(torch.arange(4), dropout, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(start, first.value)
    assert dropout.solve(x, z0=start).evaluations <= 2  # the masks are those of the first solve, and so is the answer

    norm, memory = eq.DEQ(Masked(nn.BatchNorm1d(6)), on_failure="ignore"), eq.nn.StartMemory(4)
    remember(norm, memory, torch.arange(4), x)
    held = [buffer.clone() for buffer in norm.buffers()]
    with eq.monitor(norm) as reports:
        memory.recall(torch.arange(4), norm, x)
    assert not reports
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), held, strict=True))


def test_a_memory_works_under_autocast_and_for_empty_batches():
    layer, x, memory = eq.DEQ(Cell(8, dtype=torch.float32)), normal(3, 8, seed=1, dtype=torch.float32), None
    memory = eq.nn.StartMemory(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        remember(layer, memory, torch.arange(3), x)
        assert remember(layer, memory, torch.arange(3), x).evaluations == 1
    remember(layer, memory, index(), x[:0])
    assert memory.recall(index(), layer, x[:0]).shape == (0, 8)


def test_gradients_are_those_of_a_cold_start():
    layer, memory = eq.DEQ(Tree(), rtol=1e-11, adjoint=eq.Implicit(rtol=1e-12)), eq.nn.StartMemory(2)
    inputs = moved(samples([0.5, 0.9]))
    cold, around = remember(layer, memory, index(0, 1), *inputs), (*inputs, layer.cell.w)
    warm = remember(layer, memory, index(0, 1), *inputs)
    assert warm.evaluations == 1
    close(pulled(cold.value, around), pulled(warm.value, around))


def test_a_memory_refuses_what_makes_no_sense():
    layer, memory, inputs = eq.DEQ(Tree()), eq.nn.StartMemory(3), samples([0.5, 0.9])
    solution = remember(layer, memory, index(0, 1), *inputs)
    for wrong in (index(0, 3), index(-1, 0)):
        with pytest.raises(IndexError, match="none of the 3, which are 0 to 2"):
            memory.recall(wrong, layer, *inputs)
        with pytest.raises(IndexError, match="none of the 3"):
            memory.store(wrong, solution)
    with pytest.raises(ValueError, match=r"\(2,\), but are of the shape \(3,\)"):
        memory.store(index(0, 1, 2), solution)
    for wrong in ([0, 1], torch.tensor([0.0, 1.0]), torch.tensor([True, False])):
        with pytest.raises(TypeError, match="indices must be"):
            memory.recall(wrong, layer, *inputs)  # pyright: ignore[reportArgumentType]
    wider = eq.DEQ(Cell(7))
    for call in (
        lambda: memory.recall(index(0, 1), wider, normal(2, 7, seed=1)),
        lambda: memory.store(index(0, 1), wider.solve(normal(2, 7, seed=1))),
        lambda: memory.store(index(0, 1), eq.DEQ(Tree("tuple")).solve(*samples([0.5, 0.9], "tuple"))),
    ):
        with pytest.raises(ValueError, match=r"holds states with samples of shapes \[\(4,\)\].*clear\(\)"):
            call()
    with pytest.raises(ValueError, match="in one dimension"):
        memory.recall(index(0, 1), eq.DEQ(Tree(), batch_dims=0), *inputs)
    with pytest.raises(TypeError, match=r"takes an eq\.DEQ"):
        memory.recall(index(0, 1), layer.cell, *inputs)  # pyright: ignore[reportArgumentType]
    for samples_, age, error in ((0, None, ValueError), (2.0, None, TypeError), (2, -1, ValueError)):
        with pytest.raises(error, match="samples" if age is None else "max_age"):
            eq.nn.StartMemory(samples_, max_age=age)  # pyright: ignore[reportArgumentType]


def test_a_memory_saves_evaluations_over_epochs():
    """Its own two included, over a training in which the layer moves on with every update."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    target = torch.roll(x, 1, dims=1).tanh()
    spent = {}
    for warm in (False, True):
        torch.manual_seed(2)
        layer, memory = eq.DEQ(Wide(16), eq.Picard(), rtol=1e-3, max_steps=300), eq.nn.StartMemory(64)
        counted = []
        layer.cell.register_forward_hook(lambda *_, counted=counted: counted.append(torch.is_grad_enabled()))
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        for _ in range(8):
            for batch in torch.randperm(64).split(16):
                z0 = memory.recall(batch, layer, x[batch]) if warm else None
                solution = layer.solve(x[batch], z0=z0)
                memory.store(batch, solution)
                optimizer.zero_grad()
                (solution.value - target[batch]).square().mean().backward()
                optimizer.step()
        spent[warm] = counted.count(False)
    assert spent[True] < 0.8 * spent[False]


# Random starts, and the best of several.


class Hard(nn.Module):
    """Has several equilibria, and chaos between them."""

    def __init__(self, structure: str = "tensor") -> None:
        super().__init__()
        self.structure, self.calls = structure, []
        self.a = nn.Parameter(torch.tensor(2.0, dtype=DOUBLE))

    def initial_state(self, x: Tensor) -> Any:
        return split(torch.zeros_like(x), self.structure)

    def forward(self, z: Any, x: Tensor) -> Any:
        self.calls.append(len(x))
        flat = join(z, x.ndim - 1)
        return split(self.a * torch.sin(1.5 * torch.roll(flat, 1, dims=-1) + x), self.structure)


def starts_by_hand(count: int, n: int, scale: float, seed: int) -> Tensor:
    noise = torch.randn(count, n, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    noise[0] = 0
    return scale * noise


@settings(LAW, max_examples=20)
@given(
    solver=st.sampled_from([eq.Picard(0.6), eq.Anderson(relaxation=0.5), eq.Broyden()]),
    structure=structures,
    seed=seeds,
    count=st.integers(1, 6),
    chunk=st.sampled_from([None, 1, 2, 4]),
)
def test_the_answer_is_the_best_of_solves_from_each_start(solver, structure, seed, count, chunk):
    layer = eq.DEQ(Hard(structure), solver=solver, max_steps=30, on_failure="ignore")
    x = normal(5, width(structure), seed=seed) * 2
    with torch.no_grad():
        found = eq.nn.restarts(layer, x, starts=count, scale=1.5, seed=seed, chunk=chunk)
        noise = starts_by_hand(count, x.shape[1], 1.5, seed)
        solutions = [layer.solve(x, z0=split(row.expand_as(x).clone(), structure)) for row in noise]
    for k in range(len(x)):

        def key(solution: eq.Solution, k: int = k) -> tuple[bool, float]:
            return not solution.converged[k], float(solution.residual[k])

        best = min(solutions, key=key)
        assert found.converged[k] or not best.converged[k]
        assert key(found) <= (key(best)[0], key(best)[1] * (1 + 1e-6) + 1e-13)
        if best.converged[k]:
            close(rows(found.value, k), rows(best.value, k), rtol=1e-6, atol=1e-7)
            total = sum(int(solution.steps[k]) for solution in solutions)
            assert abs(int(found.steps[k]) - total - 1) <= count  # a step of rounding each
    close(found.residual, residual(layer.cell, found.value, x), rtol=1e-6, atol=1e-12)


@LAW
@given(seed=seeds, order=st.permutations(range(4)), chunk=st.sampled_from([None, 3]))
def test_a_sample_s_answer_is_the_same_in_any_company_and_any_chunks(seed, order, chunk):
    layer = eq.DEQ(Hard(), solver=eq.Picard(0.6), max_steps=60, on_failure="ignore")
    x = normal(4, 4, seed=seed) * 2
    x[1, 0] = torch.nan
    together = eq.nn.restarts(layer, x, starts=5)
    other = eq.nn.restarts(layer, x[order], starts=5, chunk=chunk)
    for here, k in enumerate(order):
        alone = eq.nn.restarts(layer, x[k : k + 1], starts=5, chunk=1)
        for found, row in ((together, k), (other, here)):
            assert found.status[row] == alone.status[0]
            close(found.value[row], alone.value[0], rtol=1e-6, atol=1e-7)
    assert together.status[1] == eq.Status.NONFINITE
    assert (together.value[1] == 0).all()


def test_an_equilibrium_is_preferred_to_a_lower_residual_that_is_none():
    class Drift(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.where(z.abs() < 0.3, 0.5 * z, 1.05 * z) + x

    # Towards zero, met by atol alone, the relative residual is 1; outwards it stays at 0.05.
    layer = eq.DEQ(Drift(), solver=eq.Picard(), rtol=1e-6, atol=1e-2, max_steps=20, on_failure="ignore")
    x, z0 = torch.zeros(2, 1, dtype=DOUBLE), torch.tensor([[0.2], [5.0]], dtype=DOUBLE)
    assert layer.solve(x, z0=z0).status.tolist() == [eq.Status.CONVERGED, eq.Status.MAX_STEPS]
    for chunk in (None, 1):
        found = eq.nn.restarts(layer, x, z0=z0, starts=8, scale=2.0, chunk=chunk)
        assert found.converged[0]
        assert found.value[0].abs() < 0.02
        assert found.status[1] == eq.Status.MAX_STEPS
        assert found.residual[1] < 0.1


def test_any_finite_state_is_preferred_to_a_start_that_meets_nan():
    class Half(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 1.05 * z + 0 * torch.sqrt(z - 0.5) + x

    layer = eq.DEQ(Half(), solver=eq.Picard(), max_steps=9, on_failure="ignore")
    x = torch.zeros(2, 1, dtype=DOUBLE)
    assert layer.solve(x).status.tolist() == [eq.Status.NONFINITE] * 2
    assert eq.nn.restarts(layer, x, starts=8, scale=2.0).status.tolist() == [eq.Status.MAX_STEPS] * 2


def test_more_starts_solve_more():
    layer, x = eq.DEQ(Hard(), max_steps=40, on_failure="ignore"), normal(60, 4, seed=2) * 2
    with torch.no_grad():
        shares = [float(eq.nn.restarts(layer, x, starts=k, scale=2.0).converged.double().mean()) for k in (1, 4, 16)]
    assert shares == sorted(shares)
    assert shares[-1] > shares[0] + 0.2


def test_the_gradient_is_that_of_the_chosen_equilibrium():
    layer = eq.DEQ(Hard(), solver=eq.Picard(0.6), rtol=1e-11, max_steps=300, adjoint=eq.Implicit(rtol=1e-12))
    x = (normal(3, 4, seed=11) * 0.3).requires_grad_()
    layer.cell.a.data.fill_(0.9)

    def solve(x: Tensor) -> Tensor:
        return eq.nn.restarts(layer, x, starts=3, scale=0.5).value

    assert torch.autograd.gradcheck(solve, (x,), atol=1e-6)
    value = solve(x)
    again = layer(x, z0=value.detach())
    assert same(value, again)
    around = (x, layer.cell.a)
    close(pulled(value, around), pulled(again, around))


def test_evaluations_are_counted_and_the_batch_is_bounded_by_the_chunk():
    layer, x = eq.DEQ(Hard(), max_steps=25, on_failure="ignore"), normal(3, 4, seed=2) * 2
    for chunk, largest in ((None, 21), (2, 6), (1, 3)):
        layer.cell.calls = []
        with torch.no_grad(), eq.monitor(layer) as reports:
            found = eq.nn.restarts(layer, x, starts=7, chunk=chunk)
        assert found.evaluations == len(layer.cell.calls)
        assert max(layer.cell.calls) == largest
        assert [report.evaluations for report in reports] == [found.evaluations]
        assert same(reports[0].steps.double(), found.steps.double())


def test_restarts_draw_from_a_generator_of_their_own():
    layer, x = eq.DEQ(Hard(), max_steps=40, on_failure="ignore"), normal(20, 4, seed=2) * 2
    before = torch.get_rng_state()
    with torch.no_grad():
        values = [eq.nn.restarts(layer, x, seed=seed).value for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert same(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_what_is_shared_goes_by_keyword_or_one_start_at_a_time():
    class Shared(nn.Module):
        def forward(self, z: Tensor, x: Tensor, weight: Tensor) -> Tensor:
            return torch.tanh(z @ weight + x)

    layer, x, weight = eq.DEQ(Shared()), normal(4, 3, seed=1), matrix(3, 2, 0.5)
    wanted = layer(x, weight)
    close(eq.nn.restarts(layer, x, weight=weight).value, wanted, rtol=1e-6, atol=1e-7)
    close(eq.nn.restarts(layer, x, weight, chunk=1).value, wanted, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="pass it by keyword, or take chunk=1"):
        eq.nn.restarts(layer, x, weight)


@pytest.mark.parametrize("batch_dims", [0, 1, 2])
def test_any_batch_dimensions_will_do(batch_dims):
    layer = eq.DEQ(Hard(), max_steps=60, on_failure="ignore", batch_dims=batch_dims)
    x = normal(2, 3, 4, seed=2)
    found = eq.nn.restarts(layer, x, starts=4)
    assert found.value.shape == x.shape
    assert found.status.shape == x.shape[:batch_dims]
    close(found.residual, residual(layer.cell, found.value, x, batch_dims=batch_dims), rtol=1e-6, atol=1e-12)
    assert eq.nn.restarts(layer, x[:0], starts=4).value.shape == (0, 3, 4)


def test_dropout_has_the_masks_of_the_answer_and_statistics_move_once():
    layer, x = eq.DEQ(Masked(eq.nn.VariationalDropout(0.5))), normal(4, 6, seed=1)
    torch.manual_seed(3)
    found = eq.nn.restarts(layer, x, starts=4)
    after = torch.rand(1)
    torch.manual_seed(3)
    wanted = layer(x)
    assert torch.rand(1) == after  # draws as one call does
    assert found.converged.all()
    close(found.value, wanted, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="BatchNorm in training"):
        eq.nn.restarts(eq.DEQ(Masked(nn.BatchNorm1d(6))), x)
    found = eq.nn.restarts(eq.DEQ(Masked(nn.BatchNorm1d(6)).eval()), x)
    assert found.converged.all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_restarts_work_under_autocast(kind):
    layer, x = eq.DEQ(Cell(8, dtype=torch.float32)), normal(4, 8, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=kind):
        found = eq.nn.restarts(layer, x, starts=4)
    assert found.converged.all()
    found.value.float().sum().backward()
    assert (found.value.float() - layer(x)).abs().max() < 0.05
    assert layer.cell.linear.weight.grad.isfinite().all()


def test_failures_are_those_of_the_answer_and_options_are_checked():
    x = normal(20, 4, seed=2) * 2
    layer = eq.DEQ(Hard(), max_steps=3, on_failure="raise")
    with pytest.raises(eq.SolveError):
        eq.nn.restarts(layer, x, starts=4)
    layer.max_steps = 40
    with pytest.raises(eq.SolveError):
        layer(x)
    assert eq.nn.restarts(layer, x, starts=64, scale=2.0).converged.all()  # starts that fail are no failure
    layer.on_failure = "ignore"
    for wrong, error in (({"starts": 0}, ValueError), ({"scale": 0.0}, ValueError), ({"chunk": 0}, ValueError)):
        with pytest.raises(error, match=next(iter(wrong))):
            eq.nn.restarts(layer, x, **wrong)
    with pytest.raises(TypeError, match="seed"):
        eq.nn.restarts(layer, x, seed=None)  # pyright: ignore[reportArgumentType]
    layer.adjoint = eq.Unrolled()
    with pytest.raises(ValueError, match="many starts are not kept"):
        eq.nn.restarts(layer, x)
    with pytest.raises(TypeError, match=r"takes an eq\.DEQ"):
        eq.nn.restarts(layer.cell, x)  # pyright: ignore[reportArgumentType]


def test_random_starts_are_gaussian_in_training_alone():
    start = eq.nn.RandomStart(0.5)
    z0 = {"h": torch.ones(200, 50), "c": (torch.zeros(200, 3, dtype=DOUBLE),)}
    torch.manual_seed(1)
    found = start(z0)
    torch.manual_seed(1)
    assert same(found, start(z0))
    assert abs(found["h"].mean() - 1) < 4 * 0.5 / math.sqrt(10_000)
    assert abs(found["h"].std() - 0.5) < 0.02
    assert found["c"][0].dtype == DOUBLE
    assert (z0["h"] == 1).all()
    before = torch.get_rng_state()
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    one, two = (start(z0, generator=generator) for generator in generators)
    assert same(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    start.eval()
    assert start(z0) is z0
    with pytest.raises(ValueError, match="scale"):
        eq.nn.RandomStart(-1.0)
    assert repr(pickle.loads(pickle.dumps(copy.deepcopy(start)))) == "RandomStart(scale=0.5)"


def test_a_layer_draws_one_start_a_solve_and_its_equilibrium_is_the_same():
    class Noisy(Cell):
        def __init__(self) -> None:
            super().__init__(4)
            self.start = eq.nn.RandomStart()

        def initial_state(self, x: Tensor) -> Tensor:
            return self.start(torch.zeros_like(x))

    layer, x = eq.DEQ(Noisy(), solver=eq.Picard(), rtol=1e-11), normal(3, 4, seed=1)
    values = [layer(x), layer(x)]
    assert not torch.equal(*values)
    close(values[0], values[1], rtol=1e-9, atol=1e-9)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
