"""Restarts and depth at test time: the puzzles against a solver of their own, the block, the choice among starts."""

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import equilibria as eq
from onelayer.errors import UsageError
from onelayer.experiments import compare
from onelayer.experiments.arms import parameters
from onelayer.experiments.restarts.block import CellBlock
from onelayer.experiments.restarts.experiment import EXPERIMENT, NOISY, RANDOM, SOLVING, TASK, plan, tell
from onelayer.experiments.restarts.starts import Answers, RandomStarts, agreement, answers, area, random_states, solved
from onelayer.experiments.restarts.sudoku import Puzzles, grids, patterns, puzzles, solutions
from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import IGNORED, LanguageModel
from onelayer.models.window import window

TINY = EXPERIMENT.presets["tiny"]
CONFIG = ModelConfig(vocabulary=5, width=16, heads=2, context=16)


# The puzzles.


def backtrack(cells: list[int]) -> list[list[int]]:
    """All solutions, cell by cell."""
    if 0 not in cells:
        return [cells]
    i = cells.index(0)
    row, column = divmod(i, 4)
    seen = {
        cells[j]
        for j in range(16)
        for r, c in [divmod(j, 4)]
        if r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2)
    }
    return [found for d in range(1, 5) if d not in seen for found in backtrack([*cells[:i], d, *cells[i + 1 :]])]


def test_the_grids_are_all_there_are():
    assert sorted(grids().tolist()) == sorted(backtrack([0] * 16))
    assert len({tuple(row) for row in grids().tolist()}) == 288


def test_the_solver_finds_all_solutions_of_any_givens():
    generator = torch.Generator().manual_seed(0)
    for grid in torch.from_numpy(grids())[::23]:
        for givens in (2, 4, 6):
            kept = torch.randperm(16, generator=generator)[:givens]
            puzzle = torch.zeros(16, dtype=torch.long).index_put((kept,), grid[kept])
            assert sorted(solutions(puzzle)) == sorted(backtrack(puzzle.tolist()))


def test_sets_of_givens_are_those_with_one_solution():
    grid = torch.from_numpy(patterns()[3])
    sets = [s for s in range(2**16) if s.bit_count() == 5][::29]
    alone = set(puzzles(3, 5).tolist())
    for chosen in sets:
        puzzle = torch.tensor([int(d) if chosen >> i & 1 else 0 for i, d in enumerate(grid.tolist())])
        assert (len(backtrack(puzzle.tolist())) == 1) == (chosen in alone)


def renamed(grid: list[int]) -> tuple[int, ...]:
    names = {digit: k + 1 for k, digit in enumerate(grid[:4])}
    return tuple(names[digit] for digit in grid)


def test_puzzles_have_the_solution_that_is_asked_for_and_grids_of_the_test_are_never_learnt():
    drawn = Puzzles(seed=5, held_back=4)
    classes: list[set[tuple[int, ...]]] = []
    for test in (False, True):
        tokens, targets = drawn.draw(torch.Generator().manual_seed(2), 120, (4, 7), test)
        assert set((tokens > 0).sum(1).tolist()) == {4, 5, 6, 7}
        assert ((tokens == 0) == (targets != IGNORED)).all()
        full = torch.where(targets == IGNORED, tokens, targets).tolist()
        for puzzle, solution in zip(tokens.tolist(), full, strict=True):
            assert backtrack(puzzle) == [solution]
        classes.append({renamed(solution) for solution in full})
    assert len(classes[0]) == 8
    assert len(classes[1]) == 4
    assert not classes[0] & classes[1]


def test_the_generator_says_which_puzzles_and_the_seed_which_are_held_back():
    def draw(seed: int) -> Tensor:
        return Puzzles(0, 4).draw(torch.Generator().manual_seed(seed), 9, (4, 6), True)[0]

    assert (draw(1) == draw(1)).all()
    assert (draw(1) != draw(2)).any()
    assert len({tuple(sorted(Puzzles(seed, 4).tested)) for seed in range(5)}) > 1
    with pytest.raises(UsageError, match="held_back must be between 1 and 11, not 12"):
        Puzzles(0, 12)


# The block.


def block_and_context(x: Tensor):
    block = CellBlock(CONFIG).to(x.dtype)
    return block, block.context(x, block.place(window(16, x.device), x.dtype), block.prepare(x))


def test_the_block_knows_places_and_nothing_else_of_the_order():
    """To swap two rows of a box together with their learnt vectors swaps the states and does nothing else."""
    x, z = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    block, context = block_and_context(x)
    swapped = torch.arange(16).view(4, 4)[[1, 0, 2, 3]].flatten()
    out = block(z, x, context)
    with torch.no_grad():
        block.places.weight[:2] = block.places.weight[:2].flip(0)
    places = block.place(window(16, x.device), x.dtype)
    other = block(z[:, swapped], x[:, swapped], block.context(x[:, swapped], places, block.prepare(x)))
    torch.testing.assert_close(other, out[:, swapped], rtol=0, atol=1e-12)
    unswapped = block(z[:, swapped], x[:, swapped], context._replace(injected=x[:, swapped]))
    assert (unswapped - out[:, swapped]).abs().max() > 1e-3


