"""The Transformer: causal in every depth, one block behind all three, and the equilibrium what it says it is."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

import equilibria as eq
from onelayer.errors import UsageError
from onelayer.models.transformer import Block, Depth, TransformerConfig, TransformerLM, bits_per_byte

DEPTHS = get_args(Depth)
CONFIG = TransformerConfig(layers=3, width=32, heads=2, context=16, rtol=1e-4, max_steps=40)


def model_of(depth: Depth) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(replace(CONFIG, depth=depth)).eval()


def some_tokens(batch: int = 3, time: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (batch, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("position", [1, 7, 15])
def test_a_later_byte_never_changes_earlier_logits(depth: Depth, position: int):
    model, tokens = model_of(depth).double(), some_tokens()
    other = tokens.clone()
    other[:, position:] = (other[:, position:] + 1) % 256
    with torch.no_grad():
        before, after = model.unroll(tokens, 12), model.unroll(other, 12)
        assert torch.equal(before[:, :position], after[:, :position])
        assert (before != after)[:, position:].any(-1).all()
        # A solver takes the whole window into account when it steps and stops, so solves agree to the tolerance.
        before, after = model(tokens), model(other)
    apart = (before - after).abs().amax(-1) / before.std()
    assert (apart[:, :position] <= (20 * CONFIG.rtol if depth == "equilibrium" else 0)).all()
    assert (apart[:, position:] > 0.01).all()


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_prefix_has_the_logits_of_the_whole(depth: Depth):
    model, tokens = model_of(depth), some_tokens()
    with torch.no_grad():
        whole, prefix = model(tokens), model(tokens[:, :5])
    torch.testing.assert_close(whole[:, :5], prefix, rtol=0, atol=20 * CONFIG.rtol * float(whole.std()))


def test_the_three_depths_are_made_of_the_same_block():
    equilibrium, untied, tied = (model_of(depth) for depth in DEPTHS)
    assert isinstance(equilibrium.layer, eq.DEQ)
    assert [type(equilibrium.layer.cell)] == [Block]
    assert [type(block) for block in untied.blocks] == [Block] * CONFIG.layers
    assert [type(block) for block in tied.blocks] == [Block]
    total, without = equilibrium.parameter_counts()
    assert (total, without) == tied.parameter_counts()
    assert total - without == 256 * CONFIG.width
    block = sum(parameter.numel() for parameter in tied.blocks.parameters())
    assert untied.parameter_counts()[0] == total + (CONFIG.layers - 1) * block


def test_tied_layers_are_picard_steps_of_the_cell():
    tied = model_of("tied")
    assert len(tied.blocks) == 1
    layer = eq.DEQ(tied.blocks[0], solver=eq.Picard(), rtol=0.0, max_steps=CONFIG.layers + 1, on_failure="ignore")
    tokens = some_tokens()
    with torch.no_grad():
        solution = layer.solve(tied._embed(tokens))
        logits = tied._logits(solution.value)
        assert solution.evaluations == CONFIG.layers + 1
        torch.testing.assert_close(logits, tied(tokens), rtol=0, atol=0)
        torch.testing.assert_close(tied.unroll(tokens, CONFIG.layers), tied(tokens), rtol=0, atol=0)


def test_many_unrolled_layers_reach_the_equilibrium_and_its_gradient():
    model, tokens = model_of("equilibrium").double(), some_tokens()
    tight = replace(CONFIG, rtol=1e-10, backward_rtol=1e-10, max_steps=100, backward_max_steps=200)
    exact = TransformerLM(tight).double().train()
    exact.load_state_dict(model.state_dict())
    targets = some_tokens().roll(-1, 1)
    logits, solution = exact.solve(tokens)
    assert solution is not None
    assert bool(solution.converged.all())
    found = torch.autograd.grad(bits_per_byte(logits, targets), list(exact.parameters()))
    unrolled = exact.unroll(tokens, 200)
    torch.testing.assert_close(logits, unrolled, rtol=0, atol=1e-8)
    expected = torch.autograd.grad(bits_per_byte(unrolled, targets), list(exact.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9  # the loss is summed in float32


@pytest.mark.parametrize("max_steps", [1, 2, 5])
def test_allowed_evaluations_are_what_a_solve_makes(max_steps: int):
    model, tokens = model_of("equilibrium"), some_tokens()
    with torch.no_grad():
        logits, solution = model.solve(tokens, max_steps)
    assert solution is not None
    assert solution.evaluations == max_steps
    assert logits.shape == (3, 16, 256)
    if max_steps == 1:  # the start, all zeros, says nothing about the next byte
        assert float(bits_per_byte(logits, tokens)) == pytest.approx(8)
    if max_steps == 2:
        torch.testing.assert_close(logits, model.unroll(tokens, 1), rtol=0, atol=0)


def test_monitor_sees_the_solve_and_its_backward():
    model, tokens = model_of("equilibrium").train(), some_tokens()
    with eq.monitor(model) as reports:
        bits_per_byte(model(tokens), tokens).backward()
    (report,) = reports
    assert report.name == "layer"
    assert report.adjoint.steps is not None
    assert (report.residual <= CONFIG.rtol).all()


def test_bits_per_byte_of_a_known_distribution():
    logits = torch.zeros(1, 2, 256)
    logits[..., 7] = math.log(255)  # probability one half
    targets = torch.tensor([[7, 7]])
    assert float(bits_per_byte(logits, targets)) == pytest.approx(1)


def test_bfloat16_products_keep_a_float32_state():
    model, tokens = model_of("equilibrium").train(), some_tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, solution = model.solve(tokens)
    assert solution is not None
    assert solution.value.dtype == torch.float32
    loss = bits_per_byte(logits, tokens)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"depth": "deep"}, "equilibrium, untied, tied"),
        ({"width": 33}, "multiple of 4"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"max_steps": -3}, "max_steps must be at least 1"),
        ({"rtol": 0.0}, "rtol must lie between 0 and 1"),
        ({"backward_rtol": float("nan")}, "backward_rtol"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(values: dict[str, object], says: str):
    with pytest.raises(UsageError, match=says):
        replace(CONFIG, **values)  # pyright: ignore[reportArgumentType]


def test_a_model_without_equilibrium_or_room_says_so():
    with pytest.raises(UsageError, match="3 layers"):
        model_of("tied").solve(some_tokens(), max_steps=2)
    with pytest.raises(UsageError, match="do not fit a context of 16"):
        model_of("tied")(some_tokens(time=17))
