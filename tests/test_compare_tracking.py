"""State tracking: its words, its block, and what is said of its rows."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from language_models import DEPTHS, TINY, near, some_tokens
from torch import Tensor, nn

import equilibria as eq
from onelayer.experiments import EXPERIMENTS, compare
from onelayer.experiments.arms import EQUILIBRIUM, parameters
from onelayer.experiments.experiment import FAILED, Trial
from onelayer.experiments.tracking.block import AttentiveGates
from onelayer.experiments.tracking.experiment import measure, plan
from onelayer.experiments.tracking.findings import tell
from onelayer.experiments.tracking.setup import A5, PARITY, TASKS, arms_of
from onelayer.experiments.tracking.words import FIVE_CYCLE, THREE_CYCLE, after, alternating, even_permutations, parity
from onelayer.models.language_model import LanguageModel
from onelayer.models.window import window

EXPERIMENT = EXPERIMENTS["tracking"]
TINY_SETTINGS = EXPERIMENT.presets["tiny"]


# Words.


def test_the_group_is_a_group_and_not_commutative():
    elements = even_permutations(5)
    table = alternating().table
    assert elements[0] == (0, 1, 2, 3, 4)
    assert table[0].tolist() == table[:, 0].tolist() == list(range(60))
    for lines in (table, table.T):
        assert all(sorted(line.tolist()) == list(range(60)) for line in lines)
    a, b, c = torch.randint(0, 60, (3, 500))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    assert not torch.equal(table, table.T)


def test_all_elements_are_products_of_the_two_letters():
    words = alternating((FIVE_CYCLE, THREE_CYCLE))
    reached = set(words.letters.tolist())
    for _ in range(12):
        reached |= {int(words.table[one, letter]) for one in reached for letter in words.letters}
    assert len(reached) == 60


def test_targets_are_the_products_of_prefixes():
    elements = even_permutations(5)
    words, products = alternating().draw(5, 9, torch.Generator().manual_seed(0))
    for word, row in zip(words.tolist(), products.tolist(), strict=True):
        for k, product in enumerate(row):
            points = list(range(5))  # moved one by one, the last letter first
            for letter in reversed(word[: k + 1]):
                points = [elements[letter][point] for point in points]
            assert tuple(points) == elements[product]
    bits, odd = parity().draw(5, 9, torch.Generator().manual_seed(0))
    assert torch.equal(odd, bits.cumsum(1) % 2)


def test_a_product_does_the_right_factor_first():
    one, other = (1, 0, 2), (0, 2, 1)
    assert after(one, other) == (one[other[0]], one[other[1]], one[other[2]]) != after(other, one)


def test_words_hang_on_their_generator_alone_and_use_every_letter():
    words = alternating((FIVE_CYCLE, THREE_CYCLE))
    one, same, other = (words.draw(40, 20, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert set(one[0].flatten().tolist()) == set(words.letters.tolist())
    assert set(one[1][:, 10:].flatten().tolist()) == set(range(60))


# The block.


def model_of(depth: str) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(replace(TINY, depth=depth), AttentiveGates).double().eval()
    with torch.no_grad():
        model.depth.block.bias.normal_(std=0.3)
    return model


def unit(a: Tensor) -> Tensor:
    return a / (a.square().sum() + 8 * torch.finfo(a.dtype).eps).sqrt()


def test_the_block_is_gates_that_read_the_token_before_and_attention_up_to_their_own():
    block = AttentiveGates(TINY).double()
    with torch.no_grad():
        block.bias.normal_()
    x, z = torch.randn(2, 6, 16).double(), torch.randn(2, 6, 32).double()
    found = block(z, x, block.context(x, window(6, x.device), block.prepare(x)))
    wq, wk, wv = block.query_key_value.weight.chunk(3)
    for b, i in itertools.product(range(2), range(6)):
        nothing = torch.zeros(32).double()
        shown, carried = (z[b, i - 1] if i else nothing).chunk(2)
        text = [x[b, j] + (z[b, j - 1, :16] if j else 0) for j in range(i + 1)]
        mixed = []
        for head in (slice(0, 8), slice(8, 16)):
            # Queries and keys of unit size in the mean square.
            scores = torch.stack([8**0.5 * unit(wq[head] @ text[i]) @ unit(wk[head] @ t) for t in text])
            mixed.append(sum(share * (wv[head] @ t) for share, t in zip(scores.softmax(0), text, strict=True)))
        gates = block.state.weight @ torch.cat([shown, *mixed]) + block.input.weight @ x[b, i] + block.bias
        let_in, keep, show, new = gates.chunk(4)
        carried = keep.sigmoid() * carried + let_in.sigmoid() * new.tanh()
        torch.testing.assert_close(found[b, i], torch.cat([show.sigmoid() * carried.tanh(), carried]))


def test_plain_iteration_is_exact_after_as_many_evaluations_as_tokens():
    block = AttentiveGates(TINY).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(4)  # far from a contraction
    x = torch.randn(2, 9, 16).double()
    context = block.context(x, window(9, x.device), block.prepare(x))
    states = [torch.zeros(2, 9, 32).double(), 5 * torch.randn(2, 9, 32).double()]
    for k in range(1, 10):
        states = [block(z, x, context) for z in states]
        assert torch.equal(states[0][:, :k], states[1][:, :k])
        assert k == 9 or not torch.equal(states[0][:, k], states[1][:, k])


def test_gradients_of_the_block_are_those_of_finite_differences():
    block = AttentiveGates(replace(TINY, width=4)).double()
    x, z = (torch.randn(2, 3, size).double().requires_grad_() for size in (4, 8))

    def call(z: Tensor, x: Tensor, *values: Tensor) -> Tensor:
        context = block.context(x, window(3, x.device), block.prepare(x))
        return block(z, x, context)

    assert torch.autograd.gradcheck(call, (z, x, *block.parameters()))


class Cell(nn.Module):
    """The block as a cell of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = AttentiveGates(replace(TINY, width=8))

    def initial_state(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:2], self.block.state_width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.block(z, x, self.block.context(x, window(x.shape[1], x.device), self.block.prepare(x)))


