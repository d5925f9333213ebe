"""Checkpoints: a folder each, whole or not there, and known to be undamaged before it is used.

The tensors of a checkpoint are safetensors files that the processes of a training write side by side, by
`torch.distributed.checkpoint`, and that any other number of processes can read. A folder is written under a temporary
name, flushed to disk and renamed, so a run that is killed or meets a full disk while it saves leaves the checkpoints
before as they were. Its `facts.json` has a checksum of every file. Nothing is pickled, so loading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from onelayer.errors import UsageError
from onelayer.files import file_checksum, flush_folder, write_bytes
from onelayer.parallel import Processes

KEPT = 2  # the newest, and the one before it in case the newest does not survive the disk
FACTS = "facts.json"


def save(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], group: Processes) -> None:
    """Writes `folder/step-<step>` and removes all but the newest two; every process calls it.

    >>> save(Path("runs/first/checkpoints"), 100, tensors, {"seconds": 9.5}, group)      # doctest: +SKIP

    Args:
        folder: of the checkpoints; its parent exists.
        step: number of updates behind the tensors.
        tensors: by name; those that are sharded are written by the processes that hold them.
        facts: anything JSON can hold.
        group: of the processes.

    Raises:
        UsageError: it could not be written, as on a full disk; the checkpoints before are as they were.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f".{target.name}.partial"
    problem = _attempt(lambda: _make_room(partial)) if group.first else None
    problem = group.share(problem)
    if problem is None:
        # It gathers what went wrong in any process, so that all know.
        problem = _attempt(lambda: _write_tensors(partial, tensors))
    if problem is None and group.first:
        problem = _attempt(lambda: _finish(partial, target, facts | {"step": step}))
    problem = group.share(problem)
    if problem is None:
        return
    if group.first:
        shutil.rmtree(partial, ignore_errors=True)
    left = _numbered(folder)
    after = f"the one of step {_step(left[0])} is undamaged, so resume from it" if left else "none was there before"
    raise UsageError(f"The checkpoint of step {step} could not be saved ({problem}): make room on the disk; {after}.")


def newest(folder: Path, group: Processes) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest undamaged checkpoint of a folder; damaged ones that are newer are renamed out of the way.

    >>> path, facts, complaints = newest(Path("runs/first/checkpoints"), group)          # doctest: +SKIP

    Returns:
        Its folder, its facts, and one sentence for each newer one that was passed over because it is damaged.

    Raises:
        UsageError: there is none.
    """
    found = group.share(_newest(folder) if group.first else None)
    if isinstance(found, str):
        raise UsageError(found)
    return found


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors with those of a checkpoint of the same names, whatever the number of processes that wrote it.

    >>> load(path, {"model.embedding.weight": model.embedding.weight})   # doctest: +SKIP

    Raises:
        UsageError: the checkpoint holds other tensors, as one of another architecture does.
    """
    stored = entries(path)
    for name, tensor in tensors.items():
        if stored.get(name) != tuple(tensor.shape):
            found = f"holds it as {list(stored[name])}" if name in stored else "does not hold it"
            raise UsageError(
                f"The checkpoint {path} is of another model: {name} is {list(tensor.shape)} here, and it {found}; "
                "restore the config.json that was beside it."
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # one process is no group, and need not be
        distributed.load(  # pyright: ignore[reportPrivateImportUsage]
            tensors, storage_reader=HuggingFaceStorageReader(str(path))
        )


def entries(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint.

    >>> entries(path)["model.embedding.weight"]                                 # doctest: +SKIP
    (256, 128)
    """
    metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in metadata.items()}  # pyright: ignore[reportAttributeAccessIssue]


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


def prime(optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimizer that has not stepped yet the entries of its state, for a checkpoint to fill.

    >>> optimizer = torch.optim.AdamW(nn.Linear(2, 3).parameters())
    >>> prime(optimizer)
    >>> sorted(next(iter(optimizer.state.values())))
    ['exp_avg', 'exp_avg_sq', 'step']
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _make_room(partial: Path) -> None:
    partial.parent.mkdir(exist_ok=True)
    for old in partial.parent.glob(".*.partial"):  # a run that was killed leaves half a checkpoint
        shutil.rmtree(old)
    partial.mkdir()


def _write_tensors(partial: Path, tensors: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        distributed.save(  # pyright: ignore[reportPrivateImportUsage]
            tensors, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True)
        )


def _finish(partial: Path, target: Path, facts: dict[str, Any]) -> None:
    files = {path.name: file_checksum(path) for path in sorted(partial.glob("*.safetensors"))}
    facts = facts | {"files": files}
    write_bytes(partial / FACTS, (json.dumps(facts | {"sha256": _digest(facts)}, indent=2) + "\n").encode())
    if target.exists():  # resumed there and saved again
        shutil.rmtree(target)
    os.replace(partial, target)
    flush_folder(target.parent)
    for old in _numbered(target.parent)[KEPT:]:
        shutil.rmtree(old)


def _attempt(action: Any) -> str | None:
    """What went wrong, in a few words; `None` where nothing did."""
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    except CheckpointException as failed:
        causes = [error for error, _ in failed.failures.values()]
        if not all(isinstance(error, OSError | RuntimeError) for error in causes):
            raise
        return " ".join(str(getattr(causes[0], "strerror", None) or causes[0]).split())[:200]
    return None


def _newest(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | str:
    complaints: list[str] = []
    damaged: list[Path] = []
    for path in _numbered(folder):
        problem = _why_damaged(path)
        if problem is None:
            facts = json.loads((path / FACTS).read_text())
            for bad in damaged:
                bad.rename(bad.with_name(f"damaged-{bad.name}"))
            return path, facts, complaints
        damaged.append(path)
        complaints.append(f"The checkpoint {path} is damaged ({problem}).")
    if damaged:
        return f"No checkpoint in {folder} is undamaged ({complaints[0]}): train anew in another run folder."
    return f"There is no checkpoint in {folder}: train anew in another run folder."


def _why_damaged(path: Path) -> str | None:
    try:
        facts = json.loads((path / FACTS).read_text())
        if facts.pop("sha256") != _digest(facts):
            return f"the checksum of {FACTS} does not match"
        files = facts["files"]
        if sorted(files) != sorted(file.name for file in path.glob("*.safetensors")):
            return "a file is missing"
        for name, checksum in files.items():
            if file_checksum(path / name) != checksum:
                return f"the checksum of {name} does not match"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def _numbered(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
