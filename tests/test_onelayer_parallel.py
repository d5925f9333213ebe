"""Training on several processes: the numbers of one, whatever the number, and runs that are killed on any of them."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_ranks
from training_ranks import SAVED_AT, STEPS

from onelayer import checkpoints, corpora, learner
from onelayer.errors import UsageError
from onelayer.metrics import read_metrics
from onelayer.parallel import Processes, processes

ALONE = Processes(torch.device("cpu"))
NAMES = ("plain", "options", "trellisnet", "explicit", "float64")
CLOSE = 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n\n" for i in range(900)))
    return path


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, list[float]]]]:
    """Every configuration trained on one process, then on two in both ways."""
    folder, threads = tmp_path_factory.mktemp("trained"), torch.get_num_threads()
    data = corpora.prepare(data, folder / "tokens").folder
    torch.set_num_threads(1)
    alone = {}
    for name, config in training_ranks.configs(data).items():
        (folder / name).mkdir()
        alone[name] = training_ranks.train(config, ALONE, folder / name / "one")[0]
    training_ranks.on_two_processes(data, folder)
    yield folder, alone
    torch.set_num_threads(threads)


def found(folder: Path, name: str, parallel: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / name / parallel / f"found-{rank}.json").read_text())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_like_one(name: str, parallel: str, trained: tuple[Path, dict[str, list[float]]]):
    folder, alone = trained
    ranks = [found(folder, name, parallel, rank) for rank in (0, 1)]
    assert ranks[0]["losses"] == ranks[1]["losses"]
    close = 1e-10 if name == "float64" else CLOSE
    assert ranks[0]["losses"] == pytest.approx(alone[name], rel=0, abs=close)
    assert len(alone[name]) == STEPS
    # The learning is real: losses that stay where they are would agree as well.
    assert alone[name][-1] < alone[name][0] - 1


def test_processes_solve_in_different_numbers_of_evaluations(trained: tuple[Path, dict[str, list[float]]]):
    for parallel in ("ddp", "fsdp2"):
        first, second = (found(trained[0], "plain", parallel, rank)["evaluations"] for rank in (0, 1))
        assert any(a != b for a, b in zip(first, second, strict=True))


def test_sharded_parameters_are_gathered_as_often_whatever_a_solve_takes(trained: tuple[Path, dict[str, list[float]]]):
    counts = found(trained[0], "plain", "fsdp2")["gathers"]
    assert counts["many evaluations"] > 2 * counts["few evaluations"]
    # The depth forward and backward, and the embedding, which is the root's and stays gathered.
    assert counts["few"] == counts["many"] == 3


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_goes_on_on_any_number_of_processes(
    name: str, parallel: str, trained: tuple[Path, dict[str, list[float]]]
):
    folder, alone = trained
    of_two = found(folder, name, parallel)
    assert of_two["again"] == of_two["losses"][SAVED_AT:]  # on as many, bit for bit
    assert of_two["of_one"] == pytest.approx(alone[name][SAVED_AT:], rel=0, abs=CLOSE)
    config = training_ranks.configs(folder / "tokens")[name]
    step = folder / name / parallel / f"step-{SAVED_AT:08d}"
    on_one, _ = training_ranks.train(config, ALONE, folder, resume=step)
    assert on_one == pytest.approx(of_two["losses"][SAVED_AT:], rel=0, abs=CLOSE)


def test_a_full_disk_of_one_process_is_told_to_all(trained: tuple[Path, dict[str, list[float]]]):
    ranks = [found(trained[0], "plain", "fsdp2", rank)["refusals"] for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 3
    for sentence in ranks[0]:
        assert re.search(rf"of step 99 could not be saved .*No space left.*of step {SAVED_AT} is undamaged", sentence)
    assert [path.name for path in (trained[0] / "plain" / "fsdp2").glob("*step*")] == [f"step-{SAVED_AT:08d}"]


def test_parts_of_a_batch_add_up_to_the_batch(trained: tuple[Path, dict[str, list[float]]]):
    tokens = trained[0] / "tokens"
    config = training_ranks.configs(tokens)["float64"]
    found = []
    for accumulate in (1, 2, 4):
        learning = learner.start(replace(config, training=replace(config.training, accumulate=accumulate)), ALONE)
        lines = [learner.update(learning, corpora.open_tokens(tokens), step) for step in range(4)]
        found.append([line[name] for line in lines for name in ("bits_per_byte", "gradient_norm")])
    assert found[1] == pytest.approx(found[0], rel=1e-10)
    assert found[2] == pytest.approx(found[0], rel=1e-10)


def test_a_checkpoint_of_another_model_is_refused(trained: tuple[Path, dict[str, list[float]]]):
    folder, _ = trained
    config = training_ranks.configs(folder / "tokens")["trellisnet"]
    with pytest.raises(UsageError, match=r"is of another model: model\.depth"):
        training_ranks.train(config, ALONE, folder, resume=folder / "plain" / "fsdp2" / f"step-{SAVED_AT:08d}")


def torchrun(data: Path, *arguments: str, processes: int = 2, largest: int | None = None) -> subprocess.Popen[bytes]:
    """Trains under torchrun; no file may grow beyond `largest` bytes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, "-m", "onelayer", "train", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=None if largest is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
    )


