"""Checkpoints: what is read is what was written, or it is refused."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from onelayer import checkpoints
from onelayer.errors import UsageError
from onelayer.parallel import Processes

ALONE = Processes(torch.device("cpu"))


def some_tensors(step: int = 3) -> dict[str, Tensor]:
    return {
        "weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(step)),
        "step": torch.tensor(float(step)),
        "half": torch.arange(4, dtype=torch.bfloat16),
        "double": torch.arange(3, dtype=torch.float64) / 7,
    }


def save(folder: Path, step: int) -> None:
    checkpoints.save(folder, step, some_tensors(step), {"seconds": 0.5, "name": "é"}, ALONE)


def assert_holds(path: Path, step: int) -> None:
    tensors = {name: torch.full_like(tensor, -1) for name, tensor in some_tensors().items()}
    checkpoints.load(path, tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in some_tensors(step).items())


def test_what_was_written_is_read(tmp_path: Path):
    save(tmp_path / "checkpoints", 3)
    path, facts, complaints = checkpoints.newest(tmp_path / "checkpoints", ALONE)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert (facts["step"], facts["seconds"], facts["name"], complaints) == (3, 0.5, "é", [])
    assert_holds(path, 3)
    assert checkpoints.entries(path) == {name: tuple(tensor.shape) for name, tensor in some_tensors().items()}


@given(which=st.sampled_from(["facts.json", "*.safetensors"]), where=st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_is_noticed(tmp_path: Path, which: str, where: float):
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    save(tmp_path / "checkpoints", 3)
    (file,) = (tmp_path / "checkpoints" / "step-00000003").glob(which)
    data = bytearray(file.read_bytes())
    place = int(where * len(data))
    data[place] ^= 1 if chr(data[place]) not in " \n" else 64
    file.write_bytes(data)
    with pytest.raises(UsageError, match="undamaged") as error:
        checkpoints.newest(tmp_path / "checkpoints", ALONE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, left: int):
    save(tmp_path, 3)
    (file,) = (tmp_path / "step-00000003").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UsageError, match="damaged"):
        checkpoints.newest(tmp_path, ALONE)
    file.unlink()
    with pytest.raises(UsageError, match="a file is missing"):
        checkpoints.newest(tmp_path, ALONE)


def test_the_newest_undamaged_checkpoint_counts(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    with pytest.raises(UsageError, match="no checkpoint"):
        checkpoints.newest(folder, ALONE)
    for step in (5, 40, 300):
        save(folder, step)
    (folder / ".step-00000900.partial").mkdir()
    (folder / ".step-00000900.partial" / "shard.safetensors").write_bytes(b"half of it")
    path, facts, complaints = checkpoints.newest(folder, ALONE)
    assert (path.name, facts["step"], complaints) == ("step-00000300", 300, [])
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000040", "step-00000300"]

    (path / "facts.json").write_bytes(b"no")
    path, facts, complaints = checkpoints.newest(folder, ALONE)
    assert facts["step"] == 40
    assert len(complaints) == 1
    assert (folder / "damaged-step-00000300" / "facts.json").read_bytes() == b"no"
    assert_holds(path, 40)
    save(folder, 41)
    assert not (folder / ".step-00000900.partial").exists()

    for damaged in (40, 41):
        (folder / f"step-{damaged:08d}" / "facts.json").write_text("{}")
    with pytest.raises(UsageError, match="undamaged"):
        checkpoints.newest(folder, ALONE)


def test_a_step_is_saved_again_where_it_was(tmp_path: Path):
    save(tmp_path, 7)
    checkpoints.save(tmp_path, 7, some_tensors(8), {}, ALONE)
    assert_holds(checkpoints.newest(tmp_path, ALONE)[0], 8)


@pytest.mark.parametrize("after", range(3))
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1)
    calls = 0

    def flush(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", flush)
    with pytest.raises(
        UsageError, match=r"step 2 could not be saved \(No space left on device\).*of step 1 is"
    ) as error:
        save(tmp_path, 2)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    path, facts, complaints = checkpoints.newest(tmp_path, ALONE)
    assert (facts["step"], complaints) == (1, [])
    assert_holds(path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    save(tmp_path, 2)
    assert checkpoints.newest(tmp_path, ALONE)[1]["step"] == 2


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "one.json"
    checkpoints.write_bytes(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["one.json"]


def test_tensors_of_other_names_or_shapes_are_refused(tmp_path: Path):
    save(tmp_path, 3)
    path = tmp_path / "step-00000003"
    with pytest.raises(UsageError, match=r"another model: weight is \[4, 3\] here, and it holds it as \[5, 3\]"):
        checkpoints.load(path, some_tensors() | {"weight": torch.zeros(4, 3)})
    with pytest.raises(UsageError, match=r"another model: bias is .* does not hold it"):
        checkpoints.load(path, {"bias": torch.zeros(4)})


def test_an_optimizer_goes_on_where_it_stopped(tmp_path: Path):
    def some_model() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4))
        groups = [{"params": [model[1].weight, model[0].bias], "weight_decay": 0.1}, {"params": [model[0].weight]}]
        return model, torch.optim.AdamW(groups, lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    model, optimizer = some_model()
    step(model, optimizer)
    checkpoints.save(tmp_path, 1, checkpoints.optimizer_tensors(optimizer, model), {}, ALONE)
    other, other_optimizer = some_model()
    checkpoints.prime(other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), some_model()[0].parameters(), strict=True))
    other.load_state_dict(model.state_dict())
    checkpoints.load(tmp_path / "step-00000001", checkpoints.optimizer_tensors(other_optimizer, other))
    for _ in range(3):
        step(model, optimizer)
        step(other, other_optimizer)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_facts_are_json_and_nothing_is_pickled(tmp_path: Path):
    save(tmp_path, 3)
    files = {file.suffix for file in (tmp_path / "step-00000003").iterdir()}
    assert files == {".json", ".safetensors"}
    assert json.loads((tmp_path / "step-00000003" / "facts.json").read_text())["step"] == 3
