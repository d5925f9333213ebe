"""The card of a model: what it is, how its equilibrium was measured, how to load it, and what it is not good for."""

from __future__ import annotations

from dataclasses import dataclass

from onelayer.models.configuration import ModelConfig
from onelayer.report.record import CAP_LIMIT


@dataclass(frozen=True)
class Measured:
    """What was measured of a trained model on text that it was not trained on; `None` is not measured.

    >>> Measured(bits_per_byte=2.1).share_at_cap is None
    True

    Attributes:
        bits_per_byte: mean cross entropy.
        evaluations: of the block, mean of all solves.
        residual: relative, median of all solves.
        share_at_cap: share of the solves that ended without meeting the tolerance.
    """

    bits_per_byte: float | None = None
    evaluations: float | None = None
    residual: float | None = None
    share_at_cap: float | None = None


def card(
    config: ModelConfig,
    parameters: tuple[int, int],
    data: str | None = None,
    tokens: int | None = None,
    measured: Measured = Measured(),
) -> str:
    """The model card in Markdown, with what the Hub reads of it on top.

    >>> print(card(ModelConfig(), (231_000, 198_000), "some books", 1_000_000))
    ---
    library_name: transformers
    ...

    Args:
        config: of the model.
        parameters: number of them, and of those that are not embeddings, as `LanguageModel.parameter_counts` has it.
        data: name of the training text.
        tokens: that the model was trained on, counted as often as they were seen.
        measured: on validation text.

    Returns:
        The content of `README.md`.
    """
    tags = ["deep-equilibrium-model", "implicit-layers", config.architecture]
    sections = [
        _front(tags),
        f"# {_title(config, measured)}",
        _what(config, measured),
        _table(config, parameters, data, tokens, measured),
        _load(config),
        _limits(config, measured),
    ]
    return "\n\n".join(sections) + "\n"


def _front(tags: list[str]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---"])


def _title(config: ModelConfig, measured: Measured) -> str:
    name = {"transformer": "Transformer", "trellisnet": "TrellisNet"}[config.architecture]
    if config.depth == "untied":
        return f"{name} of {config.layers} layers"
    if config.depth == "tied":
        return f"{name} of one layer applied {config.layers} times"
    if _is_capped(measured):
        return f"{name} of one layer applied up to {config.eval_max_steps} times"
    return f"{name} of one layer at its equilibrium"


def _what(config: ModelConfig, measured: Measured) -> str:
    if config.depth != "equilibrium":
        return "A language model of explicit layers, made of the block of a deep equilibrium model to be compared with."
    text = (
        "A language model whose depth is the equilibrium `z = f(z, x)` of one block, found anew for every text by "
        "Anderson's method. A token leaves one pair of keys and values behind, at the equilibrium."
    )
    if _is_capped(measured):
        text += (
            f"\n\n**{_percent(measured.share_at_cap)} of the solves ended at the cap without meeting the tolerance. "
            f"What was trained is a network of up to {config.eval_max_steps} steps of one layer, not an equilibrium "
            "model**: with another number of steps it is another model."
        )
    return text


def _table(
    config: ModelConfig, parameters: tuple[int, int], data: str | None, tokens: int | None, measured: Measured
) -> str:
    missing = "not measured"
    rows = [
        ("parameters", f"{parameters[0]:,}, {parameters[1]:,} without embeddings"),
        ("vocabulary", f"{config.vocabulary:,} tokens" + (", the bytes" if config.vocabulary == 256 else "")),
        ("training window", f"{config.context:,} tokens"),
        ("trained on", "not stated" if data is None else data),
        ("tokens seen", "not stated" if tokens is None else f"{tokens:,}"),
        ("validation", missing if measured.bits_per_byte is None else f"{measured.bits_per_byte:.3f} bits per byte"),
    ]
    if config.depth == "equilibrium":
        rows += [
            ("tolerance", f"relative residual {config.rtol:g}, at most {config.eval_max_steps} evaluations"),
            ("evaluations", missing if measured.evaluations is None else f"{measured.evaluations:.1f} on average"),
            ("residual", missing if measured.residual is None else f"{measured.residual:.1e}, the median"),
            ("solves at the cap", _percent(measured.share_at_cap)),
        ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _load(config: ModelConfig) -> str:
    tighter = ", rtol=1e-4" if config.depth == "equilibrium" else ""
    return f"""## Use

```python
import onelayer.hf  # makes transformers know the architecture: pip install "equilibria[hf]"
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
model = AutoModelForCausalLM.from_pretrained(folder{tighter})
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(["Once upon a time"], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=50), skip_special_tokens=True)[0])
```"""


def _limits(config: ModelConfig, measured: Measured) -> str:
    points = [
        f"It was trained on windows of {config.context:,} tokens; longer texts were never tried.",
        "It continues text. It was not taught to follow instructions, nor kept from writing what is false or harmful.",
    ]
    if config.depth == "equilibrium":
        points.append(
            "Logits are exact to the tolerance of the solve, so that a cache, another batch or another machine can "
            "change the last digits; a smaller `rtol` makes them agree better and takes more evaluations."
        )
        if measured.share_at_cap is None:
            points.append("Whether its solves meet the tolerance was not measured: look at `converged` of its output.")
    return "\n".join(["## Limits", "", *(f"- {point}" for point in points)])


def _is_capped(measured: Measured) -> bool:
    return measured.share_at_cap is not None and measured.share_at_cap > CAP_LIMIT


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{share:.1%}"
