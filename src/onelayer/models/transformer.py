"""A causal Transformer over bytes whose whole depth is the equilibrium of one block.

The block is `f(z, x)`: a hidden state `z` and the embedded text `x`, which enters at every application (input
injection). The same block class gives three models: its equilibrium `z* = f(z*, x)`, `layers` blocks with weights of
their own, and one block applied `layers` times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equilibria as eq
from onelayer.errors import UsageError

Depth = Literal["equilibrium", "untied", "tied"]
VOCABULARY = 256


@dataclass(frozen=True)
class TransformerConfig:
    """What defines the model; the names are those of `config.json`.

    >>> TransformerConfig(width=64, heads=2).depth
    'equilibrium'

    Attributes:
        depth: `"equilibrium"` of one block, `"untied"` for `layers` different blocks, `"tied"` for one block applied
            `layers` times.
        layers: number of applications for `"untied"` and `"tied"`; the equilibrium has no such number.
        width: entries of a token's state.
        heads: attention heads; `width / heads` must be even, because rotary positions turn pairs of entries.
        context: bytes that the model sees at once.
        rtol: relative residual at which a solve is done, see `eq.DEQ`.
        max_steps: evaluations of the block allowed to a solve in training.
        eval_max_steps: the same in evaluation and generation.
        backward_rtol: relative residual at which the adjoint solve is done.
        backward_max_steps: products with the transposed Jacobian allowed to it.

    Raises:
        UsageError: at construction, for a value that is not allowed.
    """

    depth: Depth = "equilibrium"
    layers: int = 6
    width: int = 128
    heads: int = 4
    context: int = 128
    rtol: float = 5e-3
    max_steps: int = 32
    eval_max_steps: int = 64
    backward_rtol: float = 3e-2
    backward_max_steps: int = 24

    def __post_init__(self) -> None:
        if self.depth not in get_args(Depth):
            raise UsageError(f"The model must be one of {', '.join(get_args(Depth))}, not {self.depth!r}.")
        for name in ("layers", "width", "heads", "context", "max_steps", "eval_max_steps", "backward_max_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("rtol", "backward_rtol"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} must lie between 0 and 1, not {getattr(self, name)}.")
        if self.width % (2 * self.heads):
            raise UsageError(
                f"width must be a multiple of twice the heads, and {self.width} is not a multiple of {2 * self.heads}."
            )


class Block(nn.Module):
    """One post-norm Transformer block with input injection, `z -> f(z, x)`.

    Attention and then the feed-forward part each add to what they read, and the sum is normalised. The normalisation
    comes last, so the states it can return are bounded whatever the weights are, and the equilibrium is not the point
    where the branches vanish, as it would be with an identity path from `z` to the output.

    >>> block = Block(TransformerConfig(width=64, heads=2))
    >>> x = torch.randn(3, 10, 64)
    >>> block(torch.zeros_like(x), x).shape
    torch.Size([3, 10, 64])

    Source: the Transformer of Vaswani et al., 2017 (arXiv:1706.03762), with the injection of Bai, Kolter and Koltun,
    "Deep Equilibrium Models", 2019 (arXiv:1909.01377), and rotary positions, Su et al., 2021 (arXiv:2104.09864).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_output = nn.Linear(width, width, bias=False)
        self.attention_norm = nn.RMSNorm(width)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)
        self.output_norm = nn.RMSNorm(width)
        for layer in (self.query_key_value, self.attention_output, self.expand, self.contract):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        self.cosine: Tensor
        self.sine: Tensor
        cosine, sine = rotary_tables(config.context, width // config.heads)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def attention(self, u: Tensor) -> Tensor:
        """Causal self-attention with rotary positions: `(batch, time, width)` to the same."""
        batch, time, width = u.shape
        q, k, v = self.query_key_value(u).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        # Queries and keys of unit size bound the attention scores, and with them how much the block can expand.
        q, k = (self._rotate(F.rms_norm(a, a.shape[-1:])).to(v.dtype) for a in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attention_output(mixed.transpose(1, 2).reshape(batch, time, width))

    def feed_forward(self, u: Tensor) -> Tensor:
        """The part that works on each position alone: `(batch, time, width)` to the same."""
        return self.contract(F.gelu(self.expand(u)))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        u = z + x
        u = self.attention_norm(u + self.attention(u))
        return self.output_norm(u + self.feed_forward(u))

    def _rotate(self, a: Tensor) -> Tensor:
        time = a.shape[-2]
        first, second = a.chunk(2, dim=-1)
        return a * self.cosine[:time] + torch.cat((-second, first), dim=-1) * self.sine[:time]


def rotary_tables(context: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which rotary positions turn the pairs (i, i + size / 2) of a head's entries.

    >>> [table.shape for table in rotary_tables(128, 32)]
    [torch.Size([128, 32]), torch.Size([128, 32])]

    Args:
        context: number of positions.
        size: entries of a head, an even number.

    Returns:
        Two tensors `(context, size)`.

    Source: Su et al., "RoFormer", 2021 (arXiv:2104.09864).
    """
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


class TransformerLM(nn.Module):
    """A language model over bytes: embedding, the depth that `config.depth` names, tied unembedding.

    >>> model = TransformerLM(TransformerConfig(width=64, heads=2, context=32))
    >>> tokens = torch.randint(0, 256, (3, 32))
    >>> model(tokens).shape
    torch.Size([3, 32, 256])
    >>> logits, solution = model.solve(tokens, max_steps=4)
    >>> solution.evaluations
    4

    Args:
        config: width, depth and the solver's tolerances.
        block: makes the block from the configuration; any module `(z, x) -> z` on `(batch, time, width)` will do.
    """

    def __init__(self, config: TransformerConfig, block: Callable[[TransformerConfig], nn.Module] = Block) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        # Small, because the same matrix reads the logits off a state of unit size.
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        self.layer = _equilibrium(block(config), config) if config.depth == "equilibrium" else None
        count = {"equilibrium": 0, "tied": 1, "untied": config.layers}[config.depth]
        self.blocks = nn.ModuleList(block(config) for _ in range(count))
        self.norm = nn.RMSNorm(config.width)

    def forward(self, tokens: Tensor, max_steps: int | None = None) -> Tensor:
        """Logits of the next byte after each position; the arguments are those of `solve`."""
        return self.solve(tokens, max_steps)[0]

    def solve(self, tokens: Tensor, max_steps: int | None = None) -> tuple[Tensor, eq.Solution | None]:
        """Logits of the next byte after each position, and how the equilibrium was found.

        Args:
            tokens: int64 `(batch, time)`, `time` at most `config.context`.
            max_steps: evaluations of the block allowed to the solve, instead of the configuration's. N evaluations
                give a state behind which stand N - 1 applications of the block, because the last one measures the
                residual of what is returned. Such a solve is not seen by `eq.monitor`.

        Returns:
            Logits `(batch, time, 256)`; and the `eq.Solution`, or `None` where the depth is a number of layers.

        Raises:
            UsageError: more tokens than the context holds, or `max_steps` for a model without equilibrium.
        """
        if self.layer is None:
            if max_steps is not None:
                raise UsageError(f"max_steps is for equilibrium models, and this one has {self.config.layers} layers.")
            return self.unroll(tokens, self.config.layers), None
        layer = self.layer if max_steps is None else _equilibrium(self.layer.cell, self.config, max_steps)
        solution = layer.solve(self._embed(tokens))
        return self._logits(solution.value), solution

    def unroll(self, tokens: Tensor, layers: int) -> Tensor:
        """Logits after a fixed number of applications of the block, with autograd through each.

        Args:
            tokens: int64 `(batch, time)`, `time` at most `config.context`.
            layers: number of applications, from a state of zeros; untied blocks take turns.

        Returns:
            Logits `(batch, time, 256)`.
        """
        return self._logits(self._iterate(self._embed(tokens), layers))

    def parameter_counts(self) -> tuple[int, int]:
        """Number of parameters, and of those that are not embeddings."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total, total - self.embedding.weight.numel()

    def _embed(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.config.context:
            raise UsageError(f"{tokens.shape[1]} tokens do not fit a context of {self.config.context}: give fewer.")
        # Unit size, so that the text enters each application as strongly as the state does.
        return F.rms_norm(self.embedding(tokens), (self.config.width,))

    def _iterate(self, x: Tensor, layers: int) -> Tensor:
        blocks = self.blocks if self.layer is None else [self.layer.cell]
        z = torch.zeros_like(x)
        for k in range(layers):
            z = blocks[k % len(blocks)](z, x)
        return z

    def _logits(self, z: Tensor) -> Tensor:
        return F.linear(self.norm(z), self.embedding.weight)


def bits_per_byte(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in bits, which is bits per byte where a token is a byte.

    >>> bits_per_byte(torch.zeros(2, 5, 256), torch.zeros(2, 5, dtype=torch.int64))
    tensor(8.)

    Args:
        logits: `(batch, time, 256)`, of any floating dtype; the sum is taken in float32.
        targets: int64 `(batch, time)`.

    Returns:
        A scalar.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) / math.log(2)


def _equilibrium(cell: Callable[..., Tensor], config: TransformerConfig, max_steps: int | None = None) -> eq.DEQ:
    # What became of each solve is recorded at every step of training, so nothing needs to be said beside it.
    return eq.DEQ(
        cell,
        solver=eq.Anderson(),
        adjoint=eq.Implicit(rtol=config.backward_rtol, max_steps=config.backward_max_steps),
        rtol=config.rtol,
        max_steps=max_steps or config.max_steps,
        eval_max_steps=max_steps or config.eval_max_steps,
        on_failure="ignore",
    )