def test_every_cell_looks_at_every_cell():
    x, z = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    block, context = block_and_context(x)
    jacobian = torch.autograd.functional.jacobian(lambda z: block(z, x, context).sum((0, 2)), z)
    assert (jacobian.abs().amax((1, 3)) > 0).all()


def test_the_gradient_of_the_equilibrium_is_right():
    model = LanguageModel(replace(CONFIG, rtol=1e-11, max_steps=200, backward_rtol=1e-11), CellBlock).double()
    model.depth.layer.adjoint = eq.Implicit(rtol=1e-11, max_steps=200)
    tokens = torch.randint(0, 5, (2, 16))
    targets = torch.randint(1, 5, (2, 16))
    z0 = model(tokens, targets).state.detach()
    places = model.depth.block.places.weight

    def loss(offset: Tensor) -> Tensor:
        with torch.no_grad():
            places.add_(offset)
        found = model(tokens, targets, start=z0)
        assert found.solution.converged.all()
        with torch.no_grad():
            places.sub_(offset)
        return found.losses.sum()

    found = model(tokens, targets, start=z0)
    found.losses.sum().backward()
    assert found.solution.converged.all()
    along = torch.randn_like(places)
    step = 1e-5
    with torch.no_grad():
        slope = (loss(step * along) - loss(-step * along)) / (2 * step)
    torch.testing.assert_close(slope, (places.grad * along).sum(), rtol=1e-5, atol=1e-7)


# Starts.


def some(cells: list[list[list[int]]], right: list[list[int]], residual: list[list[float]], steps) -> Answers:
    known = torch.tensor(right).bool()
    return Answers(torch.tensor(cells), known, torch.tensor(residual), known, torch.tensor(steps).double(), ())


def test_an_answer_is_chosen_by_residual_by_vote_or_by_one_who_knows():
    found = some(
        [[[1], [2], [2], [3]], [[1], [2], [3], [4]]],
        [[1, 0, 0, 0], [0, 0, 1, 0]],
        [[0.1, 0.3, 0.2, 0.4], [0.3, 0.2, 0.1, 0.4]],
        [[9, 5, 5, 6], [8, 9, 7, 7]],
    )
    # Of the first the residual finds the right one, and two wrong ones outvote it and are sooner there; of the second
    # all are one of a kind, and of the two that are soonest there the residual knows the right one.
    assert solved(found, 4) == {"residual": 1.0, "steps": 0.5, "vote": 0.5, "any": 1.0}
    assert solved(found, 1) == {"residual": 0.25, "steps": 0.25, "vote": 0.25, "any": 0.25}
    assert solved(found, 2) == {"residual": 0.5, "steps": 0.25, "vote": 0.5, "any": 0.5}
    assert agreement(found) == {"pairs": pytest.approx((1 / 6 + 0) / 2), "samples": 0.0}


def test_the_area_is_how_often_a_right_answer_is_ahead():
    signal, right = torch.randn(40).round(decimals=1), torch.rand(40) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in signal[right].tolist() for b in signal[~right].tolist()]
    assert area(signal, right) == pytest.approx(sum(pairs) / len(pairs))
    assert area(signal, torch.ones(40).bool()) is None


def test_answers_are_read_off_the_blanks_and_never_say_blank():
    torch.manual_seed(3)
    model = LanguageModel(CONFIG, CellBlock).eval()
    tokens, targets = Puzzles(0, 4).draw(torch.Generator().manual_seed(0), 6, (4, 6), True)
    starts = random_states(0, 3, tokens, 16)
    found = answers(model, tokens, targets, starts)
    assert found.cells.shape == (6, 3, 16)
    assert ((found.cells == IGNORED) == (targets == IGNORED)[:, None]).all()
    assert set(found.cells.unique().tolist()) <= {IGNORED, 1, 2, 3, 4}
    wanted = answers(model, tokens, found.cells[:, 1], starts)  # what a start answers is right if that was asked for
    assert wanted.right[:, 1].all()
    one = model(tokens, start=starts[1], max_steps=4)
    assert (answers(model, tokens, targets, starts, max_steps=4).residual[:, 1] == one.solution.residual).all()
    explicit = answers(LanguageModel(replace(CONFIG, depth="tied"), CellBlock).eval(), tokens, targets)
    assert explicit.solutions == ()
    assert explicit.right.shape == (6, 1)


@pytest.mark.parametrize("noise", [None, 0.5])
def test_random_starts_are_drawn_anew_and_leave_the_gradient_of_the_equilibrium(noise: float | None):
    model = LanguageModel(replace(CONFIG, rtol=1e-9, max_steps=200), CellBlock).double()
    with torch.no_grad():  # a block that forgets where it came from has one equilibrium, and one gradient of it
        model.depth.block.inner.contract.weight *= 0.2
        model.depth.block.inner.attention_output.weight *= 0.2
    tokens, targets = Puzzles(0, 4).draw(torch.Generator().manual_seed(0), 4, (4, 6), False)
    called = RandomStarts(model, noise)
    begun: list[dict] = []
    model.register_forward_pre_hook(lambda _, args, named: begun.append(named), with_kwargs=True)
    gradients = []
    for call in (model, called, called):
        output = call(tokens, targets)
        output.losses.sum().backward()
        gradients.append(model.depth.block.places.weight.grad.clone())
        model.zero_grad()
    assert len(begun) == (3 if noise is None else 7)
    assert "start" not in begun[0]
    starts = [named["start"] for named in begun[1:]]
    for one, other in pairwise(starts):
        assert (one - other).abs().max() > 0.1
    assert starts[0].std() == pytest.approx(1, rel=0.1)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.1, atol=1e-2)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=0.1, atol=1e-2)
    assert called(tokens, targets, unrolled=2).solution is None


