"""The command line: what it draws and measures, and one sentence and exit code 2 for what cannot be done."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from onelayer import training
from onelayer.cli import main
from onelayer.metrics import Metrics, read_metrics
from onelayer.runs import load_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n\n" for i in range(300)))
    return path


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--preset", "tiny", "--data", str(data), "--run", str(folder)]) == 0
    return folder


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_a_seed_decides_what_is_drawn(run: Path, capsys: pytest.CaptureFixture[str]):
    def draw(*more: str) -> str:
        return output(capsys, "generate", str(run), "--prompt", "def ", "--bytes", "12", *more)

    assert draw("--seed", "5") == draw("--seed", "5")
    assert draw("--seed", "5") != draw("--seed", "6")
    assert draw("--temperature", "0", "--seed", "5") == draw("--temperature", "0", "--seed", "6")
    assert draw().startswith("def ")


def test_text_goes_on_beyond_the_context(run: Path, capsys: pytest.CaptureFixture[str]):
    prompt = "x" * 32  # the context of the preset, to the byte
    long = output(capsys, "generate", str(run), "--prompt", prompt, "--bytes", "40")
    assert len(long.encode()) >= 72
    # Greedy text is a function of the last 32 bytes alone.
    tail = output(capsys, "generate", str(run), "--prompt", "q" * 5 + "x" * 27, "--bytes", "3", "--temperature", "0")
    assert tail.startswith("qqqqq")


def test_evaluation_says_what_allowed_evaluations_cost(run: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    def bits(*more: str) -> float:
        lines = output(capsys, "evaluate", str(run), *more).splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith("bits per byte")))

    assert bits("--max-steps", "1") == 8.0
    assert bits() < bits("--max-steps", "2") < 8
    assert bits() == bits("--data", str(data)) == bits("--max-steps", "1000")


def test_text_is_turned_into_tokens_once_for_many_runs(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokens = tmp_path / "tokens"
    said = output(capsys, "tokenize", "--data", str(data), "--out", str(tokens))
    assert "bytes to train on (1 file)" in said
    before = {path: path.read_bytes() for path in tokens.iterdir()}
    for name in ("one", "two"):
        output(
            capsys, "train", "--preset", "tiny", "--data", str(tokens), "--run", str(tmp_path / name), "--steps", "4"
        )
        assert not (tmp_path / name / "tokens").exists()
        assert "bits per byte" in output(capsys, "evaluate", str(tmp_path / name))
    shared, own = (output(capsys, "evaluate", str(run), *more) for more in (["--data", str(tokens)], []))
    assert shared == own
    assert {path: path.read_bytes() for path in tokens.iterdir()} == before

    pairs = tmp_path / "pairs"
    said = output(capsys, "tokenize", "--data", str(data), "--out", str(pairs), "--vocabulary", "300")
    assert "of a vocabulary of 300" in said
    other = ("tokenize", "--data", str(data), "--out", str(tmp_path / "other"))
    assert "of a vocabulary of 300" in output(capsys, *other, "--tokenizer", str(pairs / "tokenizer.json"))
    assert {path.name: path.read_bytes() for path in pairs.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()
    }
    assert_refused(
        capsys,
        "vocabulary of 300, the model's of 256",
        "train",
        "--data",
        str(pairs),
        "--vocabulary",
        "256",
        "--run",
        str(tmp_path / "no"),
    )
    assert_refused(capsys, "another tokenizer", "evaluate", str(run), "--data", str(pairs))


def test_tokenizing_that_makes_no_sense(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    of_data = ("tokenize", "--data", str(data), "--out", str(out))
    assert_refused(capsys, "255 and must be at least 256", *of_data, "--vocabulary", "255")
    assert_refused(capsys, "ask for a smaller one", *of_data, "--vocabulary", "100000")
    assert_refused(capsys, "not allowed with", *of_data, "--vocabulary", "300", "--tokenizer", "tokenizer.json")
    assert_refused(capsys, "nowhere.json cannot be read", *of_data, "--tokenizer", str(tmp_path / "nowhere.json"))
    assert_refused(capsys, "text.txt: This is no tokenizer.json", *of_data, "--tokenizer", str(data))
    assert_refused(capsys, "--out", "tokenize", "--data", str(data))
    assert_refused(
        capsys, "missing.txt does not exist", "tokenize", "--data", str(tmp_path / "missing.txt"), "--out", "o"
    )
    assert not out.exists()
    output(capsys, *of_data)
    assert_refused(capsys, "exists already", *of_data)
    assert_refused(capsys, "holds tokens already", "tokenize", "--data", str(out), "--out", str(tmp_path / "again"))


def bad_data(folder: Path) -> dict[str, Path]:
    (folder / "empty.txt").write_bytes(b"")
    (folder / "short.txt").write_bytes(b"def f(): pass\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 400)
    (folder / "empty folder").mkdir()
    (folder / "images").mkdir()
    (folder / "images" / "one.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    return {
        "missing": folder / "missing.txt",
        "empty": folder / "empty.txt",
        "short": folder / "short.txt",
        "not decodable": folder / "latin.txt",
        "empty folder": folder / "empty folder",
        "no text": folder / "images",
    }


def assert_refused(capsys: pytest.CaptureFixture[str], says: str, *arguments: str) -> None:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith(".\n")
    assert "Traceback" not in error
    assert says.lower() in error.lower()


@pytest.mark.parametrize("kind", ["missing", "empty", "short", "not decodable", "empty folder", "no text"])
def test_data_that_will_not_do(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, run = bad_data(tmp_path)[kind], tmp_path / "run"
    assert_refused(capsys, path.name, "train", "--preset", "tiny", "--data", str(path), "--run", str(run))
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preset", "huge"], "small, tiny, gpu"),
        (["--model", "deep"], "equilibrium, untied, tied"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--steps", "many"], "steps"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--learning-rate", "-0.1"], "learning_rate must be a positive number"),
        (["--learning-rate", "nan"], "learning_rate must be a positive number"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--save-every", "0"], "save_every must be at least 1"),
        (["--context", "0"], "context must be at least 1"),
        (["--width", "31"], "multiple"),
        (["--max-steps", "-3"], "max_steps must be at least 1"),
        (["--rtol", "0"], "rtol must lie between 0 and 1"),
        (["--device", "abacus"], "cpu, cuda"),
        (["--precision", "int3"], "float32, bfloat16"),
        (["--verbosity", "9"], "--verbosity"),
        (["--model", "tied", "--max-steps", "4"], "max_steps is for equilibrium models"),
        (["--layers", "4"], "layers is for untied and tied models"),
        (["--kernel", "3"], "kernel is for the TrellisNet"),
        (["--architecture", "trellisnet", "--positions", "relative"], "positions is for the Transformer"),
    ],
)
def test_options_that_make_no_sense(
    options: list[str], says: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    assert_refused(capsys, says, "train", "--preset", "tiny", "--data", str(data), "--run", str(run), *options)
    assert not run.exists()


def test_an_existing_run_is_left_as_it_is(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert_refused(capsys, "--resume", "train", "--preset", "tiny", "--data", str(data), "--run", str(run))
    assert_refused(capsys, "--seed", "train", "--resume", str(run), "--seed", "3")
    assert_refused(capsys, "--model", "train", "--resume", str(run), "--model", "tied")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (tmp_path / "notes.txt").write_text("a file")
    assert_refused(capsys, "notes.txt", "train", "--preset", "tiny", "--run", str(tmp_path / "notes.txt"))


def test_a_folder_that_is_no_run(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert_refused(capsys, "not a run folder", "train", "--resume", str(folder))
        assert_refused(capsys, "not a run folder", "evaluate", str(folder))
        assert_refused(capsys, "not a run folder", "generate", str(folder), "--prompt", "def ")
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    for content in (
        "{",
        "[]",
        "{}",
        '{"preset": "tiny", "data": {"path": null}, "model": {"depth": 3}, "training": {}}',
    ):
        (broken / "config.json").write_text(content)
        assert_refused(capsys, "config.json", "evaluate", str(broken))


def test_a_damaged_model_is_not_used(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    weights = broken / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    assert_refused(capsys, "damaged", "generate", str(broken), "--prompt", "def ")
    assert_refused(capsys, "damaged", "evaluate", str(broken))
    weights.unlink()
    assert_refused(capsys, "missing", "generate", str(broken), "--prompt", "def ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", "x" * 33], "33 bytes"),
        (["--prompt", ""], "empty"),
        (["--prompt", "x", "--bytes", "0"], "at least 1"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--temperature", "inf"], "temperature"),
        (["--prompt", "x", "--seed", "-1"], "seed"),
        ([], "--prompt"),
    ],
)
def test_generation_that_makes_no_sense(options: list[str], says: str, run: Path, capsys: pytest.CaptureFixture[str]):
    assert_refused(capsys, says, "generate", str(run), *options)


def test_evaluation_that_makes_no_sense(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert_refused(capsys, "--max-steps", "evaluate", str(run), "--max-steps", "0")
    assert_refused(capsys, "missing.txt", "evaluate", str(run), "--data", str(tmp_path / "missing.txt"))
    assert_refused(capsys, "invent", "invent")
    assert_refused(capsys, "required")
    assert_refused(
        capsys, "nowhere to write found.json", "evaluate", str(run), "--json", str(tmp_path / "nowhere/found.json")
    )
    assert_refused(
        capsys, "nowhere to write found.png", "evaluate", str(run), "--plot", str(tmp_path / "nowhere/found.png")
    )
    assert_refused(capsys, f"{tmp_path} may not be written", "evaluate", str(run), "--json", str(tmp_path))


def test_a_model_in_place_of_its_run(run: Path, capsys: pytest.CaptureFixture[str]):
    assert_refused(capsys, f"name the run folder that it lies in, {run}.", "evaluate", str(run / "model"))


def test_tokens_that_are_gone_are_made_anew_as_it_says(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bare = tmp_path / "a bare run"
    shutil.copytree(run, bare)
    shutil.rmtree(bare / "tokens")
    assert_refused(capsys, "are gone", "evaluate", str(bare))
    assert main(["train", "--resume", str(bare)]) == 2
    (command,) = re.findall(r"onelayer (tokenize .*)\.$", capsys.readouterr().err.strip())
    assert main(shlex.split(command)) == 0
    assert output(capsys, "evaluate", str(bare)) == output(capsys, "evaluate", str(run))
    assert (bare / "tokens" / "train.bin").read_bytes() == (run / "tokens" / "train.bin").read_bytes()

    shutil.rmtree(bare / "tokens")
    config = (bare / "config.json").read_text()
    (bare / "config.json").write_text(config.replace(str(data), str(tmp_path / "gone.txt")))
    assert_refused(capsys, "restore one of the two", "evaluate", str(bare))


def test_a_folder_that_nothing_can_be_written_to(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # What a read-only disk does to the first file that a run opens, a folder in its place does for every user.
    closed = tmp_path / "closed"
    shutil.copytree(run, closed)
    (closed / ".lock").unlink()
    (closed / ".lock").mkdir()
    assert_refused(capsys, "make the folder one that you may write", "train", "--resume", str(closed))


def test_a_disk_that_fills_up_between_saves(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    class Full(Metrics):
        def write(self, line: dict[str, Any]) -> None:
            if line["step"] == 7:
                self._file = Path("/dev/full").open("a")  # noqa: SIM115
            super().write(line)

    full = tmp_path / "full"
    monkeypatch.setattr(training, "Metrics", Full)
    options = ["train", "--preset", "tiny", "--data", str(data), "--run", str(full)]
    capsys.readouterr()
    assert main(options) == 2
    says = f"onelayer: {full / 'metrics.jsonl'} cannot be written (No space left on device): make room"
    assert capsys.readouterr().err.splitlines()[-1].startswith(says)
    monkeypatch.undo()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "write_report", fail)
    assert main(["train", "--resume", str(full)]) == 2
    assert "the model is trained and saved" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert main(["train", "--resume", str(full)]) == 0
    both = [[line.get("bits_per_byte") for line in read_metrics(folder)] for folder in (full, run)]
    assert both[0] == both[1]
    weights = [load_model(folder)[0].state_dict() for folder in (full, run)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_disk_that_is_full_before_the_first_save(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    monkeypatch.setattr("onelayer.runs.write_json", fail)
    assert_refused(capsys, "No space left", "train", "--preset", "tiny", "--data", str(data), "--run", str(run))
    assert not run.exists()
