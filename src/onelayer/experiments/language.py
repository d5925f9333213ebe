"""Language modelling at equal parameters and equal updates, the equal-time curves beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onelayer import corpora
from onelayer.corpora import batches
from onelayer.experiments.arms import EQUILIBRIUM, ONE_LAYER, twins
from onelayer.experiments.experiment import FAILED, Claim, Drawing, Experiment, Findings, Progress, Row, Trial
from onelayer.experiments.learning import cost_table, is_cut_off, learn, score_table
from onelayer.experiments.plots import curves
from onelayer.experiments.rates import with_chosen_rates, with_rate_of
from onelayer.experiments.statistics import measured, paired
from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import LanguageModel
from onelayer.presets import Device, Precision, RunConfig, TrainingConfig
from onelayer.quality import score, spread

OWN = "python"  # the name of Python's own source as a corpus
WITHIN = 0.02  # bits per byte that the equilibrium may be above the tied network


@dataclass(frozen=True)
class Settings:
    """How much of it.

    Attributes:
        minutes: budget on the machine it is meant for.
        device, precision: of the training.
        texts: files to learn beside Python's own source.
        seeds: paired, of weights and windows.
        rates: of learning, from which each arm chooses on Python's source with a seed of its own.
        layers: of the deep explicit network, and applications of the tied one.
        longer: times as many updates that one explicit layer gets on Python's source in an arm of its own, for about
            the time that the equilibrium takes.
        width, heads, context, batch_size, steps: of the equilibrium and of all trainings.
        unrolled_steps: first updates of the equilibrium that are taken through four plain applications.
        windows: scored at the end; a quarter of them on the way.
    """

    minutes: int
    device: Device = "cpu"
    precision: Precision = "float32"
    texts: tuple[str, ...] = ()
    seeds: int = 5
    rates: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
    layers: int = 6
    longer: int = 8
    width: int = 128
    heads: int = 4
    context: int = 64
    batch_size: int = 16
    steps: int = 400
    unrolled_steps: int = 40
    windows: int = 256


def _arms(settings: Settings) -> dict[str, ModelConfig]:
    config = ModelConfig(width=settings.width, heads=settings.heads, context=settings.context)
    arms = twins(config, settings.layers)
    return arms | {_long_trained(settings): arms[ONE_LAYER]}


def _long_trained(settings: Settings) -> str:
    return f"{ONE_LAYER}, {settings.longer} times the updates"


def _tasks(settings: Settings) -> list[str]:
    return [OWN, *(Path(text).stem for text in settings.texts)]


def plan(settings: Settings, rows: Sequence[Row]) -> list[Trial]:
    """All corpora, arms and seeds, after the rates of learning."""
    tasks, long = _tasks(settings), _long_trained(settings)
    arms, updates = [arm for arm in _arms(settings) if arm != long], settings.steps
    trials = with_chosen_rates(rows, tasks, arms, settings.seeds, settings.rates, updates, [OWN] * len(tasks))
    return trials + with_rate_of(
        rows, OWN, ONE_LAYER, [long], settings.seeds, settings.rates, settings.longer * updates
    )


def measure(settings: Settings, trial: Trial, progress: Progress) -> Row:
    """One model trained on one corpus."""
    training = TrainingConfig(
        steps=trial.units,
        batch_size=settings.batch_size,
        learning_rate=trial.rate or settings.rates[0],
        warmup_steps=settings.steps // 20,
        unrolled_steps=settings.unrolled_steps,
        seed=trial.seed,
        validate_every=max(trial.units // 12, 1),
        device=settings.device,
        precision=settings.precision,
    )
    text = None if trial.task == OWN else next(t for t in settings.texts if Path(t).stem == trial.task)
    return learn_text(RunConfig("compare", text, _arms(settings)[trial.arm], training), settings.windows, progress)


def learn_text(config: RunConfig, windows: int, progress: Progress) -> Row:
    """Trains a language model on the text of a configuration; its score is in bits per byte of validation.

    Args:
        config: of the model, its training and its text.
        windows: scored at the end; a quarter of them on the way.
        progress: told of each step.
    """
    training, context = config.training, config.model.context
    torch.manual_seed(training.seed)
    model = LanguageModel(config.model).to(training.device)
    with tempfile.TemporaryDirectory() as folder:
        corpus = corpora.prepare(config.data, Path(folder, "tokens"))
        lengths = corpus.tokenizer.lengths
        every = spread(corpus.validation, context, windows)
        some = spread(corpus.validation, context, max(windows // 4, 1))

        def draw(step: int) -> tuple[Tensor, Tensor]:
            return batches.batch(corpus.train, step, training.batch_size, context, training.seed)

        def bits(model: LanguageModel) -> Row:
            return {"score": score(model, config, some, lengths, progress=False)[0].bits_per_byte}

        row = learn(model, config, draw, bits, progress, torch.from_numpy(lengths))
        (found,) = score(model, config, every, lengths, progress=False)
    row |= {"score": found.bits_per_byte, "corpus": corpus.fingerprint}
    if found.evaluations is None:
        return row
    return row | {
        "scored": {
            "evaluations": {"mean": found.evaluations, "p95": found.evaluations_p95, "at_cap": found.share_at_cap},
            "residual": {"median": found.residual, "p95": found.residual_p95},
        }
    }


def tell(settings: Settings, rows: Sequence[Row]) -> Findings:
    """Bits per byte, what it took, and whether the equilibrium did as well."""
    arms, tasks = list(_arms(settings)), _tasks(settings)
    tied = f"tied {settings.layers}"
    claims = []
    for task in tasks:
        better = paired(rows, task, ONE_LAYER, EQUILIBRIUM)
        if better is not None:
            asked = f"{task}: fewer bits per byte than one explicit layer of as many parameters"
            claims.append(Claim(asked, f"{better} fewer", better.low > 0))
        worse = paired(rows, task, EQUILIBRIUM, tied)
        if worse is not None:
            asked = f"{task}: within {WITHIN} bits per byte of {tied}"
            claims.append(Claim(asked, f"{worse} more", worse.mean <= WITHIN))
    long = _long_trained(settings)
    longer = paired(rows, OWN, long, EQUILIBRIUM)
    if longer is not None:
        asked = f"{OWN}: fewer bits per byte than one explicit layer that is given about the same time, {long}"
        claims.append(Claim(asked, f"{longer} fewer", longer.low > 0))
    own = [row for row in measured(rows, arm=EQUILIBRIUM) if FAILED not in row]
    if own:
        share = sum(row["forward"]["at_cap"] for row in own) / len(own)
        claims.append(Claim("At most 5% of the solves at the cap", f"{share:.1%} in training", not is_cut_off(own)))
    drawings = {}
    for name, column, label in (("updates", 0, "updates"), ("time", 1, "CPU seconds of training")):
        figure = curves(
            rows,
            tasks,
            arms,
            lambda row, column=column: [(point[column], point[2]) for point in row["curve"]],
            (label, "bits per byte"),
        )
        if figure is not None:
            drawings[name] = Drawing(f"Against {label}", _CAPTIONS[name], figure)
    tables = [score_table(rows, arms, EQUILIBRIUM), cost_table(rows, arms)]
    return Findings(tables if measured(rows) else [], claims, drawings)


_CAPTIONS = {
    "updates": "Validation on the way, the mean over the seeds in a band from the best seed to the worst. All arms "
    "read the same windows in the same order.",
    "time": "The same against the time of the training on one thread, so that what an evaluation costs counts.",
}

EXPERIMENT = Experiment(
    name="language",
    title="Language modelling at equal parameters",
    question="Does an equilibrium of one block predict text as well as explicit networks of as many parameters?",
    presets={
        "cpu": Settings(minutes=50),
        "gpu": Settings(
            minutes=30,
            device="cuda",
            precision="bfloat16",
            seeds=3,
            rates=(1e-3,),
            width=512,
            heads=8,
            context=256,
            batch_size=64,
            steps=1500,
            unrolled_steps=150,
        ),
        "tiny": Settings(
            minutes=1,
            seeds=2,
            rates=(6e-3,),
            layers=2,
            width=32,
            heads=2,
            context=32,
            batch_size=4,
            steps=12,
            unrolled_steps=2,
            windows=8,
        ),
    },
    plan=plan,
    measure=measure,
    tell=tell,
    sceptic=(
        "This is a comparison at equal parameters and equal updates, and the equilibrium pays for each update ten "
        "times what the explicit layer of its size does, and twice what the tied network does. In equal time it "
        "loses: the explicit layer that is given eight times the updates, and still less time, is a third of a bit "
        "ahead, because it has read eight times as much. All arms are far from having learnt what they can, after 0.4"
        " million bytes; which of them is best in the end is not known from here. The six different layers are narrow"
        " and stacked from the block that suits the equilibrium, normalised last and fed the text at every layer; a "
        "network of six layers would be built otherwise and might learn faster, so that this row is no measure of "
        "explicit depth. The tied network of six applications is the one that counts: it does as well within noise, "
        "at half the time and half again the memory, so the equilibrium itself, beyond the tying, has shown no gain "
        "in quality. What it has is the memory, and a depth that can be chosen afterwards. The rate of learning was "
        "chosen on one seed and one corpus from four that lie a factor of two apart. That the order is that of the "
        "paper of 2019 (perplexity 35.8 for four layers, 34.9 tied, 32.4 for the equilibrium, at 4.5 million "
        "parameters) is no reproduction of it."
    ),
)
