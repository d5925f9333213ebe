"""`onelayer compare`: trials that are run once, results that outlive a crash, and figures that are what they say."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import made_up_experiment as made_up
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_experiment import EXPERIMENT, Settings
from matplotlib.figure import Figure
from scipy import stats

from onelayer.cli import main
from onelayer.corpora import batches, prepare
from onelayer.errors import UsageError
from onelayer.experiments import EXPERIMENTS, blocks, language, learning
from onelayer.experiments.arms import parameters, twins
from onelayer.experiments.experiment import FAILED, Trial
from onelayer.experiments.learning import cost_table, is_cut_off, learn, scored_solves
from onelayer.experiments.page import plain, section, verdict
from onelayer.experiments.peak import peak_bytes
from onelayer.experiments.plots import curves
from onelayer.experiments.rates import best_rate, with_chosen_rates, with_rate_of
from onelayer.experiments.results import Results
from onelayer.experiments.running import compare
from onelayer.experiments.statistics import measured, paired, rank_correlation, spread
from onelayer.learner import start, update
from onelayer.models.configuration import ModelConfig
from onelayer.models.language_model import LanguageModel
from onelayer.parallel import Processes
from onelayer.presets import RunConfig, TrainingConfig

TESTS = Path(__file__).parent


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def made_up_row(arm: str, seed: int = 0, at_cap: float = 0.0, **more: object) -> dict:
    solves = {"mean": 9.0, "median": 9.0, "p95": 12.0, "at_cap": at_cap}
    row = Trial("text", arm, seed, 0.01).key | {"score": 2.0, "parameters": 100, "parameters_without_embeddings": 50}
    row |= {
        "forward": solves,
        "backward": solves,
        "cap": 33,
        "tokens": 640,
        "cpu_seconds": 3.0,
        "curve": [[1, 1.0, 2.0]],
    }
    return row | {"peak_memory_bytes": 2**20} | more


# Trials are run once, whatever happens.


def test_an_experiment_chooses_rates_then_measures_and_runs_nothing_twice(tmp_path: Path):
    findings = compare(EXPERIMENT, Settings(), tmp_path / "out", workers=2)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 8
    assert all(claim.holds for claim in findings.claims)
    told = measured(rows)
    assert {row["rate"] for row in told} == {0.1}  # the better of the two
    assert {row["seed"] for row in rows if row["stage"] == "choose"}.isdisjoint({row["seed"] for row in told})
    assert os.getpid() not in {row["process"] for row in rows}
    assert all(row["score"] == pytest.approx((row["seed"] + 1) * row["rate"] + 3) for row in rows)
    # A line that was cut short is a trial that is not done; the others are not run again.
    path = tmp_path / "out" / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    compare(EXPERIMENT, Settings(), tmp_path / "out", workers=1)
    again = rows_of(tmp_path / "out")
    assert again[:7] == rows[:7]
    assert Results(tmp_path / "out").rows == again
    assert {name: again[7][name] for name in again[7] if name != "process"} == {
        name: rows[7][name] for name in rows[7] if name != "process"
    }


def test_a_training_that_diverges_is_a_row_and_loses_the_choice(tmp_path: Path):
    settings = Settings(arms=("one", "diverges"), seeds=1)
    compare(EXPERIMENT, settings, tmp_path / "out", workers=1)
    rows = rows_of(tmp_path / "out")
    assert {row["arm"] for row in rows if FAILED in row} == {"diverges"}
    assert len(measured(rows)) == 2
    text = (tmp_path / "out" / "section.md").read_text()
    assert "of which 3 ended in nothing" in text
    assert "**does not hold**" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Made up &lt;b&gt;" in page
    assert "<b>" not in page
    assert "Scores &amp; such" in page
    assert "does not hold" in page


def test_a_fault_of_the_program_is_no_result(tmp_path: Path):
    with pytest.raises(RuntimeError, match="a fault of the program"):
        compare(EXPERIMENT, Settings(arms=("breaks",), seeds=1, rates=(0.1,)), tmp_path / "out", workers=1)
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path):
    marker = str(tmp_path / "m")
    program = (
        "from pathlib import Path\nfrom made_up_experiment import *\nfrom onelayer.experiments.running import compare\n"
        f"if __name__ == '__main__':\n    settings = Settings(arms=('waits',), rates=(0.1,), marker={marker!r})\n"
        f"    compare(EXPERIMENT, settings, Path({str(tmp_path / 'out')!r}), workers=2)\n"
    )
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "program.py")], env=environment, stderr=subprocess.PIPE)
    try:
        began = time.monotonic()
        while len(workers := [int(path.suffix[1:]) for path in tmp_path.glob("m.*")]) < 2:
            assert parent.poll() is None, parent.stderr.read() if parent.stderr else ""
            assert time.monotonic() - began < 120
            time.sleep(0.1)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
    began = time.monotonic()
    while any(map(runs, workers)):
        assert time.monotonic() - began < 60
        time.sleep(0.1)


def test_results_of_other_settings_and_folders_of_something_else_are_refused(tmp_path: Path):
    compare(EXPERIMENT, Settings(seeds=0, rates=(0.1,)), tmp_path / "out", workers=1)
    with pytest.raises(UsageError, match=r"other settings \(seeds\): name another folder by --out"):
        compare(EXPERIMENT, Settings(seeds=1, rates=(0.1,)), tmp_path / "out", workers=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="holds something else than results"):
        compare(EXPERIMENT, Settings(), tmp_path / "full")
    with pytest.raises(UsageError, match="holds no results"):
        Results(tmp_path / "nowhere")
    (tmp_path / "out" / "rows.jsonl").write_text("no json\n")
    with pytest.raises(UsageError, match="is damaged"):
        Results(tmp_path / "out")
    with pytest.raises(UsageError, match="workers must be at least 1, not -1"):
        compare(EXPERIMENT, Settings(), tmp_path / "new", workers=-1)


def test_a_preset_for_a_gpu_says_that_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["compare", "language", "--preset", "gpu", "--out", str(tmp_path / "out")]) == 2
    assert "for a GPU, and there is none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "There is no experiment 'nothing': choose one of"),
        (["language", "--preset", "big"], "There is no preset 'big': choose one of cpu, gpu, tiny"),
        (["blocks", "--data", "book.txt"], "--data is for the experiment language"),
        (["language", "--data", "nowhere.txt"], "There is no text nowhere.txt"),
        (["language", "--data", "a/book.txt", "b/book.txt"], "have the same name"),
        (["language", "--workers", "none"], "--workers"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_sentence(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("onelayer: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_an_experiment_all_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["compare"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(EXPERIMENTS)


def test_what_takes_long_to_load_of_scipy_is_not_loaded():
    loaded = "import sys, onelayer.cli; print('scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "False\n"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=20))
def test_rank_correlations_are_those_of_scipy(pairs: list[tuple[int, int]]):
    one, other = ([float(pair[k]) for pair in pairs] for k in (0, 1))
    if len(set(one)) > 1 and len(set(other)) > 1:
        assert rank_correlation(one, other) == pytest.approx(float(stats.spearmanr(one, other)[0]))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_its_presets_and_plans_without_rows(name: str):
    experiment = EXPERIMENTS[name]
    assert set(experiment.presets) == {"cpu", "gpu", "tiny"}
    assert experiment.presets["gpu"].device == "cuda"
    assert experiment.sceptic
    for preset in experiment.presets.values():
        trials = experiment.plan(preset, [])
        assert trials
        assert len({json.dumps(trial.key) for trial in trials}) == len(trials)
        assert all(trial.units >= 1 for trial in trials)
    nothing = experiment.tell(experiment.presets["tiny"], [])
    assert not nothing.tables
    assert not nothing.claims
    assert not nothing.drawings


# Figures are what they say.


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=8))
def test_paired_intervals_are_those_of_scipy(pairs: list[tuple[float, float]]):
    rows = [
        {"task": "t", "stage": "measure", "seed": seed, "arm": arm, "score": value}
        for seed, pair in enumerate(pairs)
        for arm, value in zip(("one", "two"), pair, strict=True)
    ]
    rows += [{"task": "t", "stage": "choose", "seed": 0, "arm": "one", "score": 1e6}]
    rows += [{"task": "t", "stage": "measure", "seed": 99, "arm": "one", "score": 1e6}]  # a seed without its pair
    found = paired(rows, "t", "two", "one")
    assert found is not None
    assert found.pairs == len(pairs)
    one, two = zip(*pairs, strict=True)
    if len({b - a for a, b in pairs}) > 1:
        wanted = stats.ttest_rel(two, one).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert found.mean == pytest.approx(sum(two) / len(two) - sum(one) / len(one), abs=1e-9)
    assert paired(rows, "t", "two", "three") is None


def test_a_pair_alone_has_no_interval_and_a_diverged_one_no_mean():
    rows = [made_up_row("one"), made_up_row("two", score=2.5)]
    assert str(paired(rows, "text", "two", "one")) == "+0.500 (one pair)"
    failed = [made_up_row("one"), Trial("text", "two", 0, 0.01).key | {FAILED: "diverged"}]
    found = paired(failed, "text", "two", "one")
    assert found is not None
    assert math.isnan(found.mean)
    assert not found.low > 0
    assert not found.high < 0


def test_a_rate_at_which_training_diverged_is_not_chosen():
    rows = [
        Trial("t", "a", 1000, rate, "choose").key | more for rate, more in ((0.1, {"score": 9.0}), (0.3, {FAILED: ""}))
    ]
    assert best_rate(rows, "t", "a", (0.1, 0.3)) == 0.1
    assert best_rate(rows, "t", "a", (0.1, 0.3, 0.5)) is None
    assert best_rate([], "t", "a", (0.5,)) == 0.5


def test_tasks_that_share_a_choice_of_rates_try_them_once():
    trials = with_chosen_rates([], ["a", "b"], ["one"], 2, (0.1, 0.3), 5, choose_on=["a", "a"])
    assert [(trial.task, trial.rate, trial.stage) for trial in trials] == [("a", 0.1, "choose"), ("a", 0.3, "choose")]
    rows = [trial.key | {"score": trial.rate} for trial in trials]
    told = [
        t for t in with_chosen_rates(rows, ["a", "b"], ["one"], 2, (0.1, 0.3), 5, ["a", "a"]) if t.stage == "measure"
    ]
    assert [(t.task, t.seed, t.rate) for t in told] == [("a", 0, 0.1), ("a", 1, 0.1), ("b", 0, 0.1), ("b", 1, 0.1)]


def test_a_run_that_is_cut_off_has_compared_the_arms_of_the_first_seed(tmp_path: Path):
    compare(EXPERIMENT, Settings(rates=(0.1,)), tmp_path / "out", workers=1)
    order = [(row["seed"], row["arm"]) for row in rows_of(tmp_path / "out")]
    assert order == [(0, "one"), (0, "two"), (1, "one"), (1, "two")]


def test_arms_that_take_the_rate_of_another_wait_for_its_choice():
    rows = [{"task": "t", "arm": "one", "stage": "choose", "rate": 0.1, "score": 2.0}]
    assert with_rate_of(rows, "t", "one", ["long"], 2, (0.1, 0.3), 80) == []
    rows.append(rows[0] | {"rate": 0.3, "score": 1.0})
    told = with_rate_of(rows, "t", "one", ["long"], 2, (0.1, 0.3), 80)
    assert told == [Trial("t", "long", seed, 0.3, units=80) for seed in (0, 1)]


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([32, 64, 128]),
    st.sampled_from([2, 4]),
    st.sampled_from([2, 4, 6]),
    st.sampled_from(["post", "subtracted"]),
)
def test_the_four_arms_have_as_many_parameters_and_one_block(width: int, heads: int, layers: int, block: str):
    arms = twins(ModelConfig(width=width, heads=heads, block=block), layers)  # pyright: ignore[reportArgumentType]
    assert list(arms) == ["equilibrium", "explicit 1", f"explicit {layers}", f"tied {layers}"]
    counts = {name: parameters(arm) for name, arm in arms.items()}
    wanted = counts["equilibrium"]
    assert counts["explicit 1"] == counts[f"tied {layers}"] == wanted
    assert abs(counts[f"explicit {layers}"] / wanted - 1) < (0.05 if width > 32 else 0.12)  # widths come by steps
    assert {arm.block for arm in arms.values()} == {block}
    assert [arm.slots for arm in arms.values()] == [1, 1, layers, layers]


def test_the_peak_is_of_tensors_held_at_once():
    million = 4 * 2**20

    def after_each_other() -> None:
        for _ in range(5):
            torch.zeros(2**20)

    assert peak_bytes(after_each_other) == million
    kept: list[torch.Tensor] = []
    assert peak_bytes(lambda: kept.extend(torch.zeros(2**20) for _ in range(5))) == 5 * million


def test_more_than_five_percent_at_the_cap_is_a_network_of_fixed_depth():
    assert not is_cut_off([made_up_row("equilibrium", at_cap=0.05)])
    assert is_cut_off([made_up_row("equilibrium", at_cap=0.0), made_up_row("equilibrium", 1, at_cap=0.11)])
    scored = {
        "scored": {"evaluations": {"mean": 9.0, "p95": 9.0, "at_cap": 0.2}, "residual": {"median": 1e-3, "p95": 1e-3}}
    }
    assert is_cut_off([made_up_row("equilibrium") | scored])
    rows = [made_up_row("equilibrium", at_cap=0.5), made_up_row("explicit 1")]
    names = [row[1] for row in cost_table(rows, ["equilibrium", "explicit 1"]).rows]
    assert names == ["equilibrium, a 32-step network", "explicit 1"]
    assert scored_solves([None, None]) == {}


def test_the_trainer_of_experiments_is_that_of_onelayer_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ticks = itertools.count()
    monkeypatch.setattr(learning, "clock", lambda device: next(ticks))
    (tmp_path / "text.txt").write_text("one layer is all you need, " * 200)
    corpus = prepare(str(tmp_path / "text.txt"), tmp_path / "tokens")
    training = TrainingConfig(steps=6, batch_size=4, warmup_steps=2, unrolled_steps=2, validate_every=2, seed=3)
    config = RunConfig("compare", None, ModelConfig(width=16, heads=2, context=16), training)
    learner = start(config, Processes(torch.device("cpu")))
    wanted = [update(learner, corpus, step) for step in range(6)]
    torch.manual_seed(3)
    model = LanguageModel(config.model)
    seen: list[bool] = []

    def score(model: LanguageModel) -> dict:
        seen.append(model.training or torch.is_grad_enabled())
        return {"score": float(model.embedding.weight.norm())}

    units: list[int] = []
    row = learn(
        model,
        config,
        lambda step: batches.batch(corpus.train, step, 4, 16, seed=3),
        score,
        units.append,
        torch.from_numpy(corpus.tokenizer.lengths),
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, learner.model.state_dict()[name]), name
    assert row["forward"]["mean"] == wanted[-1]["evaluations_forward"]
    assert row["backward"]["mean"] == wanted[-1]["evaluations_backward"]
    assert row["forward"]["at_cap"] == wanted[-1]["share_at_cap"]
    assert [point[:2] for point in row["curve"]] == [(2, 2), (4, 4), (6, 6)]
    assert row["cpu_seconds"] == 6
    assert row["score"] == row["curve"][-1][2]
    assert row["tokens"] == 6 * 4 * 16
    assert sum(units) == 6
    assert not any(seen)
    assert row["peak_memory_bytes"] > 0
    assert all(parameter.grad is None for parameter in model.parameters())


# What is told.


def test_pages_tell_the_claims_and_the_plain_text_too():
    findings = made_up.tell(Settings(), [made_up_row("one")])
    assert verdict(findings) == "Of 1 things asked, 1 did not hold."
    assert "DOES NOT HOLD: 4 rows. Measured: 1." in plain(findings)


def test_bands_of_curves_reach_from_the_lowest_seed_to_the_highest():
    rows = [made_up_row("one", seed, curve=[[1, 1.0, 2.0 + seed], [2, 2.0, 1.0 + seed]]) for seed in (0, 1)]
    rows.append(Trial("text", "two", 0, 0.01).key | {FAILED: "diverged"})
    figure = curves(
        rows, ["text", "none"], ["one", "two"], lambda row: [(p[0], p[2]) for p in row["curve"]], ("x", "y")
    )
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[1.0, 2.5], [2.0, 1.5]]  # pyright: ignore[reportOptionalMemberAccess,reportAttributeAccessIssue]
    band = axes.collections[0].get_paths()[0].vertices
    assert (band.min(), band.max()) == (1.0, 3.0)  # pyright: ignore[reportAttributeAccessIssue]
    assert curves([], ["text"], ["one"], lambda row: [], ("x", "y")) is None


def test_the_language_models_run_and_their_claims_follow_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = tmp_path / "book.txt"
    text.write_text("one layer is all you need, " * 400)
    folder = tmp_path / "out"
    arguments = ["compare", "language", "--preset", "tiny", "--data", str(text), "--out", str(folder), "--workers", "1"]
    code = main(arguments)
    rows = rows_of(folder)
    assert len(rows) == 2 * 4 * 2 + 2
    assert {row["task"] for row in rows} == {"python", "book"}
    assert len({row["corpus"] for row in rows}) == 2
    out = capsys.readouterr().out
    assert "explicit 2" in out
    assert (code == 1) == ("DOES NOT HOLD" in out)
    for name in ("updates", "time"):
        assert (folder / f"{name}.svg").read_text().startswith("<svg")
        assert "var(--" not in (folder / f"{name}.svg").read_text()
    preset = replace(language.EXPERIMENT.presets["tiny"], texts=(str(text),))
    findings = language.tell(preset, rows)
    assert section(language.EXPERIMENT, preset, Results(folder), findings, "c") in (
        folder / "section.md"
    ).read_text().replace("onelayer " + " ".join(arguments), "c")
    for gap, holds in ((0.3, [True, True]), (-0.3, [False, False])):
        made = [
            made_up_row(
                arm,
                seed,
                score=2 + {"explicit 1": gap, "tied 2": 0.01 if gap > 0 else -0.03}.get(arm, 0) + 0.001 * seed,
            )
            | {"task": "python"}
            for arm in ("equilibrium", "explicit 1", "tied 2")
            for seed in range(3)
        ]
        assert [claim.holds for claim in language.tell(replace(preset, texts=()), made).claims][:2] == holds


def test_the_table_of_changes_says_what_can_be_told_from_noise():
    def rows(shift: float, noise: float) -> list[dict]:
        own = [made_up_row("equilibrium", seed) for seed in range(3)]
        other = [made_up_row("Jacobian 1", seed, score=2 + shift + noise * (seed - 1)) for seed in range(3)]
        return [row | {"task": "python"} for row in [*own, *other]]

    preset = blocks.EXPERIMENT.presets["tiny"]
    for shift, noise, said in ((-0.1, 0.001, "better"), (0.1, 0.001, "worse"), (0.01, 0.1, "no difference")):
        table = blocks.tell(preset, rows(shift, noise)).tables[0]
        (told,) = table.rows
        assert told[0] == "Jacobian 1"
        assert told[-1].startswith(said)


def test_spreads_are_told_with_their_mean():
    assert spread([]) == "-"
    assert spread([1.0, 3.0], 1) == "2.0 ± 1.4"
