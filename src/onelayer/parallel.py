"""Training on several processes: what they share, and what they tell each other.

The processes are those of `torchrun`, one for each device. A batch is split between them, sample by sample, so that
the same samples make the same update whatever their number.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from onelayer.errors import UsageError
from onelayer.models.language_model import LanguageModel

Result = TypeVar("Result")

Parallel = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them.

    >>> Processes(torch.device("cpu")).first
    True

    Attributes:
        device: of this process.
        parallel: how they share the work; `None` where there is one process.
        rank: number of this process, from 0.
        count: of the processes.
        mesh: all of them in a row; `None` where there is one.
    """

    device: torch.device
    parallel: Parallel | None = None
    rank: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def rows(self, batch_size: int) -> range:
        """The rows of a batch that this process takes."""
        share = batch_size // self.count
        return range(self.rank * share, (self.rank + 1) * share)

    def wrap(self, model: LanguageModel) -> nn.Module:
        """The model to call in training, whose gradients are those of the whole batch.

        Under "fsdp2" the parameters of `model` itself are sharded: its depth, which holds the equilibrium layer, as one
        unit, so that a solve of any length gathers them once.
        """
        if self.parallel == "ddp":
            return DistributedDataParallel(model)
        if self.parallel == "fsdp2":
            fully_shard(model.depth, mesh=self.mesh)
            fully_shard(model, mesh=self.mesh)
        return model

    @contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Within it, backward adds to the gradients of this process alone, but for the last part of a batch."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
        quiet = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
        with quiet, warnings.catch_warnings():
            # It warns of writing into what a call returns, which nothing here does.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            yield

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes, first to last, along the first dimension; all have as many."""
        if self.parallel is None:
            return values
        gathered = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(gathered, values.contiguous())
        return torch.cat(gathered)

    def share(self, value: Any) -> Any:
        """What the first process has, for all."""
        if self.parallel is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first_alone(self, action: Callable[[], Result]) -> Result:
        """What an action of the first process returns, for all; a `UsageError` of it is raised in all."""
        if self.parallel is None:
            return action()
        answer: tuple[Any, str | None] = (None, None)
        if self.first:
            try:
                answer = (action(), None)
            except UsageError as error:
                answer = (None, str(error))
        value, problem = self.share(answer)
        if problem is not None:
            raise UsageError(problem)
        return value

    def split(self, rows: Tensor) -> Tensor:
        """Rows of this process as its part of those of all, for a checkpoint that any number of processes can read."""
        return rows if self.mesh is None else DTensor.from_local(rows, self.mesh, [Shard(0)])


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, as one; all processes have to ask.

    >>> whole(torch.ones(2))
    tensor([1., 1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def processes(parallel: str | None, device: str, batch_size: int, accumulate: int) -> Iterator[Processes]:
    """Joins the processes that `torchrun` has started.

    >>> with processes(None, "cpu", batch_size=16, accumulate=1) as group:
    ...     group.count
    1

    Args:
        parallel: "ddp" or "fsdp2"; `None` for this process alone.
        device: "cpu" or "cuda".
        batch_size: windows in an update, which the processes share.
        accumulate: parts that each process takes its share in.

    Returns:
        A context that gives the `Processes`.

    Raises:
        UsageError: the choice does not fit how the command was started, the machine or the batch.
    """
    if parallel is not None and parallel not in get_args(Parallel):
        raise UsageError(f"parallel must be one of {', '.join(get_args(Parallel))}, not {parallel!r}.")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if parallel is None and count > 1:
        raise UsageError(f"torchrun has started {count} processes: add --parallel ddp or --parallel fsdp2.")
    if parallel is not None and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            f"--parallel {parallel} takes processes to share the work: start it as "
            "torchrun --nproc-per-node 2 -m onelayer train ..., or leave it out."
        )
    if batch_size % (count * accumulate):
        parts = (
            f"{count} processes"
            if accumulate == 1
            else f"{accumulate} parts for each process, of which there are {count}"
        )
        raise UsageError(
            f"A batch of {batch_size} windows cannot be split evenly into {parts}: make the batch size a multiple of "
            f"{count * accumulate}."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("There is no CUDA device on this machine: choose the device cpu or the preset small.")
    own = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device(device)
    if parallel is None:
        yield Processes(own)
        return
    if own.type == "cuda":
        if own.index is not None and own.index >= torch.cuda.device_count():
            raise UsageError(
                f"There are more processes than the {torch.cuda.device_count()} CUDA devices of this machine: "
                "start one for each device."
            )
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(own.type, (count,))
        yield Processes(own, parallel, dist.get_rank(), count, mesh)  # pyright: ignore[reportArgumentType]
        dist.barrier()  # who leaves while another still speaks to it is an error there
    finally:
        dist.destroy_process_group()
