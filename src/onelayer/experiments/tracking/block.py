"""A block whose gates read the token before and attention to all the text up to there: `z -> f(z, x)`.

Explicit networks of a few convolutions see a few tokens, and would fail at long words for that alone. Here each of them
sees the whole word, so what is compared is what they can do with it.
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
        prepared: queries, keys and values, `(3 width, width)`; the gates from what is read, `(4 width, 2 width)`, and
            from the text; and the mask of what the token before shows.
        injected: what the text adds to the gates, `(batch, time, 4 width)`.
        before: state of the token before the first, `(batch, 1, 2 width)`.
        past: keys and values of the tokens before, `(batch, heads, stored, size)`; `None` where there are none.
        window: of the tokens.
    """

    prepared: Prepared
    injected: Tensor
    before: Tensor
    past: tuple[Tensor, Tensor] | None
    window: Window


class AttentiveGates(nn.Module):
    """The gates of an LSTM that read the token before and causal attention.

    A token's state is in two halves, what it shows and what it carries. It is made of its text, of the state of the
    token before, and of attention over what all tokens up to it read: their text and what the ones before them showed.
    So a state hangs on earlier ones alone, and plain iteration reaches the equilibrium, the only one there is, after as
    many evaluations as there are tokens, whatever the weights.

    Attention knows no positions, since those beyond the lengths trained on would be new to it.

    >>> from onelayer.models.window import window
    >>> block = AttentiveGates(ModelConfig(width=32, heads=2))
    >>> x = torch.randn(3, 10, 32)
    >>> context = block.context(x, block.place(window(10, x.device), x.dtype), block.prepare(x))
    >>> block(torch.zeros(3, 10, 64), x, context).shape
    torch.Size([3, 10, 64])

    Args:
        config: width, heads, dropout and weight normalisation.

    Source: the gates of Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997, as an equilibrium over the sequence
    after Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019 (arXiv:1909.01377), section 4; attention of Vaswani et
    al., 2017 (arXiv:1706.03762), without positions after Kazemnejad et al., "The Impact of Positional Encoding on
    Length Generalization in Transformers", 2023 (arXiv:2305.19466).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.state_width = 2 * width
        self.query_key_value = Linear(width, 3 * width, config.weight_norm)
        self.state = Linear(2 * width, 4 * width, config.weight_norm)
        self.input = Linear(width, 4 * width, config.weight_norm)
        self.bias = nn.Parameter(torch.zeros(4 * width))
        self.dropout = eq.nn.VariationalDropout(config.dropout)

    def prepare(self, x: Tensor) -> Prepared:
        """Matrices and masks for a forward on embedded tokens `x`, `(batch, time, width)`."""
        matrices = tuple(part.matrix() for part in (self.query_key_value, self.state, self.input))
        return Prepared(matrices, (mask(self.dropout, x, x.shape[2]),))

    def place(self, window: Window, dtype: torch.dtype) -> Window:
        """The window as it is."""
        return window

    def context(self, x: Tensor, window: Window, prepared: Prepared, past: Slot | None = None) -> Context:
        """What stays the same at every evaluation.

        Args:
            x: embedded tokens `(batch, time, width)`.
            window: of the tokens.
            prepared: what `prepare` returned.
            past: what the tokens before left in the slot of this application: their states and their `x`.
        """
        before, kept = x.new_zeros(len(x), 1, self.state_width), None
        if past is not None:
            states, texts = (old[:, 0].to(x.dtype) for old in past)
            kept = self._project(self._shown(before, states, prepared), texts, prepared)[1:]
            before = torch.cat([before, states[:, : window.offset]], dim=1)[:, -1:]
        injected = F.linear(x, prepared.matrices[2]) + self.bias
        return Context(prepared, injected, before, kept, window)

    def forward(self, z: Tensor, x: Tensor, context: Context) -> Tensor:
        """One application: states `(batch, time, 2 width)` to the same."""
        before, window = context.before.to(z.dtype), context.window
        shown = self._shown(before, z, context.prepared)
        q, k, v = self._project(shown, x, context.prepared)
        if context.past is not None:
            k, v = (torch.cat([old.to(new.dtype), new], dim=2) for old, new in zip(context.past, (k, v), strict=True))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=window.mask, is_causal=window.causal)
        read = torch.cat([shown.to(v.dtype), mixed.transpose(1, 2).flatten(2)], dim=-1)
        gates = context.injected + F.linear(read, context.prepared.matrices[1])
        let_in, keep, show, new = gates.chunk(4, dim=-1)
        previous = torch.cat([before, z], dim=1)[:, :-1].chunk(2, dim=-1)[1]
        carried = keep.sigmoid() * previous + let_in.sigmoid() * new.tanh()
        out = torch.cat([show.sigmoid() * carried.tanh(), carried], dim=-1)
        return out if window.real is None else torch.where(window.real, out, 0)

    def remember(self, z: Tensor, x: Tensor, context: Context) -> Slot:
        """States and text of the tokens, `(batch, 1, time, size)` each."""
        return z[:, None], x[:, None]

    def read(self, z: Tensor) -> Tensor:
        """The hidden state that logits are read off."""
        return z.chunk(2, dim=-1)[0]

    def _shown(self, before: Tensor, z: Tensor, prepared: Prepared) -> Tensor:
        """What the token before each shows, `(batch, time, width)`."""
        return masked(self.read(torch.cat([before, z], dim=1)[:, :-1]), prepared.masks[0])

    def _project(self, shown: Tensor, x: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor, Tensor]:
        projected = F.linear(shown + x, prepared.matrices[0])
        q, k, v = projected.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Unbounded scores learn the lengths trained on by heart and lose the state soon after them.
        q, k = (F.rms_norm(part, part.shape[-1:]).to(v.dtype) for part in (q, k))
        return q, k, v
