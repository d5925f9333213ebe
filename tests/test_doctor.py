"""The doctor: it names the cause of each known fault, none of healthy cells, and changes nothing."""

import copy
import io
import json
import re
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import normal
from torch import nn

import equilibria as eq
from equilibria import Cause
from equilibria.diagnosis.picture import plot_diagnosis
from onelayer.cli import main

LAW = settings(derandomize=True, max_examples=30, deadline=None)


class Cell(nn.Module):
    """tanh(W z + x), W a multiple of a random orthogonal matrix, or given."""

    def __init__(self, scale: float = 0.5, width: int = 8, seed: int = 0, weight=None):
        super().__init__()
        self.state = nn.Linear(width, width, bias=False)
        random = torch.linalg.qr(normal(width, width, seed=seed)).Q
        self.state.weight.data = (scale * random if weight is None else weight).float()

    def forward(self, z, x):
        return torch.tanh(self.state(z) + x)


class Changed(Cell):
    """A cell with something done to what it returns, or to what it gets."""

    def __init__(self, after=None, before=None, **options):
        super().__init__(**options)
        self.after, self.before = after, before

    def forward(self, z, x):
        if self.before is not None:
            z, x = self.before(z, x)
        value = super().forward(z, x)
        return value if self.after is None else self.after(value, z, x)


class WithPart(Cell):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, z, x):
        return 0.5 * self.part(super().forward(z, x))


class Stateful(Cell):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, z, x):
        self.calls += 1
        return super().forward(z, x) / (1 + 0.1 * self.calls)


class InPlace(Cell):
    def forward(self, z, x):
        z += x
        return torch.tanh(self.state(z))


class Rough(Cell):
    """A cell in half precision with a state in single, whose tolerance is then out of reach."""

    def __init__(self):
        super().__init__(0.95, width=8)
        self.bfloat16()

    def forward(self, z, x):
        return (super().forward(z.bfloat16(), x.bfloat16())).float()


