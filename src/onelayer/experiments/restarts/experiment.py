"""Restarts and depth at test time: equilibria of one block that solve Sudoku, started at zeros or at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onelayer.experiments.arms import EQUILIBRIUM, twins
from onelayer.experiments.experiment import FAILED, Claim, Experiment, Findings, Progress, Row, Trial
from onelayer.experiments.learning import cost_table, learn, score_table, scored_solves
from onelayer.experiments.rates import with_chosen_rates, with_rate_of
from onelayer.experiments.restarts.block import CellBlock
from onelayer.experiments.restarts.findings import (
    depth_table,
    drawings,
    from_starts,
    gap,
    paths_table,
    starts_table,
    within,
)
from onelayer.experiments.restarts.starts import RandomStarts, agreement, answers, area, random_states, solved
from onelayer.experiments.restarts.sudoku import CELLS, VOCABULARY, Puzzles
from onelayer.experiments.statistics import Paired, measured, paired
from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import LanguageModel
from onelayer.presets import Device, RunConfig, TrainingConfig

TASK = "sudoku 4x4"
RANDOM, NOISY = "random starts", "random and noise"
SOLVING = (EQUILIBRIUM, RANDOM, NOISY)
_TEST = 1_000_002  # the draw of a seed that its test is, beyond those of the training


@dataclass(frozen=True)
class Settings:
    """How much of it.

    Attributes:
        minutes: budget on the machine it is meant for.
        device: of the training.
        seeds: paired, of weights, grids held back, puzzles and starts.
        rates: of learning, from which arms choose on a seed of its own; those with random starts take that of the
            equilibrium, so that they differ from it in the starts alone.
        layers: of the deep explicit network, and applications of the tied one.
        width, heads, batch_size, steps: of the equilibrium and of all trainings.
        unrolled_steps: first updates of the equilibria that are taken through four plain applications.
        noise: on the path of the third equilibrium.
        held_back: classes of grids that only the test has, of 12.
        learnt, asked: the fewest and the most givens of a puzzle in training and in the test.
        puzzles: of the test.
        starts: at most, a power of two.
        budgets: evaluations allowed at test, or applications of the tied network.
        max_steps, rtol: evaluations allowed to a solve in training, and its tolerance.
        test_max_steps, test_rtol: the same at test.
    """

    minutes: int
    device: Device = "cpu"
    seeds: int = 3
    rates: tuple[float, ...] = (2e-3, 5e-3)
    layers: int = 4
    width: int = 48
    heads: int = 3
    batch_size: int = 32
    steps: int = 800
    unrolled_steps: int = 80
    noise: float = 0.2
    held_back: int = 4
    learnt: tuple[int, int] = (4, 8)
    asked: tuple[int, int] = (4, 6)
    puzzles: int = 256
    starts: int = 16
    budgets: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    max_steps: int = 32
    rtol: float = 5e-3
    test_max_steps: int = 64
    test_rtol: float = 5e-4

    @property
    def counts(self) -> tuple[int, ...]:
        """Of starts, each twice the one before."""
        return tuple(2**k for k in range(self.starts.bit_length()))


def _arms(settings: Settings) -> dict[str, ModelConfig]:
    config = ModelConfig(
        vocabulary=VOCABULARY,
        width=settings.width,
        heads=settings.heads,
        context=CELLS,
        rtol=settings.rtol,
        max_steps=settings.max_steps,
        eval_max_steps=settings.test_max_steps,
    )
    found = twins(config, settings.layers, CellBlock)
    return dict.fromkeys(SOLVING, found[EQUILIBRIUM]) | found


def plan(settings: Settings, rows: Sequence[Row]) -> list[Trial]:
    """All arms and seeds, after the rates of learning."""
    choosing = [arm for arm in _arms(settings) if arm not in (RANDOM, NOISY)]
    seeds, rates, updates = settings.seeds, settings.rates, settings.steps
    trials = with_chosen_rates(rows, [TASK], choosing, seeds, rates, updates)
    return trials + with_rate_of(rows, TASK, EQUILIBRIUM, [RANDOM, NOISY], seeds, rates, updates)


def measure(settings: Settings, trial: Trial, progress: Progress) -> Row:
    """One model trained, and then asked from many starts and with many evaluations."""
    assert trial.rate is not None
    config = _arms(settings)[trial.arm]
    training = TrainingConfig(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=trial.rate,
        warmup_steps=settings.steps // 20,
        unrolled_steps=settings.unrolled_steps,
        seed=trial.seed,
        validate_every=max(settings.steps // 8, 1),
        device=settings.device,
    )
    puzzles = Puzzles(trial.seed, settings.held_back)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        return puzzles.draw(_generator(trial.seed, step), settings.batch_size, settings.learnt, test=False)

    tokens, targets = puzzles.draw(_generator(trial.seed, _TEST), settings.puzzles, settings.asked, test=True)
    tokens = tokens.to(settings.device)
    starts = random_states(trial.seed, settings.starts, tokens, config.width)
    own = starts[:1] if trial.arm in (RANDOM, NOISY) else None  # as in training

    def score(model: LanguageModel) -> Row:
        found = answers(_at_test(model, settings), tokens, targets, own)
        return {"score": 1 - float(found.right.double().mean())} | scored_solves(found.solutions)

    torch.manual_seed(trial.seed)
    model = LanguageModel(config, CellBlock).to(settings.device)
    called = RandomStarts(model, settings.noise if trial.arm == NOISY else None) if own is not None else None
    row = learn(model, RunConfig("compare", None, config, training), draw, score, progress, called=called)
    if trial.stage == "choose":
        return row

    def share(model: LanguageModel, max_steps: int | None = None, starts: Tensor | None = own) -> float:
        return float(answers(model, tokens, targets, starts, max_steps).right.double().mean())

    if config.depth == "tied":
        row["depth"] = [[count, share(_at_test(model, settings, count))] for count in settings.budgets]
    if config.depth != "equilibrium":
        return row
    test = _at_test(model, settings)
    found = answers(test, tokens, targets, starts)
    return row | {
        "depth": [[budget, share(test, budget)] for budget in settings.budgets],
        "zeros": share(test, starts=None),
        "restarts": [[count, solved(found, count)] for count in settings.counts],
        "agreement": agreement(found),
        "area": area(-found.residual, found.right),
        "steps_area": area(-found.steps, found.right),
    }


def _generator(seed: int, draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + draw)


def _at_test(model: LanguageModel, settings: Settings, layers: int | None = None) -> LanguageModel:
    config = replace(model.config, rtol=settings.test_rtol, layers=layers or model.config.layers)
    same = LanguageModel(config, CellBlock).to(settings.device)
    same.load_state_dict(model.state_dict())
    return same.eval()


def tell(settings: Settings, rows: Sequence[Row]) -> Findings:
    """What starts and evaluations do at test, whether answers hang on the start, and what the residual knows."""
    arms = list(_arms(settings))
    done = [row for row in measured(rows) if FAILED not in row]
    tables = [
        score_table(done, arms, EQUILIBRIUM, what="unsolved puzzles"),
        starts_table(done, SOLVING, settings.counts, settings.test_max_steps),
        paths_table(done, SOLVING),
        depth_table(done, arms, settings.budgets, settings.max_steps),
        cost_table(rows, arms),
    ]
    claims = _claims(settings, done, arms[-1])
    return Findings(tables if done else [], claims, drawings(done, TASK, arms, SOLVING))


def _claims(settings: Settings, rows: Sequence[Row], tied: str) -> list[Claim]:
    most, deepest, trained = settings.starts, max(settings.budgets), settings.max_steps
    claims: list[Claim] = []

    def claim(asked: str, found: Paired | None, unit: str, holds: Callable[[Paired], bool]) -> None:
        if found is not None:
            claims.append(Claim(asked, f"{found} {unit}", holds(found)))

    for arm in SOLVING:
        gain = gap(rows, arm, from_starts(most), from_starts(1))
        asked = f"{arm}: more puzzles are solved from {most} starts, chosen by the residual, than from one"
        claim(asked, gain, "of the puzzles", lambda found: found.low > 0)
        signal = gap(rows, arm, lambda row: row["area"], lambda row: None if row["area"] is None else 0.5)
        asked = f"{arm}: the residual tells right answers from wrong ones better than chance"
        claim(asked, signal, "of area above 0.5", lambda found: found.low > 0)
        deeper = gap(rows, arm, within(deepest), within(trained))
        asked = f"{arm}: {deepest} evaluations at test solve no fewer than the {trained} of training"
        claim(asked, deeper, "of the puzzles", lambda found: found.mean >= 0)
    for arm in (RANDOM, NOISY):
        own = [{**row, "score": row["agreement"]["pairs"]} for row in rows if "agreement" in row]
        asked = f"{arm}: two starts agree more often than for the equilibrium trained from zeros"
        claim(asked, paired(own, TASK, arm, EQUILIBRIUM), "of the pairs", lambda found: found.low > 0)
    for arm in SOLVING:
        both = [{**row, "score": from_starts(most)(row)} for row in measured(rows, TASK, arm)]
        both += [{**row, "score": 1 - row["score"]} for row in measured(rows, TASK, tied)]
        asked = f"{arm}: {most} starts solve no fewer than {tied} does at once"
        claim(asked, paired(both, TASK, arm, tied), "of the puzzles", lambda found: found.mean >= 0)
    return claims


EXPERIMENT = Experiment(
    name="restarts",
    title="Restarts and depth at test time",
    question="Does an equilibrium solve more Sudoku from many starts, and with more evaluations than in training?",
    presets={
        "cpu": Settings(minutes=20),
        "gpu": Settings(
            minutes=30,
            device="cuda",
            rates=(2e-3,),
            width=128,
            heads=8,
            batch_size=256,
            steps=2500,
            unrolled_steps=250,
            puzzles=1024,
        ),
        "tiny": Settings(
            minutes=1,
            seeds=2,
            rates=(6e-3,),
            layers=2,
            width=16,
            heads=2,
            batch_size=4,
            steps=12,
            unrolled_steps=2,
            puzzles=8,
            starts=4,
            budgets=(2, 16),
            max_steps=16,
            test_max_steps=16,
        ),
    },
    plan=plan,
    measure=measure,
    tell=tell,
    sceptic=(
        "The tied network is the better solver of these puzzles: on average its four applications solve more of them "
        "than any of the three equilibria from sixteen starts and a thousand evaluations, after a seventh of their "
        "training time, though with one seed it is no better; and eight applications at test, twice those "
        "of its training, solve nearly all for every seed. So the depth at test time that pays here is that of the "
        "tied network, and what restarts win back is what the equilibrium lost in training. "
        "They help because many solves do not meet the tolerance (more than 5% are cut off, so that by the rule of "
        "this page none of the three is an equilibrium), and a restart is another try. The residual mostly says "
        "whether a solve met its tolerance; how soon it did tells right from wrong better, and chooses no worse. "
        "That random starts and noise in training make the answer hang less on the start was not seen. "
        "A majority of starts, which uses no residual, is the fair rival, and gains a third as much. Sudoku needs "
        "neither: an answer can be checked against the rules, which makes the column of the one who knows attainable. "
        "The task is small. There are 12 grids up to the names of digits and 2 up to all symmetries, so each grid of "
        "the test is a turned or permuted grid of the training, and a search solves each puzzle at once. Rates are "
        "chosen from two, on one seed, and the arms with random starts take the one chosen for zeros, which need "
        "not suit them; the size of the noise was set by hand. Solves from zeros and from random states are told "
        "apart by three seeds of 256 puzzles, where one share is known to three points. None of this reproduces "
        "Equilibrium Reasoners, whose noise enters at every step and whose gradient goes through the last of them, "
        "in networks trained for far longer on Sudoku of 9 by 9."
    ),
)
