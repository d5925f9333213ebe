"""`onelayer prove`: what it measures, what it writes, and that a claim which does not hold is told."""

import importlib
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

import equilibria as eq
from onelayer.cli import main
from onelayer.proofs import NETWORKS, STACKS, limits
from onelayer.proofs.limits import Blocks, Reach
from onelayer.proofs.measure import Embedding, Errors, Fusion, compare, relative_error
from onelayer.proofs.networks import Subject
from onelayer.proofs.record import Record

FEW = [NETWORKS[0], next(subject for subject in NETWORKS if subject.score is not None), NETWORKS[8]]
FIGURES = {
    "The one weight matrix",
    "Activations fill in layer by layer",
    "What the classifier sees, filling in",
    "Joint against stacked",
    "How far truncated gradients reach",
}
GOOD = Errors(1e-15, 1e-14)
ROW = Embedding("a network", 100, 3, 30, 10, 4, 4, True, GOOD, 0.001, 0.01, None)


class Page(HTMLParser):
    """What a page shows and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.captions = 0
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.captions += tag == "figcaption"
        for name, value in attrs:
            if name == "id" and value is not None:
                self.ids.append(value)
            if name in {"src", "href", "xlink:href"} and value is not None and not value.startswith(("#", "data:")):
                self.loads.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag != "meta":
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "h3":
            self.titles.append(data)


def prove(
    folder: Path, networks: list[Subject], stacks: list[Any], monkeypatch: pytest.MonkeyPatch, *more: str
) -> tuple[int, dict[str, Any], str]:
    """The exit code, what `proof.json` holds, and the page."""
    monkeypatch.setattr("onelayer.cli.prove.NETWORKS", networks)
    monkeypatch.setattr("onelayer.cli.prove.STACKS", stacks)
    code = main(["prove", "--out", str(folder), *more])
    return code, json.loads((folder / "proof.json").read_text()), (folder / "proof.html").read_text()


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return prove(tmp_path_factory.mktemp("proofs") / "proof", FEW, [STACKS[1]], monkeypatch, "--seed", "3")


def test_claims_hold_on_a_few_networks_and_a_stack(proof: tuple[int, dict[str, Any], str]):
    code, found, _ = proof
    assert code == 0
    assert found["holds"] is True
    assert [row["name"] for row in found["embeddings"]] == [subject.name for subject in FEW]
    for row in found["embeddings"]:
        assert row["errors"]["value"] <= 1e-10
        assert row["errors"]["gradient"] <= 1e-9
        assert row["evaluations"] <= row["stages"] + 1
        assert row["widest"] < row["state"]
    assert found["embeddings"][0]["widest"] == 32
    assert found["embeddings"][0]["state"] == 3 * 32  # linear, ReLU, linear
    network, embedded = found["embeddings"][1]["scores"]
    assert network == embedded > 0.9
    (stack,) = found["fusions"]
    assert stack["widths"] == [24, 40, 12]
    assert max(stack["evaluations"]) <= stack["joint_evaluations"] < 0.6 * sum(stack["evaluations"])


def test_the_page_has_claims_tables_pictures_and_limits_and_needs_nothing_else(proof: tuple[int, dict[str, Any], str]):
    page = Page(proof[2])
    assert set(page.titles) == FIGURES
    assert page.captions == len(FIGURES)
    assert page.loads == []
    assert len(set(page.ids)) == len(page.ids)
    assert set(re.findall(r"var\(--(\w+)\)", proof[2])) <= set(re.findall(r"--(\w+):", proof[2]))
    for drawing in re.findall(r"<svg.*?</svg>", proof[2], re.DOTALL):
        ElementTree.fromstring(drawing)
    told = ["theorem 2", "theorem 3", "Widths add up", "Representable is not trainable", "It costs more", "seed 3"]
    for words in [*told, "reaches 1 of them", *(subject.name for subject in FEW), STACKS[1].name]:
        assert words in page.text
    assert "does not hold" not in page.text
    assert page.text.count("✓ holds") == len(FEW) + 1


def test_pictures_are_those_of_the_theorem(proof: tuple[int, dict[str, Any], str]):
    found = proof[1]
    widths, matrix = found["blocks"]["widths"], found["blocks"]["matrix"]
    assert len(matrix) == sum(widths) == 6 * widths[0]
    errors = found["filling"]["errors"]
    # The staircase: after t updates from noise, the first t layers are right to the last bit and no other is.
    assert [[error == 0 for error in row] for row in errors] == [[i < t for i in range(16)] for t in range(17)]
    exact = found["film"]["exact"]
    assert [sum(row) for row in exact] == [min(t, len(exact[0])) for t in range(len(exact))]
    shares = found["reach"]["shares"]
    assert [[share > 0 for share in row] for row in shares] == [[i + k >= 11 for i in range(12)] for k in range(12)]
    apart, together = found["convergence"]
    assert [curve["evaluations"][0] for curve in apart[1:]] == [curve["evaluations"][-1] + 1 for curve in apart[:-1]]
    assert together["residuals"][-1] <= 1e-13 < together["residuals"][-2]


def test_a_seed_decides_all_but_the_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def numbers(folder: str, seed: str) -> dict[str, Any]:
        found = prove(tmp_path / folder, [NETWORKS[0]], [], monkeypatch, "--seed", seed)[1]
        for row in [found, *found["embeddings"]]:
            for name in [name for name in row if "seconds" in name or name == "command"]:
                del row[name]
        return found

    state = torch.get_rng_state()
    first = numbers("a", "1")
    assert torch.equal(torch.get_rng_state(), state)
    assert numbers("b", "1") == first
    assert numbers("c", "2")["blocks"] != first["blocks"]
    printed = capsys.readouterr().out
    assert NETWORKS[0].name in printed
    assert "Widths add up" in printed
    assert f"page: {tmp_path / 'a' / 'proof.html'}" in printed


class Counting(nn.Module):
    """Is another function at every call, so that nothing can stand for it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