def test_the_block_is_a_cell_that_a_layer_can_hold():
    eq.testing.check_cell(eq.DEQ(Cell(), max_steps=80), torch.randn(5, 4, 8))


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_later_token_never_changes_earlier_logits(depth: str):
    model, tokens = model_of(depth), some_tokens()
    changed = tokens.clone()
    changed[:, 7] = (tokens[:, 7] + 1) % 20
    one, other = model(tokens).logits, model(changed).logits
    near(one[:, :7], other[:, :7], depth)
    assert (one[:, 7:] - other[:, 7:]).abs().amax((0, 2)).min() > 1e-6


@pytest.mark.parametrize("depth", DEPTHS)
def test_what_tokens_leave_stands_for_them(depth: str):
    model, tokens = model_of(depth), some_tokens()
    whole = model(tokens).logits
    before = model(tokens[:, :8], remember=True)
    near(model(tokens[:, 8:], past=before.left).logits, whole[:, 8:], depth)


def test_padding_on_the_left_changes_nothing():
    model, tokens = model_of("equilibrium"), some_tokens()
    padded = F.pad(tokens, (3, 0))
    real = F.pad(torch.ones_like(tokens, dtype=torch.bool), (3, 0))
    near(model(padded, real=real).logits[:, 3:], model(tokens).logits, "equilibrium")


# The experiment.


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_all_arms_have_the_same_block_and_as_many_parameters(preset: str):
    for task in TASKS:
        arms = arms_of(EXPERIMENT.presets[preset], task)
        wanted = parameters(arms[EQUILIBRIUM], AttentiveGates)
        for arm in arms.values():
            assert abs(parameters(arm, AttentiveGates) / wanted - 1) < 0.08


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "tracking"
    settings = replace(TINY_SETTINGS, seeds=1)
    findings = compare(EXPERIMENT, settings, folder, workers=1)
    return settings, folder, findings


def test_the_tiny_preset_runs_to_rows_page_and_section(finished):
    settings, folder, findings = finished
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert {(row["task"], row["arm"]) for row in rows} == {
        (task, arm) for task in TASKS for arm in arms_of(settings, task)
    }
    for row in rows:
        scored = row["by_position"][settings.scored_from :]
        assert row["score"] == pytest.approx(1 - sum(scored) / len(scored), abs=1e-3)
        assert ("by_evaluations" in row) == (row["arm"] == EQUILIBRIUM)
    assert set(findings.drawings) == {"position", "evaluations", "time"}
    section = (folder / "section.md").read_text()
    assert all(claim.asked in section for claim in findings.claims)
    assert "A5" in (folder / "report.html").read_text()