def kill(agent: subprocess.Popen[bytes]) -> None:
    """As a machine that goes down does: torchrun and its workers at once."""
    workers = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # others come and go
            if path.read_text().rpartition(")")[2].split()[1] == str(agent.pid):
                workers.append(int(path.parent.name))
    assert len(workers) == 2
    for pid in (agent.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    agent.communicate()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_run_killed_on_two_processes_goes_on_to_the_numbers_of_one(parallel: str, data: Path, tmp_path: Path):
    size = ["--preset", "tiny", "--steps", "24", "--save-every", "5", "--data", str(data)]
    alone, run = tmp_path / "alone", tmp_path / "run"
    with subprocess.Popen([sys.executable, "-m", "onelayer", "train", *size, "--out", str(alone)]) as process:
        with torchrun(data, *size, "--out", str(run), "--parallel", parallel) as together:
            while len(read_metrics(run)) < 9 and together.poll() is None:
                time.sleep(0.01)
            kill(together)
        assert process.wait() == 0
    done = max(int(line["step"]) for line in read_metrics(run))
    saved = int(checkpoints.newest(run / "checkpoints", ALONE)[1]["step"])
    assert done < 24, "the run ended before it was killed"
    assert done - saved <= 5
    with torchrun(data, "--resume", str(run), "--parallel", parallel) as together:
        errors = together.communicate()[1].decode()
        assert together.returncode == 0, errors
    losses, expected = (
        [line["bits_per_byte"] for line in read_metrics(folder) if line["kind"] == "train"] for folder in (run, alone)
    )
    assert losses == pytest.approx(expected, rel=0, abs=CLOSE)
    assert (run / "report.html").exists()


def test_what_does_not_fit_is_said_once(data: Path, tmp_path: Path):
    arguments = ["--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "run")]
    with torchrun(data, *arguments, "--parallel", "ddp", "--batch-size", "5") as process:
        errors = process.communicate()[1].decode()
    assert process.returncode != 0
    (line,) = re.findall(r"^onelayer: .*$", errors, re.MULTILINE)
    assert line.endswith("of 5 windows cannot be split evenly into 2 processes: make the batch size a multiple of 2.")
    assert not (tmp_path / "run").exists()


def test_a_line_that_one_process_cannot_write_stops_all_in_a_sentence(data: Path, tmp_path: Path):
    run, size = tmp_path / "run", ["--preset", "tiny", "--width", "8", "--heads", "1", "--context", "8"]
    options = ["--steps", "300", "--save-every", "20", "--unrolled-steps", "300"]
    # The metrics are the first file to reach that size.
    with torchrun(
        data, *size, *options, "--data", str(data), "--out", str(run), "--parallel", "ddp", largest=38_000
    ) as process:
        errors = process.communicate()[1].decode()
    assert process.returncode != 0
    (line,) = re.findall(r"^onelayer: .*$", errors, re.MULTILINE)
    assert line.startswith(f"onelayer: {run / 'metrics.jsonl'} cannot be written (File too large): make room")
    assert "Connection closed" not in errors
    done = max(int(line["step"]) for line in read_metrics(run))
    assert done - int(checkpoints.newest(run / "checkpoints", ALONE)[1]["step"]) <= 20


@pytest.mark.parametrize(
    ("environment", "options", "says"),
    [
        ({}, ("ddp", "cpu", 4, 1), "torchrun --nproc-per-node"),
        ({"WORLD_SIZE": "2"}, (None, "cpu", 4, 1), "add --parallel ddp"),
        ({"WORLD_SIZE": "2"}, ("dp", "cpu", 4, 1), "one of ddp, fsdp2"),
        ({"WORLD_SIZE": "2"}, ("ddp", "cpu", 4, 3), "multiple of 6"),
        ({}, (None, "cpu", 4, 3), "multiple of 3"),
        ({}, (None, "cuda", 4, 1), "no CUDA device"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(
    environment: dict[str, str], options: Any, says: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=says), processes(*options):
        pass
