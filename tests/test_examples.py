"""The examples: each runs, draws its picture, is short and is told of on its page; and what it prints is so.

A file is an example by being in the folder. `SMALL` says how to run one quickly; one that it leaves out runs as it is.
"""

import re
import runpy
import struct
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE = (ROOT / "docs" / "examples.md").read_text()
SMALL = {
    "denoising.py": ["--steps", "2"],
    "monotone_digits.py": ["--steps", "8"],
    "neural_ode_spiral.py": ["--steps", "3"],
    "optnet_sudoku.py": ["--steps", "3"],
    "power_flow.py": ["--steps", "9"],
    "recurrent_backpropagation.py": ["--steps", "20"],
    "ridge_hypergradient.py": ["--steps", "3"],
    "tanh_layer.py": ["--steps", "30"],
}
printed: dict[str, str] = {}

each = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)


def size_of(picture: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def numbers(text: str, pattern: str) -> list[float]:
    """The numbers after each place of `text` that matches."""
    return [float(found) for found in re.findall(pattern + r" ([-+0-9.e]*[0-9])", text)]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run an example as a user does, small, once in the session, and hand back what it printed."""
    monkeypatch.setenv("MPLBACKEND", "agg")

    def run(name: str) -> str:
        if name not in printed:
            picture = tmp_path / "picture.png"
            monkeypatch.setattr(sys, "argv", [name, "--out", str(picture), *SMALL.get(name, [])])
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
            assert min(size_of(picture)) >= 200
            assert picture.stat().st_size > 5000
            printed[name] = capsys.readouterr().out
        return printed[name]

    return run


def test_there_are_examples():
    assert len(EXAMPLES) >= len(SMALL)
    assert set(SMALL) <= {example.name for example in EXAMPLES}


@each
def test_it_runs_small_and_draws_its_picture(example: Path, run):
    assert len(run(example.name).splitlines()) >= 2


@each
def test_it_is_short(example: Path):
    lines = example.read_text().splitlines()
    assert len(lines) < 80
    assert max(map(len, lines)) <= 120


@each
def test_its_page_names_it_and_shows_its_picture(example: Path):
    picture = ROOT / "docs" / "examples" / f"{example.stem}.png"
    assert f"python examples/{example.name} --out docs/examples/{picture.name}" in PAGE
    assert f"](examples/{picture.name})" in PAGE
    assert min(size_of(picture)) >= 200
    assert 5000 < picture.stat().st_size < 80_000


def test_the_hypergradient_is_that_of_finite_differences_and_of_the_closed_form(run):
    errors = numbers(run("ridge_hypergradient.py"), "relative error")
    assert len(errors) == 2
    assert max(errors) < 1e-6
    start, end = numbers(run("ridge_hypergradient.py"), r"(?:validation loss:|start,)")
    assert end < start


def test_power_flow_is_that_of_the_book_and_its_sensitivities_those_of_finite_differences(run):
    text = run("power_flow.py")
    assert numbers(text, "bus 1 gives") == [71.6]
    assert numbers(text, "relative error")[0] < 1e-6


def test_the_load_beyond_the_nose_is_told_as_a_status(run):
    text = run("power_flow.py")
    assert "8 of 9 loads converged" in text
    assert re.search(r"at 2\.4 times the nominal load: (MAX_STEPS|STALLED|BREAKDOWN|NONFINITE)$", text, re.M)


def test_the_tanh_layer_is_solved_by_every_solver_and_its_gradient_that_of_finite_differences(run):
    text = run("tanh_layer.py")
    residuals = numbers(text, "relative residual")
    assert len(residuals) == 4
    assert max(residuals) < 2e-10
    assert "gradients of the parameters agree with finite differences: True" in text
    assert numbers(text, "accuracy:")[0] > 0.5  # five times chance in 30 steps


def test_recurrent_backpropagation_is_the_gradient_of_the_exact_solve_and_teaches_recall(run):
    text = run("recurrent_backpropagation.py")
    assert numbers(text, "relative error")[0] < 1e-9
    recalled, _, best = numbers(text, r"(?:flipped|network|letter):")
    assert 0 <= recalled <= best + 0.05
    assert best > 0.8
