"""The report: complete, self-contained, escaped, honest about the cap, and there whatever a run left behind."""

import builtins
import importlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import made_up_runs as runs
import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onelayer.errors import UsageError
from onelayer.report import numbers, write_report
from onelayer.report.record import Record, read

CAPPED = "this is a K-step network, not an equilibrium"
FIGURES = [
    "Bits per byte",
    "Is it an equilibrium?",
    "Work of a solve in training",
    "Work of a solve on validation",
    "What the evaluations buy",
    "How a solve converges",
    "Memory",
]


def lines(steps: int = 60, equilibrium: bool = True) -> list[dict[str, Any]]:
    both = runs.train_lines(steps, equilibrium) + runs.validation_lines(max(steps, 100), equilibrium)
    return sorted(both, key=lambda line: line["step"])


class Outline(HTMLParser):
    """Checks that tags close in order, and collects what a page would load or run."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.figures: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in {"script", "link", "img", "iframe", "object"}:
            self.loads.append(tag)
        for name, value in attrs:
            if name == "id" and value is not None:
                self.ids.append(value)
            if name in {"src", "href", "xlink:href"} and value is not None and not value.startswith("#"):
                self.loads.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h3":
            self.figures.append(data)


def test_a_finished_run_gets_every_figure_and_number(tmp_path: Path):
    run = runs.write(tmp_path / "small", runs.CONFIG, lines(), runs.evaluation())
    report = write_report(run)
    assert report == run / "report.html"
    page = report.read_text()
    assert Outline(page).figures == FIGURES
    for said in ["2.200", "2.585", "9.4", "0.0034", "0.1%", "233 k", "3.69 M", "4 min 57 s", "619 MiB"]:
        assert f">{said}<" in page
    assert "onelayer train --preset small --data &#x27;my text&#x27;" in page
    assert "does not hold" not in page
    assert CAPPED not in page
    assert sorted(file.name for file in run.iterdir()) == [
        "config.json",
        "evaluation.json",
        "metrics.jsonl",
        "report.html",
    ]


def test_the_page_needs_nothing_else_and_its_drawings_are_sound(tmp_path: Path):
    page = write_report(runs.write(tmp_path / "run", runs.CONFIG, lines(), runs.evaluation())).read_text()
    outline = Outline(page)
    assert outline.loads == []
    assert len(set(outline.ids)) == len(outline.ids)
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', page)) <= set(outline.ids)
    assert "@import" not in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == len(FIGURES)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    variables = set(re.findall(r"var\(--(\w+)\)", page))
    assert variables <= set(re.findall(r"--(\w+):", page))


def test_the_same_run_gives_the_same_page_and_no_setting_of_matplotlib_changes(tmp_path: Path):
    run = runs.write(tmp_path / "run", runs.CONFIG, lines(), runs.evaluation())
    before = dict(matplotlib.rcParams)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert dict(matplotlib.rcParams) == before


def test_what_a_model_or_a_user_wrote_is_shown_and_not_obeyed(tmp_path: Path):
    config = runs.CONFIG | {"command": "<script>alert(1)</script>", "data": {"name": "<i>text</i>"}}
    final = runs.evaluation()
    final["sample"] = {"prompt": "<u>", "text": "<u></pre><script>alert(2)</script>\x00\x1b"}
    page = write_report(runs.write(tmp_path / "<b>run", config, lines(), final)).read_text()
    assert Outline(page).loads == []
    for raw in ("<script", "<i>", "<u>", "<b>"):
        assert raw not in page
    assert '<span class="prompt">&lt;u&gt;</span>&lt;/pre&gt;&lt;script&gt;' in page
    assert "\u2400\u241b" in page
    assert "\x00" not in page


@given(on_validation=st.floats(0, 1), in_training=st.floats(0, 1))
def test_the_page_says_so_when_more_than_one_solve_in_twenty_hits_the_cap(on_validation: float, in_training: float):
    train = [{"step": 1, "share_at_cap": in_training}]
    record = Record("run", runs.CONFIG, train, [], runs.evaluation(share_at_cap=on_validation), [])
    verdict = numbers.verdict(record)
    assert verdict is not None
    good, sentence = verdict
    assert good == (on_validation <= 0.05 and in_training <= 0.05)
    assert (CAPPED in sentence) == (not good)
    assert f"{100 * on_validation:.1f}% on validation" in sentence
    if not good:
        assert f"K is {64 if on_validation >= in_training else 32}." in sentence


@given(once=st.floats(0, 8))
def test_depth_counts_when_one_application_is_clearly_worse(once: float):
    allowed = [{"max_steps": 1, "bits_per_byte": 8.0}, {"max_steps": 2, "bits_per_byte": once}]
    final = runs.evaluation() | {"by_allowed_evaluations": allowed}
    check = numbers.checks(Record("run", runs.CONFIG, [], [], final, []))[-1]
    assert "applied once" in check.asked
    assert check.holds == (once - 2.2 >= 0.2)


def test_a_capped_run_says_so_on_its_page(tmp_path: Path):
    page = write_report(
        runs.write(tmp_path / "run", runs.CONFIG, lines(), runs.evaluation(share_at_cap=0.37))
    ).read_text()
    assert CAPPED in page
    assert "37.0%" in page
    assert "does not hold" in page


@pytest.mark.parametrize("depth", ["tied", "untied"])
def test_explicit_models_have_no_equilibrium_to_report(tmp_path: Path, depth: str):
    config = runs.CONFIG | {"model": {"depth": depth, "layers": 6}}
    run = runs.write(tmp_path / "run", config, lines(equilibrium=False), runs.evaluation(equilibrium=False))
    page = write_report(run).read_text()
    assert Outline(page).figures == ["Bits per byte", "Memory"]
    assert "residual" not in page.split("</style>")[1].split("<h2>Again</h2>")[0]
    assert "hit their cap" not in page


@pytest.mark.parametrize(("depth", "told"), [("equilibrium", True), ("tied", False)])
def test_updates_that_were_not_implicit_are_told(tmp_path: Path, depth: str, told: bool):
    training = runs.CONFIG["training"] | {"unrolled_steps": 300, "unrolled_layers": 4}
    config = runs.CONFIG | {"model": runs.CONFIG["model"] | {"depth": depth}, "training": training}
    page = write_report(runs.write(tmp_path / "run", config, lines(), None)).read_text()
    assert ("first 300 updates went through 4 plain applications" in page) == told
    plain = write_report(runs.write(tmp_path / "plain", runs.CONFIG, lines(), None)).read_text()
    assert "plain applications of the block, by" not in plain


def test_an_interrupted_run_gets_a_page_with_what_there_is(tmp_path: Path):
    run = runs.write(tmp_path / "run", runs.CONFIG, lines(), None)
    page = write_report(run).read_text()
    assert "has not been evaluated" in page
    assert Outline(page).figures == [FIGURES[i] for i in (0, 1, 2, 6)]
    (run / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing" in write_report(run).read_text()
    assert Outline((run / "report.html").read_text()).figures == []


def test_a_half_written_line_is_left_out_and_mentioned(tmp_path: Path):
    run = runs.write(tmp_path / "run", runs.CONFIG, lines(), runs.evaluation())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 61, "bits_per')
    assert "1 line of metrics.jsonl could not be read" in write_report(run).read_text()


def test_a_damaged_evaluation_is_mentioned(tmp_path: Path):
    run = runs.write(tmp_path / "run", runs.CONFIG, lines(), runs.evaluation())
    (run / "evaluation.json").write_text('{"bits_per_byte": 2.')
    assert "evaluation.json is missing or cannot be read" in write_report(run).read_text()


def test_steps_written_twice_by_a_resumed_run_count_once_and_the_later_line_counts(tmp_path: Path):
    again = [line | {"bits_per_byte": 1.5} for line in runs.train_lines(60)[40:50]]
    record = read(runs.write(tmp_path / "run", runs.CONFIG, runs.train_lines(60) + again, None))
    assert [line["step"] for line in record.train] == list(range(1, 61))
    assert [line["step"] for line in record.train if line["bits_per_byte"] == 1.5] == list(range(41, 51))


@pytest.mark.parametrize("holds", [[], ["notes.txt"], ["evaluation.json"]])
def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path, holds: list[str]):
    for name in holds:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match="is not a run"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="is not a run"):
        write_report(tmp_path / "nowhere")
    assert sorted(file.name for file in tmp_path.iterdir()) == holds


def test_without_matplotlib_there_is_a_page_that_says_why_it_has_no_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "onelayer.report"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = importlib.import_module("onelayer.report")
    run = runs.write(tmp_path / "run", runs.CONFIG, lines(), runs.evaluation())
    page = report.write_report(run).read_text()
    assert "matplotlib is not installed" in page
    assert "2.200" in page
    assert "<svg" not in page


def test_another_missing_module_is_not_mistaken_for_matplotlib(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def broken(name: str, *rest: Any) -> Any:
        if name == "onelayer.report.figures":
            raise ModuleNotFoundError("No module named 'else'", name="else")
        return real(name, *rest)

    for name in [name for name in sys.modules if name.startswith("onelayer.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ModuleNotFoundError, match="else"):
        importlib.import_module("onelayer.report.page")


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(-1e6, 1e6)
    | st.just(float("nan"))
    | st.integers(-9, 99)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("7"), inner, max_size=3),
    max_leaves=6,
)


def with_some_replaced(good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The object with values lost, or replaced by anything that JSON can hold."""
    keys = st.dictionaries(st.sampled_from(sorted(good)), anything, max_size=len(good))
    lost = st.sets(st.sampled_from(sorted(good)), max_size=len(good))
    return st.builds(lambda new, lost: {k: new.get(k, v) for k, v in good.items() if k not in lost}, keys, lost)


@pytest.mark.filterwarnings("error")
@settings(max_examples=20)
@given(
    config=with_some_replaced(runs.CONFIG),
    rows=st.lists(
        st.one_of(
            with_some_replaced(runs.train_lines(1)[0]), with_some_replaced(runs.validation_lines(100)[0]), anything
        ),
        max_size=6,
    ),
    final=with_some_replaced(runs.evaluation()),
)
def test_whatever_a_run_left_behind_there_is_a_page(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], rows: list[Any], final: dict[str, Any]
):
    run = runs.write(tmp_path_factory.mktemp("runs") / "run", config, rows, final)
    Outline(write_report(run).read_text())


def test_numbers_survive_the_way_through_json(tmp_path: Path):
    run = runs.write(tmp_path / "run", runs.CONFIG, lines(), runs.evaluation() | {"residual": float("nan")})
    assert json.loads((run / "evaluation.json").read_text())["bits_per_byte"] == read(run).number("bits_per_byte")
    assert read(run).number("residual") is None
    assert read(run).histogram()[9] == 88
