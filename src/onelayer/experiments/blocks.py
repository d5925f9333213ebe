"""The block of the equilibrium language model and what is said to help it, one change at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onelayer.experiments.arms import EQUILIBRIUM, twins
from onelayer.experiments.experiment import FAILED, Drawing, Experiment, Findings, Progress, Row, Table, Trial
from onelayer.experiments.language import OWN, learn_text
from onelayer.experiments.learning import cost_table, score_table
from onelayer.experiments.plots import curves
from onelayer.experiments.rates import with_chosen_rates
from onelayer.experiments.statistics import measured, paired
from onelayer.models.configuration import ModelConfig
from onelayer.presets import Device, Precision, RunConfig, TrainingConfig


@dataclass(frozen=True)
class Settings:
    """How much of it.

    Attributes:
        minutes: budget on the machine it is meant for.
        device, precision: of the training.
        seeds: paired, of weights and windows.
        rates: of learning, from which each arm chooses with a seed of its own.
        layers: of the explicit network, and applications of the tied ones.
        width, heads, context, batch_size, steps: of the equilibrium and of all trainings. No update is unrolled, so
            that arms differ in nothing but what they are named after.
        windows: scored at the end.
    """

    minutes: int
    device: Device = "cpu"
    precision: Precision = "float32"
    seeds: int = 3
    rates: tuple[float, ...] = (4e-3, 8e-3)
    layers: int = 6
    width: int = 128
    heads: int = 4
    context: int = 64
    batch_size: int = 16
    steps: int = 200
    windows: int = 256


def _arms(settings: Settings) -> dict[str, ModelConfig]:
    post = ModelConfig(width=settings.width, heads=settings.heads, context=settings.context)
    subtracted = replace(post, block="subtracted")
    four = twins(post, settings.layers)
    tied = f"tied {settings.layers}"
    return {
        **four,
        "warm start": replace(post, warm_start=True),
        "own unembedding": replace(post, own_unembedding=True),
        "Jacobian 0.1": replace(post, jacobian_weight=0.1),
        "Jacobian 1": replace(post, jacobian_weight=1.0),
        "subtracted": subtracted,
        "subtracted, warm start": replace(subtracted, warm_start=True),
        f"subtracted, {tied}": twins(subtracted, settings.layers)[tied],
    }


def plan(settings: Settings, rows: Sequence[Row]) -> list[Trial]:
    """All arms and seeds, after the rates of learning."""
    return with_chosen_rates(rows, [OWN], list(_arms(settings)), settings.seeds, settings.rates, settings.steps)


def measure(settings: Settings, trial: Trial, progress: Progress) -> Row:
    """One model trained on Python's own source."""
    training = TrainingConfig(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=trial.rate or settings.rates[0],
        warmup_steps=settings.steps // 20,
        seed=trial.seed,
        validate_every=max(settings.steps // 8, 1),
        device=settings.device,
        precision=settings.precision,
    )
    return learn_text(RunConfig("compare", None, _arms(settings)[trial.arm], training), settings.windows, progress)


def tell(settings: Settings, rows: Sequence[Row]) -> Findings:
    """Bits per byte and evaluations of each change."""
    arms = list(_arms(settings))
    if not measured(rows):
        return Findings()
    figure = curves(rows, [OWN], arms, lambda row: [(p[0], p[2]) for p in row["curve"]], ("updates", "bits per byte"))
    drawings = {}
    if figure is not None:
        caption = "Validation on the way: the mean over the seeds in a band from the best seed to the worst."
        drawings["updates"] = Drawing("Against updates", caption, figure)
    changes = [_change(rows, arm) for arm in arms if not any(word in arm for word in (EQUILIBRIUM, "explicit", "tied"))]
    told = Table(
        "What each change does",
        ("change", "bits per byte", "evaluations of training", "said"),
        [change for change in changes if change is not None],
        "Beside the post-norm equilibrium with a cold start and one matrix for embedding and unembedding, by pairs of "
        "the same seed, with the 95% interval of Student's t. Evaluations are forward and backward together.",
    )
    return Findings([told, score_table(rows, arms, EQUILIBRIUM), cost_table(rows, arms)], (), drawings)


def _change(rows: Sequence[Row], arm: str) -> list[str] | None:
    """A row of the table of changes; `None` where the arm is not measured yet."""
    bits = paired(rows, OWN, arm, EQUILIBRIUM)
    if bits is None:
        return None
    evaluations = _evaluations(rows, arm) / _evaluations(rows, EQUILIBRIUM) - 1
    said = "better" if bits.high < 0 else "worse" if bits.low > 0 else "no difference that could be told from noise"
    return [arm, str(bits), f"{evaluations:+.0%}", said]


def _evaluations(rows: Sequence[Row], arm: str) -> float:
    """Evaluations of training, forward and backward, the mean of an arm."""
    own = [row for row in measured(rows, OWN, arm) if FAILED not in row]
    return sum(row[way]["mean"] for row in own for way in ("forward", "backward")) / max(len(own), 1)


EXPERIMENT = Experiment(
    name="blocks",
    title="The block, one change at a time",
    question="Which of the changes that published work recommends help an equilibrium language model of this size?",
    presets={
        "cpu": Settings(minutes=20),
        "gpu": Settings(
            minutes=30,
            device="cuda",
            precision="bfloat16",
            rates=(1e-3,),
            width=512,
            heads=8,
            context=256,
            batch_size=64,
            steps=800,
        ),
        "tiny": Settings(
            minutes=1,
            seeds=2,
            rates=(6e-3,),
            layers=2,
            width=16,
            heads=2,
            context=16,
            batch_size=2,
            steps=10,
            windows=4,
        ),
    },
    plan=plan,
    measure=measure,
    tell=tell,
    sceptic=(
        "Two hundred updates of a model of 0.2 million parameters say how each change starts, not where it ends: what"
        " published work recommends it found at a hundred times the size and a thousand times the updates, where "
        "stability over a long training, which nothing here tests, is what a block is chosen for. Changes are tried "
        "one at a time beside a block that was chosen for this very setting, except for the warm start of the "
        "subtracted block; combinations may do what none of their parts does. Each arm chooses its rate of learning "
        "from two, on one seed, and most chose the higher, beyond which nothing was tried. The one change that helps, "
        "an unembedding of its own, has 14% more parameters, as has the warm start, which learns a state a token: that "
        "row says that this model is short of parameters or of updates, not that embeddings should not be shared. "
        "The subtracted block is no equilibrium here, with 41% of its solves cut off in training; its warm start finds "
        "one in half the evaluations and predicts no better for it. Three seeds tell differences of tenths of a bit "
        "from noise, and few smaller ones."
    ),
)
