"""The law of company, the compiler: cells compiled on their own, and models compiled around layers."""

import pytest
import torch
import torch._dynamo.testing
from maps import Cell, matrix, normal, split, tanh_map, width
from torch import Tensor, nn

import equilibria as eq

DOUBLE = torch.float64
ADJOINTS = [eq.Implicit(), eq.Phantom(3), eq.OneStep(), eq.Unrolled(), eq.Unrolled(checkpoint=True)]


def cell(n: int = 8, **options) -> Cell:
    return Cell(n, **{"dtype": torch.float32, **options})


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, seed=3, dtype=dtype)


def counting() -> torch._dynamo.testing.CompileCounterWithBackend:
    """A backend that compiles quickly, gradients as well, and counts the graphs it is given."""
    torch._dynamo.reset()
    return torch._dynamo.testing.CompileCounterWithBackend("aot_eager")


# A cell, and a model.


@pytest.mark.parametrize("adjoint", ADJOINTS[:4])
def test_a_compiled_cell(adjoint):
    torch._dynamo.reset()
    plain = eq.DEQ(cell(), adjoint=adjoint, rtol=1e-5)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = eq.DEQ(torch.compile(plain.cell, backend=counter), adjoint=adjoint, rtol=1e-5)
    x = inputs(3, 8).requires_grad_()
    results = []
    for layer in (plain, compiled):
        z = layer(x)
        results.append((z, *torch.autograd.grad(z.sum(), (x, *plain.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert 1 <= counter.frame_count <= 3  # without grad, with grad, and with a state that needs it


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(8, 8), layer, nn.Linear(8, 2)

    def forward(self, x):
        return self.after(self.layer(self.before(x))).relu()


@pytest.mark.parametrize("adjoint", ADJOINTS[:4])
def test_a_compiled_model_around_a_layer_is_two_graphs(adjoint):
    torch._dynamo.reset()
    model = Model(eq.DEQ(cell(), adjoint=adjoint, rtol=1e-5))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    x = inputs(3, 8)
    for _ in range(2):  # the second call compiles nothing
        want = torch.autograd.grad(model(x).sum(), tuple(model.parameters()))
        got = torch.autograd.grad(compiled(x).sum(), tuple(model.parameters()))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 2


def test_a_compiled_function_around_fixed_point():
    torch._dynamo.reset()
    w = matrix(8, 0, 0.5, torch.float32).requires_grad_()

    def solve(x):
        sol = eq.fixed_point(tanh_map(), torch.zeros_like(x), w, x.sin(), rtol=1e-5)
        return sol.value.cos().sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(solve, backend=counter)
    x = inputs(3, 8)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), w), torch.autograd.grad(solve(x), w))
    assert counter.frame_count == 2  # before it and after it


def test_the_default_compiler_compiles_the_cell():
    torch._dynamo.reset()
    plain = eq.DEQ(cell(), rtol=1e-5)
    layer = eq.DEQ(torch.compile(plain.cell), rtol=1e-5)
    x = inputs(3, 8)
    got, want = layer(x), plain(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got.sum(), tuple(plain.parameters())),
        torch.autograd.grad(want.sum(), tuple(plain.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# Cells of other kinds.


class Structured(nn.Module):
    """A state of several tensors."""

    def __init__(self, structure: str, n: int) -> None:
        super().__init__()
        self.structure, self.linear = structure, nn.Linear(n, n)
        with torch.no_grad():
            self.linear.weight.copy_(matrix(n, 7, 0.6))

    def initial_state(self, x: Tensor):
        return split(torch.zeros_like(x), self.structure)

    def forward(self, z, x):
        leaves = torch.utils._pytree.tree_leaves(z)
        rows = torch.cat([leaf.flatten(1) for leaf in leaves], dim=1)
        return split(torch.tanh(self.linear(rows) + x), self.structure)


@pytest.mark.parametrize("structure", ["tuple", "dict", "nested"])
def test_a_compiled_cell_of_any_structure(structure):
    n, counter = width(structure), counting()
    plain = Structured(structure, n)
    compiled = torch.compile(plain, backend=counter)
    x = inputs(3, n)
    results = []
    for c in (plain, compiled):
        solution = eq.DEQ(c, rtol=1e-5).solve(x)
        leaves = torch.utils._pytree.tree_leaves(solution.value)
        gradients = torch.autograd.grad(sum(leaf.square().sum() for leaf in leaves), tuple(plain.parameters()))
        results.append((*leaves, *gradients))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert 1 <= counter.frame_count <= 3


@pytest.mark.parametrize(
    ("entry", "solver"),
    [
        ("fixed_point", eq.Newton()),
        ("fixed_point", eq.Broyden()),
        ("root", eq.Newton()),
        ("root", eq.Newton(linear_solver=eq.Dense())),
    ],
)
def test_a_compiled_function_in_fixed_point_and_root(entry, solver):
    counter = counting()
    w = matrix(6, 0, 0.5).requires_grad_()
    x = inputs(3, 6, dtype=DOUBLE)
    f = {
        "fixed_point": lambda z: torch.tanh(z @ w + x),
        "root": lambda z: z - torch.tanh(z @ w + x),
    }[entry]
    results = []
    for function in (f, torch.compile(f, backend=counter)):
        sol = getattr(eq, entry)(function, torch.zeros_like(x), solver=solver)
        results.append((sol.value, *torch.autograd.grad(sol.value.sum(), w)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)
    assert counter.frame_count >= 1


def test_a_compiled_objective_is_refused_in_words():
    # A compiled function has no second derivative, which the gradient of a minimum takes.
    objective = torch.compile(lambda z: (z**2).sum(dim=1) + torch.logsumexp(z, dim=1), backend=counting())
    with pytest.raises(RuntimeError, match="create_graph=False"):
        eq.argmin(objective, torch.zeros(3, 6))


class Bottleneck(nn.Module):
    """A cell that saves for its backward what it does not return, which the compiler then frees at once if it may."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.up(torch.relu(self.down(z))) + x)


@pytest.mark.parametrize("first", [eq.Phantom(2), eq.Unrolled()])
@pytest.mark.parametrize("solver", [eq.Anderson(), eq.Newton()])
def test_the_adjoint_of_a_compiled_cell_can_be_changed(solver, first):
    torch.manual_seed(0)
    plain = Bottleneck()
    compiled = torch.compile(plain, backend=counting())
    x = inputs(3, 8)
    eq.DEQ(compiled, adjoint=first)(x).sum().backward()
    gradients = []
    for c in (plain, compiled):
        layer = eq.DEQ(c, solver=solver, rtol=1e-5, on_failure="raise")
        gradients.append(torch.autograd.grad(layer(x).square().sum(), tuple(plain.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_a_compiled_cell_under_autocast():
    counter = counting()
    plain = cell()
    x = inputs(3, 8).requires_grad_()
    results = []
    for c in (plain, torch.compile(plain, backend=counter)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = eq.DEQ(c, on_failure="raise")(x)
        results.append((z, *torch.autograd.grad(z.sum(), (x, *plain.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=2e-2)
    assert 1 <= counter.frame_count <= 3


def test_a_cell_that_is_compiled_in_place():
    counter = counting()
    layer = eq.DEQ(cell(), rtol=1e-5)
    x = inputs(3, 8)
    want = layer(x)
    names = list(layer.state_dict())
    layer.cell.compile(backend=counter)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6)
    assert counter.frame_count >= 1
    assert list(layer.state_dict()) == names  # torch.compile(cell) would put _orig_mod in


# Models around layers.


def graphs_of(model: nn.Module, counter, calls) -> list[int]:
    """Graphs compiled after each call of a compiled model, whose values and gradients are those of the model itself."""
    compiled, counts = torch.compile(model, backend=counter), []
    for batch, grad in calls:
        x = inputs(batch, 8)
        with torch.set_grad_enabled(grad):
            want, got = model(x), compiled(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        if grad:
            for a, b in zip(
                torch.autograd.grad(got.sum(), tuple(model.parameters())),
                torch.autograd.grad(want.sum(), tuple(model.parameters())),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        counts.append(counter.frame_count)
    return counts


class Twice(nn.Module):
    """Two layers, and something to compile before, between and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = eq.DEQ(cell(), rtol=1e-5), eq.DEQ(cell(norm=0.3), rtol=1e-5)
        self.between, self.after = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.after(self.second(self.between(self.first(x.sin())).relu()))


class Block(nn.Module):
    """A linear layer with a forward that is not torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).relu()


@pytest.mark.parametrize(
    ("make", "graphs"),
    [
        (lambda: Model(eq.DEQ(cell(), rtol=1e-5)), 2),
        (lambda: Model(eq.DEQ(cell(), rtol=1e-5, readout=lambda z: z.sin() * 2)), 3),
        (Twice, 3),
        # torch leaves a loop whole that it has to leave in the middle, and Sequential is one, over modules of torch's
        # own that it compiles from outside alone. Modules with a forward of their own are compiled each.
        (lambda: nn.Sequential(nn.Linear(8, 8), eq.DEQ(cell(), rtol=1e-5), nn.Linear(8, 2)), 0),
        (lambda: nn.Sequential(Block(), eq.DEQ(cell(), rtol=1e-5), Block()), 2),
        (lambda: eq.DEQ(cell(), rtol=1e-5), 0),
    ],
    ids=["one layer", "a readout", "two layers", "sequential", "sequential of blocks", "a layer alone"],
)
def test_how_many_graphs_a_compiled_model_is(make, graphs):
    same = [(3, True), (3, True)]
    changed = [(5, True), (7, True), (11, True)]  # the first other size makes the graphs dynamic
    once, again, dynamic, *rest = graphs_of(make(), counting(), same + changed)
    assert once == again == graphs
    assert graphs <= dynamic <= 2 * graphs
    assert rest == [dynamic, dynamic]


def test_a_compiled_model_without_grad_and_in_eval():
    model = Model(eq.DEQ(cell(), rtol=1e-5))
    counter = counting()
    assert graphs_of(model, counter, [(3, True), (3, False), (3, False)]) == [2, 4, 4]
    assert graphs_of(model.eval(), counter, [(3, True), (3, False)])[-1] <= 8


def test_a_compiled_model_under_autocast():
    counter = counting()
    model = Model(eq.DEQ(cell(), on_failure="raise"))
    compiled = torch.compile(model, backend=counter)
    x, gradients = inputs(3, 8), []
    for m in (model, compiled, compiled):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = m(x).float().square().sum()
        gradients.append(torch.autograd.grad(loss, tuple(model.parameters())))
    assert counter.frame_count == 2
    for got in gradients[1:]:
        torch.testing.assert_close(got, gradients[0], rtol=5e-2, atol=2e-2)


def test_a_cell_compiled_on_its_own_stays_so_in_a_compiled_model():
    of_cell, of_model = counting(), counting()
    plain = Model(eq.DEQ(cell(), rtol=1e-5))
    model = Model(eq.DEQ(torch.compile(plain.layer.cell, backend=of_cell), rtol=1e-5))
    model.before, model.after = plain.before, plain.after
    x = inputs(3, 8)
    got = torch.compile(model, backend=of_model)(x)
    torch.testing.assert_close(got, plain(x), rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(got.sum(), tuple(plain.parameters())),
        torch.autograd.grad(plain(x).sum(), tuple(plain.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert of_model.frame_count == 2
    assert of_cell.frame_count >= 1


@pytest.mark.parametrize("entry", ["root", "argmin"])
def test_other_entry_points_inside_a_compiled_function(entry):
    counter = counting()
    w = matrix(6, 0, 0.5).requires_grad_()

    def solve(x):
        x = x.sin()
        if entry == "root":
            value = eq.root(lambda z: z - torch.tanh(z @ w + x), torch.zeros_like(x)).value
        else:
            value = eq.argmin(lambda z: ((z - x @ w) ** 2).sum(dim=1) + (z**4).sum(dim=1), torch.zeros_like(x)).value
        return value.cos().sum()

    compiled, x = torch.compile(solve, backend=counter), inputs(3, 6, dtype=DOUBLE)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(compiled(x), w), torch.autograd.grad(solve(x), w))
        assert counter.frame_count == 2
