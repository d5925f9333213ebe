"""Language models as `transformers` knows them: `generate`, `pipeline` and `Trainer` work as with any other model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from onelayer.errors import UsageError
from onelayer.hf.caching import commit, past_of
from onelayer.hf.configuration import DEQConfig
from onelayer.models.language_model import LanguageModel, Output
from onelayer.pretrained import check_tokenizer

IGNORED = -100  # of labels, as everywhere in transformers


@dataclass
class DEQOutput(CausalLMOutputWithPast):
    """What a model makes of some tokens, and how its equilibrium was found.

    >>> DEQForCausalLM(DEQConfig(width=64, heads=2)).eval()(torch.tensor([[1, 2, 3]])).converged
    tensor([True])

    Attributes:
        loss: mean cross entropy in nats and what training adds to it, a scalar; where labels were given.
        logits: of the token after each, `(batch, time, vocabulary)`.
        cache: keys and values at the equilibrium.
        hidden_states: the equilibrium, `(batch, time, state width)`, as a tuple of one; where it was asked for.
        evaluations: of the block until each sample's solve stopped, int `(batch,)`; None without equilibrium.
        residual: relative residual of each sample's equilibrium, `(batch,)`; None likewise.
        converged: whether it met the tolerance, bool `(batch,)`; None likewise.
    """

    evaluations: Tensor | None = None
    residual: Tensor | None = None
    converged: Tensor | None = None


class DEQForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model whose depth is an equilibrium, or one of its explicit twins, for `transformers`.

    One token leaves one pair of keys and values behind, at the equilibrium, whatever the effective depth is: the stock
    dynamic and static caches serve with a single layer.

    >>> model = DEQForCausalLM(DEQConfig(width=64, heads=2)).eval()
    >>> model.generate(torch.tensor([[72, 101]]), max_new_tokens=3, do_sample=False).shape
    torch.Size([1, 5])

    How many evaluations each token took: `with eq.monitor(model) as reports: model.generate(...)`.

    Args:
        config: architecture, depth, sizes and the solver's tolerances.

    Source: Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019 (arXiv:1909.01377).
    """

    config_class = DEQConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _input_embed_layer = "embedding"
    accepts_loss_kwargs = True  # `forward` divides by `num_items_in_batch`

    def __init__(self, config: DEQConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.to_model_config())
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As of `PreTrainedModel`, except that weights which are missing or left over are an error.

        >>> DEQForCausalLM.from_pretrained("runs/first/model", rtol=1e-4)       # doctest: +SKIP

        Raises:
            UsageError: the weights do not fit the configuration, the tokenizer beside them has more tokens than the
                model, or the folder is of another kind of model.
        """
        wanted = kwargs.pop("output_loading_info", False)
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise UsageError(_misfit(pretrained_model_name_or_path, "sizes differ")) from None
        model, info = loaded
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                names = ", ".join(sorted(map(str, info[kind]))[:3])
                raise UsageError(_misfit(pretrained_model_name_or_path, f"{kind.replace('_keys', '')}: {names}"))
        if pretrained_model_name_or_path is not None:  # weights may also be given as a dictionary
            check_tokenizer(Path(pretrained_model_name_or_path), model.config.vocabulary)
        return (model, info) if wanted else model

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> DEQOutput:
        """Logits of the token after each, and the loss where labels are given.

        Args:
            input_ids: int64 `(batch, time)`.
            attention_mask: `(batch, cached + time)`, 0 for padding on the left.
            cache: a dynamic or static cache of the tokens before; those of this call are added to it.
            labels: int64 `(batch, time)`, most often `input_ids` themselves, since the model moves them by one; -100
                leaves a token out of the loss.
            use_cache: whether to make a cache where none is given; None is outside of training.
            logits_to_keep: number of logits wanted, counted from the last, or their indices; 0 is all.
            num_items_in_batch: what to divide the summed loss by, where a batch comes in several parts.
            output_hidden_states: whether `hidden_states` is wanted.
            output_attentions: nothing that can be had.

        Raises:
            UsageError: a token outside the vocabulary, a mask that does not fit, a cache of another kind, or attention
                weights are asked for.
        """
        if output_attentions:
            raise UsageError("Attention weights are not kept: leave output_attentions out.")
        wanted = not self.training if use_cache is None else use_cache
        if cache is None and wanted:
            cache = DynamicCache(config=self.config)
        past, offset = past_of(cache, self.model.config.slots)
        real = _real(attention_mask, input_ids.shape, offset)
        found: Output = self.model(input_ids, real=real, past=past, remember=cache is not None)
        assert found.logits is not None
        if cache is not None:
            commit(cache, found.left)
        loss = None if labels is None else _loss(found, labels, num_items_in_batch)
        solution = found.solution
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return DEQOutput(
            loss=loss,
            logits=found.logits[:, kept],
            cache=cache,
            hidden_states=(found.state,) if output_hidden_states else None,
            evaluations=None if solution is None else solution.steps,
            residual=None if solution is None else solution.residual,
            converged=None if solution is None else solution.converged,
        )

    @staticmethod
    def create_masks_for_generate(
        config: DEQConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor | None:
        """The mask as it is: `generate` would make one of pairs of tokens for a static cache, which the model does."""
        return attention_mask

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        """Never: a solve stays out of graphs, and what is left around it does not pay for compiling at every length."""
        return False

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refused, since embedding, adaptive softmax and warm start are one vocabulary together."""
        raise UsageError(
            f"The vocabulary of {self.config.vocabulary} tokens is fixed: keep the tokenizer of this model, or "
            "train one with another vocabulary."
        )

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Refused: an equilibrium keeps nothing of its steps, and its gradient takes the memory of one block."""
        raise UsageError(
            "Backward takes the memory of one block already, whatever the depth: leave gradient_checkpointing out."
            if self.model.is_equilibrium
            else "Explicit twins keep their activations, so that their memory can be compared with an equilibrium's: "
            "leave gradient_checkpointing out."
        )

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `LanguageModel` draws its weights itself, and a folder in which some are missing is refused."""


def _misfit(folder: Any, why: str) -> str:
    return f"The weights in {folder} do not fit the model in its config.json ({why}): restore the two together."


def _real(mask: Tensor | None, shape: torch.Size, offset: int) -> Tensor | None:
    if mask is None:
        return None
    batch, time = shape
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < offset + time:
        raise UsageError(
            f"attention_mask must have the shape {(batch, offset + time)}, one entry for each token cached or given, "
            f"not {tuple(mask.shape)}."
        )
    return mask[:, : offset + time].bool()


def _loss(found: Output, labels: Tensor, items: int | Tensor | None) -> Tensor:
    assert found.logits is not None
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = F.cross_entropy(
        found.logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    count = (targets != IGNORED).sum()
    # The penalty is one of a mean loss: each part of a batch brings it in as far as its tokens count.
    return (losses + found.penalty * count) / (count.clamp(min=1) if items is None else items)
