"""What learns: a model with its optimizer, seen from one of the processes that train it together, and its updates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import equilibria as eq
from onelayer import checkpoints
from onelayer.corpora import batches
from onelayer.corpora.prepared import Corpus
from onelayer.errors import UsageError
from onelayer.models.language_model import IGNORED, LanguageModel, Output
from onelayer.models.window import Memory
from onelayer.parallel import Processes, whole
from onelayer.presets import RunConfig, TrainingConfig


@dataclass(eq=False)
class Learner:
    """A model in training.

    >>> learner = start(preset("tiny"), Processes(torch.device("cpu")))         # doctest: +SKIP
    >>> update(learner, corpus, step=0)["bits_per_byte"]                        # doctest: +SKIP
    8.4

    Attributes:
        config: of the run.
        group: the processes that train it together.
        model: its parameters, sharded where the processes shard them.
        called: the same model as it is called in training.
        optimizer: of its parameters.
        memory: of the segments before, for the rows of this process; `None` at first, or where there is none.
    """

    config: RunConfig
    group: Processes
    model: LanguageModel
    called: nn.Module
    optimizer: torch.optim.Optimizer
    memory: Memory | None = field(default=None)

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by name: the model, its optimizer and the memory of the segments before."""
        weights = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return weights | checkpoints.optimizer_tensors(self.optimizer, self.model) | self._remembered()

    def weights(self) -> dict[str, Tensor]:
        """The weights on the CPU, whole; all processes have to ask."""
        return {name: whole(tensor).detach().cpu() for name, tensor in self.model.state_dict().items()}

    def load(self, checkpoint: Path) -> None:
        """Goes back to where a checkpoint was made, whatever the number of processes then.

        Raises:
            UsageError: the checkpoint is of another model.
        """
        stored = checkpoints.entries(checkpoint)
        if any(name.startswith("optimizer.") for name in stored):  # there is none before the first update
            checkpoints.prime(self.optimizer)
        if self.config.model.memory and "memory.x" in stored:
            rows = self.group.rows(self.config.training.batch_size)
            x, *states = (
                torch.zeros(len(rows), *shape[1:], device=self.group.device, dtype=self.model.embedding.weight.dtype)
                for name, shape in sorted(stored.items())
                if name.startswith("memory.")
            )
            self.memory = Memory(x, tuple(states))
        checkpoints.load(checkpoint, self.tensors())

    def _remembered(self) -> dict[str, Tensor]:
        if self.memory is None:
            return {}
        # The name of the text comes first in sorted order, and those of a hundred thousand layers in theirs.
        named = {"memory.x": self.memory.x} | {f"memory.x{k:05d}": s for k, s in enumerate(self.memory.states)}
        return {name: self.group.split(tensor.contiguous()) for name, tensor in named.items()}


def start(config: RunConfig, group: Processes) -> Learner:
    """A model with its first weights, which are the same in every process, and an optimizer.

    >>> start(preset("tiny"), Processes(torch.device("cpu"))).memory            # doctest: +SKIP
    """
    torch.manual_seed(config.training.seed)
    model = LanguageModel(config.model).to(group.device)
    if config.training.precision == "float64":
        model.double()
    called = group.wrap(model)
    return Learner(config, group, model, called, make_optimizer(model, config.training))


def update(learner: Learner, corpus: Corpus, step: int) -> dict[str, Any]:
    """One update of the weights, by all processes together.

    Args:
        learner: changed in place.
        corpus: its text.
        step: number of the update, from 0.

    Returns:
        What `metrics.jsonl` says of the update; figures of the equilibrium are `None` where none was solved for.

    Raises:
        UsageError: the loss or the gradient is not finite.
    """
    config, training = learner.config, learner.config.training
    rows = learner.group.rows(training.batch_size)
    x, y = batches.batch(
        corpus.train, step, training.batch_size, config.model.context, training.seed, rows, config.model.memory > 0
    )
    found = advance(learner, x, y, torch.from_numpy(corpus.tokenizer.lengths)[y], step)
    line = {name: getattr(found, name) for name in ("bits_per_byte", "learning_rate", "gradient_norm")}
    return line | _of_the_equilibrium(found.rows)


class Advance(NamedTuple):
    """What an update of the weights met on its way.

    Attributes:
        bits_per_byte: the loss.
        learning_rate: of this update.
        gradient_norm: before it was clipped.
        rows: what each row of the batch tells of its loss and its solves, float64 `(rows, COLUMNS)`.
    """

    bits_per_byte: float
    learning_rate: float
    gradient_norm: float
    rows: Tensor


