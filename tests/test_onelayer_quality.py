"""Evaluation with a stride: each token once, as a loop over single tokens scores it, at any allowed evaluations."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from onelayer import runs
from onelayer.cli import main
from onelayer.corpora.token_files import Tokens
from onelayer.errors import UsageError
from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import LanguageModel
from onelayer.presets import RunConfig, TrainingConfig
from onelayer.quality import Windows, score, spread, strided

CONTEXT = 8
CONFIG = RunConfig(
    model=ModelConfig(width=16, heads=2, context=CONTEXT, rtol=1e-10, eval_max_steps=200),
    training=TrainingConfig(batch_size=5),
)
TEXT = torch.randint(0, 256, (45,), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
BYTES = np.ones(256, dtype=np.int64)


def model_of(depth: str = "equilibrium") -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(replace(CONFIG.model, depth=depth)).double().eval()


def tokens_of(text: Tensor, folder: Path) -> Tokens:
    path = folder / f"{len(text)}.bin"
    path.write_bytes(text.to(torch.uint8).numpy().tobytes())
    return Tokens(path, np.dtype(np.uint8), vocabulary=256)


@pytest.fixture
def text(tmp_path: Path) -> Tokens:
    return tokens_of(TEXT, tmp_path)


@pytest.mark.parametrize("stride", [1, 3, 5, 8])
@pytest.mark.parametrize("length", [9, 10, 13, 16, 17, 45])
def test_each_token_is_scored_once_with_enough_before_it(stride: int, length: int, tmp_path: Path):
    windows = strided(tokens_of(torch.arange(length), tmp_path), CONTEXT, stride)
    scored = []
    for before, inputs, targets, chosen in windows.batches(3, memory=4):
        assert before.tolist() == [list(range(max(first - 4, 0), first)) for first in inputs[:, 0].tolist()]
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        scored += targets[chosen].tolist()
        enough = (inputs[:, :1] == 0) | (torch.arange(CONTEXT) >= CONTEXT - stride)
        assert bool((enough | ~chosen).all())
    assert scored == list(range(1, length))


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_a_stride_scores_what_a_loop_over_single_tokens_does(stride: int, text: Tokens):
    model = model_of()
    (found,) = score(model, CONFIG, strided(text, CONTEXT, stride), BYTES)
    tokens, nats = TEXT.long(), []
    with torch.no_grad():
        start = 0
        for target in range(1, len(tokens)):
            if target - start > CONTEXT:  # this token begins the next window
                start = min(start + stride, len(tokens) - 1 - CONTEXT)
            logits = model(tokens[None, start:target]).logits[0, -1]
            nats.append(float(-logits.log_softmax(0)[tokens[target]]))
    assert found.tokens == found.bytes == len(nats) == len(TEXT) - 1
    # The loss is summed in float32, the loop in float64.
    assert found.bits_per_byte == pytest.approx(sum(nats) / len(nats) / math.log(2), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-6)


def test_a_smaller_stride_sees_more_and_a_whole_stride_is_disjoint_windows(text: Tokens):
    model = model_of()
    windows = strided(text, CONTEXT, CONTEXT, count=5 * CONTEXT)
    assert windows.starts.tolist() == [0, 8, 16, 24, 32]
    assert windows.fresh.tolist() == [0] * 5
    (found,) = score(model, CONFIG, windows, BYTES)
    inputs, targets = (TEXT[k : k + 5 * CONTEXT].long().view(5, CONTEXT) for k in (0, 1))
    with torch.no_grad():
        losses = model(inputs, targets).losses
    assert found.bits_per_byte == pytest.approx(float(losses.mean()) / math.log(2), rel=1e-6)


@pytest.mark.parametrize("depth", ["equilibrium", "untied"])
def test_a_model_with_a_memory_reads_what_stands_before_a_window(depth: str, text: Tokens):
    torch.manual_seed(0)
    model = LanguageModel(replace(CONFIG.model, depth=depth, memory=6, layers=2)).double().eval()
    (found,) = score(model, CONFIG, strided(text, CONTEXT, 5), BYTES)
    nats, ends = [], 0
    with torch.no_grad():
        for start in (0, 5, 10, 15, 20, 25, 30, 35, 36):
            before = TEXT[max(start - 6, 0) : start].long()[None]
            memory = model(before).memory if start else None
            window = TEXT[start : start + CONTEXT + 1].long()[None]
            losses = model(window[:, :-1], window[:, 1:], memory=memory).losses[0]
            nats += losses[max(ends - start, 0) :].tolist()
            ends = start + CONTEXT
    assert len(nats) == found.tokens == len(TEXT) - 1
    assert found.bits_per_byte == pytest.approx(sum(nats) / len(nats) / math.log(2), rel=1e-6)
    plain = replace(CONFIG, model=replace(CONFIG.model, depth=depth, layers=2))
    twin = LanguageModel(plain.model).double().eval()
    twin.load_state_dict(model.state_dict())
    (without,) = score(twin, plain, strided(text, CONTEXT, 5), BYTES)
    assert abs(without.bits_per_byte - found.bits_per_byte) > 1e-4


def test_perplexity_is_per_token_and_bits_are_per_byte(text: Tokens):
    model = model_of()
    lengths = np.random.default_rng(4).integers(1, 6, 256)
    windows = strided(text, CONTEXT, 4)
    (plain,), (found,) = score(model, CONFIG, windows, BYTES), score(model, CONFIG, windows, lengths)
    stands_for = int(lengths[TEXT[1:].numpy()].sum())
    assert (found.bytes, plain.bytes) == (stands_for, len(TEXT) - 1)
    assert found.perplexity == plain.perplexity
    assert found.bits_per_byte == pytest.approx(plain.bits_per_byte * (len(TEXT) - 1) / stands_for)
    assert plain.perplexity == pytest.approx(2**plain.bits_per_byte)


def test_allowed_evaluations_are_those_of_the_solve(text: Tokens):
    model = model_of()
    few, some, many = score(model, CONFIG, strided(text, CONTEXT, 4), BYTES, (1, 6, 200))
    assert (few.max_steps, few.evaluations, few.share_at_cap) == (1, 1, 1)
    assert few.perplexity == pytest.approx(256)  # the start, all zeros, says nothing of the next byte
    assert (some.evaluations, some.share_at_cap) == (6, 1)
    assert few.residual > some.residual > 1e-10 >= many.residual
    assert (many.max_steps, many.share_at_cap) == (200, 0)
    (own,) = score(model, CONFIG, strided(text, CONTEXT, 4), BYTES)
    assert own == many
    (tied,) = score(model_of("tied"), CONFIG, strided(text, CONTEXT, 4), BYTES)
    assert (tied.max_steps, tied.evaluations, tied.residual, tied.share_at_cap) == (None, None, None, None)


def test_scoring_leaves_the_mode_of_the_model_as_it_is(text: Tokens):
    model = model_of().train()
    score(model, CONFIG, spread(text, CONTEXT, 2), BYTES, (2,))
    assert model.training


def test_what_makes_no_sense_is_refused(text: Tokens, tmp_path: Path):
    for stride in (0, CONTEXT + 1):
        with pytest.raises(UsageError, match=f"stride must lie between 1 and the context, {CONTEXT}"):
            strided(text, CONTEXT, stride)
    with pytest.raises(UsageError, match="no window"):
        strided(tokens_of(TEXT[:CONTEXT], tmp_path), CONTEXT, 4)
    with pytest.raises(UsageError, match="at least the context"):
        strided(text, CONTEXT, 4, count=CONTEXT - 1)
    windows = strided(text, CONTEXT, 4)
    with pytest.raises(UsageError, match="at least 1, not 0"):
        score(model_of(), CONFIG, windows, BYTES, (4, 0))
    with pytest.raises(UsageError, match="equilibrium models"):
        score(model_of("tied"), CONFIG, windows, BYTES, (4,))
    empty = Windows(text, CONTEXT, torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(UsageError, match="no bytes"):
        score(model_of(), CONFIG, empty, np.zeros(256, dtype=np.int64))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    data = folder / "text.txt"
    data.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n\n" for i in range(100)))
    for depth in ("equilibrium", "tied"):
        run = folder / depth
        assert main(["train", "--preset", "tiny", "--model", depth, "--data", str(data), "--run", str(run)]) == 0
    return {depth: folder / depth for depth in ("equilibrium", "tied")}


def refused(capsys: pytest.CaptureFixture[str], says: str, *arguments: str) -> None:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_one_command_draws_compute_against_quality(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, plot, figures = made["equilibrium"], tmp_path / "quality.png", tmp_path / "quality.json"
    capsys.readouterr()
    options = ["--max-steps", "1", "4", "32", "--stride", "16", "--plot", str(plot), "--json", str(figures)]
    assert main(["evaluate", str(run), *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(figures.read_text())["rows"]
    model, config = runs.load_model(run)
    corpus = runs.read_corpus(run)
    text = corpus.validation
    expected = score(model, config, strided(text, config.model.context, 16), corpus.tokenizer.lengths, (1, 4, 32))
    assert [row["bits_per_byte"] for row in rows] == [quality.bits_per_byte for quality in expected]
    assert {row["tokens"] for row in rows} == {len(text) - 1}
    table = [line.split() for line in printed[2:5]]
    assert [line[0] for line in table] == ["1", "4", "32"]
    assert [float(line[4]) for line in table] == [round(row["bits_per_byte"], 3) for row in rows]
    assert "At 1 and 4 allowed evaluations" in printed[5]
    assert "K-step network" in printed[5]


def test_part_of_a_text_and_a_single_measurement(made: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert main(["evaluate", str(made["tied"]), "--stride", "8", "--tokens", "50"]) == 0
    printed = capsys.readouterr().out
    assert "50 tokens of 1.00 bytes" in printed
    assert "residual" not in printed


@pytest.mark.parametrize(
    ("depth", "options", "says"),
    [
        ("equilibrium", ["--max-steps", "4", "0"], "--max-steps must be at least 1, not 0"),
        ("equilibrium", ["--stride", "33"], "between 1 and the context, 32"),
        ("equilibrium", ["--stride", "0"], "between 1 and the context, 32"),
        ("equilibrium", ["--tokens", "50"], "needs --stride"),
        ("equilibrium", ["--stride", "8", "--tokens", "31"], "at least the context, 32"),
        ("equilibrium", ["--plot", "quality.txt"], ".png, .svg or .pdf"),
        ("equilibrium", ["--plot", "nowhere/quality.png"], "no folder nowhere"),
        ("tied", ["--max-steps", "4"], "equilibrium models"),
        ("tied", ["--plot", "quality.png"], "equilibrium models"),
    ],
)
def test_options_that_make_no_sense(
    depth: str, options: list[str], says: str, made: dict[str, Path], capsys: pytest.CaptureFixture[str]
):
    refused(capsys, says, "evaluate", str(made[depth]), *options)


def test_several_prompts_and_a_report(made: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    common = ["generate", str(made["equilibrium"]), "--bytes", "9", "--temperature", "0"]
    alone = []
    for prompt in ("def f", "    return x"):
        assert main([*common, "--prompt", prompt]) == 0
        alone.append(capsys.readouterr().out)
    assert main([*common, "--prompt", "def f", "--prompt", "    return x", "--chunk", "4", "--report"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "".join(alone)
    assert "9 for each of 2 prompts" in shown.err
    assert "a token" in shown.err
    assert main([*common, "--prompt", "def f", "--no-cache"]) == 0
    assert capsys.readouterr().out == alone[0]
    refused(capsys, "chunk", *common, "--prompt", "def f", "--chunk", "0")
    refused(capsys, "empty", *common, "--prompt", "def f", "--prompt", "")
