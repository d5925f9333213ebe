"""A network and its embedding as one equilibrium layer are the same function, with the same gradient."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from embedding import error, errors, floating, loss
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Convolutional, Joined, LanguageModel, Recurrent, mlp, normed
from torch import Tensor, nn

import equilibria as eq

QUICK = settings(derandomize=True, max_examples=5, deadline=None)
TRAINED = ["MLP, tanh", "transformer, pre-norm", "convolutional, BatchNorm in eval", "tied weights"]


@pytest.fixture(autouse=True)
def doubles():
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(kept)


def made(kind: str, depth: int = 6, batch: int = 3) -> tuple[nn.Module, tuple[Tensor, ...], eq.DEQ]:
    network, inputs = NETWORKS[kind](depth)
    example = inputs(batch)
    return network, example, eq.universal.embed(network, example)


@pytest.mark.parametrize("kind", NETWORKS)
@QUICK
@given(depth=st.sampled_from([2, 5, 9, 13]), batch=st.sampled_from([1, 2, 5]), example=st.sampled_from([1, 3]))
def test_value_and_gradient_are_those_of_the_network_at_any_batch(kind: str, depth: int, batch: int, example: int):
    network, inputs = NETWORKS[kind](depth)
    layer = eq.universal.embed(network, inputs(example))
    given = inputs(batch)
    value, gradient = errors(network, layer, given)
    assert value <= 1e-10
    assert gradient <= 1e-9
    solution = layer.solve(*given)
    assert solution.converged.all()
    assert solution.evaluations <= layer.cell.depth + 1 <= len(layer.cell.stages) + 1
    assert layer.batch_dims == 1


@pytest.mark.parametrize("kind", ["MLP, sigmoid", "MLP, ReLU"])
def test_the_gradient_is_exact_however_deep_the_network_and_small_the_gradient(kind: str):
    network, inputs, layer = made(kind, 40, 2)
    value, gradient = errors(network, layer, inputs)
    assert value <= 1e-10
    assert gradient <= 1e-9
    sizes = [torch.linalg.vector_norm(g) for g in torch.autograd.grad(loss(layer(*inputs)), list(network.parameters()))]
    assert max(sizes) > 1e12 * min(size for size in sizes if size > 0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_any_start_ends_at_the_same_bits_after_the_longest_chain_and_one_more(kind: str):
    _, inputs, layer = made(kind, 8)
    wanted = layer.solve(*inputs).value
    for scale in (1e-3, 1.0, 30.0):
        start = pytree.tree_map(lambda t, scale=scale: scale * torch.randn_like(t), wanted)
        solution = layer.solve(*inputs, z0=start)
        assert solution.evaluations <= layer.cell.depth + 1
        assert solution.converged.all()
        assert all(torch.equal(solution.value[name], wanted[name]) for name in layer.cell.stages)
    again = layer.solve(*inputs, z0=wanted)
    assert again.evaluations == 1


@pytest.mark.parametrize("kind", ["MLP, tanh", "residual MLP", "transformer, post-norm", "U-shaped", "tied weights"])
def test_the_jacobian_is_nilpotent_of_the_depth(kind: str):
    _, inputs, layer = made(kind, 5, 1)
    state = {name: 0.5 + 0.1 * torch.randn_like(t) for name, t in layer.solve(*inputs).value.items()}
    sizes = [t.numel() for t in state.values()]

    def f(flat: Tensor) -> Tensor:
        parts = {n: p.reshape(t.shape) for (n, t), p in zip(state.items(), flat.split(sizes), strict=True)}
        return torch.cat([t.flatten() for t in layer.cell(parts, *inputs).values()])

    jacobian = torch.autograd.functional.jacobian(f, torch.cat([t.flatten() for t in state.values()]))
    depth = layer.cell.depth
    assert torch.equal(torch.linalg.matrix_power(jacobian, depth), torch.zeros_like(jacobian))
    assert torch.linalg.matrix_power(jacobian, depth - 1).abs().max() > 0
    # Block by block it is what `reads` says, and nothing above the diagonal.
    blocks = [row.split(sizes, dim=1) for row in jacobian.split(sizes)]
    stages = layer.cell.stages
    for (i, to), (j, of) in itertools.product(enumerate(stages), enumerate(stages)):
        assert bool(blocks[i][j].any()) == (of in layer.cell.reads[to])
        assert j < i or not blocks[i][j].any()


@pytest.mark.parametrize("optimiser", ["momentum", "Adam"])
@pytest.mark.parametrize("kind", TRAINED)
def test_training_the_layer_trains_the_network_to_the_same_weights(kind: str, optimiser: str):
    network, inputs = NETWORKS[kind](8)
    twin = copy.deepcopy(network)
    layer = eq.universal.embed(network, inputs(2))
    start = [p.detach().clone() for p in network.parameters()]
    models = [layer, twin]
    if optimiser == "Adam":
        steps = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in models]
    else:
        steps = [torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9) for model in models]
    for _ in range(20):
        batch = inputs(4)
        for model, step in zip(models, steps, strict=True):
            step.zero_grad()
            model(*batch).square().mean().backward()
            step.step()
    assert max(error(p, q) for p, q in zip(twin.parameters(), network.parameters(), strict=True)) <= 1e-9
    assert all(error(p, q) > 1e-4 for p, q in zip(start, network.parameters(), strict=True) if p.ndim > 1)


def test_stages_are_modules_and_runs_of_operations_named_after_them():
    layer = made("tokens, causal, tied head", 9)[2]
    assert layer.cell.stages == (
        "tokens",
        "add",
        "blocks.0.norm1",
        "blocks.0.attention.mix",
        "blocks.0.attention.scaled_dot_product_attention",
        "blocks.0.attention.out",
        "blocks.0.add",
        "blocks.0.norm2",
        "blocks.0.feed.0",
        "blocks.0.feed.1",
        "blocks.0.feed.2",
        "blocks.0.feed.3",
        "norm",
        "head",
    )
    assert layer.cell.widths["blocks.0.attention.mix"] == 4 * 24
    assert layer.cell.reads["blocks.0.add"] == ("add", "blocks.0.attention.out")
    again = made("one layer again and again", 6)[2]
    assert again.cell.stages == ("layer", "norm", "layer@2", "norm@2", "layer@3", "norm@3")
    parts = eq.universal.embed(Recurrent(1), torch.randn(2, 3, 8)).cell
    assert parts.stages == ("layers.0[0]", "last[0]", "head", "last[1][0][-1]")


def test_other_lengths_than_the_example_where_the_network_takes_them():
    network = LanguageModel(1).eval()
    layer = eq.universal.embed(network, torch.randint(11, (2, 4)))
    for shape in ((1, 1), (3, 7), (2, 16)):
        assert errors(network, layer, (torch.randint(11, shape),))[0] <= 1e-10
    network = Convolutional(3).eval()
    layer = eq.universal.embed(network, torch.randn(1, 1, 6, 6))
    assert max(errors(network, layer, (torch.randn(2, 1, 8, 10),))) <= 1e-10
    assert layer(torch.randn(0, 1, 6, 6)).shape == (0, 3)


def test_shapes_of_other_inputs_are_found_without_running_the_network(monkeypatch: pytest.MonkeyPatch):
    network, _, layer = made("MLP, tanh")
    ran = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: ran.append(type(x)) or forward(self, x))
    state = layer.cell.initial_state(torch.randn(7, 5))
    assert ran
    assert Tensor not in ran
    assert {len(t) for t in state.values()} == {7}
    ran.clear()
    layer.cell.initial_state(torch.randn(7, 5))
    assert not ran
    network.float()
    assert {t.dtype for t in layer.cell.initial_state(torch.randn(7, 5).float()).values()} == {torch.float32}


class Written(nn.Module):
    """A forward given as a function, over linear layers."""

    def __init__(self, run: Callable[..., Any], layers: int = 2) -> None:
        super().__init__()
        self.run = run
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(layers)])

    def forward(self, x: Tensor) -> Any:
        return self.run(self.layers, x, self.training)


def coupled(layers: Any, x: Tensor, training: bool) -> Tensor:
    return layers[1](layers[0](x) - layers[0](x).mean(0))


def mean_taken() -> nn.Module:
    return Written(coupled)


def time_first() -> nn.Module:
    return nn.LSTM(3, 4)


@pytest.mark.parametrize("build", [time_first, mean_taken, lambda: nn.Flatten(0)], ids=["time", "mean", "flat"])
@pytest.mark.parametrize("batch", [1, 3])
def test_samples_that_are_not_apart_are_one_problem(build: Callable[[], nn.Module], batch: int):
    network = build()
    layer = eq.universal.embed(network, torch.randn(batch, 2, 3))
    assert layer.batch_dims == 0
    assert max(errors(network, layer, (torch.randn(batch, 2, 3),))) <= 1e-10


def test_a_mask_with_as_many_rows_as_samples_is_not_taken_for_a_batch():
    class Blended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.layer(mask @ x)

    network = Blended()
    layer = eq.universal.embed(network, (torch.randn(4, 4, 3), torch.rand(4, 4)))
    assert layer.batch_dims == 1
    assert max(errors(network, layer, (torch.randn(2, 4, 3), torch.rand(4, 4)))) <= 1e-10


def test_arguments_left_to_their_defaults_and_flags_stay_as_in_the_example():
    network = Joined(2)
    x, y = torch.randn(3, 3), torch.randn(3, 4)
    layer = eq.universal.embed(network, (x, y, 0.5))
    assert error(network(x, y, 0.5)["joined"], layer(x, y, 0.5)["joined"]) <= 1e-10
    with pytest.raises(ValueError, match=r"more than their tensors.*0\.7.*embed the network anew"):
        layer(x, y, 0.7)
    mask = torch.rand(3, 1)
    with_mask = eq.universal.embed(network, (x, y, 0.5, mask))
    assert error(network(x, y, 0.5, mask)["joined"], with_mask(x, y, 0.5, mask)["joined"]) <= 1e-10
    with pytest.raises(TypeError, match="1 inputs of the example"):
        eq.universal.embed(network, x)


def test_outputs_keep_their_structure_also_where_an_output_is_an_input_or_a_whole_tuple():
    x = torch.randn(2, 3)
    network = Written(lambda layers, x, _: (x, [layers[0](x), None, {"k": layers[1](x).long(), "n": 3}]))
    value, (first, nothing, rest) = eq.universal.embed(network, x)(x)
    assert torch.equal(value, x)
    assert nothing is None
    assert torch.equal(rest["k"], network(x)[1][2]["k"])
    assert rest["n"] == 3
    assert error(network(x)[1][0], first) <= 1e-10
    network = nn.LSTM(3, 4)
    assert max(errors(network, eq.universal.embed(network, torch.randn(5, 2, 3)), (torch.randn(4, 2, 3),))) <= 1e-10


def test_a_layer_in_the_network_that_solves_an_equation_of_its_own_is_one_stage():
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * self.linear(z) + x)

    network = nn.Sequential(nn.Linear(3, 3), eq.DEQ(Cell(), rtol=1e-13), nn.Linear(3, 2))
    layer = eq.universal.embed(network, torch.randn(2, 3))
    assert layer.cell.stages == ("0", "1", "2")
    assert max(errors(network, layer, (torch.randn(4, 3),))) <= 1e-9


def test_changes_in_place_that_nobody_else_sees_are_made_on_copies():
    inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3))
    for network in (inner, Written(lambda layers, x, _: layers[1](layers[0](x).mul_(2).tanh_()))):
        layer = eq.universal.embed(network, torch.randn(2, 3))
        assert max(errors(network, layer, (torch.randn(4, 3),))) <= 1e-10
        state = layer.cell.initial_state(torch.randn(2, 3))
        for t in state.values():
            t.normal_()
        kept = copy.deepcopy(state)
        layer.cell(state, torch.randn(2, 3))
        assert all(torch.equal(state[name], kept[name]) for name in state)


def _seen(layers: Any, x: Tensor, training: bool) -> Tensor:
    h = layers[0](x)
    return F.relu_(h) + layers[1](h)


def _seen_as_a_view(layers: Any, x: Tensor, training: bool) -> Tensor:
    h = layers[0](x)
    h.view(-1).add_(1)
    return layers[1](h)


def _given(layers: Any, x: Tensor, training: bool) -> Tensor:
    return layers[0](x.add_(1))


def _item(layers: Any, x: Tensor, training: bool) -> Tensor:
    h = layers[0](x)
    h[:, 0] = 0
    return h


def _branch(layers: Any, x: Tensor, training: bool) -> Tensor:
    return layers[0](x) if x.sum() > 0 else x


def _loop(layers: Any, x: Tensor, training: bool) -> Tensor:
    for _ in range(x.shape[0]):
        x = layers[0](x)
    return x


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "Dropout": (nn.Dropout(0.2), r"Dropout '1\.0' since it draws random"),
    "RReLU": (nn.RReLU(), r"RReLU '1\.0' since it draws random"),
    "LSTM": (nn.TransformerEncoderLayer(3, 1, 4), r"TransformerEncoderLayer '1\.0' since it draws"),
    "F.dropout": (
        Written(lambda layers, x, _: F.dropout(layers[0](x), 0.5)),
        r"'dropout' in Written '1\.0' since it draws",
    ),
    "F.dropout in training": (
        Written(lambda layers, x, training: F.dropout(layers[0](x), 0.5, training)),
        r"'dropout' in Written '1\.0' since it draws",
    ),
    "randn_like": (Written(lambda layers, x, _: x + torch.randn_like(x)), r"'randn_like' in Written '1\.0'"),
    "randn": (Written(lambda layers, x, _: x + torch.randn(3)), r"Written '1\.0', which draws random"),
    "attention": (
        Written(lambda layers, x, _: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)),
        r"'scaled_dot_product_attention' in Written '1\.0' since it draws",
    ),
    "BatchNorm": (nn.BatchNorm1d(3), r"BatchNorm1d '1\.0' since it normalises over the batch.*eval\(\)"),
    "BatchNorm without statistics": (
        nn.BatchNorm1d(3, track_running_stats=False).eval(),
        r"BatchNorm1d '1\.0' since it normalises over the batch",
    ),
    "F.batch_norm": (
        Written(lambda layers, x, _: F.batch_norm(x, None, None, training=True)),
        r"'batch_norm' in Written '1\.0' since it normalises",
    ),
    "in place, seen": (Written(_seen), r"'relu_' in Written '1\.0' since it changes in place"),
    "in place, a view": (Written(_seen_as_a_view), r"'add_' in Written '1\.0' since it changes in place"),
    "in place, an item": (Written(_item), r"trace Written '1\.0'.*item assignment"),
    "branch": (Written(_branch), r"trace Written '1\.0'.*torch\.where"),
    "loop": (Written(_loop), r"trace Written '1\.0'"),
    "numpy": (Written(lambda layers, x, _: torch.from_numpy(x.detach().numpy())), r"trace Written '1\.0'"),
    "integers": (
        Written(lambda layers, x, _: layers[0](x).argmax(-1)),
        r"network itself \(Sequential\).*floating tensor",
    ),
    "no input": (Written(lambda layers, x, _: layers[0](torch.ones(2, 3))), r"network itself \(Sequential\).*depends"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_embedded_is_refused_by_name(kind: str):
    part, words = REFUSED[kind]
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(part))
    example = torch.randn(2, 3, 3) if kind in ("LSTM", "attention") else torch.randn(2, 3)
    with pytest.raises(ValueError, match=words) as caught:
        eq.universal.embed(network.to(torch.float64), example)
    assert str(caught.value).count(". ") == 0


def test_what_would_change_its_inputs_or_compute_outputs_from_them_is_refused():
    with pytest.raises(ValueError, match="'add_' in the network itself"):
        eq.universal.embed(Written(_given), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"ReLU '0' since it changes in place"):
        eq.universal.embed(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), torch.randn(2, 3))
    with pytest.raises(ValueError, match="computed from an input"):
        eq.universal.embed(Written(lambda layers, x, _: (layers[0](x), x.argmax(-1))), torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"nn\.Module, not function"):
        eq.universal.embed(_given, torch.randn(2, 3))
    with pytest.raises(ValueError, match="form must be one of"):
        eq.universal.embed(nn.Linear(3, 3), torch.randn(2, 3), form="dense")


def test_a_switch_to_training_after_embedding_is_refused_where_it_matters():
    x = torch.randn(4, 3)
    for part, words in (
        (nn.BatchNorm1d(3), r"BatchNorm1d '1'.*normalises over the batch"),
        (nn.Dropout(0.5), r"Dropout.*'network\.1'"),
        (nn.RReLU(), r"RReLU '1'.*random"),
        (
            Written(lambda layers, x, training: F.dropout(layers[0](x), 0.5, training)),
            r"Written '1' computes other things in train\(\)",
        ),
    ):
        layer = eq.universal.embed(nn.Sequential(nn.Linear(3, 3), part).eval(), x)
        wanted = layer(x)
        layer.train()
        with pytest.raises(ValueError, match=words):
            layer(x)
        layer.eval()
        assert torch.equal(layer(x), wanted)
    layer = made("residual MLP")[2]
    layer.train()
    layer(torch.randn(2, 8))


@pytest.mark.parametrize("kind", NETWORKS)
def test_embedding_leaves_the_network_and_the_generator_as_they_are(kind: str):
    network, inputs = NETWORKS[kind](6)
    example = inputs(2)
    kept, names, modes = (
        copy.deepcopy(network.state_dict()),
        set(vars(network)),
        [m.training for m in network.modules()],
    )
    state = torch.get_rng_state()
    layer = eq.universal.embed(network, example)
    layer(*example)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(network)) == names
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(network.state_dict()[name], kept[name]) for name in kept)
    assert layer.cell.network is network
    assert list(layer.state_dict()) == [f"cell.network.{name}" for name in kept]
    assert set(map(id, layer.parameters())) == set(map(id, network.parameters()))


def test_embedding_a_spectral_norm_in_training_moves_none_of_its_vectors():
    network = normed(4)[0].train()
    kept = copy.deepcopy(network.state_dict())
    layer = eq.universal.embed(network, torch.randn(2, 8))
    assert all(torch.equal(network.state_dict()[name], kept[name]) for name in kept)
    x = torch.randn(3, 8)
    wanted = copy.deepcopy(network)
    assert error(wanted(x), layer(x)) <= 1e-10
    assert all(torch.allclose(network.state_dict()[name], value) for name, value in wanted.state_dict().items())


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_layer_copies_saves_converts_and_runs_under_autocast(kind: str):
    network, inputs, layer = made(kind)
    wanted = floating(layer(*inputs))
    twin = copy.deepcopy(layer)
    assert twin.cell.network is not network
    if kind != "weight and spectral norm":  # torch pickles no parametrised module
        assert torch.equal(floating(pickle.loads(pickle.dumps(layer))(*inputs))[0], wanted[0])
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(floating(layer(*inputs)), wanted, strict=True))
    twin.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(floating(twin(*inputs)), wanted, strict=True))
    layer.float()
    narrow = tuple(t.float() if t.is_floating_point() else t for t in inputs)
    outputs = floating(layer(*narrow))
    assert {t.dtype for t in outputs} == {torch.float32}
    assert max(error(a, b) for a, b in zip(wanted, outputs, strict=True)) < 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = layer.solve(*narrow)
        assert solution.converged.all()
        loss(layer(*narrow)).backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_functional_transforms_see_the_network_through_the_layer():
    network, (x,), layer = made("residual MLP", 6)

    def value(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, parameters, (x,)))

    inner = {name: p.detach() for name, p in network.named_parameters()}
    outer = {f"cell.network.{name}": p for name, p in inner.items()}
    wanted = torch.func.grad(lambda p: value(network, p, x))(inner)
    found = torch.func.grad(lambda p: value(layer, p, x))(outer)
    assert max(error(wanted[name], found[f"cell.network.{name}"]) for name in wanted) <= 1e-9


CHAINS = {
    "MLP": lambda: mlp(nn.Tanh)(6)[0],
    "flattened": lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 6), nn.PReLU()),
    "two linear layers": lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3), nn.Identity(), nn.SiLU()),
    "activation first": lambda: nn.Sequential(nn.Sigmoid(), nn.Linear(5, 2)),
    "one layer": lambda: nn.Linear(5, 2),
}


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("batch", [1, 4])
def test_the_affine_form_is_the_theorem(kind: str, batch: int):
    network, x = CHAINS[kind](), torch.randn(batch, 5)
    layer = eq.universal.embed(network, torch.randn(2, 5), form="affine")
    assert max(errors(network, layer, (x,))) <= 1e-10
    cell, solution = layer.cell, layer.solve(x)
    widths = list(cell.widths.values())
    assert solution.evaluations <= len(widths) + 1
    assert solution.value.shape == (batch, sum(widths))
    z = torch.randn(batch, sum(widths))
    assert torch.allclose(cell.activation(z @ cell.W_z.T + x @ cell.W_x.T + cell.b), cell(z, x), rtol=1e-12)
    rows = cell.W_z.split(widths)
    for i, row in enumerate(rows):
        for j, block in enumerate(row.split(widths, dim=1)):
            assert bool(block.any()) == (i == j + 1)
    assert not torch.linalg.matrix_power(cell.W_z, len(widths)).any()
    for parameter in network.parameters():
        weighed = [m * torch.arange(m.numel()).reshape(m.shape) for m in (cell.W_z, cell.W_x, cell.b)]
        total = sum(m.sum() for m in weighed)
        gradient = torch.autograd.grad(total, parameter, allow_unused=True)[0]
        assert gradient is not None or parameter.shape == (1,)
    start = 10 * torch.randn(batch, sum(widths))
    assert torch.equal(layer.solve(x, z0=start).value, solution.value)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_the_affine_form_follows_the_weights_and_their_parametrisation():
    network = normed(6)[0]
    layer = eq.universal.embed(network, torch.randn(2, 8), form="affine")
    assert max(errors(network, layer, (torch.randn(3, 8),))) <= 1e-10
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    assert max(errors(network, layer, (torch.randn(3, 8),))) <= 1e-10
    layer.float()
    assert layer(torch.randn(3, 8).float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (nn.Softmax(dim=-1), r"Softmax '1' is neither linear nor elementwise.*stacked"),
        (nn.LayerNorm(3), r"LayerNorm '1' is neither"),
        (Written(lambda layers, x, _: x + layers[0](x)), r"'add' in Written '1' reads more than the layer before it"),
        (nn.Unflatten(1, (3, 1)), r"Unflatten '1' yields the shape \(2, 3, 1\)"),
        (nn.Dropout(0.5), r"Dropout '1' since it draws random"),
    ],
    ids=["softmax", "norm", "residual", "shape", "dropout"],
)
def test_what_is_no_chain_of_linear_and_elementwise_layers_is_refused_by_name(part: nn.Module, words: str):
    network = nn.Sequential(nn.Linear(3, 3), part).to(torch.float64)
    with pytest.raises(ValueError, match=words):
        eq.universal.embed(network, torch.randn(2, 3), form="affine")


def test_tracing_leaves_no_constant_on_the_network_and_no_mark_on_the_generator():
    network = Written(lambda layers, x, _: layers[0](x) * torch.tensor([1.0, 2.0, 3.0]))
    names = set(vars(network))
    layer = eq.universal.embed(network, torch.randn(2, 3))
    assert set(vars(network)) == names
    assert max(errors(network, layer, (torch.randn(4, 3),))) <= 1e-10
    noisy = Written(lambda layers, x, _: layers[0](x) + torch.randn(3))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="draws random"):
        eq.universal.embed(noisy, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unfolded_embedding_is_exported_for_batches_of_any_size():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    unfolded = eq.universal.unfold(eq.universal.embed(network, x), steps=3).eval()
    shapes = {"inputs": ({0: torch.export.Dim("batch")},)}
    program = torch.export.export(unfolded, (x,), dynamic_shapes=shapes).module()
    for batch in (2, 4, 9):
        x = torch.randn(batch, 3, dtype=torch.float64)
        torch.testing.assert_close(program(x), network(x), rtol=1e-12, atol=1e-14)
