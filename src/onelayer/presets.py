"""What a run is: its configuration, and the presets that stand for a machine and a time budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch

from onelayer.errors import UsageError
from onelayer.models.configuration import ModelConfig

Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained, validated and saved; the names are those of `config.json`.

    >>> TrainingConfig(steps=100).batch_size
    32

    Attributes:
        steps: updates of the weights; the learning rate falls along a cosine that ends with the last.
        batch_size: windows of one context in an update, those of all processes together.
        accumulate: parts in which each process takes its share of an update, to hold less at once.
        learning_rate: its peak.
        final_learning_rate: where the cosine ends, as a share of the peak.
        warmup_steps: updates over which the learning rate rises to its peak.
        weight_decay: of matrices; gains of normalisations have none.
        gradient_clip: largest norm of the gradient.
        unrolled_steps: first updates of an equilibrium model, taken through `unrolled_layers` plain applications of the
            block instead of its equilibrium: cheaper, and as good while little has been learnt. 0 is none.
        unrolled_layers: number of those applications.
        seed: of the initial weights and of the windows drawn.
        validate_every: updates between validations.
        validation_windows: windows in each of them.
        evaluation_windows: windows in the evaluation that ends the run.
        sample_bytes: bytes of text drawn there.
        save_every: updates between checkpoints, and so the most that a killed run loses.
        device: "cpu" or "cuda".
        precision: "float32"; "bfloat16" for products with matrices, weights and the state of the solver staying
            float32; or "float64" for all.

    Raises:
        UsageError: at construction, for a value that is not allowed.
    """

    steps: int = 900
    batch_size: int = 32
    accumulate: int = 1
    learning_rate: float = 6e-3
    final_learning_rate: float = 0.05
    warmup_steps: int = 30
    weight_decay: float = 0.05
    gradient_clip: float = 1.0
    unrolled_steps: int = 0
    unrolled_layers: int = 4
    seed: int = 0
    validate_every: int = 100
    validation_windows: int = 64
    evaluation_windows: int = 256
    sample_bytes: int = 320
    save_every: int = 50
    device: Device = "cpu"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name, least in {
            "steps": 1,
            "batch_size": 1,
            "accumulate": 1,
            "warmup_steps": 0,
            "unrolled_steps": 0,
            "unrolled_layers": 1,
            "seed": 0,
            "validate_every": 1,
            "validation_windows": 1,
            "evaluation_windows": 1,
            "sample_bytes": 1,
            "save_every": 1,
        }.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        for name in ("learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name} must be a positive number, not {getattr(self, name)}.")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"weight_decay must be 0 or a positive number, not {self.weight_decay}.")
        if not 0 <= self.final_learning_rate <= 1:
            raise UsageError(f"final_learning_rate must lie between 0 and 1, not {self.final_learning_rate}.")
        if self.device not in get_args(Device):
            raise UsageError(f"device must be one of {', '.join(get_args(Device))}, not {self.device!r}.")
        if self.precision not in get_args(Precision):
            raise UsageError(f"precision must be one of {', '.join(get_args(Precision))}, not {self.precision!r}.")


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run.

    >>> RunConfig(preset="tiny", training=TrainingConfig(steps=10)).model.depth
    'equilibrium'

    Attributes:
        preset: where the values came from.
        data: path of the text, or `None` for Python's standard library.
        model: the model.
        training: how it is trained.
    """

    preset: str = "small"
    data: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which a model on that device runs, which sets the precision of its products."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.training.precision == "bfloat16")


PRESETS = {
    # Two CPU cores, about five minutes.
    "small": RunConfig(
        "small",
        model=ModelConfig(width=128, heads=4, context=64),
        training=TrainingConfig(
            steps=600,
            batch_size=16,
            learning_rate=6e-3,
            warmup_steps=30,
            unrolled_steps=300,
            validate_every=50,
            validation_windows=128,
            evaluation_windows=256,
            save_every=50,
        ),
    ),
    # Seconds, to see that everything works; what it learns is not worth reading.
    "tiny": RunConfig(
        "tiny",
        model=ModelConfig(width=32, heads=2, context=32, layers=3, max_steps=24, eval_max_steps=32),
        training=TrainingConfig(
            steps=12,
            batch_size=4,
            warmup_steps=2,
            unrolled_steps=2,
            validate_every=6,
            validation_windows=4,
            evaluation_windows=8,
            sample_bytes=16,
            save_every=4,
        ),
    ),
    # About half an hour on one large GPU.
    "gpu": RunConfig(
        "gpu",
        model=ModelConfig(width=768, heads=12, context=512, rtol=1e-2, backward_rtol=5e-2),
        training=TrainingConfig(
            steps=6000,
            batch_size=64,
            learning_rate=1e-3,
            warmup_steps=200,
            unrolled_steps=2000,
            validate_every=200,
            validation_windows=128,
            evaluation_windows=512,
            save_every=200,
            device="cuda",
            precision="bfloat16",
        ),
    ),
}


def preset(name: str) -> RunConfig:
    """The configuration of that name.

    >>> preset("tiny").training.steps
    12

    Raises:
        UsageError: there is no such preset.
    """
    if name not in PRESETS:
        raise UsageError(f"There is no preset {name!r}: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


# Values that say how an equilibrium is found, or made easy to find.
_OF_EQUILIBRIA = {"max_steps", "rtol", "unrolled_steps", "jacobian_weight", "jacobian_share", "warm_start"}


def changed(config: RunConfig, values: dict[str, Any], data: str | None = None) -> RunConfig:
    """The configuration on other data, with some values of its model or training replaced, by their names.

    >>> changed(preset("tiny"), {"steps": 3, "width": 64}).model.width
    64

    Raises:
        UsageError: a value is not allowed.
    """
    own = {f.name for f in fields(ModelConfig)}
    model = replace(config.model, **{name: value for name, value in values.items() if name in own})
    for kind, names, holds in (
        ("equilibrium models", _OF_EQUILIBRIA, model.depth == "equilibrium"),
        ("untied and tied models", {"layers"}, model.depth != "equilibrium"),
        ("the Transformer", {"heads", "block", "positions"}, model.architecture == "transformer"),
        ("the TrellisNet", {"kernel"}, model.architecture == "trellisnet"),
    ):
        for name in values if not holds else ():
            if name in names:
                raise UsageError(f"{name} is for {kind}, and this is another: leave it out.")
    return replace(
        config,
        data=data,
        model=model,
        training=replace(config.training, **{name: value for name, value in values.items() if name not in own}),
    )


def from_dict(values: dict[str, Any]) -> RunConfig:
    """The configuration that was written to `config.json`.

    >>> from_dict({"preset": "tiny", "data": {"path": None}, "model": {"width": 64}, "training": {}}).model.width
    64

    Raises:
        UsageError: a part is missing, unknown or not allowed.
    """
    try:
        return RunConfig(
            values["preset"],
            values["data"]["path"],
            ModelConfig(**values["model"]),
            TrainingConfig(**values["training"]),
        )
    except (KeyError, TypeError) as error:
        raise UsageError(f"This is no configuration that onelayer train has written ({error}): restore it.") from None


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The `model` and `training` parts of `config.json`.

    >>> to_dict(preset("tiny"))["model"]["width"]
    32
    """
    return {"preset": config.preset, "model": asdict(config.model), "training": asdict(config.training)}
