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
from onelayer.models.weights import Linear, Prepared, mask, masked
from onelayer.models.window import Slot, Window

GATE = 0.5  # LayerScale of both branches at the start; 0.1 learns more slowly (docs/log.md)


class Context(NamedTuple):
    """What stays the same at every evaluation of the block in a forward.

    Attributes:
        prepared: matrices of the linear maps, in the order in which they are applied, and masks of the two branches.
        past: keys and values of the tokens before.
        distances: keys of distances `(heads, distances, size)`, where positions are relative.
        window: of the tokens, with the tables of their positions.
    """

    prepared: Prepared
    past: Slot | None
    distances: Tensor | None
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
    >>> context = block.context(x, block.place(window(10, x.device), x.dtype), block.prepare(x))
    >>> block(torch.zeros_like(x), x, context).shape
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
        subtracted = config.block == "subtracted"
        self.attention_gate = nn.Parameter(torch.full((width,), GATE)) if subtracted else None
        self.feed_forward_gate = nn.Parameter(torch.full((width,), GATE)) if subtracted else None
        self.relative = RelativePositions(config) if config.positions == "relative" else None
        self.dropout = eq.nn.VariationalDropout(config.dropout)

    def prepare(self, x: Tensor) -> Prepared:
        """Matrices and masks for a forward on embedded tokens `x`, `(batch, time, width)`."""
        maps = [self.query_key_value, self.attention_output, self.expand, self.contract]
        if self.relative is not None:
            maps.append(self.relative.project)
        masks = tuple(mask(self.dropout, x, x.shape[2]) for _ in range(2))
        return Prepared(tuple(part.matrix() for part in maps), masks)

    def place(self, window: Window, dtype: torch.dtype) -> Window:
        """The window with tables of its positions: rotations of queries and keys, or waves of distances."""
        if self.relative is not None:
            return window._replace(tables=self.relative.tables(window, dtype))
        return window._replace(tables=rotary(window.positions, self.query_key_value.columns // self.heads, dtype))

    def context(self, x: Tensor, window: Window, prepared: Prepared, past: Slot | None = None) -> Context:
        """What stays the same at every evaluation.

        Args:
            x: embedded tokens `(batch, time, width)`.
            window: of the tokens, from `place`.
            prepared: what `prepare` returned.
            past: what the tokens before left in the slot of this application.
        """
        distances = None if self.relative is None else self.relative.keys(window, prepared.matrices[4])
        return Context(prepared, past, distances, window)

    def forward(self, z: Tensor, x: Tensor, context: Context) -> Tensor:
        """One application: states `(batch, time, width)` to the same."""
        u = z + x
        one, two = context.prepared.masks
        if self.attention_gate is None or self.feed_forward_gate is None:
            u = self.attention_norm(u + masked(self._attention(u, context), one))
            out = self.output_norm(u + masked(self._feed_forward(u, context), two))
        else:
            mixed = self.attention_gate * masked(self._attention(self.attention_norm(u), context), one)
            fed = self._feed_forward(self.output_norm(u + mixed), context)
            out = x + mixed + self.feed_forward_gate * masked(fed, two)
        return out if context.window.real is None else torch.where(context.window.real, out, 0)

    def remember(self, z: Tensor, x: Tensor, context: Context) -> Slot:
        """Keys and values that tokens in the state `z` have for later ones, `(batch, heads, time, size)` each."""
        u = z + x
        return self._heads(u if self.attention_gate is None else self.attention_norm(u), context)[1:]

    def read(self, z: Tensor) -> Tensor:
        """The hidden state that logits are read off."""
        return z

    def _heads(self, u: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        batch, time, width = u.shape
        projected = F.linear(u, context.prepared.matrices[0])
        parts = projected.view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        pair, v = parts[:2], parts[2]
        # Queries and keys of unit size bound the attention scores, and with them how much the block can expand.
        pair = F.rms_norm(pair, pair.shape[-1:])
        if self.relative is None and context.window.tables:  # a window without tables knows no positions
            pair = rotate(pair, *context.window.tables)
        q, k = pair.to(v.dtype)
        return q, k, v

    def _attention(self, u: Tensor, context: Context) -> Tensor:
        q, k, v = self._heads(u, context)
        if context.past is not None and context.window.time == 1:
            mixed = self._one(q, k, v, context.past, context)
            return F.linear(mixed.transpose(1, 2).flatten(2), context.prepared.matrices[1])
        if context.past is not None:
            k, v = (torch.cat([old.to(new.dtype), new], dim=2) for old, new in zip(context.past, (k, v), strict=True))
        mask, causal = context.window.mask, context.window.causal
        if self.relative is not None and context.distances is not None:
            q, mask = self.relative.bias(q, context.distances, context.window)
            causal = False
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return F.linear(mixed.transpose(1, 2).flatten(2), context.prepared.matrices[1])

    def _one(self, q: Tensor, k: Tensor, v: Tensor, past: Slot, context: Context) -> Tensor:
        """Attention of a single token to the past and to itself, which leaves the past where it is.

        To put the token's keys and values behind all those before it costs more than the attention does, and would be
        done at every evaluation.
        """
        keys, values = (part.to(v.dtype) for part in past)
        mask = context.window.mask
        if self.relative is not None and context.distances is not None:
            q, mask = self.relative.bias(q, context.distances, context.window)
        scores = torch.cat([q @ keys.mT, (q * k).sum(-1, keepdim=True)], dim=-1) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        shares = scores.softmax(-1)
        return shares[..., :-1] @ values + shares[..., -1:] * v

    def _feed_forward(self, u: Tensor, context: Context) -> Tensor:
        return F.linear(F.gelu(F.linear(u, context.prepared.matrices[2])), context.prepared.matrices[3])


class RelativePositions(nn.Module):
    """Attention scores that know the distance of a pair: `(q + a) . k + (q + b) . r(distance)`.

    >>> RelativePositions(ModelConfig(width=64, heads=2)).project.weight.shape
    torch.Size([64, 64])

    Args:
        config: width, heads and weight normalisation.

    Source: Dai et al., "Transformer-XL", 2019 (arXiv:1901.02860), section 3.3.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.project = Linear(config.width, config.width, config.weight_norm)
        self.content_bias = nn.Parameter(torch.zeros(config.width))
        self.distance_bias = nn.Parameter(torch.zeros(config.width))

    def tables(self, window: Window, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Waves of all distances in a window `(distances, width)`, and the distance of each pair."""
        distances = (window.positions[:, None] - window.seen).clamp(min=0)
        width = self.project.columns
        cosine, sine = rotary(torch.arange(window.offset + window.time, device=window.device), width, dtype)
        return torch.cat([sine[:, : width // 2], cosine[:, : width // 2]], dim=1), distances

    def keys(self, window: Window, matrix: Tensor) -> Tensor:
        """Keys of all distances, `(heads, distances, size)`."""
        return F.linear(window.tables[0], matrix).unflatten(1, (self.heads, -1)).transpose(0, 1)

    def bias(self, q: Tensor, keys: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """The queries that meet keys, and what to add to the scaled scores of each pair."""
        a, b = (bias.to(q.dtype).view(self.heads, 1, -1) for bias in (self.content_bias, self.distance_bias))
        distances = window.tables[1]
        scores = torch.matmul(q + b, keys.to(q.dtype).transpose(1, 2)) * q.shape[-1] ** -0.5
        scores = scores.gather(-1, distances.expand(*scores.shape[:-1], -1))
        mask = window.mask
        if window.causal:
            mask = torch.ones(distances.shape, dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return q + a, scores


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
