"""What the pages tell users to type: every command is one, the table of options is whole, and the Python runs."""

import argparse
import importlib
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from onelayer.cli import parser
from onelayer.presets import preset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINING = ROOT / "docs" / "training.md"


def commands(page: Path) -> list[list[str]]:
    """The words of every line of a page that starts `onelayer`, with or without torchrun or variables before it."""
    lines = re.findall(
        r"^(?:    )?((?:[A-Z_]+=\S+ |srun |\.venv/bin/)*(?:onelayer|torchrun) .*)$", page.read_text(), re.M
    )
    return [shlex.split(line.rpartition(".venv/bin/")[2], comments=True) for line in lines]


def test_the_pages_have_commands():
    count = {page.name: len(commands(page)) for page in PAGES}
    assert count["training.md"] >= 10
    assert count["README.md"] >= 8
    assert count["generation.md"] >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one(page: Path):
    for words in commands(page):
        while words[0] == "srun" or "=" in words[0]:
            words = words[1:]
        if words[0] == "torchrun":
            # Variables of the batch script stand for words of their own.
            script = [word.replace("$SLURM_NNODES", "2") for word in words[1:] if word != "$WHAT"]
            options = get_args_parser().parse_args(script)
            assert (options.module, options.training_script) == (True, "onelayer")
            words = [options.training_script, *options.training_script_args]
        parser().parse_args(words[1:])  # UsageError for what it does not understand


def train_options() -> list[argparse.Action]:
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return [action for action in commands.choices["train"]._actions if action.dest != "help"]


def written(value: object) -> str:
    if isinstance(value, str):
        return f"`{value}`"
    return "off" if value is False else "none" if value == () else str(value)


def test_the_table_of_options_is_whole_and_tells_the_values_of_the_preset():
    rows = re.findall(r"^\| (`--.*?) \| .* \| (.*?) \|$", TRAINING.read_text(), re.M)
    told = {name: value for names, value in rows for name in re.findall(r"--[a-z-]+", names)}
    assert set(told) == {name for action in train_options() for name in action.option_strings}
    small = preset("small")
    values = asdict(small.model) | asdict(small.training)
    for action in train_options():
        if action.dest in values:
            assert told[action.option_strings[0]] == written(values[action.dest])


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    blocks = re.findall(r"^```python\n(.*?)^```$", TRAINING.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    (tmp_path / "page_on_training.py").write_text("\n\n".join(blocks))
    (tmp_path / "book.txt").write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n\n" for i in range(300)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        page = importlib.import_module("page_on_training")
    assert len(page.losses) == 8
    assert 0 < page.evaluation["bits_per_byte"] < 8
    # What the page says a run folder holds is what is there.
    told = set(re.findall(r"`([a-z.]+/?)`", TRAINING.read_text().partition("## Data")[0]))
    there = {path.name + "/" * path.is_dir() for path in (tmp_path / "runs" / "first").iterdir()}
    assert there - {".lock"} <= told
    assert {"config.json", "tokens/", "model/", "checkpoints/", "evaluation.json"} <= there
    monkeypatch.delitem(sys.modules, "page_on_training")


def test_the_links_between_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}."
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in (ROOT / "README.md").read_text(), f"README does not mention {page.name}."