def test_a_network_that_breaks_the_bound_is_named_and_the_exit_code_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    counting = Subject("a network that counts", Counting, lambda batch: (torch.randn(batch, 4),))
    code, found, page = prove(tmp_path / "proof", [NETWORKS[0], counting], [], monkeypatch)
    assert code == 1
    assert found["holds"] is False
    assert found["broken"] == [counting.name]
    assert "Not everything held: a network that counts." in page
    assert page.count("✗ does not hold") == 1
    assert "DOES NOT HOLD" in capsys.readouterr().out


@pytest.mark.parametrize(
    "broken",
    [
        replace(ROW, errors=Errors(1.1e-10, 0.0)),
        replace(ROW, errors=Errors(0.0, 1.1e-9)),
        replace(ROW, errors=Errors(math.nan, 0.0)),
        replace(ROW, evaluations=5),
        replace(ROW, converged=False),
        Fusion("a stack", [2, 3], [9, 9], 10, False, GOOD, 0.1, 0.1),
        Fusion("a stack", [2, 3], [9, 9], 10, True, Errors(1e-9, 0.0), 0.1, 0.1),
        Blocks([[0.0, 1e-9], [1.0, 0.0]], [1, 1]),
        Blocks([[0.0, 0.0], [1.0, 0.0]], [1]),
        Reach([[0.0, 1.0], [1.0, 1.0]], [[False, True], [True, True]], 2),
        Reach([[0.1, 1.0], [1.0, 1.0]], [[False, True], [True, True]], 1),
        Reach([[0.0, 1.0], [1.0, 1.0]], [[False, True], [False, True]], 1),
    ],
    ids=lambda broken: type(broken).__name__,
)
def test_nothing_is_said_to_hold_that_does_not(broken: Embedding | Fusion | Blocks | Reach):
    assert not broken.holds
    record = Record(embeddings=[ROW])
    assert record.holds
    match broken:
        case Embedding():
            record.embeddings.append(broken)
        case Fusion():
            record.fusions.append(broken)
        case Blocks():
            record.blocks = broken
        case Reach():
            record.reach = broken
    assert not record.holds


