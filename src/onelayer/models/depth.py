"""The depth of a model: one block to its equilibrium, or blocks a number of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import equilibria as eq
from onelayer.errors import UsageError
from onelayer.models.configuration import ModelConfig
from onelayer.models.weights import Prepared
from onelayer.models.window import Memory, Slot, Window, window


class Result(NamedTuple):
    """Where the depth of a model ends.

    Attributes:
        z: state of each token, `(batch, time, state width)`.
        entered: what entered the block of each slot, likewise; the equilibrium itself where there is one.
        left: keys and values for later tokens, for each slot; empty where they were not asked for.
        penalty: the block's squared Jacobian norm per entry, where it was drawn for this forward.
        solution: how the equilibrium was found; `None` where there is none.
    """

    z: Tensor
    entered: tuple[Tensor, ...]
    left: tuple[Slot, ...]
    penalty: Tensor | None
    solution: eq.Solution | None


class Depth(nn.Module):
    """One block to its equilibrium, or a number of blocks, or one block a number of times.

    All its parameters are used within a call, so that `fully_shard(depth)` gathers them once for a solve of any length.

    >>> from onelayer.models.transformer import TransformerBlock
    >>> depth = Depth(ModelConfig(width=64, heads=2), TransformerBlock)
    >>> x = torch.randn(3, 10, 64)
    >>> depth(x, window(10, x.device)).z.shape
    torch.Size([3, 10, 64])

    Args:
        config: of the model.
        block: makes a block from it; see `TransformerBlock` for the methods that it has.
    """

    def __init__(self, config: ModelConfig, block: Callable[[ModelConfig], Any]) -> None:
        super().__init__()
        self.config = config
        # What became of each solve is recorded at every step of training, so nothing needs to be said beside it.
        self.layer = (
            eq.DEQ(
                block(config),
                solver=eq.Anderson(),
                adjoint=eq.Implicit(rtol=config.backward_rtol, max_steps=config.backward_max_steps),
                rtol=config.rtol,
                max_steps=config.max_steps,
                eval_max_steps=config.eval_max_steps,
                on_failure="ignore",
            )
            if config.depth == "equilibrium"
            else None
        )
        count = {"equilibrium": 0, "tied": 1, "untied": config.layers}[config.depth]
        self.blocks = nn.ModuleList(block(config) for _ in range(count))

    @property
    def all_blocks(self) -> list[Any]:
        """The blocks, in the order in which they take turns."""
        return list(self.blocks) if self.layer is None else [self.layer.cell]

    @property
    def block(self) -> Any:
        """The first block, or the only one."""
        return self.all_blocks[0]

    def forward(
        self,
        x: Tensor,
        frame: Window,
        past: tuple[Slot, ...] | None = None,
        memory: Memory | None = None,
        start: Tensor | None = None,
        max_steps: int | None = None,
        unrolled: int | None = None,
        remember: bool = False,
    ) -> Result:
        """The state of each token.

        Args:
            x: embedded tokens `(batch, time, width)`.
            frame: window of the tokens.
            past: what the tokens before left in each slot.
            memory: or the segment before, from which that is worked out with today's weights.
            start: of the solve, `(batch, time, state width)`; zeros where there is none.
            max_steps: evaluations of the block allowed to the solve, instead of the configuration's.
            unrolled: plain applications of the block of an equilibrium model, instead of a solve.
            remember: whether keys and values are wanted.

        Raises:
            UsageError: `max_steps` or `unrolled` without an equilibrium, or both of them.
        """
        if self.layer is None and (max_steps is not None or unrolled is not None):
            raise UsageError(
                "max_steps and unrolled are for equilibrium models, and this one has "
                f"{self.config.layers} layers: leave them out."
            )
        if max_steps is not None and unrolled is not None:
            raise UsageError("max_steps is for solves, and there is none of an unrolled block: give one of the two.")
        prepared = [block.prepare(x) for block in self.all_blocks]
        if memory is not None:
            past = self._remembered(memory, prepared)
        frame = self.block.place(frame, x.dtype)
        zeros = x.new_zeros(*x.shape[:2], self.block.state_width)
        if self.layer is None:
            return self._stack(x, frame, prepared, past, zeros, remember)
        cell = self.block
        context = cell.context(x, frame, prepared[0], None if past is None else past[0])
        if unrolled is not None:
            z, solution = zeros, None
            for _ in range(unrolled):
                z = cell(z, x, context)
        else:
            z0 = zeros if start is None else start.to(zeros.dtype)
            solution = self.layer.solve(x, context, z0=z0, max_steps=max_steps)
            z = solution.value
        left = (cell.remember(z, x, context),) if remember else ()
        return Result(z, (z,), left, self._penalty(z, x, context), solution)

    def _stack(
        self,
        x: Tensor,
        frame: Window,
        prepared: list[Prepared],
        past: tuple[Slot, ...] | None,
        z: Tensor,
        remember: bool,
    ) -> Result:
        entered, left, blocks, context = [], [], self.all_blocks, None
        for k in range(self.config.layers):
            block, own = blocks[k % len(blocks)], prepared[k % len(blocks)]
            if context is None or len(blocks) > 1 or past is not None:
                context = block.context(x, frame, own, None if past is None else past[k])
            entered.append(z)
            if remember:
                left.append(block.remember(z, x, context))
            z = block(z, x, context)
        return Result(z, tuple(entered), tuple(left), None, None)

    def _remembered(self, memory: Memory, prepared: list[Prepared]) -> tuple[Slot, ...]:
        before = self.block.place(window(memory.x.shape[1], memory.x.device), memory.x.dtype)
        blocks = self.all_blocks
        slots = []
        for k, state in enumerate(memory.states):
            block, own = blocks[k % len(blocks)], prepared[k % len(blocks)]
            slots.append(block.remember(state, memory.x, block.context(memory.x, before, own)))
        return tuple(slots)

    def _penalty(self, z: Tensor, x: Tensor, context: Any) -> Tensor | None:
        config = self.config
        if not (config.jacobian_weight and self.training and torch.is_grad_enabled()):
            return None
        if float(torch.rand(())) >= config.jacobian_share:
            return None
        # `forward` passes by what `block.compile()` has made, which has no second derivatives.
        return eq.nn.jacobian_penalty(lambda z: self.block.forward(z, x, context), z)
