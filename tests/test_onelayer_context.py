"""What tokens look back at: memory, stored keys and values, and padding are all equal to the long window."""

import pytest
import torch
from language_models import DEPTHS, FORMS, TINY, model_of, near, some_tokens
from torch import Tensor, nn

from onelayer.models.window import Slot, window

each_form = pytest.mark.parametrize("form", FORMS)
each_depth = pytest.mark.parametrize("depth", DEPTHS)


@each_form
@each_depth
@torch.no_grad()
def test_a_segment_with_memory_is_the_end_of_the_longer_window(form: str, depth: str):
    model, tokens = model_of(form, depth, memory=12), some_tokens(time=12)
    whole, memory, pieces = model(tokens).logits, None, []
    for segment in tokens.split([5, 4, 3], dim=1):  # the memory reaches over more than one of them
        output = model(segment, memory=memory)
        memory = output.memory
        pieces.append(output.logits)
    near(torch.cat(pieces, dim=1), whole, depth)
    assert (model(tokens[:, 9:]).logits - pieces[2]).abs().max() > 0.01
    # No more is kept than asked for.
    short = model_of(form, depth, memory=4)
    assert short(tokens).memory.x.shape[1] == short(tokens, memory=short(tokens).memory).memory.x.shape[1] == 4
    assert model_of(form, depth)(tokens).memory is None


@each_form
@each_depth
def test_memory_is_read_with_today_s_weights_and_no_gradient_reaches_behind_it(form: str, depth: str):
    model, tokens, targets = model_of(form, depth, memory=12), some_tokens(), some_tokens(seed=2)
    memory = model(tokens).memory
    assert not memory.x.requires_grad
    assert not any(state.requires_grad for state in memory.states)
    assert len(memory.states) == model.config.slots

    # The keys and values of a memory are functions of the weights, as those of the window itself are.
    block = model.depth.block
    parameter = (block.state if form.startswith("trellisnet") else block.query_key_value).weight
    loss = model(targets, targets, memory=memory).losses.mean()
    (gradient,) = torch.autograd.grad(loss, parameter)
    direction = torch.randn_like(parameter)
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            parameter += step * direction
            ends.append(model(targets, targets, memory=memory).losses.mean())
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, (gradient * direction).sum(), rtol=1e-5, atol=1e-7)


@each_form
@each_depth
@torch.no_grad()
def test_stored_keys_and_values_stand_for_the_tokens_before(form: str, depth: str):
    model, tokens = model_of(form, depth), some_tokens()
    whole = model(tokens).logits
    first = model(tokens[:, :7], remember=True)
    assert len(first.left) == model.config.slots
    second = model(tokens[:, 7:11], past=first.left, remember=True)
    near(second.logits, whole[:, 7:11], depth)
    grown = joined(first.left, second.left)
    near(model(tokens[:, 11:], past=grown).logits, whole[:, 11:], depth)
    # Buffers of a fixed size hold what was stored first, and whatever after it.
    buffers = joined(grown, tuple(tuple(torch.full_like(part[:, :, :5], 7.0) for part in slot) for slot in grown))
    near(model(tokens[:, 11:], past=buffers, offset=11).logits, whole[:, 11:], depth)
    near(model(tokens[:, 9:], past=buffers, offset=9).logits, whole[:, 9:], depth)
    near(model(tokens, past=buffers, offset=0).logits, whole, depth)


def joined(left: tuple[Slot, ...], right: tuple[Slot, ...]) -> tuple[Slot, ...]:
    return tuple(
        (torch.cat([a[0], b[0]], dim=2), torch.cat([a[1], b[1]], dim=2)) for a, b in zip(left, right, strict=True)
    )


