"""How much of state tracking: its words, and the networks that stand beside each other."""

from __future__ import annotations

from dataclasses import dataclass

from onelayer.experiments.arms import twins
from onelayer.experiments.tracking.block import AttentiveGates
from onelayer.experiments.tracking.words import FIVE_CYCLE, THREE_CYCLE, Words, alternating, parity
from onelayer.models.configuration import ModelConfig
from onelayer.presets import Device

PARITY, A5 = "parity", "A5"
TASKS = [PARITY, A5]
# What is told travels a letter an evaluation, so both are more than a word has letters.
MAX_STEPS, EVAL_MAX_STEPS = 64, 200


@dataclass(frozen=True)
class Settings:
    """How much of it.

    Attributes:
        minutes: budget on the machine it is meant for.
        device: of the training.
        seeds: paired, of weights and words.
        rates: of learning, from which each arm chooses on each task with a seed of its own.
        layers: of the deep explicit network, and applications of the tied one.
        rtol: relative residual at which a solve is done.
        longer: times as many updates that the deep explicit network gets in an arm of its own.
        width, heads, batch_size: of the equilibrium and of all trainings.
        steps, parity_steps: updates on words of A5 and on bits.
        shortest, longest: letters of the words trained on, every length as likely as the others.
        tested: letters of the words scored.
        scored_from: letters at the start of these that are not scored.
        words: scored at the end; a quarter of them on the way.
        all_letters: whether words of A5 are made of all its 60 elements, not of two that generate it.
    """

    minutes: int
    device: Device = "cpu"
    seeds: int = 3
    rates: tuple[float, ...] = (1e-2, 2e-2)
    layers: int = 4
    rtol: float = 5e-3
    longer: int = 8
    width: int = 32
    heads: int = 2
    batch_size: int = 32
    steps: int = 2000
    parity_steps: int = 300
    shortest: int = 16
    longest: int = 32
    tested: int = 128
    scored_from: int = 64
    words: int = 128
    all_letters: bool = False

    def updates(self, task: str) -> int:
        """Of a training on a task."""
        return self.parity_steps if task == PARITY else self.steps

    @property
    def beyond(self) -> str:
        """The letters that are scored, in words."""
        return f"positions {self.scored_from + 1} to {self.tested}"


def words_of(settings: Settings, task: str) -> Words:
    """The words of a task.

    >>> words_of(Settings(minutes=1), A5).letters.shape
    torch.Size([2])
    """
    if task == PARITY:
        return parity()
    return alternating(None if settings.all_letters else (FIVE_CYCLE, THREE_CYCLE))


def arms_of(settings: Settings, task: str) -> dict[str, ModelConfig]:
    """Configurations of a task by the name of the arm.

    >>> list(arms_of(Settings(minutes=1), PARITY))
    ['equilibrium', 'explicit 1', 'explicit 4', 'tied 4', 'explicit 4, 8 times the updates']
    """
    config = ModelConfig(
        vocabulary=words_of(settings, task).elements,
        width=settings.width,
        heads=settings.heads,
        context=settings.longest,
        rtol=settings.rtol,
        max_steps=MAX_STEPS,
        eval_max_steps=EVAL_MAX_STEPS,
        backward_max_steps=MAX_STEPS,
    )
    arms = twins(config, settings.layers, AttentiveGates)
    return arms | {long_trained(settings): arms[deep(settings)]}


def deep(settings: Settings) -> str:
    """The name of the deep explicit network."""
    return f"explicit {settings.layers}"


def long_trained(settings: Settings) -> str:
    """The name of the same with more updates, for those that an equilibrium has the time of."""
    return f"{deep(settings)}, {settings.longer} times the updates"
