"""`onelayer compare memory`: counts that are right, memory that does not grow, and claims that can fail."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import equilibria as eq
from onelayer.experiments.experiment import Findings, Trial
from onelayer.experiments.memory import experiment as memory
from onelayer.experiments.memory import findings as memory_findings
from onelayer.experiments.memory.experiment import EXPERIMENT, Settings
from onelayer.experiments.memory.findings import DEPTH, EXPLICIT, FIXED, IMPLICIT, TRAINED, WORKING, claims
from onelayer.experiments.memory.training_step import (
    EVALUATION,
    GRADIENTS,
    GRAPH,
    PRODUCT,
    Step,
    interleaved,
    quartiles,
)
from onelayer.experiments.running import compare
from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import LanguageModel

CONFIG = ModelConfig(width=16, heads=2, context=8)
STACK = replace(CONFIG, depth="untied", layers=5)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def equilibrium(adjoint: eq.Adjoint) -> Step:
    torch.manual_seed(0)
    step = Step(CONFIG)
    step.layer.adjoint, step.layer.rtol, step.layer.atol = adjoint, 0.0, 0.0
    return step


def test_a_step_counts_what_its_blocks_do(batch):
    assert Step(STACK).counts(batch)["forward"] == Step(STACK).counts(batch)["backward"] == 5
    tied = Step(replace(STACK, depth="tied"), checkpointed=True).counts(batch)
    assert (tied["forward"], tied["backward"]) == (10, 5)
    one = equilibrium(eq.OneStep()).counts(batch, 6)
    assert (one["evaluations"], one["forward"], one["backward"]) == (6, 7, 1)
    # The cut series: terms - 1 products and the pass to the weights; one evaluation attaches, one is the graph's.
    cut = equilibrium(eq.Neumann(4)).counts(batch, 6)
    assert (cut["forward"], cut["backward"], cut["products"]) == (8, 4, 3)
    implicit = equilibrium(eq.Implicit(rtol=1e-3)).counts(batch, 6)
    assert implicit["forward"] == 8
    assert implicit["backward"] >= implicit["products"] + 1 > 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_that_count_give_the_gradients_of_those_that_do_not(batch, checkpointed):
    torch.manual_seed(0)
    plain = LanguageModel(STACK)
    step = Step(STACK, checkpointed=checkpointed)
    step.model.load_state_dict(plain.state_dict())
    plain(*batch).losses.mean().backward()
    step(batch)
    for own, other in zip(step.model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(own.grad, other.grad, atol=1e-7)
    step.fused = False
    before = [parameter.grad.clone() for parameter in step.model.parameters()]
    step(batch)  # adds what the fused attention gave
    for own, once in zip(step.model.parameters(), before, strict=True):
        assert torch.allclose(own.grad, 2 * once, atol=1e-6)


def test_memory_grows_with_what_is_unrolled_and_not_with_what_is_implicit(batch):
    implicit = [equilibrium(eq.Implicit(rtol=3e-2)).counts(batch, depth)["bytes"] for depth in (10, 20)]
    unrolled = [equilibrium(eq.Unrolled()).counts(batch, depth)["bytes"] for depth in (10, 20)]
    assert implicit[1] <= 1.02 * implicit[0]
    assert unrolled[1] > 1.8 * unrolled[0]


def test_parts_are_those_of_the_equilibrium(batch):
    parts = Step(CONFIG).parts(batch)
    assert list(parts) == [EVALUATION, GRAPH, PRODUCT, GRADIENTS]
    for work in parts.values():
        work()


def test_ratios_are_of_neighbours():
    order: list[str] = []
    ratios = interleaved(
        {"a": lambda k: order.append("a"), "b": lambda k: order.append("b")}, lambda k: order.append("r"), rounds=2
    )
    assert order == ["r", "a", "r", "b", "a", "r", "b", "r"]
    assert [len(found) for found in ratios.values()] == [2, 2]
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_the_tiny_preset_runs_to_a_page(tmp_path: Path):
    settings = replace(EXPERIMENT.presets["tiny"], depths=(8, 12))
    findings = compare(EXPERIMENT, settings, tmp_path / "out", workers=1)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(memory.plan(settings, []))
    assert [point["depth"] for point in rows[1]["points"]] == [8, 12]
    assert {claim.holds for claim in findings.claims} <= {True, False}
    assert len(findings.claims) == 5
    assert set(findings.drawings) == {"memory", "time"}
    titles = [table.title for table in findings.tables]
    assert "Where the time goes, as trained" in titles
    assert all(len(line) == len(table.columns) for table in findings.tables for line in table.rows)
    for name in ("report.html", "section.md", "memory.svg", "time.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    own = rows[0]["settings"][WORKING]
    assert own["evaluations"] >= own["steps"] > 1
    assert own["backward"] >= own["products"]


def test_presets_are_for_depths_that_they_can_tell():
    for settings in EXPERIMENT.presets.values():
        assert settings.reference in settings.depths
        assert max(settings.depths) > memory_findings.FROM
        assert isinstance(settings, Settings)


def rows_of(held: list[int], explicit: int, ratios: list[float], at_cap: float) -> list[dict]:
    points = [
        {"depth": depth, "evaluations": depth, "bytes": size, "ratios": [1.0], "forward": 1, "backward": 1}
        for depth, size in zip((4, 8, 64), held, strict=True)
    ]
    own = {"bytes": held[-1], "ratios": ratios}
    return [
        Trial(DEPTH, FIXED, 0).key | {"points": points},
        Trial(DEPTH, IMPLICIT, 0).key | {"points": points},
        Trial(DEPTH, EXPLICIT, 0).key | {"points": [{"depth": 12, "bytes": explicit}, {"depth": 64, "bytes": 9999}]},
        Trial(TRAINED, "equilibrium", 0, 0.1).key
        | {"settings": {WORKING: own}, "reference": {"bytes": explicit}, "forward": {"at_cap": at_cap}},
    ]


GOOD = {"held": [90, 100, 101], "explicit": 300, "ratios": [0.9, 1.0, 5.0], "at_cap": 0.01}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, set()),
        ({"held": [50, 100, 101]}, set()),  # what is below 8 evaluations is not asked for
        ({"held": [90, 100, 103]}, {0}),
        ({"explicit": 250}, {1, 2}),
        ({"ratios": [2.1, 2.2, 0.5]}, {3}),
        ({"at_cap": 0.2}, {4}),
    ],
)
def test_claims_hold_or_not(change: dict, broken: set[int]):
    found = claims(rows_of(**(copy.deepcopy(GOOD) | change)), reference=12)
    assert {k for k, claim in enumerate(found) if not claim.holds} == broken
    assert len(found) == 5


def test_nothing_is_claimed_of_rows_that_are_not_there():
    assert claims([], 12) == []
    assert EXPERIMENT.tell(EXPERIMENT.presets["tiny"], []) == Findings()