@each_form
@each_depth
@torch.no_grad()
def test_padding_on_the_left_changes_no_logits(form: str, depth: str):
    model = model_of(form, depth, warm_start=depth == "equilibrium")
    if model.guess is not None:
        model.guess.weight.normal_()
    lengths = (9, 4, 7)
    texts = [some_tokens(1, length, seed=length) for length in lengths]
    alone = [model(text).logits[0] for text in texts]
    padded = torch.cat([nn.functional.pad(text, (9 - text.shape[1], 0), value=3) for text in texts])
    real = torch.stack([torch.arange(9) >= 9 - length for length in lengths])
    whole = model(padded, real=real)
    for row, wanted in zip(whole.logits, alone, strict=True):
        near(row[9 - len(wanted) :], wanted, depth)
    assert (whole.state[~real] == 0).all()
    assert whole.logits.isfinite().all()
    if depth == "equilibrium":  # a start that is wrong there is right after one step
        started = model(padded, real=real, start=torch.randn_like(whole.state), max_steps=2)
        assert (started.state[~real] == 0).all()
    # Numbers and bools say the same, and padding nowhere is none.
    assert torch.equal(model(padded, real=real.long()).logits, whole.logits)
    assert torch.equal(model(padded, real=torch.ones_like(real)).logits, model(padded).logits)
    # What padding leaves is not looked at either.
    first = model(padded[:, :6], real=real[:, :6], remember=True)
    second = model(padded[:, 6:], real=real, past=first.left)
    for row, wanted in zip(second.logits, alone, strict=True):
        near(row, wanted[-3:], depth)
    buffers = joined(first.left, first.left)
    second = model(padded[:, 6:], real=real, past=buffers, offset=6)
    for row, wanted in zip(second.logits, alone, strict=True):
        near(row, wanted[-3:], depth)


@each_form
@torch.no_grad()
def test_padding_has_the_state_zero_whatever_a_solver_tries(form: str):
    """So that its Jacobian is zero too, where a normalisation of zeros would have a large one."""
    model, tokens, caught = model_of(form), some_tokens(), []
    model.depth.block.register_forward_pre_hook(lambda block, inputs: caught.append(inputs))
    real = torch.ones(3, 12, dtype=torch.bool)
    real[1, :4] = False
    model(tokens, real=real)
    z, x, context = caught[0]
    out = model.depth.block(torch.randn_like(z), x, context)
    assert (out[1, :4] == 0).all()
    assert (out[real] != 0).all()


@pytest.mark.parametrize("form", ["post", "trellisnet"])
def test_padding_gets_no_gradient(form: str):
    model = model_of(form, warm_start=True).train()
    nn.init.normal_(model.guess.weight)
    tokens, targets = some_tokens(2, 6) % 19, some_tokens(2, 6, seed=2) % 19
    tokens[0, :3] = 19  # the padding, which is nowhere else
    real = tokens != 19
    output = model(tokens, targets, real=real)
    loss = output.losses[real].mean() + output.penalty
    # The embedding also reads the logits off, so what tokens entered with is told from the guess.
    (gradient,) = torch.autograd.grad(loss, model.guess.weight)
    assert not gradient[19].any()
    assert gradient[tokens[1]].any(dim=1).all()


@torch.no_grad()
def test_a_longer_window_than_trained_for_is_read():
    model = model_of("post")
    assert model(some_tokens(time=30)).logits.shape == (3, 30, TINY.vocabulary)


@pytest.mark.parametrize(
    ("time", "stored", "offset", "real"),
    [
        (4, 0, None, None),
        (1, 5, None, None),
        (3, 5, None, None),
        (1, 5, 2, None),
        (3, 5, 2, None),
        (3, 0, None, [[0, 1, 1], [1, 1, 1]]),
        (2, 4, 2, [[0, 1, 1, 1], [0, 0, 0, 1]]),
        (2, 4, 2, [[0, 1, 1, 1], [1, 1, 1, 1]]),
    ],
)
def test_who_looks_at_whom(time: int, stored: int, offset: int | None, real: list | None):
    there = None if real is None else torch.tensor(real)
    frame = window(time, torch.device("cpu"), stored, offset, there)
    offset = stored if offset is None else offset
    batch = 1 if real is None else len(real)
    wanted = torch.zeros(batch, 1, time, stored + time, dtype=torch.bool)
    for b in range(batch):
        for i in range(time):
            for j in range(offset + i + 1):
                column = j if j < offset else stored + j - offset
                wanted[b, 0, i, column] = real is None or bool(real[b][j]) or j == offset + i
    found = frame.mask
    if found is None:
        assert time == 1 or stored == 0
        found = torch.ones(time, time, dtype=torch.bool).tril() if frame.causal else torch.ones(1, stored + 1).bool()
    assert torch.equal(found.expand_as(wanted), wanted)
    assert frame.positions.tolist() == list(range(offset, offset + time))
    padding: Tensor = torch.ones(batch, time).bool() if frame.real is None else frame.real[..., 0]
    assert padding.tolist() == ([[True] * time] if real is None else [[bool(r) for r in row[offset:]] for row in real])
