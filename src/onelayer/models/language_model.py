"""A language model: embedding, the depth that `config.depth` names, unembedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equilibria as eq
from onelayer.errors import UsageError
from onelayer.models.configuration import ModelConfig
from onelayer.models.depth import Depth
from onelayer.models.transformer import TransformerBlock
from onelayer.models.trellisnet import TrellisBlock
from onelayer.models.window import Memory, Slot, window

IGNORED = -100  # a target that no loss is taken of; what cross entropies of torch leave out by default

BLOCKS: dict[str, Callable[[ModelConfig], Any]] = {"transformer": TransformerBlock, "trellisnet": TrellisBlock}


class Output(NamedTuple):
    """What a language model makes of some tokens.

    Attributes:
        logits: of the token after each, `(batch, time, vocabulary)`; `None` where targets were given.
        losses: cross entropy of each target in nats, `(batch, time)`, float32 at least; `None` where there were none.
        penalty: what training adds to the mean loss, a scalar; 0 where there is nothing to add.
        state: of each token, `(batch, time, state width)`.
        left: keys and values for later tokens, for each slot; empty where they were not asked for.
        memory: for the segment after this one; `None` where the configuration has no memory.
        solution: how the equilibrium was found; `None` where there is none.
    """

    logits: Tensor | None
    losses: Tensor | None
    penalty: Tensor
    state: Tensor
    left: tuple[Slot, ...]
    memory: Memory | None
    solution: eq.Solution | None


class LanguageModel(nn.Module):
    """A language model over bytes or other tokens, whose depth is an equilibrium or a number of layers.

    >>> model = LanguageModel(ModelConfig(width=64, heads=2, context=32))
    >>> tokens = torch.randint(0, 256, (3, 32))
    >>> model(tokens).logits.shape
    torch.Size([3, 32, 256])
    >>> model(tokens, max_steps=4).solution.evaluations
    4

    Args:
        config: architecture, depth, sizes and the solver's tolerances.
        block: makes the block in place of the architecture's own; see `TransformerBlock` for the methods that it has.

    Source: Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019 (arXiv:1909.01377); the guess that a warm start
    learns after Bai, Koltun and Kolter, "Neural Deep Equilibrium Solvers", 2022.
    """

    def __init__(self, config: ModelConfig, block: Callable[[ModelConfig], Any] | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        # Small, because the same matrix reads the logits off a state of unit size.
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        self.depth = Depth(config, block or BLOCKS[config.architecture])
        self.norm = nn.RMSNorm(config.width)
        self.dropout = eq.nn.VariationalDropout(config.dropout, shared_dims=1)
        self.adaptive = (
            nn.AdaptiveLogSoftmaxWithLoss(config.width, config.vocabulary, list(config.cutoffs))
            if config.cutoffs
            else None
        )
        self.unembedding = nn.Linear(config.width, config.vocabulary, bias=False) if config.own_unembedding else None
        if self.unembedding is not None:
            nn.init.normal_(self.unembedding.weight, std=config.width**-0.5)
        self.guess = nn.Embedding(config.vocabulary, self.depth.block.state_width) if config.warm_start else None
        if self.guess is not None:
            nn.init.zeros_(self.guess.weight)

    @property
    def is_equilibrium(self) -> bool:
        """Whether there is an equilibrium to solve for."""
        return self.config.depth == "equilibrium"

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        real: Tensor | None = None,
        past: tuple[Slot, ...] | None = None,
        offset: int | None = None,
        memory: Memory | None = None,
        start: Tensor | None = None,
        max_steps: int | None = None,
        unrolled: int | None = None,
        remember: bool = False,
    ) -> Output:
        """Logits of the token after each, or the losses of those that really follow.

        Args:
            tokens: int64 `(batch, time)`.
            targets: the tokens that follow, likewise; the loss of one that is `IGNORED` is 0, which an adaptive
                softmax does not know.
            real: bool `(batch, past + time)`, False for padding on the left; `None` where there is none.
            past: what the tokens before left, for each slot `(batch, heads, stored, size)` twice.
            offset: positions of the past that are used; `None` is all.
            memory: or what the call on the segment before returned as `memory`.
            start: of the solve, `(batch, time, state width)`.
            max_steps: evaluations of the block allowed to the solve, instead of the configuration's. N evaluations
                give a state behind which stand N - 1 applications of the block, because the last one measures the
                residual of what is returned.
            unrolled: plain applications of the block of an equilibrium model, instead of a solve.
            remember: whether `left` is wanted.

        Raises:
            UsageError: `max_steps` or `unrolled` for a model without equilibrium, options that exclude each other, or a
                token outside the vocabulary.
        """
        self._check(tokens)
        if past is not None and memory is not None:
            raise UsageError("past and memory are two ways to look back: give one of them.")
        stored = 0
        if past is not None:
            stored = past[0][0].shape[2]
        elif memory is not None:
            stored = memory.x.shape[1]
        frame = window(tokens.shape[1], tokens.device, stored, offset, real)
        # Unit size, so that the text enters each application as strongly as the state does.
        x = self.dropout(F.rms_norm(self.embedding(tokens), (self.config.width,)))
        if frame.real is not None:
            x = torch.where(frame.real, x, 0)
        guess = None if self.guess is None else self.guess(tokens)
        if guess is not None and frame.real is not None:
            guess = torch.where(frame.real, guess, 0)
        if start is None:
            start = guess
        result = self.depth(x, frame, past, memory, start, max_steps, unrolled, remember)
        hidden = self.norm(self.depth.block.read(result.z))
        logits, losses = self._unembed(hidden, targets)
        penalty = _wide(hidden.new_zeros(()))
        if self.training and guess is not None:
            apart = _wide(guess - result.z.detach()).square()
            penalty = penalty + apart.sum() / max(apart.numel(), 1)  # the mean, also of an empty batch
        if result.penalty is not None:
            penalty = penalty + self.config.jacobian_weight * result.penalty
        kept = self._keep(x, result.entered, memory) if self.config.memory else None
        return Output(logits, losses, penalty, result.z, result.left, kept, result.solution)

    def parameter_counts(self) -> tuple[int, int]:
        """Number of parameters, and of those that are not embeddings."""
        total = sum(parameter.numel() for parameter in self.parameters())
        tables = (part for part in (self.embedding, self.unembedding, self.guess, self.adaptive) if part is not None)
        return total, total - sum(parameter.numel() for part in tables for parameter in part.parameters())

    def _check(self, tokens: Tensor) -> None:
        # Elsewhere and compiled, the embedding complains by itself, in other words and without being waited for.
        if tokens.numel() and tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(end) for end in tokens.aminmax())
            if low < 0 or high >= self.config.vocabulary:
                raise UsageError(
                    f"Token {low if low < 0 else high} is not in the vocabulary of {self.config.vocabulary}: "
                    "read the text with the tokenizer of this model."
                )

    def _unembed(self, hidden: Tensor, targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if self.adaptive is None:
            logits = F.linear(hidden, (self.unembedding or self.embedding).weight)
            if targets is None:
                return logits, None
            losses = F.cross_entropy(_wide(logits).flatten(0, 1), targets.flatten(), reduction="none")
            return None, losses.view(targets.shape)
        with torch.autocast(hidden.device.type, enabled=False):  # it copies between dtypes that autocast makes unequal
            shape, hidden = hidden.shape[:2], hidden.flatten(0, 1).to(self.adaptive.head.weight.dtype)
            if targets is None:
                return self.adaptive.log_prob(hidden).unflatten(0, shape), None
            losses = -_wide(self.adaptive(hidden, targets.flatten()).output)
            # Clusters that no target fell in take part too, as data parallelism expects of every parameter.
            losses = losses + 0 * sum(parameter.sum() for parameter in self.adaptive.parameters())
        return None, losses.view(targets.shape)

    def _keep(self, x: Tensor, entered: tuple[Tensor, ...], memory: Memory | None) -> Memory:
        size = self.config.memory
        if memory is not None:
            x = torch.cat([memory.x.to(x.dtype), x], dim=1)
            entered = tuple(torch.cat(pair, dim=1) for pair in zip(memory.states, entered, strict=True))
        return Memory(x[:, -size:].detach(), tuple(state[:, -size:].detach() for state in entered))


def _wide(a: Tensor) -> Tensor:
    return a.to(torch.promote_types(a.dtype, torch.float32))  # sums in half precision lose digits


def bits(losses: Tensor) -> Tensor:
    """Mean cross entropy in bits, which is bits per byte where a token is a byte.

    >>> bits(torch.full((2, 5), math.log(256)))
    tensor(8.)

    Args:
        losses: in nats, of any shape.

    Returns:
        A scalar.
    """
    return losses.mean() / math.log(2)
