"""`onelayer compare gradients`: exact gradients that are, radii that are what was asked, and claims that can fail."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import equilibria as eq
from onelayer.errors import UsageError
from onelayer.experiments.experiment import FAILED, Trial
from onelayer.experiments.gradients import experiment as gradients
from onelayer.experiments.gradients.experiment import EXPERIMENT, quality
from onelayer.experiments.gradients.findings import APPROXIMATE, EXACTEST, IMPLICITS, UNROLLED, claims
from onelayer.experiments.gradients.subjects import (
    Family,
    exact_gradients,
    groups,
    subject,
    tanh_family,
    transformer_family,
)
from onelayer.experiments.running import compare

FAMILIES = {
    "random": lambda: tanh_family(6, True, 0),
    "non-normal": lambda: tanh_family(6, False, 0),
    "transformer": lambda: transformer_family(4, 3, 1),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_gradients_are_those_of_finite_differences(name):
    family = FAMILIES[name]()
    one = subject(family, 0.6, seed=3)

    def loss() -> float:
        found = eq.fixed_point(one.cell, family.z0, rtol=1e-14, max_steps=300, on_failure="ignore")
        return float((found.value * one.v).sum())

    step = 1e-6
    for group, tensors in groups(family).items():
        exact = one.exact[group]
        flat = [(tensor, i) for tensor in tensors for i in range(tensor.numel())]
        assert len(flat) == len(exact)
        for k in range(0, len(flat), max(len(flat) // 4, 1)):
            tensor, i = flat[k]
            with torch.no_grad():
                entry = tensor.view(-1)[i].clone()
                tensor.view(-1)[i] = entry + step
                more = loss()
                tensor.view(-1)[i] = entry - step
                less = loss()
                tensor.view(-1)[i] = entry
            assert (more - less) / (2 * step) == pytest.approx(float(exact[k]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("radius", [0.3, 0.9])
def test_the_radius_is_what_was_asked_by_all_eigenvalues(name, radius):
    family = FAMILIES[name]()
    one = subject(family, radius, seed=0)
    z = eq.fixed_point(one.cell, family.z0, rtol=1e-14, max_steps=300, on_failure="ignore").value
    jacobian, _ = exact_gradients(one.cell, z, one.v, groups(family))
    assert float(torch.linalg.eigvals(jacobian).abs().max()) == pytest.approx(radius, abs=0.011 * (1 - radius))
    assert one.norm >= one.radius * (1 - 1e-6)
    assert one.condition >= 1


def test_a_radius_that_no_cell_has_is_refused():
    x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    flat = Family(lambda scale: lambda z: x + 0.1 * torch.tanh(z), torch.zeros_like(x), [x], [x], x)
    with pytest.raises(UsageError, match="No cell of this family has a spectral radius of"):
        subject(flat, 0.9, seed=0)


def test_the_quality_of_adjoints_that_are_known():
    one = subject(FAMILIES["random"](), 0.7, seed=0)
    exact = quality(one, eq.Implicit(rtol=1e-12), 1e-13)
    assert all(exact[name]["error"] < 1e-9 and exact[name]["cosine"] > 1 - 1e-12 for name in one.exact)
    # One step takes v for the adjoint state.
    u = one.exact["adjoint state"]
    once = quality(one, eq.OneStep(), 1e-13)
    assert once["adjoint state"]["error"] == pytest.approx(float((u - one.v.flatten()).norm() / u.norm()))
    errors = [quality(one, eq.Neumann(terms), 1e-13)["parameters"]["error"] for terms in (2, 8, 32)]
    assert errors[0] > errors[1] > errors[2]
    assert quality(one, eq.Neumann(8), 1e-13)["products"] == 7
    loose = quality(one, eq.Implicit(rtol=1e-12), 1e-1)
    assert loose["parameters"]["error"] > 1e-4
    assert loose["evaluations"] < exact["evaluations"]


def test_the_tiny_preset_runs_to_a_page(tmp_path: Path):
    settings = replace(EXPERIMENT.presets["tiny"], radii=(0.3, 0.8), tolerances=(1e-1, 1e-12))
    findings = compare(EXPERIMENT, settings, tmp_path / "out", workers=1)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(gradients.plan(settings, [])) == 6
    assert not any(FAILED in row for row in rows)
    assert all(math.isfinite(found["inputs"]["error"]) for row in rows for found in row["found"])
    assert set(findings.drawings) == {"radius", "tolerance", "error"}
    assert all(len(line) == len(table.columns) for table in findings.tables for line in table.rows)
    # The law of the adjoint state is a theorem, so that it holds at any size.
    assert all(claim.holds for claim in findings.claims if "cond(I - J)" in claim.asked)
    for name in ("report.html", "section.md", "radius.svg", "tolerance.svg", "error.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_a_cell_that_cannot_have_the_radius_is_drawn_anew(monkeypatch: pytest.MonkeyPatch):
    drawn = []

    def family(*arguments):
        drawn.append(arguments[2])
        if len(drawn) < 3:
            raise UsageError("No cell.")
        return tanh_family(*arguments)

    monkeypatch.setattr(gradients, "tanh_family", family)
    trial = Trial(gradients.NORMAL, "radius 0.3", seed=4)
    settings = replace(EXPERIMENT.presets["tiny"], tolerances=(1e-2,))
    assert gradients.measure(settings, trial, lambda units: None)["redrawn"] == 2
    assert drawn == [4, 1004, 2004]


def made_up(error: dict[str, float], cosine: dict[str, list[float]]) -> list[dict]:
    rows = []
    for radius in (0.3, 0.6, 0.9):
        found = []
        for name in (*IMPLICITS, *APPROXIMATE, UNROLLED):
            own = {"error": error.get(name, 0.5), "cosine": cosine.get(name, [0.9, 0.8, 0.7])[round(radius / 0.3) - 1]}
            groups_of = dict.fromkeys(("parameters", "inputs", "adjoint state"), own)
            found.append(
                {"adjoint": name, "tolerance": 1e-12, "evaluations": 9, "products": 3, "differentiable": 2, **groups_of}
            )
        row = {"wanted": radius, "radius": radius, "norm": 1.0, "condition": 2.0, "redrawn": 0, "found": found}
        rows.append(Trial("tanh", f"radius {radius:g}", 0).key | row)
    return rows


GOOD = IMPLICITS | {UNROLLED: 1e-5}


@pytest.mark.parametrize(
    ("error", "cosine", "broken"),
    [
        ({}, {}, set()),
        ({EXACTEST: 3e-8}, {}, {len(IMPLICITS) - 1}),
        ({EXACTEST: 2e-4}, {}, {len(IMPLICITS) - 1, len(IMPLICITS)}),
        ({}, {"OneStep": [0.7, 0.8, 0.9]}, {len(IMPLICITS) + 1}),
        ({UNROLLED: 0.1}, {}, {len(IMPLICITS) + 2}),
    ],
)
def test_claims_hold_or_not(error: dict, cosine: dict, broken: set[int]):
    found = claims(made_up(copy.deepcopy(GOOD) | error, cosine))
    assert {k for k, claim in enumerate(found) if not claim.holds} == broken
    assert len(found) == len(IMPLICITS) + 3


def test_nothing_is_claimed_of_rows_that_are_not_there():
    failed = [Trial("tanh", "radius 0.3", 0).key | {FAILED: "none"}]
    assert claims([]) == claims(failed) == []
    findings = EXPERIMENT.tell(EXPERIMENT.presets["tiny"], failed)
    assert findings.tables == []
    assert findings.drawings == {}
