"""What defines a language model of this application, of either architecture and any depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from onelayer.errors import UsageError

Architecture = Literal["transformer", "trellisnet"]
Depth = Literal["equilibrium", "untied", "tied"]
Form = Literal["post", "subtracted"]
Positions = Literal["rotary", "relative"]

BYTES = 256


@dataclass(frozen=True)
class ModelConfig:
    """What defines the model; the names are those of `config.json`.

    >>> ModelConfig(width=64, heads=2).depth
    'equilibrium'

    Attributes:
        architecture: `"transformer"` or `"trellisnet"`: the block.
        depth: `"equilibrium"` of one block, `"untied"` for `layers` different blocks, `"tied"` for one block applied
            `layers` times.
        layers: number of applications for `"untied"` and `"tied"`; the equilibrium has no such number.
        vocabulary: tokens; 256 are bytes.
        width: entries of a token's hidden state.
        heads: attention heads; `width / heads` must be even, because rotary positions turn pairs of entries.
        context: tokens of a training window.
        block: form of the Transformer block: `"post"`, normalised last; or `"subtracted"`, a pre-norm block with gated
            branches less its identity path.
        positions: of the Transformer: `"rotary"`, or `"relative"` as in Transformer-XL.
        kernel: tokens that the convolution of the TrellisNet spans.
        memory: tokens of the previous segment that training keeps for the next one to look back at; 0 is none.
        own_unembedding: whether logits are read off by a matrix of their own instead of the embedding's.
        cutoffs: where the clusters of an adaptive softmax begin, rising, for large vocabularies; empty is an ordinary
            softmax that shares its matrix with the embedding.
        dropout: share of entries zeroed in training, the same ones for all tokens of a window and within a solve.
        weight_norm: whether matrices are written as direction and size, evaluated once per forward.
        jacobian_weight: weight of the squared Frobenius norm of the block's Jacobian in the loss; 0 is none.
        jacobian_share: share of the updates that it is applied in.
        warm_start: whether solves start at a guess read off each token, learnt from the equilibria it led to.
        rtol: relative residual at which a solve is done, see `eq.DEQ`.
        max_steps: evaluations of the block allowed to a solve in training.
        eval_max_steps: the same in evaluation and generation.
        backward_rtol: relative residual at which the adjoint solve is done.
        backward_max_steps: products with the transposed Jacobian allowed to it.

    Raises:
        UsageError: at construction, for a value that is not allowed.
    """

    architecture: Architecture = "transformer"
    depth: Depth = "equilibrium"
    layers: int = 6
    vocabulary: int = BYTES
    width: int = 128
    heads: int = 4
    context: int = 128
    block: Form = "post"
    positions: Positions = "rotary"
    kernel: int = 2
    memory: int = 0
    own_unembedding: bool = False
    cutoffs: tuple[int, ...] = ()
    dropout: float = 0.0
    weight_norm: bool = False
    jacobian_weight: float = 0.0
    jacobian_share: float = 0.5
    warm_start: bool = False
    rtol: float = 5e-3
    max_steps: int = 32
    eval_max_steps: int = 64
    backward_rtol: float = 3e-2
    backward_max_steps: int = 24

    def __post_init__(self) -> None:
        object.__setattr__(self, "cutoffs", tuple(self.cutoffs))  # JSON gives a list
        for name, allowed in (
            ("architecture", Architecture),
            ("depth", Depth),
            ("block", Form),
            ("positions", Positions),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise UsageError(f"{name} must be one of {', '.join(get_args(allowed))}, not {getattr(self, name)!r}.")
        for name in ("layers", "width", "heads", "context", "max_steps", "eval_max_steps", "backward_max_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name, least in (("vocabulary", 2), ("kernel", 2), ("memory", 0), ("jacobian_weight", 0)):
            if not least <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        for name in ("rtol", "backward_rtol"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} must lie between 0 and 1, not {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and less than 1, not {self.dropout}.")
        if not 0 <= self.jacobian_share <= 1:
            raise UsageError(f"jacobian_share must lie between 0 and 1, not {self.jacobian_share}.")
        if self.depth != "equilibrium" and (self.jacobian_weight or self.warm_start):
            name = "jacobian_weight" if self.jacobian_weight else "warm_start"
            raise UsageError(f"{name} is for equilibrium models, and this one is {self.depth}: leave it out.")
        if self.own_unembedding and self.cutoffs:
            raise UsageError("own_unembedding is for an ordinary softmax, an adaptive one has its own: leave it out.")
        if self.width % (2 * self.heads):
            raise UsageError(
                f"width must be a multiple of twice the heads, and {self.width} is not a multiple of {2 * self.heads}."
            )
        if list(self.cutoffs) != sorted({c for c in self.cutoffs if 0 < c < self.vocabulary}):
            raise UsageError(
                f"cutoffs must rise between 1 and {self.vocabulary - 1}, and {list(self.cutoffs)} do not: leave them "
                "out for an ordinary softmax."
            )

    @property
    def slots(self) -> int:
        """Number of states that a token leaves for later ones to look at: one for an equilibrium, else one a layer."""
        return 1 if self.depth == "equilibrium" else self.layers