class PreNorm(nn.Module):
    """z + g(norm(z), x): a residual block as deep networks have them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, z, x):
        return z + 0.1 * torch.tanh(self.linear(self.norm(z)) + x - 0.2 * z)


def nilpotent(width: int = 8, size: float = 40.0) -> torch.Tensor:
    return torch.diag(torch.full((width - 1,), size), 1)


X = normal(4, 8, seed=3).float()
BAD = torch.where(torch.arange(4)[:, None] == 2, torch.nan, X)


SLOPES, FIRST = torch.linspace(-0.5, 0.5, 8), torch.tensor([0])
ROTATION = torch.tensor([[0.8, 1.2], [-1.2, 0.8]])


def slope(value):
    """An affine cell of this slope in every direction, or of one for each."""
    return lambda z, x: value * z + x


BROKEN = {
    "raises": (Changed(after=lambda v, z, x: v @ x), X, Cause.FAILS),
    "another shape": (Changed(after=lambda v, z, x: v[:, :4]), X, Cause.STRUCTURE),
    "another structure": (Changed(after=lambda v, z, x: (v, v)), X, Cause.STRUCTURE),
    "another dtype": (Changed(after=lambda v, z, x: v.double()), X, Cause.STRUCTURE),
    "a bad sample": (Cell(), BAD, Cause.INPUT_NOT_FINITE),
    "a logarithm": (Changed(after=lambda v, z, x: torch.log(v - v.amax(1, keepdim=True))), X, Cause.NOT_FINITE),
    "dropout": (WithPart(nn.Dropout(0.3)), X, Cause.RANDOM),
    "noise": (Changed(after=lambda v, z, x: v + 0.1 * torch.randn_like(v)), X, Cause.RANDOM),
    "a counter": (Stateful(), X, Cause.STATEFUL),
    "in place": (InPlace(), X, Cause.IN_PLACE),
    "batch normalisation": (WithPart(nn.BatchNorm1d(8)), X, Cause.COUPLED),
    "a mean over the batch": (Changed(after=lambda v, z, x: v - 0.5 * v.mean(0)), X, Cause.COUPLED),
    "no state": (lambda z, x: torch.tanh(x), X, Cause.IGNORES_STATE),
    "no input": (lambda z, x: 0.5 * torch.cos(z), X, Cause.IGNORES_INPUT),
    "detached": (lambda z, x: torch.tanh(0.5 * z.detach() + x), X, Cause.DETACHED),
    "detached in part": (lambda z, x: torch.tanh(0.5 * z.detach() + 0.1 * z + x), X, Cause.WRONG_DERIVATIVE),
    "straight-through": (lambda z, x: torch.tanh(x) + 0.5 * z + (torch.sin(z) - z).detach(), X, Cause.WRONG_DERIVATIVE),
    "runs away": (lambda z, x: z + 1 + x.square(), X, Cause.NO_EQUILIBRIUM),
    "no real root": (lambda z, x: z + z.square() + 1 + x.square(), X, Cause.NO_EQUILIBRIUM),
    "tolerance below rounding": (Rough(), X, Cause.BELOW_ROUNDING),
    "pre-norm residual": (PreNorm(), X, Cause.RESIDUAL),
    "overshoots": (slope(-1.5), X, Cause.OSCILLATES),
    "expands": (slope(2.5), X, Cause.EXPANDS),
    "rotates and expands": (Cell(weight=torch.block_diag(*[ROTATION] * 4)), 0.01 * X, Cause.EXPANDS),
    "next to singular": (slope(SLOPES.clamp(max=0.3).index_fill(0, FIRST, 0.999)), X, Cause.SINGULAR),
    "two equilibria": (lambda z, x: torch.tanh(3 * z + 0.01 * x), X, Cause.SEVERAL),
    "far from normal": (Cell(weight=nilpotent()), 0.001 * X, Cause.NON_NORMAL),
    "slow": (slope(SLOPES.clamp(max=0.3).index_fill(0, FIRST, 0.98)), X, Cause.SLOW),
}
OPTIONS = {"tolerance below rounding": {"rtol": 1e-6}, "two equilibria": {"z0": torch.full_like(X, 0.3)}}


@pytest.mark.parametrize("name", BROKEN)
def test_it_names_the_cause(name):
    cell, x, cause = BROKEN[name]
    diagnosis = eq.doctor(cell, x, **OPTIONS.get(name, {}))
    assert cause in diagnosis.causes, str(diagnosis)
    assert diagnosis.healthy == (not cause.needs_change)
    report = str(diagnosis)
    assert cause.meaning in report
    assert cause.remedy in report
    assert report.startswith("Healthy" if diagnosis.healthy else "Not healthy")


def test_it_says_where_and_which():
    assert "Dropout(p=0.3" in str(eq.doctor(BROKEN["dropout"][0], X))
    (bad,) = (f for f in eq.doctor(Cell(), BAD).findings if f.cause is Cause.INPUT_NOT_FINITE)
    assert bad.samples == (2,)
    assert "sample 2" in str(bad)
    assert "must return the shape" in str(eq.doctor(BROKEN["another shape"][0], X))
    assert "RuntimeError" in str(eq.doctor(BROKEN["raises"][0], X))


def test_two_faults_are_both_named():
    causes = eq.doctor(lambda z, x: -1.5 * (z - 0.5 * z.mean(0)), X).causes
    assert {Cause.COUPLED, Cause.IGNORES_INPUT} <= set(causes)


@LAW
@given(
    scale=st.floats(0.05, 0.9),
    width=st.integers(2, 12),
    seed=st.integers(0, 999),
    batch=st.integers(1, 5),
    double=st.booleans(),
)
def test_healthy_cells_are_healthy(scale, width, seed, batch, double):
    cell, x = Cell(scale, width, seed), normal(batch, width, seed=seed + 1)
    diagnosis = eq.doctor(cell.double(), x) if double else eq.doctor(cell, x.float())
    assert diagnosis.healthy, str(diagnosis)
    assert diagnosis.measured is not None
    radius = torch.stack(
        [
            torch.linalg.eigvals(jacobian).abs().max()
            for jacobian in (
                torch.func.jacrev(lambda z, k=k: cell(z, x[k].to(z)))(_equilibrium(cell, x)[k]) for k in range(batch)
            )
        ]
    )
    assert torch.allclose(diagnosis.measured.radius, radius.double(), rtol=0.05, atol=2e-3)


def _equilibrium(cell, x):
    dtype = cell.state.weight.dtype
    z = torch.zeros_like(x, dtype=dtype)
    with torch.no_grad():
        for _ in range(300):
            z = cell(z, x.to(dtype))
    return z


@pytest.mark.parametrize("name", ["dropout", "batch normalisation", "a counter", "in place", "runs away", "expands"])
def test_it_changes_nothing_and_says_the_same_again(name):
    cell, x, _ = BROKEN[name]
    kept_x, state = x.clone(), torch.get_rng_state()
    before = copy.deepcopy(cell)
    first = str(eq.doctor(cell, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(eq.doctor(cell, x)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept_x)
    if isinstance(cell, nn.Module):
        assert cell.training
        for (key, new), (_, old) in zip(cell.state_dict().items(), before.state_dict().items(), strict=True):
            assert torch.equal(new, old), key
        assert all(p.grad is None for p in cell.parameters())
        assert getattr(cell, "calls", 0) == getattr(before, "calls", 0)


def test_a_layer_is_examined_with_its_own_options():
    assert eq.doctor(eq.DEQ(Cell()), X).healthy
    causes = eq.doctor(eq.DEQ(Cell(0.9), solver=eq.Picard(), max_steps=5), X).causes
    assert causes == (Cause.NOT_ENOUGH_STEPS,)
    causes = eq.doctor(eq.DEQ(Cell(weight=-1.5 * torch.eye(8)), solver=eq.Picard()), 0.1 * X).causes
    assert {Cause.OWN_SOLVER, Cause.OSCILLATES} <= set(causes)


def test_states_of_any_structure_and_no_samples():
    def cell(state, x):
        a, b = state["a"], state["b"]
        return {"a": torch.tanh(0.3 * a + b.sum(dim=1) * 0.1 + x), "b": 0.5 * torch.cos(b) + x[:, :, None]}

    z0 = {"a": torch.zeros(3, 2), "b": torch.zeros(3, 2, 2)}
    x = normal(3, 2, seed=1).float()
    assert eq.doctor(cell, x, z0=z0).healthy
    assert eq.doctor(Cell(), X[:1]).healthy
    with pytest.raises(TypeError, match="initial_state"):
        eq.doctor(Cell(), torch.arange(3))


@pytest.mark.parametrize("name", ["dropout", "runs away", "overshoots", "far from normal", "batch normalisation"])
def test_the_picture_of_each_kind_of_diagnosis(name, tmp_path):
    cell, x, _ = BROKEN[name]
    figure = plot_diagnosis(eq.doctor(cell, x))
    assert len(figure.axes) >= 4
    figure.savefig(tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 5000


FILE = """
import torch

