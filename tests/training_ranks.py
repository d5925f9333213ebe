"""What each of two processes does in the tests of training on several; a light module, as each imports it anew."""

import errno
import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import equilibria as eq
from onelayer import checkpoints, learner
from onelayer.corpora.prepared import open_tokens
from onelayer.errors import UsageError
from onelayer.parallel import Processes, processes
from onelayer.presets import RunConfig, preset

STEPS, SAVED_AT = 20, 10


def some_config(data: Path, **model: Any) -> RunConfig:
    config = preset("tiny")
    training = replace(config.training, steps=STEPS, unrolled_steps=2, accumulate=2)
    return replace(config, data=str(data), model=replace(config.model, **model), training=training)


# Everything that could tell one process from two: accumulation, relative positions, a memory that crosses windows, a
# start that learns, weight normalisation, a vocabulary in clusters; and the plainest, in float64.
def configs(data: Path) -> dict[str, RunConfig]:
    plain = some_config(data)
    options: dict[str, Any] = {"memory": 8, "positions": "relative", "warm_start": True, "cutoffs": (64, 120)}
    return {
        "plain": plain,
        "options": some_config(data, **options),
        "trellisnet": some_config(data, architecture="trellisnet", weight_norm=True, max_steps=60),
        "explicit": some_config(data, depth="untied"),
        "float64": replace(plain, training=replace(plain.training, precision="float64")),
    }


def train(
    config: RunConfig, group: Processes, folder: Path, resume: Path | None = None
) -> tuple[list[float], list[int]]:
    """Losses of all updates, or of those after the checkpoint, and the evaluations that this process made in each."""
    assert config.data is not None
    corpus = open_tokens(config.data)
    learning = learner.start(config, group)
    first = 0
    if resume is not None:
        learning.load(resume)
        first = SAVED_AT
    losses, evaluations = [], []
    for step in range(first, STEPS):
        with eq.monitor(learning.model) as reports:
            losses.append(learner.update(learning, corpus, step)["bits_per_byte"])
        evaluations.append(sum(report.evaluations for report in reports))
        if step + 1 == SAVED_AT and resume is None:
            checkpoints.save(folder, SAVED_AT, learning.tensors(), {"of": "a test"}, group)
    return losses, evaluations


class Gathers(TorchDispatchMode):
    """Counts the all-gathers into one buffer, which are those of sharded parameters."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allgather_base" in str(func) or "all_gather_into_tensor" in str(func)
        return func(*args, **(kwargs or {}))


def gathers(config: RunConfig, group: Processes) -> dict[str, int]:
    """All-gathers of parameters in an update whose solves make few or many evaluations, and those evaluations."""
    assert config.data is not None
    corpus, found = open_tokens(config.data), {}
    for name, max_steps in (("few", 3), ("many", 20)):
        training = replace(config.training, unrolled_steps=0, accumulate=1)
        model = replace(config.model, rtol=1e-6, max_steps=max_steps, backward_rtol=1e-6, backward_max_steps=max_steps)
        learning = learner.start(replace(config, model=model, training=training), group)
        with eq.monitor(learning.model) as reports, Gathers() as gathered:
            learner.update(learning, corpus, 0)
        found[name] = gathered.count
        found[f"{name} evaluations"] = sum(report.evaluations for report in reports)
    return found


def refusals(config: RunConfig, group: Processes, folder: Path) -> list[str]:
    """What this process says of saves for which the disk is full in one of the two, at the tensors or at the end."""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    learning, said = learner.start(config, group), []
    for rank, place in ((0, "os.fsync"), (1, "os.fsync"), (0, "onelayer.checkpoints.write_bytes")):
        with pytest.MonkeyPatch.context() as patch:
            if group.rank == rank:
                patch.setattr(place, full)
            try:
                checkpoints.save(folder, 99, learning.tensors(), {}, group)
            except UsageError as error:
                said.append(str(error))
    return said


def on_two_processes(data: Path, folder: Path) -> None:
    """Every configuration under "ddp" and "fsdp2"; what came of it lies in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, data, folder), nprocs=2)


def _process(rank: int, port: int, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    for number, parallel in enumerate(("ddp", "fsdp2")):
        os.environ["MASTER_PORT"] = str(port + number)
        with processes(parallel, "cpu", 4, 2) as group:
            for name, config in configs(data).items():
                own = folder / name / parallel
                if group.first:
                    own.mkdir(parents=True)
                losses, evaluations = train(config, group, own)
                again, _ = train(config, group, own, resume=own / f"step-{SAVED_AT:08d}")
                of_one, _ = train(config, group, own, resume=folder / name / "one" / f"step-{SAVED_AT:08d}")
                found = {"losses": losses, "again": again, "of_one": of_one, "evaluations": evaluations}
                if parallel == "fsdp2" and name == "plain":
                    found |= {"gathers": gathers(config, group), "refusals": refusals(config, group, own)}
                (own / f"found-{rank}.json").write_text(json.dumps(found))
