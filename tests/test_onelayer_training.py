"""Runs: resumed ones give the same numbers, interrupted ones are saved, damaged ones are refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from onelayer import checkpoints, learner, pretrained, runs
from onelayer.cli import main
from onelayer.corpora.prepared import Corpus
from onelayer.learner import Learner, learning_rate_at
from onelayer.metrics import read_metrics
from onelayer.parallel import Processes
from onelayer.presets import TrainingConfig

STEPS, SAVE_EVERY = 50, 7
ALONE = Processes(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, sums may be taken in another order
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n\n" for i in range(900)))
    return path


def train_process(data: Path, run: Path) -> subprocess.Popen[bytes]:
    arguments = ["train", "--preset", "tiny", "--steps", str(STEPS), "--save-every", str(SAVE_EVERY)]
    return subprocess.Popen(
        [sys.executable, "-m", "onelayer.cli", *arguments, "--data", str(data), "--run", str(run)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    with train_process(data, run) as process:
        assert process.wait() == 0
    return run


def numbers(run: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl less what depends on the clock and the machine."""
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "peak_memory_bytes")}
        for line in read_metrics(run)
    ]


def assert_same_run(run: Path, other: Path) -> None:
    assert numbers(run) == numbers(other)
    weights, others = (pretrained.read(folder / "model").state_dict() for folder in (run, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    found, expected = (json.loads((folder / "evaluation.json").read_text()) for folder in (run, other))
    for evaluation in (found, expected):
        del evaluation["seconds"], evaluation["peak_memory_bytes"]
    assert found == expected


def test_a_run_leaves_everything_behind(finished: Path):
    config = json.loads((finished / "config.json").read_text())
    assert {"preset", "command", "model", "data", "training"} <= config.keys()
    assert (config["preset"], config["training"]["steps"]) == ("tiny", STEPS)
    assert config["command"].startswith("onelayer train --preset tiny")
    assert (finished / "report.html").stat().st_size > 1000

    lines = read_metrics(finished)
    train = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert [line["step"] for line in validation] == [*range(6, STEPS, 6), STEPS]
    assert set(train[0]) == {
        *("kind", "step", "tokens", "seconds", "bits_per_byte", "evaluations_forward", "evaluations_backward"),
        *("residual", "backward_residual", "share_at_cap", "learning_rate", "gradient_norm", "peak_memory_bytes"),
    }
    assert set(validation[0]) == {*("kind", "step", "bits_per_byte", "evaluations_forward", "residual", "share_at_cap")}
    assert train[-1]["tokens"] == STEPS * 4 * 32
    assert validation[-1]["bits_per_byte"] < validation[0]["bits_per_byte"] - 1

    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert set(evaluation) == {
        *("bits_per_byte", "perplexity", "residual", "residual_p95", "share_at_cap", "evaluations"),
        *("by_allowed_evaluations", "ngrams", "parameters", "tokens", "seconds", "peak_memory_bytes", "sample"),
    }
    assert evaluation["residual_p95"] < 1e-2
    assert sum(evaluation["evaluations"]["histogram"].values()) == 8
    rows = evaluation["by_allowed_evaluations"]
    assert [row["max_steps"] for row in rows][:4] == [1, 2, 3, 4]
    assert rows[-1]["bits_per_byte"] == pytest.approx(evaluation["bits_per_byte"])
    assert rows[0]["bits_per_byte"] > evaluation["bits_per_byte"]


def test_a_resumed_run_gives_the_same_numbers(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "resumed"
    shutil.copytree(finished, run)
    newest, before = sorted((run / "checkpoints").iterdir(), reverse=True)
    shutil.rmtree(newest)  # as if killed before the last save, with the metrics ahead of it and a line cut short
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    shutil.copytree(before, run / "checkpoints" / f".{newest.name}.partial")
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_run(run, finished)
    assert "bits per byte" in capsys.readouterr().out


def test_ten_stops_in_a_row_lose_no_more_than_the_updates_since_a_save(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Stopped(Exception):
        pass

    run, update = tmp_path / "run", learner.update
    options = ["--preset", "tiny", "--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--data", str(data)]
    for last in (0, 3, 5, 8, 9, 14, 22, 27, 41, 49):  # twice before there is a save

        def stopping(learning: Learner, corpus: Corpus, step: int, last: int = last) -> dict[str, Any]:
            if step == last:
                raise Stopped
            return update(learning, corpus, step)

        monkeypatch.setattr(learner, "update", stopping)
        with pytest.raises(Stopped):
            main(["train", "--resume", str(run)] if run.exists() else ["train", *options, "--run", str(run)])
        assert checkpoints.newest(run / "checkpoints", ALONE)[1]["step"] == last - last % SAVE_EVERY
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_run(run, finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_is_saved_and_goes_on(number: signal.Signals, data: Path, finished: Path, tmp_path: Path):
    run = tmp_path / "run"
    with train_process(data, run) as process:
        while len(read_metrics(run)) < 12 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate()
    done = max(int(line["step"]) for line in read_metrics(run))
    saved = checkpoints.newest(run / "checkpoints", ALONE)[1]["step"]
    assert done < STEPS, "the run ended before the signal came"
    if number == signal.SIGKILL:
        assert process.returncode == -number
        assert done - saved <= SAVE_EVERY
    else:
        assert process.returncode == 130
        assert done == saved
        assert b"Traceback" not in errors
    assert not (run / "evaluation.json").exists()
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_run(run, finished)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "damaged"
    shutil.copytree(finished, run)
    newest, before = sorted((run / "checkpoints").iterdir(), reverse=True)
    (file,) = newest.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_run(run, finished)
    errors = capsys.readouterr().err
    assert str(newest) in errors
    assert "Going on from step 49" in errors

    for folder in (newest, before):
        (folder / "facts.json").write_bytes(b"")
    (run / "evaluation.json").unlink()
    before_run = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(run)]) == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before_run


def test_other_data_are_refused(finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = tmp_path / "other.txt"
    other.write_text(data.read_text().replace("x", "y"))
    assert main(["train", "--resume", str(finished), "--data", str(other)]) == 2
    error = capsys.readouterr().err
    assert "other data" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("depth", ["untied", "tied"])
def test_explicit_models_train_and_say_nothing_of_an_equilibrium(depth: str, data: Path, tmp_path: Path):
    run = tmp_path / depth
    assert main(["train", "--preset", "tiny", "--model", depth, "--data", str(data), "--run", str(run)]) == 0
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["residual"] is evaluation["by_allowed_evaluations"] is evaluation["evaluations"] is None
    line = read_metrics(run)[0]
    assert line["residual"] is line["evaluations_forward"] is line["share_at_cap"] is None
    assert main(["generate", str(run), "--prompt", "def ", "--bytes", "3"]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert main(["evaluate", str(run), "--max-steps", "2"]) == 2


def test_tensorboard_has_the_numbers_of_the_metrics(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    tiny = ["train", "--preset", "tiny", "--steps", "8", "--data", str(data), "--tensorboard"]
    assert main([*tiny, "--run", str(run)]) == 0
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    assert main(["train", "--resume", str(run), "--tensorboard"]) == 0  # steps made twice are there once
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    for kind, name in (("train", "bits_per_byte"), ("train", "residual"), ("validation", "bits_per_byte")):
        lines = [line for line in read_metrics(run) if line["kind"] == kind and line[name] is not None]
        events = board.Scalars(f"{kind}/{name}")
        assert [event.step for event in events] == [line["step"] for line in lines]
        assert [event.value for event in events] == pytest.approx([line[name] for line in lines], rel=1e-6)

    monkeypatch.setattr("onelayer.metrics.SummaryWriter", None)
    assert main([*tiny, "--run", str(tmp_path / "other")]) == 2
    assert "install equilibria[tensorboard]" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_two_trainings_of_one_run_do_not_mix(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with runs.locked(run):
        assert main(["train", "--resume", str(run)]) == 2
    assert "Another process is training" in capsys.readouterr().err
    assert main(["train", "--resume", str(run)]) == 0


def test_the_learning_rate_rises_and_falls():
    training = TrainingConfig(steps=50, warmup_steps=5, learning_rate=0.01, final_learning_rate=0.1)
    rates = [learning_rate_at(step, training) for step in range(50)]
    assert max(rates) == rates[4] == rates[5] == pytest.approx(0.01)
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.001, rel=0.05)
