"""One training step of a language model without the update, taken apart: what it holds, calls and lasts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import equilibria as eq
from onelayer.experiments.experiment import Row
from onelayer.experiments.learning import clock
from onelayer.experiments.peak import peak_bytes
from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import LanguageModel
from onelayer.models.transformer import TransformerBlock
from onelayer.models.window import window
from onelayer.presets import Precision, RunConfig, TrainingConfig

Batch = tuple[Tensor, Tensor]
EVALUATION, GRAPH, PRODUCT, GRADIENTS = "evaluation", "evaluation with its graph", "product", "product with all weights"
REPEATS = 4  # of a part of a step, since one alone is short


@dataclass
class Tally:
    """What the blocks of a model have done.

    Attributes:
        forward: calls of a block.
        backward: passes of a gradient through such a call, to its inputs alone or to its weights as well.
    """

    forward: int = 0
    backward: int = 0


def counted(tally: Tally, checkpointed: bool = False) -> Callable[[ModelConfig], TransformerBlock]:
    """Makes Transformer blocks that count their calls.

    >>> tally = Tally()
    >>> model = LanguageModel(ModelConfig(width=64, heads=2, depth="tied", layers=3), counted(tally))
    >>> model(torch.zeros(1, 5, dtype=torch.int64)).logits.sum().backward()
    >>> tally
    Tally(forward=3, backward=3)

    Args:
        tally: what they count into.
        checkpointed: whether each call keeps what it was called with alone, and is made again in backward.
    """

    def passed(grad: Tensor) -> None:
        tally.backward += 1

    def make(config: ModelConfig) -> TransformerBlock:
        block = TransformerBlock(config)
        plain = block.forward

        def call(z: Tensor, x: Tensor, context: Any) -> Tensor:
            tally.forward += 1
            return plain(z, x, context)

        def forward(z: Tensor, x: Tensor, context: Any) -> Tensor:
            out: Any = checkpoint(call, z, x, context, use_reentrant=False) if checkpointed else call(z, x, context)
            if out.requires_grad:
                out.register_hook(passed)
            return out

        block.forward = forward
        return block

    return make


class Step:
    """A model's training step on a batch, without an update.

    >>> step = Step(ModelConfig(width=64, heads=2, depth="tied", layers=3))
    >>> batch = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)
    >>> step.counts(batch)["forward"]
    3

    Args:
        config: of the model.
        device, precision: of the training.
        checkpointed: whether each application of a block is.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: str = "cpu",
        precision: Precision = "float32",
        checkpointed: bool = False,
    ) -> None:
        self.tally = Tally()
        self.model = LanguageModel(config, counted(self.tally, checkpointed)).to(device).train()
        self.device = torch.device(device)
        self._run = RunConfig("compare", None, config, TrainingConfig(precision=precision))
        self.fused = True  # attention; or else scores, softmax and sum as operations of their own

    @property
    def layer(self) -> eq.DEQ:
        """The equilibrium, whose solver, adjoint and tolerances may be changed between steps."""
        layer = self.model.depth.layer
        assert layer is not None
        return layer

    def __call__(self, batch: Batch, max_steps: int | None = None) -> eq.Solution | None:
        """Forward and backward; gradients are added to those that are there.

        Args:
            batch: tokens and those that follow, int64 `(batch, time)` each.
            max_steps: evaluations allowed to the solve; `None` for the configuration's, or where there is none.
        """
        x, y = batch
        with nullcontext() if self.fused else sdpa_kernel(SDPBackend.MATH), self._run.autocast(self.device):
            output = self.model(x, y, max_steps=max_steps)
            assert output.losses is not None
            output.losses.mean().backward()
        return output.solution

    def counts(self, batch: Batch, max_steps: int | None = None) -> Row:
        """Bytes that the tensors of a step hold at once, gradients of the weights aside, and what its blocks do."""
        self(batch, max_steps)  # from here on there are gradients, as in every step but the first
        self.tally.forward = self.tally.backward = 0
        solution = self(batch, max_steps)
        row = {"forward": self.tally.forward, "backward": self.tally.backward}
        if solution is not None:
            products, status = solution.adjoint.steps, solution.adjoint.status
            unsolved = None if status is None else float((status != eq.Status.CONVERGED).double().mean())
            row |= {
                "evaluations": solution.evaluations,
                "steps": float(solution.steps.double().mean()),
                "products": None if products is None else float(products.double().mean()),
                "residual": float(solution.residual.median()),
                "at_cap": float((~solution.converged).double().mean()),
                "backward_at_cap": unsolved,
            }
        del solution
        return row | {"bytes": peak_bytes(lambda: self(batch, max_steps), self.device.type)}

    def parts(self, batch: Batch) -> dict[str, Callable[[], object]]:
        """The calls that a step of an equilibrium is made of, `REPEATS` of each.

        Args:
            batch: whose equilibria they are made at.
        """
        model, tokens = self.model, batch[0]
        block = model.depth.block
        with torch.no_grad():
            z = model(tokens).state
        x = F.rms_norm(model.embedding(tokens), (model.config.width,)).detach()
        frame = block.place(window(tokens.shape[1], self.device), x.dtype)
        leaf, u = z.clone().requires_grad_(), torch.randn_like(z)
        weights = [weight for weight in block.parameters() if weight.requires_grad]

        def record() -> Tensor:
            return block(leaf, x, block.context(x, frame, block.prepare(x)))

        kept = record()

        def evaluate() -> None:
            with torch.no_grad():
                record()

        def multiply() -> None:
            torch.autograd.grad(kept, leaf, u, retain_graph=True)

        def differentiate() -> None:
            torch.autograd.grad(kept, [leaf, *weights], u, retain_graph=True)

        works = {EVALUATION: evaluate, GRAPH: record, PRODUCT: multiply, GRADIENTS: differentiate}

        def repeated(work: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                with self._run.autocast(self.device):
                    for _ in range(REPEATS):
                        work()

            return run

        return {name: repeated(work) for name, work in works.items()}


def interleaved(
    works: Mapping[str, Callable[[int], object]], reference: Callable[[int], object], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Times of some works in units of a reference that runs right beside each of them.

    Both of a pair meet the same machine, busy or not, so that their ratio says more than either time; which of them is
    first changes from round to round.

    >>> ratios = interleaved({"twice": lambda k: sum(range(2_000_000))}, lambda k: sum(range(1_000_000)), rounds=5)
    >>> 1.5 < statistics.median(ratios["twice"]) < 2.5
    True

    Args:
        works: by name; called with the number of the round.
        reference: likewise.
        rounds: in which each work runs once.
        device: `"cpu"`, where processor time of this process counts, or `"cuda"`.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    where = torch.device(device)

    def seconds(work: Callable[[int], object], k: int) -> float:
        start = clock(where)
        work(k)
        return clock(where) - start

    for k in range(rounds):
        for name, work in works.items():
            if k % 2:
                own, other = seconds(work, k), seconds(reference, k)
            else:
                other, own = seconds(reference, k), seconds(work, k)
            found[name].append(own / other)
    return found


def quartiles(ratios: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    (2.0, 3.0, 4.0)
    """
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high
