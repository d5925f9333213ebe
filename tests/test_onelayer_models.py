"""The language models: causal in every depth, one block behind all three, and the equilibrium what it says it is."""

import copy
import math
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from language_models import DEPTHS, FORMS, TINY, model_of, near, some_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import equilibria as eq
from onelayer.errors import UsageError
from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import LanguageModel, Output, bits
from onelayer.models.transformer import TransformerBlock
from onelayer.models.trellisnet import TrellisBlock
from onelayer.models.weights import Linear

each_form = pytest.mark.parametrize("form", FORMS)
each_depth = pytest.mark.parametrize("depth", DEPTHS)
both_architectures = pytest.mark.parametrize("form", ["post", "trellisnet"])

# Every option that a gradient passes through, together.
ALL = {"weight_norm": True, "dropout": 0.2, "cutoffs": (5, 12), "memory": 12}


def gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


# What a model is.


@each_form
@each_depth
@torch.no_grad()
def test_a_later_token_never_changes_earlier_logits(form: str, depth: str):
    model, tokens = model_of(form, depth), some_tokens()
    for position in (1, 7, 11):
        other = tokens.clone()
        other[:, position:] = (other[:, position:] + 1) % 20
        before, after = model(tokens).logits, model(other).logits
        near(before[:, :position], after[:, :position], depth)
        assert ((before - after)[:, position:].abs().amax(-1) > 1e-3).all()
        if depth == "equilibrium":  # a solver looks at the whole window when it steps, the block itself does not
            before, after = (model(text, unrolled=5).logits for text in (tokens, other))
            assert torch.equal(before[:, :position], after[:, :position])


@each_form
@each_depth
@torch.no_grad()
def test_a_prefix_and_a_single_sample_have_the_logits_of_the_whole(form: str, depth: str):
    model, tokens = model_of(form, depth), some_tokens()
    whole = model(tokens).logits
    near(model(tokens[:, :5]).logits, whole[:, :5], depth)
    near(model(tokens[1:2]).logits, whole[1:2], depth)


@pytest.mark.parametrize(("form", "kind"), [("post", TransformerBlock), ("trellisnet", TrellisBlock)])
def test_the_three_depths_are_made_of_the_same_block(form: str, kind: type):
    equilibrium, untied, tied = (model_of(form, depth) for depth in DEPTHS)
    assert isinstance(equilibrium.depth.layer, eq.DEQ)
    assert [type(block) for block in equilibrium.depth.all_blocks] == [kind]
    assert [type(block) for block in untied.depth.all_blocks] == [kind] * 3
    assert [type(block) for block in tied.depth.all_blocks] == [kind]
    total, without = equilibrium.parameter_counts()
    assert (total, without) == tied.parameter_counts()
    assert total - without == 20 * 16
    block = sum(parameter.numel() for parameter in tied.depth.block.parameters())
    assert untied.parameter_counts()[0] == total + 2 * block
    assert (equilibrium.config.slots, untied.config.slots, tied.config.slots) == (1, 3, 3)


@each_form
@torch.no_grad()
def test_tied_layers_and_a_solver_s_plain_steps_are_unrolled_applications(form: str):
    tied, equilibrium, tokens = model_of(form, "tied"), model_of(form), some_tokens()
    equilibrium.load_state_dict(
        {name.replace("depth.blocks.0", "depth.layer.cell"): value for name, value in tied.state_dict().items()}
    )
    unrolled = equilibrium(tokens, unrolled=3)
    assert torch.equal(unrolled.logits, tied(tokens).logits)
    assert unrolled.solution is None
    assert equilibrium.depth.layer is not None
    equilibrium.depth.layer.solver = eq.Picard()
    # The last evaluation measures the residual of what is returned.
    torch.testing.assert_close(equilibrium(tokens, max_steps=4).logits, unrolled.logits, rtol=0, atol=1e-14)


# Gradients.


