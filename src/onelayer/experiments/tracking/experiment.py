"""State tracking: words whose state a recurrent network can carry along, and no network of a fixed depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import equilibria as eq
from onelayer.experiments.experiment import Experiment, Progress, Row, Trial
from onelayer.experiments.learning import learn, scored_solves
from onelayer.experiments.rates import with_chosen_rates, with_rate_of
from onelayer.experiments.tracking.block import AttentiveGates
from onelayer.experiments.tracking.findings import tell
from onelayer.experiments.tracking.setup import TASKS, Settings, arms_of, deep, long_trained, words_of
from onelayer.models.language_model import LanguageModel
from onelayer.presets import RunConfig, TrainingConfig

ALLOWED = (2, 4, 8, 16, 32, 64, 128, 256)  # evaluations


def plan(settings: Settings, rows: Sequence[Row]) -> list[Trial]:
    """Both tasks, all arms and seeds, after the rates of learning; the long training takes that of the short one."""
    long, trials = long_trained(settings), []
    for task in TASKS:
        updates = settings.updates(task)
        arms = [arm for arm in arms_of(settings, task) if arm != long]
        trials += with_chosen_rates(rows, [task], arms, settings.seeds, settings.rates, updates)
        updates *= settings.longer
        trials += with_rate_of(rows, task, deep(settings), [long], settings.seeds, settings.rates, updates)
    return trials


def measure(settings: Settings, trial: Trial, progress: Progress) -> Row:
    """One model trained on short words of one group and scored on long ones."""
    assert trial.rate is not None
    words = words_of(settings, trial.task)
    training = TrainingConfig(
        steps=trial.units,
        batch_size=settings.batch_size,
        learning_rate=trial.rate,
        warmup_steps=settings.updates(trial.task) // 20,
        seed=trial.seed,
        validate_every=max(trial.units // 8, 1),
        device=settings.device,
    )
    config = RunConfig("compare", None, arms_of(settings, trial.task)[trial.arm], training)
    # All arms of a seed read the same words. Those scored are longer than any that are trained on.
    learnt, scored = (torch.Generator().manual_seed(2 * trial.seed + k) for k in (0, 1))
    long_words = words.draw(settings.words, settings.tested, scored)
    some = (long_words[0][: max(settings.words // 4, 1)], long_words[1][: max(settings.words // 4, 1)])

    def draw(step: int) -> tuple[Tensor, Tensor]:
        length = int(torch.randint(settings.shortest, settings.longest + 1, (), generator=learnt))
        return words.draw(settings.batch_size, length, learnt)

    def error(model: LanguageModel) -> Row:
        return {"score": 1 - _judge(model, some, settings).accuracy}

    torch.manual_seed(trial.seed)
    model = LanguageModel(config.model, AttentiveGates).to(settings.device)
    if model.depth.layer is not None:
        # A state of this block hangs on earlier ones alone: what a token is told travels one token an evaluation, which
        # no acceleration can change, and plain steps are exact once it has arrived.
        model.depth.layer.solver = eq.Picard()
    row = learn(model, config, draw, error, progress)
    model.eval()
    found = _judge(model, long_words, settings)
    row |= {"score": 1 - found.accuracy, "by_position": found.by_position} | scored_solves([found.solution])
    if model.is_equilibrium:
        judged = [(allowed, _judge(model, some, settings, max_steps=allowed)) for allowed in ALLOWED]
        row["by_evaluations"] = [
            (allowed, found.accuracy, float(found.solution.residual.median()))
            for allowed, found in judged
            if found.solution is not None
        ]
        row["from_elsewhere"] = _judge(model, long_words, settings, start=scored).accuracy
    return row


class Judged(NamedTuple):
    """What a model makes of long words.

    Attributes:
        accuracy: on the letters that are scored.
        by_position: of each letter.
        solution: how the equilibria were found; `None` where there are none.
    """

    accuracy: float
    by_position: list[float]
    solution: eq.Solution | None


@torch.no_grad()
def _judge(
    model: LanguageModel,
    words: tuple[Tensor, Tensor],
    settings: Settings,
    max_steps: int | None = None,
    start: torch.Generator | None = None,
) -> Judged:
    letters, products = (part.to(settings.device) for part in words)
    z0 = None
    if start is not None:  # of the size that states have, and otherwise unlike them
        shape = (*letters.shape, model.depth.block.state_width)
        z0 = torch.randn(shape, generator=start).to(settings.device)
    output = model(letters, start=z0, max_steps=max_steps)
    assert output.logits is not None
    hits = (output.logits.argmax(-1) == products).double().mean(0)
    by_position = [round(value, 4) for value in hits.tolist()]
    return Judged(float(hits[settings.scored_from :].mean()), by_position, output.solution)


EXPERIMENT = Experiment(
    name="tracking",
    title="Tracking a state over words longer than any trained on",
    question="Does an equilibrium carry a state along a text, where explicit networks of as many parameters lose it?",
    presets={
        "cpu": Settings(minutes=25),
        "gpu": Settings(
            minutes=30,
            device="cuda",
            rates=(5e-3,),
            width=64,
            heads=4,
            batch_size=256,
            steps=2000,
            parity_steps=400,
            longer=4,
            words=512,
            all_letters=True,
        ),
        "tiny": Settings(
            minutes=1,
            seeds=2,
            rates=(1e-2,),
            layers=2,
            longer=2,
            width=16,
            batch_size=4,
            steps=10,
            parity_steps=10,
            shortest=3,
            longest=5,
            tested=12,
            scored_from=6,
            words=8,
        ),
    },
    plan=plan,
    measure=measure,
    tell=tell,
    sceptic="A state of this block is made of the one before it, so its equilibrium is a recurrent network, solved for "
    "all letters at once: 128 letters take 129 evaluations of the whole word, where an LSTM takes one pass. What "
    "carries the state is the number of evaluations. With as many as the explicit networks have layers the "
    "equilibrium knows nothing either, see the table, and a tied network applied 129 times would be the same "
    "network. So this shows what an adaptive depth buys at equal parameters, and not that a fixed point would be "
    "needed for it; nor is it equal arithmetic. The deep explicit network with more updates answers for the time "
    "of the training, but no explicit network here has the evaluations of a word that the equilibrium has, and "
    "one of more or wider layers may do more: a depth that grows with the logarithm of the length is enough for "
    "A5 in principle. Only one width was tried, words of A5 are made of two letters, and the recipe was looked "
    "for with the equilibrium on A5. A block that also read its own state, trained at a higher rate without "
    "weight decay, lost its equilibrium, with 72% of the solves of a step at the cap; without bounds on the "
    "attention scores the states were lost beyond the lengths trained on. Solves end at a residual of 5e-3 in the mean "
    "over letters, in which the last letter can hide behind states that have grown large: in a trial that chose a rate "
    "it was right in 0.7 of the words where all before it were right in all.",
)