def example():
    return (lambda z, x: {slope} * z + x), torch.ones(3, 2)
"""


def test_the_command_on_a_file(tmp_path, capsys):
    good, bad, wrong = tmp_path / "good.py", tmp_path / "bad.py", tmp_path / "wrong.py"
    good.write_text(FILE.format(slope="0.5"))
    bad.write_text(FILE.format(slope="-2.0"))
    assert main(["doctor", str(good)]) == 0
    assert capsys.readouterr().out.startswith("Healthy")
    picture, report = tmp_path / "one.png", tmp_path / "one.json"
    assert main(["doctor", str(bad), "--plot", str(picture), "--json", str(report)]) == 1
    assert "relaxation" in capsys.readouterr().out
    assert picture.stat().st_size > 5000
    assert "OSCILLATES" in [found["cause"] for found in json.loads(report.read_text())["findings"]]
    for text, words in [
        ("1 / 0", "ZeroDivisionError"),
        ("example = 3", "TypeError"),
        ("", "must have a function example"),
    ]:
        wrong.write_text(text)
        assert main(["doctor", str(wrong)]) == 2
        assert words in capsys.readouterr().err
    for arguments, words in [
        (["nowhere.py"], "no file"),
        ([str(tmp_path / "nowhere")], "not a run folder"),
        ([str(good), "--plot", "one.txt"], "ending"),
        ([str(good), "--json", "nowhere/one.json"], "no folder"),
        ([str(good), "--windows", "1"], "at least 2"),
    ]:
        assert main(["doctor", *arguments]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("depth", ["equilibrium", "tied"])
def test_the_command_on_a_run(depth, tmp_path, capsys):
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 200)
    arguments = ["train", "--preset", "tiny", "--steps", "2", "--run", str(run), "--data", str(text), "--model", depth]
    assert main(arguments) == 0
    capsys.readouterr()
    code = main(["doctor", str(run)])
    told = capsys.readouterr()
    if depth == "equilibrium":
        assert code in (0, 1)
        assert "spectral radius" in told.out
    else:
        assert code == 2
        assert "equilibrium models" in told.err


def test_the_blocks_of_the_page_print_what_it_says():
    page = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    for code, wanted in blocks:
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == wanted
    assert len(blocks) == 1