@each_form
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
def test_many_unrolled_layers_reach_the_equilibrium_and_its_gradient(form: str, options: dict):
    model = model_of(form, **options).train()
    tokens, targets = some_tokens(), some_tokens(seed=2)
    losses, found = [], []
    for unrolled in (None, 200):
        torch.manual_seed(3)  # the same masks
        memory = model(tokens.roll(1, 0)).memory if options else None
        output = model(tokens, targets, memory=memory, unrolled=unrolled)
        if output.solution is not None:
            assert bool(output.solution.converged.all())
        losses.append(output.losses)
        found.append(gradients(model, output.losses.mean()))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-8)
    for name, gradient in found[0].items():
        assert gradient is not None, name
        assert gradient.norm() > 0, name
        assert (gradient - found[1][name]).norm() <= 1e-7 * gradient.norm(), name


@each_form
def test_gradients_of_layers_are_those_of_finite_differences(form: str):
    model, tokens, targets = model_of(form, "untied"), some_tokens(2, 6), some_tokens(2, 6, seed=2)
    expected = gradients(model, model(tokens, targets).losses.mean())
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        ends = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                parameter += step * direction
                ends.append(model(tokens, targets).losses.mean())
            parameter += 1e-5 * direction
        slope = (ends[0] - ends[1]) / 2e-5
        wanted = expected[name]
        assert wanted is not None
        torch.testing.assert_close(slope, (wanted * direction).sum(), rtol=1e-4, atol=1e-6, msg=name)


@both_architectures
def test_an_activation_checkpoint_around_the_model_changes_nothing(form: str):
    options = {"dropout": 0.2, "jacobian_weight": 1.0, "jacobian_share": 1.0, "warm_start": True}
    model, tokens, targets = model_of(form, **options).train(), some_tokens(), some_tokens(seed=2)
    found = []
    for run in (model, lambda *inputs: checkpoint(model, *inputs, use_reentrant=False)):
        torch.manual_seed(3)
        output = run(tokens, targets)
        found.append(gradients(model, output.losses.mean() + output.penalty))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=0, atol=1e-12, msg=name)


@both_architectures
def test_a_compiled_block_has_the_same_gradients_and_penalty(form: str):
    torch._dynamo.reset()
    options = {"jacobian_weight": 1.0, "jacobian_share": 1.0, "dropout": 0.2, "weight_norm": True}
    model, tokens, targets = model_of(form, **options).train(), some_tokens(), some_tokens(seed=2)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    found = []
    for compiled in (False, True):
        if compiled:
            model.depth.block.compile(backend=counter, fullgraph=True)
        torch.manual_seed(3)
        output = model(tokens, targets)
        found.append(gradients(model, output.losses.mean() + output.penalty))
    assert 1 <= counter.frame_count <= 3  # without grad, with grad, and with a state that needs it
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=0, atol=1e-9, msg=name)


@both_architectures
def test_a_compiled_model_and_a_functional_one_have_the_same_gradients(form: str):
    torch._dynamo.reset()
    model, tokens, targets = model_of(form, weight_norm=True), some_tokens(2, 6), some_tokens(2, 6, seed=2)
    wanted = gradients(model, model(tokens, targets).losses.mean())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    found = [gradients(model, compiled(tokens, targets).losses.mean())]
    assert counter.frame_count == 3  # before the solve, and after it inside of the depth and outside

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (tokens, targets)).losses.mean()

    found.append(torch.func.grad(loss)(dict(model.named_parameters())))
    for other in found:
        for name, gradient in wanted.items():
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-9, msg=name)


# Solves.


@both_architectures
@pytest.mark.parametrize("max_steps", [1, 2, 5])
@torch.no_grad()
def test_allowed_evaluations_are_what_a_solve_makes_and_what_monitors_see(form: str, max_steps: int):
    model, tokens = model_of(form), some_tokens()
    with eq.monitor(model) as reports:
        output = model(tokens, max_steps=max_steps)
    assert output.solution.evaluations == max_steps
    assert [(report.name, report.evaluations) for report in reports] == [("depth.layer", max_steps)]
    assert torch.equal(reports[0].residual, output.solution.residual)
    if max_steps == 1:  # the start, all zeros, says nothing about the next token
        losses = model(tokens, tokens, max_steps=1).losses
        torch.testing.assert_close(losses, torch.full_like(losses, math.log(20)))
    if max_steps == 2:
        torch.testing.assert_close(output.logits, model(tokens, unrolled=1).logits, rtol=0, atol=1e-14)
    assert model(tokens).solution.evaluations > 5  # the configuration's allowance is as it was


