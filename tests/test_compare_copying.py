"""Copy memory: the task, the baselines against PyTorch's own, and what is made of the rows."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onelayer.errors import UsageError
from onelayer.experiments import EXPERIMENTS, compare
from onelayer.experiments.arms import parameters
from onelayer.experiments.copying import baselines
from onelayer.experiments.copying.experiment import score
from onelayer.experiments.copying.findings import tell
from onelayer.experiments.copying.setup import Settings, arm_of, arms, generator, memoryless, sequences, task, updates
from onelayer.experiments.experiment import FAILED, Row
from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import LanguageModel
from onelayer.models.window import window
from onelayer.presets import RunConfig

DOUBLE = torch.float64
CONFIG = ModelConfig(vocabulary=10, width=8, heads=1, context=30, depth="tied", layers=1, kernel=3, weight_norm=True)
BASELINES = {"LSTM": baselines.lstm, "GRU": baselines.gru, "TCN": baselines.ConvolutionalBlock}


# The task.


@pytest.mark.parametrize("delay", [1, 4, 50])
def test_what_is_asked_for_is_what_was_read(delay: int):
    tokens, targets = sequences(20, delay, generator(0))
    for x, y in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert len(x) == len(y) == delay + 20
        assert set(x[:10]) <= set(range(1, 9))
        assert x[10:] == [0] * (delay - 1) + [9] * 11
        first = x.index(9) + 1  # where the first symbol is asked for
        assert y == [0] * first + x[:10]
        assert first - 10 == delay  # and as far behind where it was read
    assert {symbol for row in tokens.tolist() for symbol in row[:10]} == set(range(1, 9))


def test_sequences_are_those_of_the_seed_and_the_update_and_none_is_scored_that_was_learnt():
    def drawn(seed: int, step: int | None) -> Tensor:
        return sequences(16, 5, generator(seed, step))[0]

    assert torch.equal(drawn(3, 7), drawn(3, 7))
    streams = [drawn(seed, step) for seed in (0, 1, 1000) for step in (None, 0, 1, 2, 399)]
    rows = [tuple(row) for stream in streams for row in stream[:, :10].tolist()]
    assert len(set(rows)) == len(rows)


def test_the_memoryless_loss_is_that_of_one_who_guesses_the_symbols():
    _, targets = sequences(4, 6, generator(0))
    logits = torch.full((4, 26, 10), -1e4)
    logits[:, :16, 0] = 0  # blanks while nothing is asked for
    logits[:, 16:, 1:9] = 0  # then any of the eight
    found = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert float(found) == pytest.approx(memoryless(6), rel=1e-6)


def test_the_score_is_the_loss_of_the_model_and_the_share_of_symbols_named_right():
    config, block = arm_of(EXPERIMENTS["copying"].presets["tiny"], "explicit 1", 4)
    model = LanguageModel(config, block).eval()
    tokens, targets = sequences(10, 4, generator(0))
    with torch.no_grad():
        found = score(model, RunConfig(), tokens, targets, part=3)
        losses, logits = model(tokens, targets).losses, model(tokens).logits
    assert found["score"] == pytest.approx(float(losses.mean()), rel=1e-5)
    named = [
        int(logits[i, j].argmax()) == int(tokens[i, j - 14]) for i in range(10) for j in range(14, 24)
    ]  # the symbol that was read T + 10 positions before
    assert found["recall"] == pytest.approx(sum(named) / 100)


# The arms.


@pytest.mark.parametrize("delay", [50, 200])
def test_all_arms_have_as_many_parameters(delay: int):
    settings = EXPERIMENTS["copying"].presets["cpu"]
    counts = {name: parameters(*arm_of(settings, name, delay)) for name in arms(settings)}
    assert len(counts) == 7
    for name, count in counts.items():
        assert count == pytest.approx(counts["equilibrium"], rel=0.04), name


def applied(block: nn.Module, x: Tensor, z: Tensor | None = None) -> Tensor:
    frame = block.place(window(x.shape[1], x.device), x.dtype)
    z = torch.zeros(*x.shape[:2], block.state_width, dtype=x.dtype) if z is None else z
    return block(z, x, block.context(x, frame, block.prepare(x)))


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_looks_back_as_far_as_the_first_token_and_never_ahead(name: str):
    block = BASELINES[name](CONFIG).double()
    x = torch.randn(1, 30, 8, dtype=DOUBLE, requires_grad=True)
    for at in (0, 13, 29):
        (found,) = torch.autograd.grad(applied(block, x)[0, at].sum(), x)
        reached = found[0].abs().sum(1)
        assert (reached[at + 1 :] == 0).all()
        assert reached[at] > 0
        assert reached[0] > 0
    other = torch.randn(1, 30, 8, dtype=DOUBLE)
    assert torch.equal(applied(block, x, other), applied(block, x))  # the state is not read
    assert block.read(other) is other


@pytest.mark.parametrize("name", BASELINES)
def test_gradients_of_a_baseline_are_those_of_finite_differences(name: str):
    config = replace(CONFIG, width=4, context=6)
    block = BASELINES[name](config).double()
    x = torch.randn(2, 6, 4, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: applied(block, x), (x, *block.parameters()))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@torch.no_grad()
def test_a_recurrent_baseline_is_its_equations(name: str):
    block, x = BASELINES[name](CONFIG).double(), torch.randn(3, 7, 8, dtype=DOUBLE)
    read, again, b_read, b_again = block.network.parameters()
    h = c = torch.zeros(3, 8, dtype=DOUBLE)
    found = applied(block, x)
    for t in range(7):
        a, b = x[:, t] @ read.T + b_read, h @ again.T + b_again
        if name == "LSTM":
            let_in, keep, new, show = (a + b).chunk(4, dim=1)
            c = keep.sigmoid() * c + let_in.sigmoid() * new.tanh()
            h = show.sigmoid() * c.tanh()
        else:
            (reset, update, new), (reset_b, update_b, new_b) = a.chunk(3, dim=1), b.chunk(3, dim=1)
            gate = (update + update_b).sigmoid()
            h = (1 - gate) * (new + (reset + reset_b).sigmoid() * new_b).tanh() + gate * h
        torch.testing.assert_close(found[:, t], h, rtol=0, atol=1e-12)


def test_the_forget_gate_of_the_lstm_begins_open():
    torch.manual_seed(1)
    block = baselines.lstm(CONFIG)
    torch.manual_seed(1)
    stock = nn.LSTM(8, 8, batch_first=True)
    moved = block.network.bias_hh_l0 - stock.bias_hh_l0
    torch.testing.assert_close(moved.unflatten(0, (4, 8)), torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None].expand(4, 8))


@torch.no_grad()
def test_the_tcn_is_its_equations():
    block, x = baselines.ConvolutionalBlock(replace(CONFIG, dropout=0.3)).double(), torch.randn(2, 30, 8, dtype=DOUBLE)
    for parameter in block.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    parts = len(block.convolutions) // 2
    assert [baselines.receptive_field(3, k) < 30 for k in (parts - 1, parts)] == [True, False]
    prepared = block.prepare(x)
    state = x
    for k in range(parts):
        inner = state
        for own in (2 * k, 2 * k + 1):
            convolution, bias = block.convolutions[own], block.biases[own]
            matrix = convolution.size[:, None] * convolution.weight / convolution.weight.norm(dim=1, keepdim=True)
            taps, out = matrix.split(8, dim=1), torch.zeros_like(x)
            for t in range(30):
                before = [t - (2 - i) * 2**k for i in range(3)]
                out[:, t] = bias + sum(inner[:, s] @ taps[i].T for i, s in enumerate(before) if s >= 0)
            inner = out.clamp(min=0) * prepared.masks[own]
        state = (state + inner).clamp(min=0)
    found = block(torch.zeros_like(x), x, prepared)
    torch.testing.assert_close(found, state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_refuse_what_they_do_not_know(name: str):
    model = LanguageModel(CONFIG, BASELINES[name])
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    padded = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    for options in ({"real": padded}, {"remember": True}):
        with pytest.raises(UsageError, match="read whole windows"):
            model(tokens, **options)
    past = ((torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8)),)
    with pytest.raises(UsageError, match="read whole windows"):
        model(tokens, past=past)


# What is made of the rows.


def made_up(settings: Settings, loss: dict[str, float], cap: float = 0.0, recall: float = 1.0) -> list[Row]:
    """Rows of two seeds; losses are shares of the memoryless one."""
    solved = {"mean": 9.0, "median": 9.0, "p95": 12.0}
    rows = []
    for delay in settings.delays:
        for arm in arms(settings):
            for seed in range(2):
                row: Row = {"task": task(delay), "arm": arm, "seed": seed, "stage": "measure", "rate": 1e-3}
                share = loss.get(arm, 0.5) * (1 + 0.1 * seed)
                row |= {"score": share * memoryless(delay), "decades": math.log10(share), "delay": delay}
                row |= {"recall": recall, "curve": [(1, 0.1, 0.3), (2, 0.2, 0.2)], "parameters": 9, "cpu_seconds": 1.0}
                row |= {"parameters_without_embeddings": 8, "tokens": 10, "peak_memory_bytes": 10}
                if arm == "equilibrium":
                    row |= {"cap": 32, "residual": solved, "forward": solved | {"at_cap": cap}}
                    row |= {"backward": solved | {"at_cap": 0.0}}
                    row |= {"scored": {"evaluations": solved | {"at_cap": cap}, "residual": solved}}
                else:
                    row |= {"forward": {"mean": 1.0, "p95": 1.0}, "backward": {"mean": 1.0, "p95": 1.0}}
                rows.append(row)
    return rows


def verdicts(rows: list[Row], settings: Settings) -> list[bool]:
    return [claim.holds for claim in tell(settings, rows).claims]


def test_claims_hold_or_not_as_the_rows_say():
    settings = Settings(minutes=1, delays=(50, 100))
    good = {"equilibrium": 0.01, "LSTM": 0.99, "GRU": 0.8}
    assert verdicts(made_up(settings, good), settings) == [True] * 7
    # Loss, recall and the recurrent ones at each delay, then the cap.
    assert verdicts(made_up(settings, good | {"equilibrium": 0.095}), settings) == [False, True, True] * 2 + [True]
    assert verdicts(made_up(settings, good, recall=0.99), settings) == [True, False, True] * 2 + [True]
    assert verdicts(made_up(settings, good | {"GRU": 0.4}), settings) == [True, True, False] * 2 + [True]
    assert verdicts(made_up(settings, good, cap=0.06), settings) == [True] * 6 + [False]
    failed = made_up(settings, good)
    key = {name: failed[0][name] for name in ("task", "arm", "seed", "stage", "rate")}
    failed[0] = key | {FAILED: "Training diverged."}
    assert verdicts(failed, settings) == [False, False, True, True, True, True, True]
    assert verdicts([], settings) == []


def test_the_pictures_have_a_line_for_no_memory_and_one_point_for_each_delay():
    settings = Settings(minutes=1, delays=(50, 100))
    findings = tell(settings, made_up(settings, {"equilibrium": 0.02}))
    assert list(findings.drawings) == ["updates", "time", "delay"]
    for axes, delay in zip(findings.drawings["updates"].figure.axes, settings.delays, strict=True):
        assert any(set(line.get_ydata()) == {memoryless(delay)} for line in axes.lines)
    (axes,) = findings.drawings["delay"].figure.axes
    (line,) = [line for line in axes.lines if line.get_label() == "equilibrium"]
    assert list(line.get_xdata()) == [50, 100]
    assert list(line.get_ydata()) == pytest.approx([0.021, 0.021])


def test_baselines_have_more_updates_and_rates_are_chosen_at_one_delay():
    experiment = EXPERIMENTS["copying"]
    settings = replace(experiment.presets["cpu"], steps=10, more=3)
    trials = experiment.plan(settings, [])
    assert {trial.stage for trial in trials} == {"choose"}
    assert {trial.task for trial in trials} == {task(settings.delays[0])}
    assert {trial.arm: trial.units for trial in trials} == {arm: updates(settings, arm) for arm in arms(settings)}
    assert {updates(settings, arm) for arm in ("LSTM", "GRU", "TCN")} == {30}
    rows = [trial.key | {"score": trial.rate} for trial in trials]
    told = [trial for trial in experiment.plan(settings, rows) if trial.stage == "measure"]
    assert len(told) == 7 * settings.seeds * len(settings.delays)
    for trial in told:
        allowed = settings.baseline_rates if trial.arm in BASELINES else settings.rates
        assert trial.rate == min(allowed)


def test_the_preset_for_a_gpu_is_models_that_can_be_built():
    settings = EXPERIMENTS["copying"].presets["gpu"]
    for arm in ("equilibrium", "GRU"):
        config, block = arm_of(settings, arm, settings.delays[-1])
        assert parameters(config, block) == pytest.approx(parameters(arm_of(settings, "tied 4", 400)[0]), rel=0.02)
        assert config.context == settings.delays[-1] + 20


def test_the_tiny_preset_runs_to_rows_and_a_page(tmp_path: Path):
    experiment = EXPERIMENTS["copying"]
    settings = experiment.presets["tiny"]
    findings = compare(experiment, settings, tmp_path / "copying", workers=1)
    wanted = len(arms(settings)) * len(settings.delays) * settings.seeds
    assert [len(table.rows) for table in findings.tables] == [wanted // settings.seeds] * 3
    assert len((tmp_path / "copying" / "rows.jsonl").read_text().splitlines()) == wanted
    for claim in findings.claims:
        assert claim.asked in (tmp_path / "copying" / "section.md").read_text()
    page = (tmp_path / "copying" / "report.html").read_text()
    assert all(drawing.caption[:40] in page for drawing in findings.drawings.values())