def advance(learner: Learner, x: Tensor, y: Tensor, lengths: Tensor, step: int) -> Advance:
    """One update of the weights on a batch, by all processes together.

    Args:
        learner: changed in place.
        x, y: tokens and those that follow, int64 `(rows, time)`, the rows of this process; a target of `IGNORED` is
            not learnt from.
        lengths: bytes that each target stands for, likewise.
        step: number of the update, from 0.

    Raises:
        UsageError: the loss or the gradient is not finite.
    """
    config, group, model = learner.config, learner.group, learner.model
    training = config.training
    learning_rate = learning_rate_at(step, training)
    for parameters in learner.optimizer.param_groups:
        parameters["lr"] = learning_rate
    # Masks and probes are those of the step, so that a resumed run draws what an uninterrupted one draws.
    torch.manual_seed((training.seed * 1_000_003 + step) * 10_007 + group.rank)
    x, y, lengths = x.to(group.device), y.to(group.device), lengths.to(group.device)
    unrolled = training.unrolled_layers if model.is_equilibrium and step < training.unrolled_steps else None
    learner.called.train()
    found: list[Tensor] = []
    memories: list[Memory] = []
    share = len(x) // training.accumulate
    for part in range(training.accumulate):
        own = slice(part * share, (part + 1) * share)
        before = learner.memory
        if before is not None:
            before = Memory(before.x[own], tuple(state[own] for state in before.states))
        with group.accumulating(learner.called, part == training.accumulate - 1):
            with config.autocast(group.device):
                output: Output = learner.called(x[own], y[own], memory=before, unrolled=unrolled)
            assert output.losses is not None
            # In nats, as learning rates and gradient norms are usually quoted for.
            loss = output.losses.sum() / (y[own] != IGNORED).sum()
            ((loss + output.penalty) / training.accumulate).backward()
        found.append(_of_each_row(output, lengths[own]))
        if output.memory is not None:
            memories.append(output.memory)
    if memories:
        states = (torch.cat(parts) for parts in zip(*(memory.states for memory in memories), strict=True))
        learner.memory = Memory(torch.cat([memory.x for memory in memories]), tuple(states))
    norm = float(whole(nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)))
    rows = group.gather(torch.cat(found)).cpu()
    nats, lengths_of_all = rows[:, :2].sum(0).tolist()
    bits_per_byte = nats / lengths_of_all / math.log(2)
    if not math.isfinite(norm + bits_per_byte):
        raise UsageError(
            f"Training diverged at step {step + 1}, its loss is {bits_per_byte} and its gradient {norm}: "
            "train anew with a lower learning rate."
        )
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    return Advance(bits_per_byte, learning_rate, norm, rows)


# What each row of a batch tells of its solves, in the columns of a tensor that processes can gather.
COLUMNS = ("nats", "bytes", "steps", "residual", "failed", "adjoint_steps", "adjoint_residual", "adjoint_failed")


def _of_each_row(output: Output, lengths: Tensor) -> Tensor:
    assert output.losses is not None
    nats = output.losses.detach().double().sum(1)
    nothing = torch.full_like(nats, math.nan)
    known = [nats, lengths.double().sum(1)]
    if output.solution is None:
        return torch.stack([*known, *[nothing] * 6], dim=1)
    solution, adjoint = output.solution, output.solution.adjoint
    unsolved = None if adjoint.status is None else adjoint.status != eq.Status.CONVERGED
    back = [nothing if value is None else value.double() for value in (adjoint.steps, adjoint.residual, unsolved)]
    ahead = [value.double() for value in (solution.steps, solution.residual, ~solution.converged)]
    return torch.stack([*known, *ahead, *back], dim=1)


def _of_the_equilibrium(rows: Tensor) -> dict[str, float | None]:
    column = dict(zip(COLUMNS, rows.unbind(1), strict=True))
    solved, pulled_back = (not bool(column[name][0].isnan()) for name in ("steps", "adjoint_steps"))
    return {
        "evaluations_forward": float(column["steps"].mean()) if solved else None,
        "evaluations_backward": float(column["adjoint_steps"].mean()) if pulled_back else None,
        "residual": float(column["residual"].median()) if solved else None,
        "backward_residual": float(column["adjoint_residual"].median()) if pulled_back else None,
        "share_at_cap": float(column["failed"].mean()) if solved else None,
    }


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    >>> make_optimizer(nn.Linear(2, 3), TrainingConfig()).param_groups[1]["weight_decay"]
    0.0
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.95))


def learning_rate_at(step: int, training: TrainingConfig) -> float:
    """A linear rise, then a cosine down to a share of the peak.

    >>> training = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    >>> [round(learning_rate_at(step, training), 2) for step in (0, 9, 10, 55, 99)]
    [0.1, 1.0, 1.0, 0.55, 0.1]

    Args:
        step: number of the update, from 0.
        training: for the peak, the length of the rise and where the cosine ends.

    Returns:
        The learning rate of that update.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    done = (step - training.warmup_steps) / max(training.steps - training.warmup_steps, 1)
    low = training.final_learning_rate
    return training.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)
