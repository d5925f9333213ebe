"""The blocks and their options, against the equations that they come from."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from language_models import TINY, model_of, near, some_tokens
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import equilibria as eq
from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import IGNORED
from onelayer.models.transformer import GATE, TransformerBlock, rotary, rotate
from onelayer.models.trellisnet import TrellisBlock
from onelayer.models.weights import Linear
from onelayer.models.window import window

DOUBLE = torch.float64


def block_of(config: ModelConfig, x: Tensor):
    """A block in float64 with gains and biases unlike their first values, and its context for `x`."""
    kind = TransformerBlock if config.architecture == "transformer" else TrellisBlock
    block = kind(config).double()
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return block, block.context(x, block.place(window(x.shape[1], x.device), x.dtype), block.prepare(x))


# The Transformer.


def attention(block: TransformerBlock, u: Tensor, positions: str) -> Tensor:
    """As the papers write it, token by token and head by head."""
    batch, time, width = u.shape
    size = width // block.heads
    wq, wk, wv = block.query_key_value.weight.chunk(3)
    wave = 10000 ** (-torch.arange(0, size if positions == "rotary" else width, 2, dtype=DOUBLE) / width)
    if positions == "rotary":
        wave = 10000 ** (-torch.arange(0, size, 2, dtype=DOUBLE) / size)
    mixed = torch.zeros_like(u)
    for b in range(batch):
        for head in range(block.heads):
            own = slice(head * size, (head + 1) * size)
            q, k, v = (u[b] @ w[own].T for w in (wq, wk, wv))
            q, k = (a / a.square().mean(1, keepdim=True).add(torch.finfo(DOUBLE).eps).sqrt() for a in (q, k))
            for i in range(time):
                scores = []
                for j in range(i + 1):
                    if positions == "rotary":  # pairs of entries as complex numbers, turned by their positions
                        one, other = (torch.complex(*a.chunk(2)) for a in (q[i], k[j]))
                        score = (one * (1j * wave * i).exp() * (other * (1j * wave * j).exp()).conj()).real.sum()
                    else:  # Transformer-XL, terms (a) to (d)
                        r = block.relative.project.weight @ torch.cat([(wave * (i - j)).sin(), (wave * (i - j)).cos()])
                        a, c = block.relative.content_bias[own], block.relative.distance_bias[own]
                        score = q[i] @ k[j] + q[i] @ r[own] + a @ k[j] + c @ r[own]
                    scores.append(score / math.sqrt(size))
                mixed[b, i, own] = torch.stack(scores).softmax(0) @ v[: i + 1]
    return mixed @ block.attention_output.weight.T


@pytest.mark.parametrize("form", ["post", "subtracted"])
@pytest.mark.parametrize("positions", ["rotary", "relative"])
@torch.no_grad()
def test_the_transformer_s_block_is_its_equations(form: str, positions: str):
    x, z = torch.randn(2, 2, 5, 16, dtype=DOUBLE)
    block, context = block_of(replace(TINY, block=form, positions=positions, dropout=0.3), x)
    one, two = context.prepared.masks

    def feed_forward(u: Tensor) -> Tensor:
        return F.gelu(u @ block.expand.weight.T) @ block.contract.weight.T

    def norm(part: nn.RMSNorm, u: Tensor) -> Tensor:
        return part.weight * u / u.square().mean(-1, keepdim=True).add(torch.finfo(DOUBLE).eps).sqrt()

    u = z + x
    if form == "post":
        u = norm(block.attention_norm, u + one * attention(block, u, positions))
        wanted = norm(block.output_norm, u + two * feed_forward(u))
    else:  # a pre-norm block with LayerScale, less its identity path
        u = u + block.attention_gate * one * attention(block, norm(block.attention_norm, u), positions)
        wanted = u + block.feed_forward_gate * two * feed_forward(norm(block.output_norm, u)) - z
    torch.testing.assert_close(block(z, x, context), wanted, rtol=0, atol=1e-12)


def test_gates_begin_at_one_number_and_decay_with_no_matrix():
    block = TransformerBlock(replace(TINY, block="subtracted", positions="relative"))
    assert (block.attention_gate == GATE).all()
    assert (block.feed_forward_gate == GATE).all()
    matrices = {name.rsplit(".", 1)[-1] for name, parameter in block.named_parameters() if parameter.ndim > 1}
    assert matrices == {"weight"}  # what weight decay is for


def test_rotary_positions_know_distances_alone():
    q, k = torch.randn(2, 1, 8, dtype=DOUBLE)

    def score(i: int, j: int) -> Tensor:
        return rotate(q, *rotary(torch.tensor([i]), 8, DOUBLE)) @ rotate(k, *rotary(torch.tensor([j]), 8, DOUBLE)).T

    torch.testing.assert_close(score(7, 3), score(1004, 1000), rtol=0, atol=1e-11)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


# The TrellisNet.


@torch.no_grad()
def test_the_equilibrium_of_a_trellisnet_can_be_an_lstm():
    """Theorem 1 of the paper: recurrent networks are TrellisNets whose matrices have blocks of zeros."""
    lstm = nn.LSTM(16, 16, batch_first=True).double()
    x = torch.randn(3, 9, 16, dtype=DOUBLE)
    block, _ = block_of(replace(TINY, architecture="trellisnet"), x)
    order = torch.cat([torch.arange(16) + 16 * gate for gate in (0, 1, 3, 2)])  # torch has the output gate last
    block.state.weight.zero_()
    block.input.weight.zero_()
    block.state.weight[:, :16] = lstm.weight_hh_l0[order]  # reads the token before
    block.input.weight[:, 16:] = lstm.weight_ih_l0[order]  # reads the token itself
    block.bias.copy_((lstm.bias_ih_l0 + lstm.bias_hh_l0)[order])
    context = block.context(x, window(9, x.device), block.prepare(x))
    z = torch.randn(3, 9, 32, dtype=DOUBLE)
    for _ in range(9):  # one application for each token settles the next
        z = block(z, x, context)
    torch.testing.assert_close(block.read(z), lstm(x)[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(block(z, x, context), z, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kernel", [2, 3])
@torch.no_grad()
def test_the_trellisnet_s_block_is_its_equations(kernel: int):
    x, z = torch.randn(2, 5, 16, dtype=DOUBLE), torch.randn(2, 5, 32, dtype=DOUBLE)
    block, context = block_of(replace(TINY, architecture="trellisnet", kernel=kernel, dropout=0.3), x)
    shown, carried = z.chunk(2, dim=-1)
    shown = shown * context.prepared.masks[0]
    # A convolution of torch's own; its kernel is (rows, columns, taps).
    convolved = [
        F.conv1d(F.pad(a.mT, (kernel - 1, 0)), part.weight.unflatten(1, (kernel, 16)).mT.contiguous()).mT
        for a, part in ((shown, block.state), (x, block.input))
    ]
    let_in, keep, show, new = (convolved[0] + convolved[1] + block.bias).chunk(4, dim=-1)
    wanted = keep.sigmoid() * F.pad(carried, (0, 0, 1, 0))[:, :-1] + let_in.sigmoid() * new.tanh()
    found = block(z, x, context)
    torch.testing.assert_close(found, torch.cat([show.sigmoid() * wanted.tanh(), wanted], dim=-1), rtol=0, atol=1e-13)


# Options.


def test_weight_norm_is_torch_s():
    own, torch_s = Linear(5, 3, normalised=True).double(), weight_norm(nn.Linear(5, 3, bias=False).double())
    with torch.no_grad():
        torch.testing.assert_close(own.matrix(), own.weight, rtol=0, atol=1e-7)  # at first it is what was drawn
        own.size.copy_(torch.tensor([0.5, 2.0, 3.0]))
        torch_s.parametrizations.weight.original0.copy_(own.size[:, None])
        torch_s.parametrizations.weight.original1.copy_(own.weight)
    toward = torch.randn(3, 5, dtype=DOUBLE)
    found = torch.autograd.grad((own.matrix() * toward).sum(), (own.size, own.weight))
    wanted = torch.autograd.grad((torch_s.weight * toward).sum(), tuple(torch_s.parameters()))
    torch.testing.assert_close(own.matrix(), torch_s.weight, rtol=0, atol=1e-14)
    torch.testing.assert_close(found[0], wanted[0][:, 0], rtol=0, atol=1e-14)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", ["post", "trellisnet"])
@pytest.mark.parametrize("depth", ["equilibrium", "tied", "untied"])
def test_masks_are_drawn_once_a_forward_for_all_tokens_alike(form: str, depth: str):
    model, tokens = model_of(form, depth, dropout=0.3), some_tokens()
    seen: list[Tensor] = []

    def see(part, inputs, output):
        if output is not inputs[0]:
            seen.append(output)

    for part in model.modules():
        if isinstance(part, eq.nn.VariationalDropout):
            part.register_forward_hook(see)
    with torch.no_grad():
        still = model(tokens).logits
        assert not seen
        model.train()
        first, second = model(tokens), model(tokens)
    assert not torch.equal(first.logits, second.logits)
    assert not torch.equal(first.logits, still)
    of_a_block = 2 if form == "post" else 1
    assert len(seen) == 2 * (1 + of_a_block * (3 if depth == "untied" else 1))
    dropped = [(output == 0) for output in seen]
    for zeros in dropped:
        assert (zeros == zeros[:, :1]).all()  # all tokens alike
        assert not torch.equal(zeros[0], zeros[1])  # samples not
    share = torch.cat([zeros[:, 0].flatten() for zeros in dropped]).double().mean()
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / sum(3 * 16 for _ in dropped))
    for output in seen[1 : 1 + of_a_block]:
        torch.testing.assert_close(output[output != 0], torch.full_like(output[output != 0], 1 / 0.7))
    if depth == "equilibrium":  # there is one only where the masks stay
        assert first.solution.residual.max() <= TINY.rtol


@pytest.mark.parametrize("form", ["post", "subtracted", "trellisnet"])
def test_the_penalty_is_the_size_of_the_block_s_own_jacobian(form: str):
    options = {"jacobian_weight": 3.0, "jacobian_share": 1.0, "dropout": 0.2, "width": 8}
    model, tokens = model_of(form, **options).train(), some_tokens(2, 3)
    cell, caught = model.depth.block, []
    handle = cell.register_forward_pre_hook(lambda block, inputs: caught.append(inputs))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        state = model(tokens).state.detach()
    handle.remove()
    _, x, context = caught[-1]  # with the masks of that forward
    dense = torch.autograd.functional.jacobian(lambda z: cell(z, x, context), state)
    wanted = 3 * dense.square().sum() / state.numel()
    # The model draws its masks anew at each forward, so that the vectors alone are drawn anew here.
    draws = torch.stack([model.depth._penalty(state, x, context).detach() * 3 for _ in range(300)])
    assert abs(draws.mean() - wanted) < 4 * draws.std() / math.sqrt(300)
    torch.manual_seed(5)
    output = model(tokens)
    assert abs(output.penalty.item() - wanted) < 6 * draws.std()
    assert output.penalty > 0


def test_the_penalty_is_drawn_in_its_share_of_updates_and_never_elsewhere():
    tokens = some_tokens(2, 4)
    for share in (0.0, 0.5, 1.0):
        model = model_of("post", jacobian_weight=1.0, jacobian_share=share, rtol=1e-2).train()
        drawn = sum(bool(model(tokens).penalty != 0) for _ in range(40))
        assert abs(drawn - 40 * share) <= (0 if share in (0, 1) else 13)  # four standard deviations
    assert model.eval()(tokens).penalty == 0
    with torch.no_grad():
        assert model.train()(tokens).penalty == 0
    penalty = model(tokens).penalty
    assert penalty.requires_grad
    gradients = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
    named = {name for (name, _), found in zip(model.named_parameters(), gradients, strict=True) if found is not None}
    assert "depth.layer.cell.query_key_value.weight" in named


@pytest.mark.parametrize("form", ["post", "trellisnet"])
def test_a_warm_start_learns_where_tokens_end(form: str):
    model = model_of(form, warm_start=True)
    cold = model_of(form)
    cold.load_state_dict(model.state_dict(), strict=False)
    assert model.guess is not None
    # A text of one token, whose equilibrium nothing else decides.
    tokens = torch.tensor([[3], [5]])
    with torch.no_grad():
        state = cold(tokens).state
        assert torch.equal(model(tokens).state, state)  # guesses begin where solves do without
        model.guess.weight[tokens[:, 0]] = state[:, 0]
        warm = model(tokens)
    assert warm.solution.evaluations == 1
    near(warm.state, state, "equilibrium")
    # The penalty is how far the guess is off, and nothing but the guess learns from it.
    model.train()
    other = torch.tensor([[3], [6]])
    output = model(other)
    expected = output.state[1].square().sum() / output.state.numel()
    torch.testing.assert_close(output.penalty, expected, rtol=1e-6, atol=1e-10)
    named = dict(model.named_parameters())
    found = torch.autograd.grad(output.penalty, list(named.values()), allow_unused=True)
    assert [name for name, gradient in zip(named, found, strict=True) if gradient is not None] == ["guess.weight"]
    # A start that is given comes first.
    assert model(tokens, start=torch.zeros_like(state)).solution.evaluations > 1


@pytest.mark.parametrize("form", ["post", "trellisnet"])
@pytest.mark.parametrize("depth", ["equilibrium", "tied"])
def test_an_adaptive_softmax_is_a_distribution_and_all_of_it_learns(form: str, depth: str):
    model, tokens = model_of(form, depth, cutoffs=(5, 12)), some_tokens()
    logits = model(tokens).logits
    assert logits.shape == (3, 12, 20)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(3, 12, dtype=DOUBLE), rtol=0, atol=1e-12)
    for targets in (some_tokens(seed=2), some_tokens(seed=2) % 5):
        losses = model(tokens, targets).losses
        torch.testing.assert_close(losses, -logits.gather(-1, targets[..., None])[..., 0], rtol=0, atol=1e-8)
        found = torch.autograd.grad(losses.mean(), list(model.parameters()), allow_unused=True)
        assert all(gradient is not None for gradient in found)  # as data parallelism expects


@torch.no_grad()
@pytest.mark.parametrize("own", [False, True])
def test_an_ordinary_softmax_reads_one_matrix_and_its_losses_are_cross_entropies(own: bool):
    model, tokens, targets = model_of("post", own_unembedding=own), some_tokens(), some_tokens(seed=2)
    assert (model.unembedding is not None) == own
    output = model(tokens)
    matrix = model.embedding if model.unembedding is None else model.unembedding
    logits = model.norm(output.state) @ matrix.weight.T
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-12)
    wanted = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(model(tokens, targets).losses, wanted, rtol=0, atol=1e-12)


def test_ignored_targets_have_no_loss_and_no_gradient():
    model, tokens, targets = model_of("post"), some_tokens(), some_tokens(seed=2)
    ignored = targets.clone()
    ignored[:, ::2] = IGNORED
    losses = model(tokens, ignored).losses
    assert (losses[:, ::2] == 0).all()
    torch.testing.assert_close(losses[:, 1::2], model(tokens, targets).losses[:, 1::2], rtol=0, atol=1e-9)
    found = torch.autograd.grad(losses.sum(), list(model.parameters()))
    wanted = torch.autograd.grad(model(tokens, targets).losses[:, 1::2].sum(), list(model.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