def test_monitor_sees_the_solve_and_its_backward():
    model, tokens = model_of("post").train(), some_tokens()
    with eq.monitor(model) as reports:
        model(tokens, tokens).losses.mean().backward()
    (report,) = reports
    assert report.name == "depth.layer"
    assert report.adjoint.steps is not None
    assert (report.residual <= TINY.rtol).all()


@each_form
@each_depth
def test_matrices_are_evaluated_once_a_forward(form: str, depth: str, monkeypatch):
    counts: Counter[int] = Counter()
    matrix = Linear.matrix

    def counted(self: Linear) -> Tensor:
        counts[id(self)] += 1
        return matrix(self)

    monkeypatch.setattr(Linear, "matrix", counted)
    model, tokens = model_of(form, depth, weight_norm=True, memory=12).train(), some_tokens()
    maps = {id(part) for part in model.modules() if isinstance(part, Linear)}
    memory = model(tokens).memory
    assert counts == dict.fromkeys(maps, 1)
    output = model(tokens, tokens, memory=memory, remember=True)
    output.losses.mean().backward()
    assert counts == dict.fromkeys(maps, 2)
    model(tokens, past=output.left)
    assert counts == dict.fromkeys(maps, 3)


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result the CPU would have to wait for on a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
        return func(*args, **(kwargs or {}))


@each_form
@torch.no_grad()
def test_an_evaluation_of_the_block_waits_for_no_device(form: str):
    model, tokens, caught = model_of(form, dropout=0.2).train(), some_tokens(), []
    block = model.depth.block
    block.register_forward_pre_hook(lambda _, inputs: caught.append(inputs))
    real = torch.ones(3, 12)
    real[1, :4] = 0
    first = model(tokens[:, :8], real=real[:, :8], remember=True)
    model(tokens[:, 8:], real=real, past=first.left)
    assert len(caught) > 10
    for inputs in (caught[0], caught[-1]):
        with NoWaiting():
            block.forward(*inputs)
    with NoWaiting(), pytest.raises(AssertionError):
        bool(real.all())


@each_form
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_products_in_half_precision_keep_a_float32_state(form: str, kind: torch.dtype):
    options = {"weight_norm": True, "dropout": 0.1, "cutoffs": (5,), "memory": 12, "warm_start": True}
    options |= {"jacobian_weight": 0.1, "jacobian_share": 1.0, "rtol": 1e-2, "backward_rtol": 5e-2}
    model, tokens, targets = model_of(form, **options).float().train(), some_tokens(), some_tokens(seed=2)
    with torch.autocast("cpu", dtype=kind):
        memory = model(tokens).memory
        output = model(tokens, targets, memory=memory)
    assert output.state.dtype == output.losses.dtype == output.penalty.dtype == torch.float32
    assert bool(output.solution.converged.all())
    (output.losses.mean() + output.penalty).backward()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    model.eval()
    with torch.autocast("cpu", dtype=kind), torch.no_grad():
        half = model(tokens, targets).losses
    torch.testing.assert_close(half, model(tokens, targets).losses, rtol=0, atol=0.15)


@both_architectures
def test_a_bad_sample_is_that_sample_s_own(form: str):
    model, tokens, targets = model_of(form), some_tokens(), some_tokens(seed=2)
    with torch.no_grad():
        left = model(tokens, remember=True).left
    bad = tuple(tuple(part.clone().index_fill_(0, torch.tensor([1]), math.nan) for part in slot) for slot in left)
    alone = model(tokens[[0, 2]], targets[[0, 2]], past=tuple(tuple(part[[0, 2]] for part in slot) for slot in left))
    beside = model(tokens, targets, past=bad)
    assert beside.solution.status.tolist() == [eq.Status.CONVERGED, eq.Status.NONFINITE, eq.Status.CONVERGED]
    near(beside.losses[[0, 2]], alone.losses, "equilibrium")
    near(beside.state[[0, 2]], alone.state, "equilibrium")
    assert beside.state.isfinite().all()
    if form == "post":  # the TrellisNet convolves the text of the past, which gets no gradient that is finite
        found = gradients(model, beside.losses[[0, 2]].sum())
        for name, wanted in gradients(model, alone.losses.sum()).items():
            torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-7, msg=name)


