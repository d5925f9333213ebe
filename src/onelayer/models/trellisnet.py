"""The block of the DEQ-TrellisNet: a weight-tied causal temporal convolution with the gates of an LSTM.

A state `z` of two halves, what a token shows `h` and what it carries `c`, and the embedded text `x`, which enters at
every application. The same block makes the equilibrium and its explicit twins, see `onelayer.models.depth`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equilibria as eq
from onelayer.models.configuration import ModelConfig
from onelayer.models.weights import Linear, Prepared, mask, masked
from onelayer.models.window import Slot, Window


class Context(NamedTuple):
    """What stays the same at every evaluation of the block in a forward.

    Attributes:
        prepared: the convolution of the state `(4 width, kernel * width)`, that of the text, and the mask of what the
            former reads.
        injected: the text convolved, with the bias, `(batch, time, 4 width)`.
        before: states of the `kernel - 1` tokens before the first, `(batch, kernel - 1, 2 width)`.
        window: of the tokens.
    """

    prepared: Prepared
    injected: Tensor
    before: Tensor
    window: Window


class TrellisBlock(nn.Module):
    """One layer of a TrellisNet with input injection, `z -> f(z, x)`.

    >>> from onelayer.models.window import window
    >>> block = TrellisBlock(ModelConfig(architecture="trellisnet", width=64))
    >>> x = torch.randn(3, 10, 64)
    >>> context = block.context(x, block.place(window(10, x.device), x.dtype), block.prepare(x))
    >>> block(torch.zeros(3, 10, 128), x, context).shape
    torch.Size([3, 10, 128])

    Args:
        config: width, kernel, dropout and weight normalisation.

    Source: Bai, Kolter and Koltun, "Trellis Networks for Sequence Modeling", 2019 (arXiv:1810.06682): the network, and
    the activation with the gates of an LSTM; as an equilibrium, "Deep Equilibrium Models", 2019 (arXiv:1909.01377).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.kernel = config.kernel
        self.state_width = 2 * width
        self.state = Linear(self.kernel * width, 4 * width, config.weight_norm)
        self.input = Linear(self.kernel * width, 4 * width, config.weight_norm)
        self.bias = nn.Parameter(torch.zeros(4 * width))
        self.dropout = eq.nn.VariationalDropout(config.dropout)

    def prepare(self, x: Tensor) -> Prepared:
        """Matrices and masks for a forward on embedded tokens `x`, `(batch, time, width)`."""
        return Prepared((self.state.matrix(), self.input.matrix()), (mask(self.dropout, x, x.shape[2]),))

    def place(self, window: Window, dtype: torch.dtype) -> Window:
        """The window as it is: a convolution knows no positions."""
        return window

    def context(self, x: Tensor, window: Window, prepared: Prepared, past: Slot | None = None) -> Context:
        """What stays the same at every evaluation.

        Args:
            x: embedded tokens `(batch, time, width)`.
            window: of the tokens.
            prepared: what `prepare` returned.
            past: what the tokens before left in the slot of this application: their states and their `x`.
        """
        span = self.kernel - 1
        if past is None:
            states, texts = x.new_zeros(len(x), span, self.state_width), x.new_zeros(len(x), span, x.shape[2])
        else:
            states, texts = (F.pad(old[:, 0, : window.offset], (0, 0, span, 0))[:, -span:] for old in past)
        injected = F.linear(self._side_by_side(texts.to(x.dtype), x), prepared.matrices[1]) + self.bias
        return Context(prepared, injected, states, window)

    def forward(self, z: Tensor, x: Tensor, context: Context) -> Tensor:
        """One application: states `(batch, time, 2 width)` to the same."""
        (shown, carried), (shown_before, carried_before) = (
            states.chunk(2, dim=-1) for states in (z, context.before.to(z.dtype))
        )
        (factors,) = context.prepared.masks
        read = self._side_by_side(masked(shown_before, factors), masked(shown, factors))
        gates = context.injected + F.linear(read, context.prepared.matrices[0])
        let_in, keep, show, new = gates.chunk(4, dim=-1)
        previous = torch.cat([carried_before[:, -1:], carried], dim=1)[:, :-1]
        carried = keep.sigmoid() * previous + let_in.sigmoid() * new.tanh()
        out = torch.cat([show.sigmoid() * carried.tanh(), carried], dim=-1)
        return out if context.window.real is None else torch.where(context.window.real, out, 0)

    def remember(self, z: Tensor, x: Tensor, context: Context) -> Slot:
        """States and text of the tokens, `(batch, 1, time, size)` each, of which later ones read the last few."""
        return z[:, None], x[:, None]

    def read(self, z: Tensor) -> Tensor:
        """The hidden state that logits are read off."""
        return z.chunk(2, dim=-1)[0]

    def _side_by_side(self, before: Tensor, a: Tensor) -> Tensor:
        """Each token beside the `kernel - 1` before it, `(batch, time, kernel * width)`."""
        whole = torch.cat([before, a], dim=1)
        return torch.cat([whole[:, k : k + a.shape[1]] for k in range(self.kernel)], dim=-1)