# The experiment.


def test_the_tiny_preset_runs_to_a_page(tmp_path: Path):
    findings = compare(EXPERIMENT, TINY, tmp_path / "restarts", workers=1, command="onelayer compare restarts")
    assert {table.title for table in findings.tables} >= {"Unsolved puzzles", "Solved from so many starts"}
    section = (tmp_path / "restarts" / "section.md").read_text()
    page = (tmp_path / "restarts" / "report.html").read_text()
    for arm in (*SOLVING, "explicit 1", "explicit 2", "tied 2"):
        assert re.search(rf"\| {TASK} \| {arm}", section)
        assert arm in page
    assert len(findings.claims) >= 11


def test_all_arms_have_as_many_parameters_and_the_same_rate_where_only_starts_differ():
    settings = replace(TINY, rates=(1e-3, 1e-2))
    chosen = [
        {"task": TASK, "arm": arm, "seed": 1000, "stage": "choose", "rate": rate, "score": score}
        for arm in ("equilibrium", "explicit 1", "explicit 2", "tied 2")
        for rate, score in ((1e-3, 0.5), (1e-2, 0.4 if arm == "equilibrium" else 0.6))
    ]
    trials = [trial for trial in plan(settings, chosen) if trial.stage == "measure"]
    assert len(trials) == 12
    assert {trial.arm for trial in trials if trial.rate == 1e-2} == set(SOLVING)
    assert all(trial.stage == "choose" for trial in plan(settings, []))
    assert parameters(CONFIG, CellBlock) == 12 * 16**2 + 12 * 16 + 5 * 16 + 3 * 16


def made_up(gain: float, area_: float | None, deeper: float, agree: float, tied: float) -> list[dict]:
    rows = []
    for seed in range(2):
        own = {"task": TASK, "seed": seed, "stage": "measure", "rate": 1e-3, "curve": [[1, 1.0, 0.5]]}
        own |= {"forward": {"mean": 4.0}, "parameters": 9, "parameters_without_embeddings": 9, "score": 0.4}
        wobble = 0.01 * seed
        gain_, deeper_, agree_ = (value * (1 + wobble) for value in (gain, deeper, agree))
        for arm in SOLVING:
            ways = [
                [k, dict.fromkeys(("residual", "steps", "vote", "any"), 0.6 + gain_ * (k > 1) + wobble * k)]
                for k in (1, 2, 4)
            ]
            rows.append(
                own
                | {
                    "arm": arm,
                    "restarts": ways,
                    "area": None if area_ is None else area_ + wobble,
                    "zeros": 0.5,
                    "steps_area": 0.7,
                }
                | {"depth": [[2, 0.1], [16, 0.5 + deeper_]], "cap": 16}
                | {"agreement": {"pairs": 0.5 + wobble + (agree_ if arm != "equilibrium" else 0), "samples": 0.1}}
            )
        rows.append(own | {"arm": "tied 2", "score": 1 - tied + wobble, "depth": [[2, 0.1], [16, 0.2]]})
    return rows


def held(rows: list[dict]) -> dict[str, bool]:
    settings = replace(TINY, max_steps=2)
    return {claim.asked: claim.holds for claim in tell(settings, rows).claims}


def test_claims_are_what_the_rows_say():
    good = held(made_up(gain=0.2, area_=0.8, deeper=0.01, agree=0.1, tied=0.7))
    assert len(good) == 14
    assert all(good.values())
    bad = held(made_up(gain=-0.1, area_=0.4, deeper=-0.45, agree=-0.1, tied=0.9))
    assert set(bad) == set(good)
    assert not any(bad.values())
    # Where every answer is right there is nothing for the residual to tell.
    assert len(held(made_up(gain=0.2, area_=None, deeper=0.01, agree=0.1, tied=0.7))) == 11
    assert tell(TINY, []).claims == []


def test_a_difference_of_one_seed_shows_nothing():
    rows = [row for row in made_up(gain=0.2, area_=0.8, deeper=0.01, agree=0.1, tied=0.7) if row["seed"] == 0]
    found = {claim.asked: claim for claim in tell(replace(TINY, max_steps=2), rows).claims}
    more = next(claim for asked, claim in found.items() if asked.startswith(f"{RANDOM}: more puzzles"))
    assert not more.holds
    assert "one pair" in more.measured
    assert math.isclose(float(more.measured.split()[0]), 0.2)
    assert any(asked.startswith(NOISY) for asked in found)
