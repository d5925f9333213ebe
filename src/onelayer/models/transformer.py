"""The block of the DEQ-Transformer: causal attention and a feed-forward part, `z -> f(z, x)`.

A hidden state `z` and the embedded text `x`, which enters at every application (input injection). The same block makes
the equilibrium `z* = f(z*, x)` and its explicit twins, see `onelayer.models.depth`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equilibria as eq
from onelayer.models.configuration import ModelConfig
from onelayer.models.weights import Linear
from onelayer.models.window import Slot, Window

GATE = 0.5  # LayerScale of both branches at the start; 0.1 learns more slowly (docs/log.md)


class Context(NamedTuple):
    """What stays the same at every evaluation of the block in a forward.

    Attributes:
        weights: matrices of the four linear maps, in the order in which they are applied.
        past: keys and values of the tokens before.
        rotation: cosines and sines of rotary positions.
        relative: keys of distances `(heads, distances, size)`, and the distance of each pair `(time, stored + time)`.
        window: of the tokens.
    """

    weights: tuple[Tensor, Tensor, Tensor, Tensor]
    past: Slot | None
    rotation: tuple[Tensor, Tensor] | None
    relative: tuple[Tensor, Tensor] | None
    window: Window


class TransformerBlock(nn.Module):
    """One Transformer block with input injection, `z -> f(z, x)`.

    In the form `"post"`, attention and then the feed-forward part each add to what they read, and the sum is
    normalised. The normalisation comes last, so the states it can return are bounded whatever the weights are, and the
    equilibrium is not the point where the branches vanish, as it would be with an identity path from `z` to the output.
    The form `"subtracted"` is a pre-norm block B with gated branches (LayerScale) less that path,
    `f(z, x) = B(z + x) - z`.

    >>> from onelayer.models.window import window
    >>> block = TransformerBlock(ModelConfig(width=64, heads=2))
    >>> x = torch.randn(3, 10, 64)
    >>> block(torch.zeros_like(x), x, block.context(x, window(10, x.device))).shape
    torch.Size([3, 10, 64])

    Args:
        config: width, heads, form, positions, dropout and weight normalisation.

    Source: the Transformer of Vaswani et al., 2017 (arXiv:1706.03762), with the injection of Bai, Kolter and Koltun,
    "Deep Equilibrium Models", 2019 (arXiv:1909.01377); rotary positions, Su et al., 2021 (arXiv:2104.09864); relative
    positions, Dai et al., 2019 (arXiv:1901.02860), equation of section 3.3; LayerScale, Touvron et al., 2021
    (arXiv:2103.17239).
    """

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
        self.gates = nn.Parameter(torch.full((2, width), GATE)) if config.block == "subtracted" else None
        self.relative = RelativePositions(width, config.heads) if config.positions == "relative" else None
        self.dropout = eq.nn.VariationalDropout(config.dropout, shared_dims=1)

    def context(self, x: Tensor, window: Window, past: Slot | None = None) -> Context:
        """What stays the same at every evaluation, evaluated once.

        Args:
            x: embedded tokens `(batch, time, width)`.
            window: of the tokens.
            past: what the tokens before left in the slot of this application.
        """
        maps = (self.query_key_value, self.attention_output, self.expand, self.contract)
        size = x.shape[-1] // self.heads
        rotation = rotary(window.positions, size, x.dtype) if self.relative is None else None
        relative = None if self.relative is None else self.relative.keys(window, x.dtype)
        one, two, three, four = (part.matrix() for part in maps)
        return Context((one, two, three, four), past, rotation, relative, window)

    def forward(self, z: Tensor, x: Tensor, context: Context) -> Tensor:
        """One application: states `(batch, time, width)` to the same."""
        u = z + x
        if self.gates is None:
            u = self.attention_norm(u + self.dropout(self._attention(u, context)))
            out = self.output_norm(u + self.dropout(self._feed_forward(u, context)))
        else:
            mixed = self.gates[0] * self.dropout(self._attention(self.attention_norm(u), context))
            out = x + mixed + self.gates[1] * self.dropout(self._feed_forward(self.output_norm(u + mixed), context))
        return out if context.window.real is None else torch.where(context.window.real, out, 0)

    def remember(self, z: Tensor, x: Tensor, context: Context) -> Slot:
        """Keys and values that tokens in the state `z` have for later ones, `(batch, heads, time, size)` each."""
        u = z + x
        return self._heads(u if self.gates is None else self.attention_norm(u), context)[1:]

    def read(self, z: Tensor) -> Tensor:
        """The hidden state that logits are read off."""
        return z

    def _heads(self, u: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        batch, time, width = u.shape
        projected = F.linear(u, context.weights[0])
        parts = projected.view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        pair, v = parts[:2], parts[2]
        # Queries and keys of unit size bound the attention scores, and with them how much the block can expand.
        pair = F.rms_norm(pair, pair.shape[-1:])
        if context.rotation is not None:
            pair = rotate(pair, *context.rotation)
        q, k = pair.to(v.dtype)
        return q, k, v

    def _attention(self, u: Tensor, context: Context) -> Tensor:
        q, k, v = self._heads(u, context)
        if context.past is not None and context.window.time == 1:
            return F.linear(self._one(q, k, v, context.past, context).transpose(1, 2).flatten(2), context.weights[1])
        if context.past is not None:
            k, v = (torch.cat([old.to(new.dtype), new], dim=2) for old, new in zip(context.past, (k, v), strict=True))
        mask, causal = context.window.mask, context.window.causal
        if self.relative is not None and context.relative is not None:
            q, mask = self.relative.bias(q, *context.relative, mask, causal)
            causal = False
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return F.linear(mixed.transpose(1, 2).flatten(2), context.weights[1])

    def _one(self, q: Tensor, k: Tensor, v: Tensor, past: Slot, context: Context) -> Tensor:
        """Attention of a single token to the past and to itself, which leaves the past where it is.

        To put the token's keys and values behind all those before it costs more than the attention does, and would be
        done at every evaluation.
        """
        keys, values = (part.to(v.dtype) for part in past)
        mask = context.window.mask
        if self.relative is not None and context.relative is not None:
            q, mask = self.relative.bias(q, *context.relative, mask, causal=False)
        scores = torch.cat([q @ keys.mT, (q * k).sum(-1, keepdim=True)], dim=-1) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        shares = scores.softmax(-1)
        return shares[..., :-1] @ values + shares[..., -1:] * v

    def _feed_forward(self, u: Tensor, context: Context) -> Tensor:
        return F.linear(F.gelu(F.linear(u, context.weights[2])), context.weights[3])


class RelativePositions(nn.Module):
    """Attention scores that know the distance of a pair: `(q + a) . k + (q + b) . r(distance)`.

    Args:
        width: entries of a token's state.
        heads: attention heads.

    Source: Dai et al., "Transformer-XL", 2019 (arXiv:1901.02860), section 3.3.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = Linear(width, width)
        self.biases = nn.Parameter(torch.zeros(2, heads, 1, width // heads))

    def keys(self, window: Window, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys of all distances in a window `(heads, distances, size)`, and the distance of each pair."""
        distances = (window.positions[:, None] - window.seen).clamp(min=0)
        width = self.project.in_features
        tables = rotary(torch.arange(window.offset + window.time, device=window.device), width, dtype)
        table = torch.cat([half[:, : width // 2] for half in tables], dim=1)
        keys = F.linear(table, self.project.matrix())
        return keys.view(len(table), self.heads, -1).transpose(0, 1), distances

    def bias(
        self, q: Tensor, keys: Tensor, distances: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """The queries that meet keys, and what to add to the scaled scores of each pair."""
        scores = torch.matmul(q + self.biases[1].to(q.dtype), keys.to(q.dtype).transpose(1, 2)) * q.shape[-1] ** -0.5
        scores = scores.gather(-1, distances.expand(*scores.shape[:-1], -1))
        if causal:
            mask = torch.ones(distances.shape, dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return q + self.biases[0].to(q.dtype), scores


def rotary(positions: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which rotary positions turn the pairs (i, i + size / 2) of a head's entries.

    >>> [table.shape for table in rotary(torch.arange(128), 32, torch.float32)]
    [torch.Size([128, 32]), torch.Size([128, 32])]

    Args:
        positions: int64 `(time,)`.
        size: entries of a head, an even number.
        dtype: of the result.

    Returns:
        Two tensors `(time, size)`.

    Source: Su et al., "RoFormer", 2021 (arXiv:2104.09864).
    """
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float64) / size)
    angles = torch.outer(positions.double(), frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(a: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns pairs of entries of `(..., time, size)` by the tables of `rotary`."""
    first, second = a.chunk(2, dim=-1)
    return a * cosine + torch.cat((-second, first), dim=-1) * sine
