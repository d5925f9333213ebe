"""A Transformer block over the cells of a Sudoku: every cell looks at every cell, `z -> f(z, x)`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from onelayer.experiments.restarts.sudoku import BOX, SIDE
from onelayer.models import transformer
from onelayer.models.configuration import ModelConfig
from onelayer.models.weights import Prepared
from onelayer.models.window import Slot, Window


class Context(NamedTuple):
    """What stays the same at every evaluation of the block in a forward.

    Attributes:
        injected: the embedded cells with their places, `(batch, 16, width)`.
        inner: the context of the block of language models.
    """

    injected: Tensor
    inner: transformer.Context


class CellBlock(nn.Module):
    """The block of `onelayer.models.transformer`, not causal, its places learnt.

    A cell's place is the sum of a learnt vector of its row, one of its column and one of its box, which enters with its
    token at every application. Nothing says which cells share a row: the attention has to learn that.

    >>> from onelayer.models.window import window
    >>> block = CellBlock(ModelConfig(width=32, heads=2))
    >>> x = torch.randn(3, 16, 32)
    >>> context = block.context(x, block.place(window(16, x.device), x.dtype), block.prepare(x))
    >>> block(torch.zeros_like(x), x, context).shape
    torch.Size([3, 16, 32])

    Args:
        config: width, heads, dropout and weight normalisation.

    Source: the encoder of Vaswani et al., 2017 (arXiv:1706.03762), with the injection of Bai, Kolter and Koltun, "Deep
    Equilibrium Models", 2019 (arXiv:1909.01377).
    """

    cells: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inner = transformer.TransformerBlock(config)
        self.state_width = self.inner.state_width
        self.places = nn.Embedding(3 * SIDE, config.width)  # rows, columns, boxes
        nn.init.normal_(self.places.weight, std=3**-0.5)  # so that the sum of three is as large as a token
        row, column = torch.arange(SIDE).repeat_interleave(SIDE), torch.arange(SIDE).repeat(SIDE)
        box = row // BOX * (SIDE // BOX) + column // BOX
        self.register_buffer("cells", torch.stack([row, column + SIDE, box + 2 * SIDE]), persistent=False)

    def prepare(self, x: Tensor) -> Prepared:
        """Matrices and masks for a forward on embedded cells `x`, `(batch, 16, width)`."""
        return self.inner.prepare(x)

    def place(self, window: Window, dtype: torch.dtype) -> Window:
        """The window in which each cell may look at all, without positions: places are the block's own parameters."""
        return window._replace(mask=torch.ones(1, 1, window.time, window.time, dtype=torch.bool, device=window.device))

    def context(self, x: Tensor, window: Window, prepared: Prepared, past: Slot | None = None) -> Context:
        """What stays the same at every evaluation.

        Args:
            x: embedded cells `(batch, 16, width)`.
            window: of the cells, from `place`.
            prepared: what `prepare` returned.
            past: there is none.
        """
        injected = x + self.places(self.cells).sum(0).to(x.dtype)
        return Context(injected, self.inner.context(injected, window, prepared))

    def forward(self, z: Tensor, x: Tensor, context: Context) -> Tensor:
        """One application: states `(batch, 16, width)` to the same."""
        return self.inner(z, context.injected, context.inner)

    def remember(self, z: Tensor, x: Tensor, context: Context) -> Slot:
        """Keys and values of cells in the state `z`, `(batch, heads, 16, size)` each."""
        return self.inner.remember(z, context.injected, context.inner)

    def read(self, z: Tensor) -> Tensor:
        """The hidden state that logits are read off."""
        return z
