"""eq.nn.jacobian_penalty: unbiased against the dense Jacobian, with gradients that are its own."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import equilibria as eq

DOUBLE = torch.float64
W = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
Z = torch.randn(2, 5, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)


def cell(z: Tensor, w: Tensor = W) -> Tensor:
    return torch.tanh(z @ w.T + z.square())


def dense(f, z: Tensor) -> Tensor:
    """The squared Frobenius norm of the whole Jacobian, per entry of the state."""
    return torch.autograd.functional.jacobian(f, z).square().sum() / z.numel()


def mean_and_error(f, z, draws: int = 2000) -> tuple[Tensor, Tensor]:
    values = torch.stack([eq.nn.jacobian_penalty(f, z).detach() for _ in range(draws)])
    return values.mean(), values.std() / math.sqrt(draws)


def test_its_mean_is_the_size_of_the_dense_jacobian():
    mean, error = mean_and_error(cell, Z)
    assert error < 0.03 * mean
    assert abs(mean - dense(cell, Z)) < 4 * error


def test_a_known_jacobian_gives_the_product_of_the_vector_drawn():
    torch.manual_seed(7)
    found = eq.nn.jacobian_penalty(lambda z: z @ W.T, Z)
    torch.manual_seed(7)
    vector = torch.randn_like(Z)
    torch.testing.assert_close(found, (vector @ W).square().mean())
    # Samples have vectors of their own, and two calls other ones.
    assert eq.nn.jacobian_penalty(lambda z: z @ W.T, Z) != found


def test_a_state_of_several_leaves_has_one_jacobian():
    z = {"a": Z[:, :2], "b": (Z[:, 2:],)}

    def call(z):
        out = cell(torch.cat([z["a"], z["b"][0]], dim=1))
        return {"a": out[:, :2], "b": (out[:, 2:],)}

    mean, error = mean_and_error(call, z)
    assert abs(mean - dense(cell, Z)) < 4 * error


def test_a_leaf_that_nothing_reaches_counts_as_zero():
    def call(z):
        a, b = z
        return 3 * a, torch.ones_like(b)

    torch.manual_seed(7)
    found = eq.nn.jacobian_penalty(call, (Z, Z))
    torch.manual_seed(7)
    torch.testing.assert_close(found, (3 * torch.randn_like(Z)).square().sum() / 20)


def test_its_gradient_is_that_of_finite_differences_and_none_is_the_state_s():
    w, z = W.clone().requires_grad_(), Z.clone().requires_grad_()

    def penalty(w: Tensor) -> Tensor:
        torch.manual_seed(7)
        return eq.nn.jacobian_penalty(lambda z: cell(z, w), z)

    assert torch.autograd.gradcheck(penalty, (w,), atol=1e-7)
    penalty(w).backward()
    assert z.grad is None
    assert w.grad.norm() > 0.1


def test_a_gradient_of_the_mean_is_the_gradient_of_the_dense_jacobian():
    w = W.clone().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda z: cell(z, w), Z, create_graph=True)
    (wanted,) = torch.autograd.grad(jacobian.square().sum() / Z.numel(), w)
    draws = []
    for _ in range(2000):
        draws.append(*torch.autograd.grad(eq.nn.jacobian_penalty(lambda z: cell(z, w), Z), w))
    found = torch.stack(draws)
    error = found.std(0) / math.sqrt(len(draws))
    assert ((found.mean(0) - wanted).abs() < 5 * error).all()


def test_it_is_there_without_grad_and_has_no_graph_then():
    with torch.no_grad():
        found = eq.nn.jacobian_penalty(cell, Z)
    assert found > 0
    with torch.inference_mode():
        state = Z.clone()
        assert eq.nn.jacobian_penalty(cell, state) > 0


def test_training_on_it_shrinks_the_jacobian_and_spares_evaluations():
    torch.manual_seed(0)

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)
            nn.init.normal_(self.linear.weight, std=0.22)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(z) + x)

    layer, x = eq.DEQ(Cell(), solver=eq.Picard(), rtol=1e-4, max_steps=200), torch.randn(8, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    evaluations, sizes = [], []
    for _ in range(20):
        solution = layer.solve(x)
        penalty = eq.nn.jacobian_penalty(lambda z: layer.cell(z, x), solution.value)
        evaluations.append(solution.evaluations)
        sizes.append(penalty.item())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert evaluations[-1] < 0.75 * evaluations[0]
    assert sizes[-1] < 0.7 * sizes[0]


def test_fused_attention_has_its_plain_form_stand_in():
    z = torch.randn(2, 2, 4, 8)
    w = torch.randn(8, 8, requires_grad=True)

    def call(z: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(z @ w, z, z, is_causal=True)

    eq.nn.jacobian_penalty(call, z).backward()
    assert w.grad.norm() > 0
    # Outside it is fused as before.
    leaf = z.clone().requires_grad_()
    (first,) = torch.autograd.grad(call(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        first.sum().backward()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_is_for_the_function(kind: torch.dtype):
    w = W.float().requires_grad_()
    found = []
    for enabled in (True, False):
        torch.manual_seed(7)
        seen = []

        def call(z: Tensor, seen=seen) -> Tensor:
            seen.append((z @ w.T).dtype)
            return torch.tanh(F.linear(z, w)).float()

        with torch.autocast("cpu", dtype=kind, enabled=enabled):
            penalty = eq.nn.jacobian_penalty(call, Z.float())
        assert seen == [kind if enabled else torch.float32]
        assert penalty.dtype == torch.float32
        found.append((penalty.detach(), *torch.autograd.grad(penalty, w)))
    for half, single in zip(*found, strict=True):
        assert (half - single).norm() < 0.03 * single.norm()


def test_what_a_function_does_outside_of_autocast_is_differentiated_outside_of_it():
    w, found = W.float(), []

    def call(z: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return z @ w.T

    for enabled in (True, False):
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(eq.nn.jacobian_penalty(call, Z.float()))
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_states_in_half_precision_are_squared_in_single(kind: torch.dtype):
    big = 300.0  # its square is too large for float16
    found = eq.nn.jacobian_penalty(lambda z: big * z, torch.zeros(100, 100, dtype=kind))
    assert found.dtype == torch.float32
    assert abs(found / big**2 - 1) < 0.1


def test_masks_within_a_cell_are_those_of_a_call():
    dropout = eq.nn.VariationalDropout(0.5)
    found = torch.stack([eq.nn.jacobian_penalty(lambda z: dropout(z), Z) for _ in range(2000)])
    assert abs(found.mean() - 2) < 4 * found.std() / math.sqrt(2000)  # half of the entries, twice as large


def test_an_activation_checkpoint_around_it_runs_the_function_no_more_than_once_again():
    w, calls = W.clone().requires_grad_(), []

    def model(z: Tensor) -> Tensor:
        def call(z: Tensor) -> Tensor:
            calls.append(1)
            return cell(z, w)

        x = torch.tanh(z @ w)
        return x.sum() + eq.nn.jacobian_penalty(call, x)

    found = []
    for run in (model, lambda z: checkpoint(model, z, use_reentrant=False)):
        torch.manual_seed(7)
        found.append(torch.autograd.grad(run(Z), w)[0])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-14)
    assert len(calls) <= 3


def test_its_graph_is_freed_without_the_collector():
    def alive_after_a_call():
        w = W.clone().requires_grad_()
        shifted = w * 2
        eq.nn.jacobian_penalty(lambda z: cell(z, shifted), Z)
        return weakref.ref(shifted)

    gc.disable()
    try:
        assert alive_after_a_call()() is None
    finally:
        gc.enable()


def test_an_empty_batch_has_none():
    w = W.clone().requires_grad_()
    found = eq.nn.jacobian_penalty(lambda z: cell(z, w), Z[:0])
    assert found == 0
    assert torch.autograd.grad(found, w)[0].norm() == 0


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"shapes of the state, and made \[\(2, 4\)\] of \[\(2, 5\)\]"):
        eq.nn.jacobian_penalty(lambda z: z[:, :4], Z)
    with pytest.raises(ValueError, match="structure"):
        eq.nn.jacobian_penalty(lambda z: (z,), Z)
    for f in (lambda z: z.detach(), lambda z: torch.ones_like(z, requires_grad=True), torch.no_grad()(cell)):
        with pytest.raises(ValueError, match="No graph leads from f"):
            eq.nn.jacobian_penalty(f, Z)
    for state in (3, torch.ones(2, 3, dtype=torch.long), (), None, (Z, 1.0)):
        with pytest.raises(TypeError, match="floating tensors"):
            eq.nn.jacobian_penalty(cell, state)
    with pytest.raises(TypeError, match="f must be"):
        eq.nn.jacobian_penalty(Z, Z)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="outside of torch"):
        torch.func.grad(lambda w: eq.nn.jacobian_penalty(lambda z: cell(z, w), Z))(W)
