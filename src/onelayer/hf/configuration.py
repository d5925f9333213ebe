"""The configuration of a model in the form of `transformers`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from onelayer.errors import UsageError
from onelayer.models.configuration import Architecture, Depth, Form, ModelConfig, Positions
from onelayer.pretrained import ARCHITECTURE, MODEL_TYPE


class DEQConfig(PreTrainedConfig):
    """What defines the model: the fields of `ModelConfig` under their own names, and some under those that others use.

    `vocab_size`, `hidden_size`, `num_attention_heads` and `max_position_embeddings` are other names of `vocabulary`,
    `width`, `heads` and `context`.

    >>> config = DEQConfig(width=64, heads=2)
    >>> config.hidden_size, config.num_hidden_layers
    (64, 1)

    Args:
        architecture, depth, layers, vocabulary, width, heads, context, block, positions, kernel, memory,
            own_unembedding, cutoffs, dropout, weight_norm, jacobian_weight,
            jacobian_share, warm_start, rtol, max_steps, eval_max_steps,
            backward_rtol, backward_max_steps: see `onelayer.models.configuration.ModelConfig`.

    Raises:
        UsageError: a value that is not allowed, or the configuration of another kind of model.
    """

    model_type = MODEL_TYPE
    attribute_map: ClassVar[dict[str, str]] = {
        "vocab_size": "vocabulary",
        "hidden_size": "width",
        "num_attention_heads": "heads",
        "max_position_embeddings": "context",
    }
    # What `Trainer` does not gather over an evaluation, where it asks for logits alone.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "cache",
        "hidden_states",
        "evaluations",
        "residual",
        "converged",
    ]

    architecture: Architecture = "transformer"
    depth: Depth = "equilibrium"
    layers: int = 6
    vocabulary: int = 256
    width: int = 128
    heads: int = 4
    context: int = 128
    block: Form = "post"
    positions: Positions = "rotary"
    kernel: int = 2
    memory: int = 0
    own_unembedding: bool = False
    cutoffs: tuple[int, ...] | list[int] = ()
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

    def __post_init__(self, **kwargs: Any) -> None:
        # `transformers` hands its own fields over here, in every version others.
        super().__post_init__(**kwargs)
        self.cutoffs = list(self.cutoffs)  # as JSON gives it back, so that a configuration equals the one saved
        self.to_model_config()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of `PreTrainedConfig`, except that the configuration of another kind of model is refused."""
        kind, architectures = config_dict.get("model_type", MODEL_TYPE), config_dict.get("architectures")
        if kind != MODEL_TYPE or ARCHITECTURE not in (architectures or [ARCHITECTURE]):
            raise UsageError(
                f"This is a model of type {kind!r} and architecture {', '.join(architectures or [])!r}, not of "
                f"{MODEL_TYPE!r} and {ARCHITECTURE!r}: load it by AutoModelForCausalLM."
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Slots of the cache that a token leaves keys and values in: one for an equilibrium, else one a layer."""
        return self.to_model_config().slots

    @property
    def qk_head_dim(self) -> int | None:
        """Entries of a cached key where they are not `hidden_size / num_attention_heads`, as in the TrellisNet."""
        return 2 * self.width if self.architecture == "trellisnet" else None

    @property
    def v_head_dim(self) -> int | None:
        """Entries of a cached value, likewise."""
        return self.width if self.architecture == "trellisnet" else None

    def to_model_config(self) -> ModelConfig:
        """The same as a `ModelConfig`.

        >>> DEQConfig(hidden_size=64, num_attention_heads=2).to_model_config() == ModelConfig(width=64, heads=2)
        True

        Raises:
            UsageError: a value that is not allowed.
        """
        return ModelConfig(**{field.name: getattr(self, field.name) for field in fields(ModelConfig)})
