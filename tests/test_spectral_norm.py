"""Weights whose norm is bounded, always; and parametrised weights in a cell, worked out once a forward."""

import copy
import io
import math
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import normal
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import equilibria as eq
from equilibria.nn.spectral_norm import operator_norm_of

DOUBLE = torch.float64
LAW = settings(derandomize=True, max_examples=40, deadline=None)
LAYERS = {
    "dense": (lambda: nn.Linear(7, 5), (7,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 5, padding=2, padding_mode="circular"), (3, 16)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 8, 8)),
    "zero padding": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 9, 9)),
    "strided": (lambda: nn.Conv2d(3, 4, 3, padding=1, stride=2), (3, 9, 9)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 7, 7)),
    "dilated": (lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=2), (2, 9, 9)),
    "even": (lambda: nn.Conv2d(2, 3, (2, 4), padding=2), (2, 9, 9)),
    "pointwise": (lambda: nn.Conv2d(4, 5, 1), (4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 3, padding=1), (2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 5, 5)),
    "transposed in groups": (lambda: nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2), (4, 6, 6)),
}


def norm_of(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """The exact norm of the operator on inputs of this shape, from its matrix."""
    n = math.prod(shape)
    with torch.no_grad():
        zero = layer(torch.zeros(1, *shape, dtype=DOUBLE))
        images = layer(torch.eye(n, dtype=DOUBLE).reshape(n, *shape)) - zero
    return float(torch.linalg.matrix_norm(images.reshape(n, -1), 2))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_norm_stays_bounded_through_training_evaluation_and_loading(kind):
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = eq.nn.spectral_norm(build().double(), bound=0.9)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    x = normal(8, *shape, seed=0)
    largest = 0.0
    for step in range(100):
        loss = -layer(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == 99:
            for mode in (True, False):
                layer.train(mode)
                largest = max(largest, norm_of(layer, shape))
            layer.train()
    assert largest <= 0.9 + 1e-3
    assert norm_of(layer, shape) > 0.5  # it is not that the weight has gone
    raw = layer.parametrizations.weight.original
    assert operator_norm_of(raw.detach(), getattr(layer, "groups", 1)) > 2  # though the weight itself has grown
    other = eq.nn.spectral_norm(build().double(), bound=0.9).eval()
    other.load_state_dict({key: 50 * value for key, value in layer.state_dict().items()})
    assert norm_of(other, shape) <= 0.9 + 1e-3


def test_the_norm_of_torch_is_neither_the_operators_nor_up_to_date():
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular").double()).eval()
    layer.load_state_dict(
        {k: normal(*v.shape, seed=1) if "original" in k else v for k, v in layer.state_dict().items()}
    )
    assert norm_of(layer, (3, 8, 8)) > 1.2


@LAW
@given(
    outputs=st.integers(1, 4),
    inputs=st.integers(1, 4),
    taps=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    seed=st.integers(0, 999),
)
def test_a_bound_is_one_and_close(outputs, inputs, taps, seed):
    weight = normal(outputs, inputs, *taps, seed=seed)
    bound = operator_norm_of(weight)
    fine = torch.fft.fftn(weight, s=[64] * len(taps), dim=tuple(range(2, 2 + len(taps))))
    exact = torch.linalg.matrix_norm(fine.flatten(2).permute(2, 0, 1), 2).max()
    assert exact <= bound * (1 + 1e-12)
    assert bound <= exact * 1.04 ** sum(tap > 1 for tap in taps) * (1 + 1e-12)
    if taps == [1] * len(taps):
        assert torch.allclose(bound, exact)


def test_a_bound_has_its_gradient_also_where_it_is_hard():
    for shape in [(4, 3), (3, 4), (2, 3, 3), (2, 2, 3, 3)]:
        weight = normal(*shape, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(operator_norm_of, (weight,))
    for weight in (torch.zeros(3, 4), torch.eye(4), torch.zeros(2, 2, 3, 3), torch.zeros(0, 3)):
        layer = torch.nn.Parameter(weight.clone())
        operator_norm_of(layer).backward()
        assert layer.grad is not None
        assert layer.grad.isfinite().all()
    assert operator_norm_of(torch.tensor([[torch.nan]])).isnan()


def test_a_weight_below_the_bound_is_left_alone_and_gives_its_gradient():
    layer = nn.Linear(5, 5).double()
    with torch.no_grad():
        layer.weight *= 0.1
    plain = copy.deepcopy(layer)
    eq.nn.spectral_norm(layer)
    x = normal(3, 5, seed=0)
    assert torch.equal(layer(x), plain(x))
    layer(x).sum().backward()
    plain(x).sum().backward()
    assert torch.allclose(layer.parametrizations.weight.original.grad, plain.weight.grad)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, plain.weight)


def test_in_other_precisions_and_saved():
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)]:
        layer = eq.nn.spectral_norm(nn.Linear(20, 20).to(dtype))
        with torch.no_grad():
            layer.parametrizations.weight.original *= 30
        assert layer.weight.dtype == dtype
        assert torch.linalg.matrix_norm(layer.weight.double(), 2) <= 1 + tolerance
    layer = eq.nn.spectral_norm(nn.Conv2d(2, 2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(1, 2, 5, 5)).isfinite().all()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = eq.nn.spectral_norm(nn.Conv2d(2, 2, 3))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


def test_what_has_no_known_norm_is_refused():
    with pytest.raises(ValueError, match="reflect"):
        eq.nn.spectral_norm(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(TypeError, match="no floating tensor"):
        eq.nn.spectral_norm(nn.ReLU())
    with pytest.raises(TypeError, match="not known"):
        eq.nn.spectral_norm(nn.Linear(2, 2), name="bias")
    with pytest.raises(ValueError, match="bound"):
        eq.nn.spectral_norm(nn.Linear(2, 2), bound=0.0)


class Counted(nn.Module):
    """A parametrisation that counts how often it is worked out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.count += 1
        return 0.5 * torch.tanh(weight)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6).double()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def counted() -> tuple[Cell, Counted]:
    torch.manual_seed(0)
    cell, counter = Cell(), Counted()
    parametrize.register_parametrization(cell.linear, "weight", counter)
    counter.count = 0
    return cell, counter


ADJOINTS = [
    eq.Implicit(),
    eq.Implicit(order=2),
    eq.Unrolled(),
    eq.Unrolled(checkpoint=True),
    eq.Phantom(3),
    eq.Neumann(3),
    eq.OneStep(),
]


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_parametrised_weight_is_worked_out_once_for_forward_and_backward(adjoint):
    cell, counter = counted()
    layer = eq.DEQ(cell, adjoint=adjoint, rtol=1e-10, max_steps=100)
    x = normal(3, 6, seed=0)
    value = layer(x)
    value.square().sum().backward()
    assert counter.count == 1
    with torch.no_grad():
        cell.linear.parametrizations.weight.original *= 2
    again = layer(x)
    assert counter.count == 2
    assert not torch.allclose(again, value)
    assert torch.allclose(again, cell(again, x), atol=1e-8)


@pytest.mark.parametrize("adjoint", [*ADJOINTS[:3], eq.Unrolled(checkpoint=True)])
def test_its_gradient_is_that_of_the_weight_written_out(adjoint):
    cell, _ = counted()
    raw = cell.linear.parametrizations.weight.original
    layer = eq.DEQ(cell, adjoint=adjoint, rtol=1e-12, max_steps=200)
    x = normal(3, 6, seed=0)
    layer(x).square().sum().backward()
    weight = raw.detach().clone().requires_grad_()
    bias = cell.linear.bias.detach()
    plain = eq.fixed_point(
        lambda z: torch.tanh(z @ (0.5 * torch.tanh(weight)).T + bias + x),
        torch.zeros_like(x),
        rtol=1e-12,
        max_steps=200,
    ).value
    plain.square().sum().backward()
    assert torch.allclose(raw.grad, weight.grad, atol=1e-9)
    raw.grad = None
    for mode in (layer.eval(), torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6).double())):
        mode(x).sum().backward()
        assert all(p.grad is not None for p in mode.parameters())


def test_in_a_checkpoint_in_a_nested_layer_without_grad_and_under_transforms():
    cell, counter = counted()
    inner = eq.DEQ(cell, rtol=1e-10)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, z, x):
            return 0.5 * self.inner(z) + x

    outer, x = eq.DEQ(Outer(), rtol=1e-8, max_steps=60), normal(3, 6, seed=0)
    value = outer(x)
    value.sum().backward()
    assert counter.count == 1
    expected = cell.linear.parametrizations.weight.original.grad.clone()
    outer.zero_grad()
    torch.utils.checkpoint.checkpoint(outer, x, use_reentrant=False).sum().backward()
    assert counter.count == 3
    assert torch.allclose(cell.linear.parametrizations.weight.original.grad, expected)
    with torch.no_grad():
        assert torch.allclose(outer(x), value)
        assert torch.allclose(torch.func.vmap(inner)(x[:, None])[:, 0], inner(x), atol=1e-8)
    # What torch itself has cached around stays what it is.
    with parametrize.cached():
        before = cell.linear.weight
        inner(x)
        assert cell.linear.weight is before


def test_a_cell_bounded_below_one_has_an_equilibrium_that_iteration_finds():
    torch.manual_seed(0)
    cell = Cell()
    with torch.no_grad():
        cell.linear.weight *= 20
    eq.nn.spectral_norm(cell.linear, bound=0.8)
    layer = eq.DEQ(cell, solver=eq.Picard(), rtol=1e-6, max_steps=100, on_failure="raise")
    solution = layer.solve(normal(5, 6, seed=0))
    assert solution.converged.all()
    solution.value.sum().backward()
    assert torch.func.functional_call(layer, dict(layer.named_parameters()), (normal(5, 6, seed=0),)).shape == (5, 6)


def test_the_blocks_of_the_page_print_what_it_says():
    page = (Path(__file__).parents[1] / "docs" / "stabilisers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    for code, wanted in blocks:
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == wanted
    assert len(blocks) == 3
