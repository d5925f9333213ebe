"""The table of laws in the documentation names tests that are there, and the list of mutations places that are."""

import ast
import importlib
import re
from pathlib import Path

import mutations
import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "laws.md").read_text()
LISTED = dict(re.findall(r"^\| (\w+) \| `(test_\w+::test_\w+)` \|$", PAGE, flags=re.M))
GRID = [line.strip("|").split("|") for line in PAGE.splitlines() if re.match(r"\| \d\. ", line)]
MODULES = sorted(path.stem for path in TESTS.glob("test_*.py"))


def test_every_law_has_a_test_for_every_column():
    assert [int(row[0].strip()[0]) for row in GRID] == list(range(1, 10))
    used = set(re.findall(r"\((\w\d+)\)", PAGE))
    for law, *cells in GRID:
        assert len(cells) == 5, law
        for cell in cells:
            assert cell.split(), law
            used.update(cell.split())
    assert used == set(LISTED)


@pytest.mark.parametrize("name", sorted(LISTED))
def test_the_tests_of_the_table_exist(name: str):
    module, test = LISTED[name].split("::")
    tree = ast.parse((TESTS / f"{module}.py").read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_thousand_cases_are_drawn_from_a_fixed_seed():
    drawn = 0
    for module in MODULES:
        if re.search("onelayer|corpora|ngrams|report", module):  # of the application
            continue
        for test in vars(importlib.import_module(module)).values():
            if getattr(test, "is_hypothesis_test", False):
                settings = test._hypothesis_internal_use_settings
                drawn += settings.max_examples
    assert drawn >= 1000


def test_nothing_is_skipped_or_tried_twice():
    for module in MODULES:
        tree = ast.parse((TESTS / f"{module}.py").read_text())
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & {"skip", "skipif", "xfail", "importorskip", "flaky"}, module


@pytest.mark.parametrize("number", range(len(mutations.MUTATIONS)))
def test_mutations_are_of_what_stands_there(number: int):
    mutation = mutations.MUTATIONS[number]
    source = (mutations.ROOT / "src" / "equilibria" / mutation.file).read_text()
    assert source.count(mutation.old) == 1, f"{mutation.file}: {mutation.old}"
    assert mutation.old not in mutation.new or mutation.new.startswith(mutation.old), mutation
    for word in mutation.tests.split():
        assert not word.startswith("tests/") or (mutations.ROOT / word).is_file(), word
