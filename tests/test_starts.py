"""Remembered starts, random starts, and corrections on the way."""

import copy

import pytest
import torch
from maps import normal
from torch import nn

import equilibria as eq

DOUBLE = torch.float64


class Cell(nn.Module):
    def __init__(self, scale=0.9, width=6):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False).double()
        self.linear.weight.data = scale * torch.linalg.qr(normal(width, width, seed=0)).Q

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


class Pair(nn.Module):
    """A cell whose state is a dict, in two dtypes."""

    def initial_state(self, x):
        return {"a": torch.zeros_like(x), "b": x.new_zeros(len(x), 2, dtype=torch.float32)}

    def forward(self, z, x):
        return {"a": torch.tanh(0.5 * z["a"] + x), "b": 0.5 * torch.cos(z["b"]) + x[:, :2].float()}


class Two(nn.Module):
    """Several equilibria for a slope of 3; only a start above 0 leads to the one at x > 0."""

    def forward(self, z, x):
        return torch.where(z > 0.5, 0.5 * z + 0.5 * x, z + 0.1 + 0.05 * torch.sin(9 * z))


def layer_of(cell=None, **options):
    return eq.DEQ(cell or Cell(), **({"rtol": 1e-8, "max_steps": 200} | options))


def test_a_remembered_start_saves_evaluations_while_the_cell_moves():
    torch.manual_seed(0)
    layer, memory, x = layer_of(solver=eq.Picard(), rtol=1e-4), eq.nn.StartMemory(40), normal(40, 6, seed=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    cold, warm = [], []
    for _ in range(5):
        for indices in torch.randperm(40).split(10):
            cold.append(layer.solve(x[indices]).steps.double().mean())
            solution = layer.solve(x[indices], z0=memory.recall(layer, indices, x[indices]))
            warm.append(solution.steps.double().mean())
            memory.store(indices, solution)
            optimizer.zero_grad()
            solution.value.square().mean().backward()
            optimizer.step()
    assert torch.stack(warm[4:]).mean() < 0.5 * torch.stack(cold[4:]).mean()


def test_a_start_that_is_stale_is_not_used():
    layer, memory, x, indices = layer_of(), eq.nn.StartMemory(5), normal(5, 6, seed=1), torch.arange(5)
    assert torch.equal(memory.recall(layer, indices, x), torch.zeros_like(x))
    solution = layer.solve(x)
    memory.store(indices, solution)
    assert torch.equal(memory.recall(layer, indices, x), solution.value)
    # Worse than the usual start: another input, whose equilibrium is at the opposite side.
    far = torch.cat([x[:3], -x[3:]])
    recalled = memory.recall(layer, indices, far)
    assert torch.equal(recalled[:3], solution.value[:3])
    assert (recalled[3:] == 0).all()
    # Too old.
    memory.max_age = 2
    for _ in range(2):
        assert torch.equal(memory.recall(layer, indices, x)[:1], solution.value[:1])
        memory.store(indices[1:], layer.solve(x[1:]))
    recalled = memory.recall(layer, indices, x)
    assert (recalled[0] == 0).all()
    assert torch.equal(recalled[1:], layer(x[1:]))


def test_samples_that_failed_are_not_stored_and_repeated_ones_once():
    layer, memory, x = layer_of(on_failure="ignore"), eq.nn.StartMemory(5), normal(3, 6, seed=1)
    x[1] = torch.nan
    memory.store(torch.tensor([0, 1, 2]), layer.solve(x))
    recalled = memory.recall(layer, torch.tensor([0, 1, 2]), torch.nan_to_num(x))
    assert (recalled[1] == 0).all()
    assert (recalled[[0, 2]] != 0).any(dim=1).all()
    later = layer.solve(normal(2, 6, seed=2))
    memory.store(torch.tensor([4, 4]), later)
    assert torch.equal(memory.recall(layer, torch.tensor([4]), normal(2, 6, seed=2)[1:]), later.value[1:])


def test_states_of_any_structure_saved_and_loaded():
    layer, memory, x = layer_of(Pair(), rtol=1e-4), eq.nn.StartMemory(4), normal(4, 6, seed=1)
    solution = layer.solve(x)
    memory.store(torch.arange(4), solution)
    other = eq.nn.StartMemory(4)
    other.load_state_dict(copy.deepcopy(memory.state_dict()))
    for one in (memory, other, copy.deepcopy(memory)):
        recalled = one.recall(layer, torch.arange(4), x)
        for key in ("a", "b"):
            assert torch.equal(recalled[key], solution.value[key])
            assert recalled[key].dtype == solution.value[key].dtype
    with pytest.raises(ValueError, match="of 4 samples, and this one of 5"):
        eq.nn.StartMemory(5).load_state_dict(memory.state_dict())
    with pytest.raises(ValueError, match="StartMemory for each layer"):
        memory.recall(layer_of(), torch.arange(4), x)


def test_a_look_moves_no_statistics():
    class Normalised(Cell):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6).double()

        def forward(self, z, x):
            return 0.5 * self.norm(super().forward(z, x))

    layer, memory, x = layer_of(Normalised()), eq.nn.StartMemory(4), normal(4, 6, seed=1)
    memory.store(torch.arange(4), layer.solve(x))
    before = copy.deepcopy(layer.state_dict())
    memory.recall(layer, torch.arange(4), x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_what_makes_no_sense_is_told():
    memory, layer, x = eq.nn.StartMemory(4), layer_of(), normal(2, 6, seed=1)
    for indices, words in [(torch.tensor([0, 4]), "from 0 to 3"), (torch.tensor([-1, 0]), "from 0 to 3")]:
        with pytest.raises(ValueError, match=words):
            memory.recall(layer, indices, x)
    with pytest.raises(TypeError, match="int64"):
        memory.recall(layer, torch.tensor([0.0, 1.0]), x)
    with pytest.raises(ValueError, match="3 indices for a batch of 2"):
        memory.recall(layer, torch.arange(3), x)
    with pytest.raises(ValueError, match="3 indices for 2"):
        memory.store(torch.arange(3), layer.solve(x))
    for steps in [(), (4, 2), (2, 2)]:
        with pytest.raises(ValueError, match="must rise"):
            eq.nn.corrections(layer, x, steps=steps)
    with pytest.raises(ValueError, match="starts"):
        eq.nn.restarts(layer, x, starts=0)


def test_restarts_find_what_one_start_does_not_and_keep_the_gradient():
    cell = Two()
    layer = eq.DEQ(cell, solver=eq.Picard(), rtol=1e-8, max_steps=3, on_failure="ignore")
    x = torch.full((3, 1), 2.0, dtype=DOUBLE, requires_grad=True)
    assert layer.solve(x).residual.min() > 1e-3
    layer.max_steps = 30
    found = eq.nn.restarts(layer, x, starts=12, scale=2.0)
    assert found.converged.all()
    (gradient,) = torch.autograd.grad(found.value.sum(), x)
    assert torch.allclose(gradient, torch.ones_like(x), atol=1e-6)
    state = torch.get_rng_state()
    again = eq.nn.restarts(layer, x, starts=12, scale=2.0)
    assert torch.equal(again.value, found.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_restarted_sample_is_the_same_in_any_company_and_no_worse_than_one_start():
    layer = layer_of(Cell(3.0), max_steps=40, on_failure="ignore")
    x = normal(4, 6, seed=2)
    x[3] = torch.nan
    together = eq.nn.restarts(layer, x, starts=6)
    for k in range(3):
        alone = eq.nn.restarts(layer, x[k : k + 1], starts=6)
        if alone.converged[0]:
            assert torch.allclose(alone.value[0], together.value[k], rtol=1e-6)
    assert (together.residual[:3] <= layer.solve(x).residual[:3] * (1 + 1e-9)).all()
    assert together.status[3] == eq.Status.NONFINITE


@pytest.mark.parametrize("solver", [eq.Picard(), eq.Anderson(), eq.Broyden()])
def test_corrections_are_states_on_the_way_with_gradients_of_their_own(solver):
    layer, x = layer_of(solver=solver), normal(3, 6, seed=1).requires_grad_()
    *early, last = eq.nn.corrections(layer, x, steps=(2, 5, 9))
    residuals = torch.stack([one.residual for one in (*early, last)])
    assert (residuals[1:] <= residuals[:-1] * (1 + 1e-9)).all()
    assert last.converged.all()
    assert torch.allclose(last.value, layer(x), atol=1e-6)
    weight = layer.cell.linear.weight
    for one in early:
        gradient, of_x = torch.autograd.grad(one.value.square().sum(), (weight, x))
        z = one.value.detach()
        wanted = torch.autograd.grad((layer.cell(z, x) * 2 * z).sum(), (weight, x))
        assert torch.allclose(gradient, wanted[0])
        assert torch.allclose(of_x, wanted[1])
    exact, _ = torch.autograd.grad(last.value.square().sum(), (weight, x))
    other, _ = torch.autograd.grad(layer(x).square().sum(), (weight, x))
    assert torch.allclose(exact, other, atol=1e-5)
    if solver == eq.Picard():
        with torch.no_grad():
            z = torch.zeros_like(x)
            z = layer.cell(z, x)
        assert torch.equal(early[0].value, z)


def test_corrections_make_few_evaluations_worth_more():
    """Of two copies of a cell that learn a map, the one with corrections is nearer to it after four evaluations."""
    x = normal(64, 6, seed=1)
    y = torch.tanh(x @ normal(6, 6, seed=2) * 0.3)
    losses = []
    for corrected in (False, True):
        layer = layer_of(Cell(0.95), rtol=1e-4, on_failure="ignore")
        optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
        for _ in range(60):
            *early, last = eq.nn.corrections(layer, x, steps=(2, 4))
            loss = (last.value - y).square().mean()
            if corrected:
                loss = loss + sum(0.5 * (one.value - y).square().mean() for one in early)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            layer.solver = eq.Picard()
            losses.append(float((layer(x, max_steps=4) - y).square().mean()))
    assert losses[1] < losses[0]
