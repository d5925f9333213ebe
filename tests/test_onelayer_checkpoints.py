"""Checkpoints: what is read is what was written, or it is refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from onelayer import checkpoints
from onelayer.checkpoints import Checkpoint
from onelayer.errors import UsageError


def some_checkpoint(step: int = 3) -> Checkpoint:
    tensors = {
        "weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(step)),
        "step": torch.tensor(float(step)),
        "half": torch.arange(4, dtype=torch.bfloat16),
        "random": torch.arange(9, dtype=torch.uint8),
        "empty": torch.empty(0, 2),
    }
    return Checkpoint(tensors, {"step": step, "seconds": 0.1 + 0.2, "name": "é"})


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return (
        a.facts == b.facts
        and a.tensors.keys() == b.tensors.keys()
        and all(a.tensors[k].dtype == b.tensors[k].dtype and torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
    )


def test_what_was_written_is_read(tmp_path: Path):
    checkpoints.write(tmp_path / "one.safetensors", some_checkpoint())
    assert same(checkpoints.read(tmp_path / "one.safetensors"), some_checkpoint())
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


@given(where=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_is_noticed(tmp_path: Path, where: float, change: int):
    path = tmp_path / "one.safetensors"
    checkpoints.write(path, some_checkpoint())
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= change
    path.write_bytes(data)
    try:
        found = checkpoints.read(path)
    except UsageError as error:
        said = str(error)
    else:  # one kind of white space of the header for another
        assert same(found, some_checkpoint())
        return
    assert "damaged" in said
    assert "\n" not in said


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, left: int):
    path = tmp_path / "one.safetensors"
    checkpoints.write(path, some_checkpoint())
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UsageError, match="damaged"):
        checkpoints.read(path)


def test_a_safetensors_file_of_another_program_is_no_checkpoint(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="damaged"):
        checkpoints.read(tmp_path / "other.safetensors")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "one.safetensors"
    checkpoints.write(path, some_checkpoint(1))

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.write(path, some_checkpoint(2))
    monkeypatch.undo()
    assert same(checkpoints.read(path), some_checkpoint(1))
    assert [file.name for file in tmp_path.iterdir()] == ["one.safetensors"]


def test_the_newest_undamaged_checkpoint_counts(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    with pytest.raises(UsageError, match="no checkpoint"):
        checkpoints.newest(folder)
    for step in (5, 40, 300):
        checkpoints.save_numbered(folder, step, some_checkpoint(step))
    (folder / ".step-00000900.safetensors.17.partial").write_bytes(b"half of it")
    newest, complaints = checkpoints.newest(folder)
    assert (newest.facts["step"], complaints) == (300, [])
    assert len(list(folder.glob("*.safetensors"))) == checkpoints.KEPT

    (folder / "step-00000300.safetensors").write_bytes(b"no")
    newest, complaints = checkpoints.newest(folder)
    assert newest.facts["step"] == 40
    assert len(complaints) == 1
    assert (folder / "step-00000300.safetensors.damaged").read_bytes() == b"no"

    (folder / "step-00000040.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match="undamaged"):
        checkpoints.newest(folder)


def test_an_optimizer_goes_on_where_it_stopped(tmp_path: Path):
    def some_model() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4))
        groups = [{"params": [model[1].weight, model[0].bias], "weight_decay": 0.0}, {"params": [model[0].weight]}]
        return model, torch.optim.AdamW(groups, lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    model, optimizer = some_model()
    step(model, optimizer)
    other, other_optimizer = some_model()
    other.load_state_dict(model.state_dict())
    checkpoints.write(tmp_path / "one.safetensors", Checkpoint(checkpoints.optimizer_tensors(optimizer, model), {}))
    checkpoints.restore_optimizer(other_optimizer, other, checkpoints.read(tmp_path / "one.safetensors").tensors)
    for _ in range(3):
        step(model, optimizer)
        step(other, other_optimizer)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_facts_are_json(tmp_path: Path):
    checkpoints.write(tmp_path / "one.safetensors", some_checkpoint())
    header = (tmp_path / "one.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert json.loads(json.loads(header[8 : 8 + length])["__metadata__"]["facts"])["step"] == 3