def test_a_trial_is_the_same_again_and_another_with_another_seed(finished):
    settings, folder, _ = finished
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    (known,) = (row for row in rows if (row["task"], row["arm"]) == (A5, EQUILIBRIUM))
    trial = Trial(A5, EQUILIBRIUM, 0, settings.rates[0], units=settings.steps)
    found = measure(settings, trial, lambda _: None)
    assert found["by_position"] == known["by_position"]
    assert [point[2] for point in found["curve"]] == [point[2] for point in known["curve"]]
    other = measure(settings, replace(trial, seed=1), lambda _: None)
    assert other["by_evaluations"] != found["by_evaluations"]


def test_the_long_training_takes_the_rate_of_the_short_one():
    settings = replace(TINY_SETTINGS, rates=(0.1, 0.3), seeds=1)
    chosen = plan(settings, [])
    assert {trial.stage for trial in chosen} == {"choose"}
    rows = [trial.key | {"score": 1 - trial.rate if trial.task == A5 else trial.rate} for trial in chosen]
    rates = {(t.task, t.arm): (t.rate, t.units) for t in plan(settings, rows) if t.stage == "measure"}
    assert rates[A5, "explicit 2, 2 times the updates"] == (0.3, 2 * settings.steps)
    assert rates[PARITY, "explicit 2, 2 times the updates"] == (0.1, 2 * settings.parity_steps)
    assert len(rates) == 10


def made_up(arm: str, accuracy: float, at_cap: float = 0.0, elsewhere: float | None = None, seed: int = 0) -> dict:
    row = Trial(A5, arm, seed, 0.01).key | {
        "score": 1 - accuracy,
        "by_position": [accuracy] * 12,
        "curve": [(1, 1, 0.5)],
    }
    row |= {"forward": {"mean": 9.0, "p95": 9.0}, "parameters": 9, "parameters_without_embeddings": 9}
    if arm == EQUILIBRIUM:
        row["forward"]["at_cap"] = at_cap
        row |= {"from_elsewhere": accuracy if elsewhere is None else elsewhere, "cap": 64}
        row |= {"scored": {"evaluations": {"at_cap": at_cap}}, "by_evaluations": [(2, 0.1, 0.5)]}
    return row


def held(*rows: dict) -> dict[str, bool]:
    return {claim.asked: claim.holds for claim in tell(TINY_SETTINGS, rows).claims}


def test_claims_hold_and_do_not_as_the_rows_have_it():
    tracks, same = (
        f"A5: {EQUILIBRIUM} above 0.9 on positions 7 to 12, every seed",
        "A5: the same accuracy, within 0.01,",
    )
    fails, cap = "A5: explicit 2 below 0.6 there, every seed", "At most 5% of the solves at the cap"
    good = held(made_up(EQUILIBRIUM, 0.95), made_up("explicit 2", 0.2))
    assert len(good) == 4
    assert all(good.values())
    bad = held(
        *(made_up(EQUILIBRIUM, 0.95), made_up(EQUILIBRIUM, 0.85, at_cap=0.2, elsewhere=0.7, seed=1)),
        *(made_up("explicit 2", 0.2), made_up("explicit 2", 0.7, seed=1)),
    )
    assert {asked[: len(same)] for asked in bad} == {tracks[: len(same)], same, fails[: len(same)], cap[: len(same)]}
    assert not any(bad.values())


def test_a_training_that_diverged_has_tracked_nothing():
    diverged = Trial(A5, EQUILIBRIUM, 1, 0.01).key | {FAILED: "it diverged"}
    claims = held(made_up(EQUILIBRIUM, 0.95), diverged)
    assert not claims[f"A5: {EQUILIBRIUM} above 0.9 on positions 7 to 12, every seed"]
    assert held(diverged) == {f"A5: {EQUILIBRIUM} above 0.9 on positions 7 to 12, every seed": False}
