"""docs/results.md says what the rows beside it say, and nothing else."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from onelayer.experiments import EXPERIMENTS
from onelayer.experiments.page import machine, markdown
from onelayer.experiments.results import Results

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
MEASURED = sorted(path.parent.name for path in (ROOT / "docs" / "results").glob("*/section.md"))


def told(name: str) -> tuple[Any, Results]:
    results = Results(ROOT / "docs" / "results" / name)
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in results.settings.items()}
    assert values.pop("experiment") == name
    preset = EXPERIMENTS[name].presets["cpu"]
    return type(preset)(minutes=preset.minutes, **values), results


def test_the_page_is_its_parts():
    assembled = runpy.run_path(str(ROOT / "benchmarks" / "results.py"))["assembled"]
    assert assembled() == PAGE, "run python benchmarks/results.py"


@pytest.mark.parametrize("name", MEASURED)
def test_tables_are_those_of_the_rows(name: str):
    settings, results = told(name)
    findings = EXPERIMENTS[name].tell(settings, results.rows)
    assert findings.tables
    for table in findings.tables:
        assert markdown(table.columns, table.rows) in PAGE
        assert table.note in PAGE
    for claim in findings.claims:
        row = f"| {claim.asked} | {claim.measured} | {'holds' if claim.holds else '**does not hold**'} |"
        assert row in PAGE
    assert machine(settings, results) in PAGE
    assert EXPERIMENTS[name].sceptic in PAGE
    assert f"onelayer compare {name}" in PAGE


@pytest.mark.parametrize("name", MEASURED)
def test_no_trial_is_missing_and_the_settings_are_those_of_the_preset(name: str):
    settings, results = told(name)
    assert [trial for trial in EXPERIMENTS[name].plan(settings, results.rows) if not results.has(trial)] == []
    preset = EXPERIMENTS[name].presets["cpu"]
    changed = [field for field in vars(preset) if getattr(preset, field) != getattr(settings, field)]
    assert set(changed) <= {"texts"}


def test_pictures_that_are_shown_are_there():
    for line in PAGE.splitlines():
        if line.startswith("!["):
            assert (ROOT / "docs" / line.split("](")[1].rstrip(")")).exists(), line