def test_good_parts_hold():
    assert Fusion("a stack", [2, 3], [9, 9], 10, True, GOOD, 0.1, 0.1).holds
    assert Blocks([[0.0, 0.0], [1.0, 0.0]], [1, 1]).holds
    assert Reach([[0.0, 1.0], [1.0, 1.0]], [[False, True], [True, True]], 1).holds


def test_an_error_is_relative_to_its_own_tensor_and_never_hides():
    small, large = torch.tensor([1e-8]), torch.tensor([1.0])
    assert relative_error([large, 1.5 * small], [large, small]) == pytest.approx(0.5)
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert relative_error([torch.ones(2)], [torch.zeros(2)]) == math.inf
    assert relative_error([torch.tensor([math.nan])], [large]) == math.inf
    assert relative_error([large, large], [large]) == math.inf
    assert relative_error([torch.ones(1, 2)], [torch.ones(2)]) == math.inf


@pytest.mark.parametrize("subject", [subject for subject in NETWORKS if "64" not in subject.name], ids=lambda s: s.name)
def test_every_network_is_its_embedding_and_has_gradients_that_are_not_rounding(subject: Subject):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = subject.network().double().eval()
        inputs, example = (tuple(x.double() if x.is_floating_point() else x for x in subject.inputs(n)) for n in (3, 2))
    assert compare(eq.universal.embed(network, example), network, inputs).within_bounds
    # Against itself moved by rounding: a gradient that is nothing but rounding would differ by all of its size.
    moved = tuple(x * (1 + 1e-15) if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())
    assert compare(network, network, moved).within_bounds
    sizes = limits.differentiate(network, inputs)[1]
    assert all(float(gradient.abs().max()) > 1e-10 for gradient in sizes)


def test_there_are_a_dozen_networks_of_depths_from_2_to_64():
    names = [subject.name for subject in NETWORKS]
    assert len(set(names)) == len(names) == 12
    for words in ("2 layers", "16 layers", "64 layers", "digits", "Transformer", "GRU"):
        assert any(words in name for name in names)
    assert [len(stack.build()[0]) for stack in STACKS] == [2, 3, 4, 2]


def assert_refused(capsys: pytest.CaptureFixture[str], says: str, *arguments: str) -> None:
    capsys.readouterr()
    assert main(["prove", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith(".\n")
    assert says in error


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--seed", "-1"], "at least 0"), (["--seed", "many"], "--seed"), (["--epochs", "3"], "--epochs")],
    ids=["negative seed", "no seed", "unknown option"],
)
def test_options_that_make_no_sense(options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert_refused(capsys, says, "--out", str(tmp_path / "proof"), *options)
    assert not (tmp_path / "proof").exists()


def test_what_is_there_already_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("onelayer.cli.prove.NETWORKS", [])
    folder, file = tmp_path / "proof", tmp_path / "notes.txt"
    folder.mkdir()
    for path in (folder / "proof.html", file):
        path.write_text("kept")
    assert_refused(capsys, "--out", "--out", str(folder))
    assert_refused(capsys, "notes.txt", "--out", str(file))
    assert_refused(capsys, "cannot be made", "--out", str(file / "deeper"))
    assert [path.read_text() for path in (folder / "proof.html", file)] == ["kept", "kept"]
    assert [path.name for path in folder.iterdir()] == ["proof.html"]


def test_without_scikit_learn_the_extra_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("onelayer.cli.prove.NETWORKS", FEW)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert_refused(capsys, "equilibria[prove]", "--out", str(tmp_path / "proof"))
    assert not (tmp_path / "proof").exists()


def test_without_matplotlib_there_is_a_page_that_says_why_it_has_no_pictures(monkeypatch: pytest.MonkeyPatch):
    own = ("matplotlib", "onelayer.proofs", "onelayer.report")
    for name in [name for name in sys.modules if name.startswith(own)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = importlib.import_module("onelayer.proofs.page")
    shown = page.page(Record(embeddings=[ROW]))
    assert "matplotlib is not installed" in shown
    assert "<svg" not in shown
    assert "a network" in shown
