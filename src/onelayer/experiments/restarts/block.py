"""A Transformer block over the cells of a Sudoku: every cell looks at every cell, `z -> f(z, x)`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equilibria as eq
from onelayer.experiments.restarts.sudoku import BOX, SIDE
from onelayer.models.configuration import ModelConfig
from onelayer.models.weights import Linear, Prepared, mask, masked
from onelayer.models.window import Slot, Window


class Context(NamedTuple):
    """What stays the same at every evaluation of the block in a forward.

    Attributes:
        prepared: matrices of the linear maps, in the order in which they are applied, and masks of the two branches.
        injected: the embedded cells with their places, `(batch, 16, width)`.
    """

    prepared: Prepared
    injected: Tensor


class CellBlock(nn.Module):
    """The block of `onelayer.models.transformer` in its form `"post"`, not causal, its places learnt.

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
        width = config.width
        self.heads = config.heads
        self.state_width = width
        self.query_key_value = Linear(width, 3 * width, config.weight_norm)
        self.attention_output = Linear(width, width, config.weight_norm)
        self.attention_norm = nn.RMSNorm(width)
        self.expand = Linear(width, 4 * width, config.weight_norm)
        self.contract = Linear(4 * width, width, config.weight_norm)
        self.output_norm = nn.RMSNorm(width)
        self.places = nn.Embedding(3 * SIDE, width)  # rows, columns, boxes
        nn.init.normal_(self.places.weight, std=3**-0.5)  # so that the sum of three is as large as a token
        self.dropout = eq.nn.VariationalDropout(config.dropout)
        row, column = torch.arange(SIDE).repeat_interleave(SIDE), torch.arange(SIDE).repeat(SIDE)
        box = row // BOX * (SIDE // BOX) + column // BOX
        self.register_buffer("cells", torch.stack([row, column + SIDE, box + 2 * SIDE]), persistent=False)

    def prepare(self, x: Tensor) -> Prepared:
        """Matrices and masks for a forward on embedded cells `x`, `(batch, 16, width)`."""
        maps = (self.query_key_value, self.attention_output, self.expand, self.contract)
        masks = tuple(mask(self.dropout, x, x.shape[2]) for _ in range(2))
        return Prepared(tuple(part.matrix() for part in maps), masks)

    def place(self, window: Window, dtype: torch.dtype) -> Window:
        """The window as it is: places are the block's own parameters."""
        return window

    def context(self, x: Tensor, window: Window, prepared: Prepared, past: Slot | None = None) -> Context:
        """What stays the same at every evaluation.

        Args:
            x: embedded cells `(batch, 16, width)`.
            window: of the cells; that it would be causal does not matter here.
            prepared: what `prepare` returned.
            past: there is none.
        """
        return Context(prepared, x + self.places(self.cells).sum(0).to(x.dtype))

    def forward(self, z: Tensor, x: Tensor, context: Context) -> Tensor:
        """One application: states `(batch, 16, width)` to the same."""
        one, two = context.prepared.masks
        u = z + context.injected
        u = self.attention_norm(u + masked(self._attention(u, context), one))
        fed = F.linear(F.gelu(F.linear(u, context.prepared.matrices[2])), context.prepared.matrices[3])
        return self.output_norm(u + masked(fed, two))

    def remember(self, z: Tensor, x: Tensor, context: Context) -> Slot:
        """Keys and values of cells in the state `z`, `(batch, heads, 16, size)` each."""
        return self._heads(z + context.injected, context)[1:]

    def read(self, z: Tensor) -> Tensor:
        """The hidden state that logits are read off."""
        return z

    def _heads(self, u: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        projected = F.linear(u, context.prepared.matrices[0])
        parts = projected.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        pair, v = parts[:2], parts[2]
        # Queries and keys of unit size bound the attention scores, and with them how much the block can expand.
        q, k = F.rms_norm(pair, pair.shape[-1:]).to(v.dtype)
        return q, k, v

    def _attention(self, u: Tensor, context: Context) -> Tensor:
        mixed = F.scaled_dot_product_attention(*self._heads(u, context))
        return F.linear(mixed.transpose(1, 2).flatten(2), context.prepared.matrices[1])
