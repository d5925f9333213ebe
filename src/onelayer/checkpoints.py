"""Checkpoints: one safetensors file each, whole or not there, and known to be undamaged before it is used.

A file is written under a temporary name in its own folder, flushed to disk and renamed, so a run that is killed while
it saves leaves the previous checkpoints as they were. Its header carries a checksum of everything else in it. Nothing
is pickled, so loading a checkpoint runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from onelayer.errors import UsageError

KEPT = 2  # the newest, and the one before it in case the newest does not survive the disk


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Named tensors with facts about them.

    >>> Checkpoint({"weight": torch.zeros(2)}, {"step": 10}).facts["step"]
    10

    Attributes:
        tensors: by name, on the CPU when read from a file.
        facts: anything JSON can hold.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file in one step: readers see the old content or the new, also after a crash.

    >>> write_bytes(Path("config.json"), b"{}")                                 # doctest: +SKIP

    Args:
        path: in an existing folder.
        data: the whole new content.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself is safe once the folder is on disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint in one step.

    >>> write(Path("model.safetensors"), Checkpoint(model.state_dict(), {}))    # doctest: +SKIP

    Args:
        path: in an existing folder.
        checkpoint: its tensors may lie on any device.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    facts = json.dumps(checkpoint.facts, sort_keys=True)
    write_bytes(path, save(tensors, {"facts": facts, "sha256": checksum(tensors, facts)}))


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint and makes sure that it is what was written.

    >>> read(Path("runs/first/model.safetensors")).facts                        # doctest: +SKIP
    {'step': 900}

    Raises:
        UsageError: the file is missing, damaged, cut short, or no checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportPrivateImportUsage]
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        facts = header.get("facts", "")
        if header.get("sha256") != checksum(tensors, facts):
            raise UsageError(f"The checkpoint {path} is damaged, its checksum does not match.")
        return Checkpoint(tensors, json.loads(facts))
    except FileNotFoundError:
        raise UsageError(f"The checkpoint {path} does not exist: name a run that has saved.") from None
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"The checkpoint {path} is damaged ({_short(error)}).") from None


def save_numbered(folder: Path, step: int, checkpoint: Checkpoint) -> None:
    """Writes `folder/step-<step>.safetensors` and removes all but the newest two.

    >>> save_numbered(Path("runs/first/checkpoints"), 100, checkpoint)          # doctest: +SKIP
    """
    folder.mkdir(exist_ok=True)
    write(folder / f"step-{step:08d}.safetensors", checkpoint)
    for old in [*_numbered(folder)[KEPT:], *folder.glob(".*.partial")]:  # a run that was killed leaves half a file
        old.unlink()


def newest(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest undamaged checkpoint of a folder; damaged ones that are newer are renamed out of the way.

    >>> checkpoint, complaints = newest(Path("runs/first/checkpoints"))         # doctest: +SKIP

    Returns:
        The checkpoint, and one sentence for each newer one that was passed over because it is damaged.

    Raises:
        UsageError: there is none.
    """
    damaged: list[Path] = []
    complaints: list[str] = []
    for file in _numbered(folder):
        try:
            found = read(file)
        except UsageError as error:
            damaged.append(file)
            complaints.append(str(error))
            continue
        for bad in damaged:  # or it would pass for the newest until the run has overtaken it
            bad.replace(bad.with_name(f"{bad.name}.damaged"))
        return found, complaints
    if damaged:
        raise UsageError(f"No checkpoint in {folder} is undamaged ({complaints[0]}): train anew in another run folder.")
    raise UsageError(f"There is no checkpoint in {folder}: train anew in another run folder.")


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `optimizer.<parameter>.<entry>`.

    >>> optimizer_tensors(optimizer, model)                                     # doctest: +SKIP
    {'optimizer.embedding.weight.exp_avg': tensor(...), ...}
    """
    return {
        f"optimizer.{name}.{entry}": value
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave, each entry on the device where the optimizer wants it.

    >>> restore_optimizer(optimizer, model, checkpoint.tensors)                 # doctest: +SKIP
    """
    packed = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, parameter in enumerate(parameters):
        prefix = f"optimizer.{names[id(parameter)]}."
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        packed["state"][index] = state
    optimizer.load_state_dict(packed)


def random_tensors() -> dict[str, Tensor]:
    """The states of torch's random generators.

    >>> sorted(random_tensors())[0]
    'random.cpu'
    """
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(tensors: dict[str, Tensor]) -> None:
    """Puts back what `random_tensors` gave.

    >>> restore_random(random_tensors())
    """
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def checksum(tensors: dict[str, Tensor], facts: str) -> str:
    """What changes when any entry, shape, dtype or name of the tensors changes, or the facts do.

    >>> checksum({"weight": torch.zeros(2)}, "")[:8]
    'c8c984a4'

    Args:
        tensors: by name, contiguous ones on the CPU.
        facts: any text.

    Returns:
        A SHA-256 digest in hexadecimal.
    """
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