@each_form
@each_depth
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_an_empty_batch_goes_in_and_comes_out(form: str, depth: str, shape: tuple[int, int]):
    options = {"dropout": 0.1, "memory": 12}
    if depth == "equilibrium":
        options |= {"warm_start": True, "jacobian_weight": 1.0, "jacobian_share": 1.0}
    model, tokens = model_of(form, depth, **options).train(), torch.zeros(shape, dtype=torch.long)
    assert model(tokens).logits.shape == (*shape, 20)
    output = model(tokens, tokens, remember=True)
    assert output.losses.shape == shape
    assert output.penalty == 0
    (output.losses.sum() + output.penalty).backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


# Housekeeping.


@each_form
@torch.no_grad()
def test_a_model_is_saved_copied_and_pickled(form: str):
    options = {"weight_norm": True, "dropout": 0.1, "cutoffs": (5,), "warm_start": True}
    model, tokens = model_of(form, **options), some_tokens()
    want = model(tokens).logits
    loaded = LanguageModel(model.config).double().eval()
    assert not torch.equal(loaded(tokens).logits, want)
    loaded.load_state_dict(model.state_dict())
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens).logits, want)
    assert pickle.loads(pickle.dumps(model.config)) == model.config


def test_bits_of_a_known_distribution():
    assert float(bits(torch.full((1, 2), math.log(2)))) == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"architecture": "lstm"}, "transformer, trellisnet"),
        ({"depth": "deep"}, "equilibrium, untied, tied"),
        ({"block": "pre"}, "post, subtracted"),
        ({"positions": "learnt"}, "rotary, relative"),
        ({"width": 18}, "multiple of 4"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"max_steps": -3}, "max_steps must be at least 1"),
        ({"kernel": 1}, "kernel must be at least 2"),
        ({"memory": -1}, "memory must be at least 0"),
        ({"rtol": 0.0}, "rtol must lie between 0 and 1"),
        ({"backward_rtol": float("nan")}, "backward_rtol"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
        ({"jacobian_weight": -1.0}, "jacobian_weight must be at least 0"),
        ({"jacobian_weight": float("nan")}, "jacobian_weight must be at least 0"),
        ({"jacobian_share": 1.5}, "jacobian_share must lie between 0 and 1"),
        ({"depth": "tied", "warm_start": True}, "warm_start is for equilibrium models"),
        ({"depth": "untied", "jacobian_weight": 1.0}, "jacobian_weight is for equilibrium models"),
        ({"cutoffs": (5, 12), "own_unembedding": True}, "own_unembedding is for an ordinary softmax"),
        ({"cutoffs": (5, 5)}, "cutoffs must rise"),
        ({"cutoffs": (5, 20)}, "cutoffs must rise between 1 and 19"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(values: dict, says: str):
    with pytest.raises(UsageError, match=says):
        replace(TINY, **values)


def test_calls_that_make_no_sense_are_refused():
    model, tokens = model_of("post", memory=12), some_tokens()
    output: Output = model(tokens, remember=True)
    with pytest.raises(UsageError, match="3 layers"):
        model_of("post", "tied")(tokens, max_steps=2)
    with pytest.raises(UsageError, match="3 layers"):
        model_of("post", "untied")(tokens, unrolled=2)
    with pytest.raises(UsageError, match="give one of the two"):
        model(tokens, max_steps=2, unrolled=2)
    with pytest.raises(UsageError, match="two ways to look back"):
        model(tokens, past=output.left, memory=output.memory)
    for token in (-1, 20):
        with pytest.raises(UsageError, match=f"Token {token} is not in the vocabulary of 20"):
            model(torch.full((1, 3), token))


def test_lists_of_cutoffs_become_tuples():
    assert ModelConfig(vocabulary=20, cutoffs=[5, 12]).cutoffs == (5, 12)  # pyright: ignore[reportArgumentType]
