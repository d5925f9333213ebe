"""`onelayer doctor`: what is wrong with a trained model's equilibrium, or with a cell of one's own, and what to do."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import torch

import equilibria as eq
from onelayer import corpora, runs
from onelayer.errors import UsageError
from onelayer.files import check_target, written
from onelayer.quality import spread

try:
    from equilibria.diagnosis.picture import plot_diagnosis
    from onelayer.report.compute import check_plot
except ImportError as error:
    if "matplotlib" not in str(error):
        raise

    def check_plot(path: Path) -> None:
        raise UsageError("--plot needs matplotlib: install equilibria[viz], or leave it out.")

    def plot_diagnosis(diagnosis: eq.Diagnosis) -> Any:
        raise UsageError("--plot needs matplotlib: install equilibria[viz], or leave it out.")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of the command."""
    command = commands.add_parser("doctor", help="say what is wrong with an equilibrium, and what to do")
    command.set_defaults(act=_run)
    command.add_argument(
        "subject",
        metavar="RUN|FILE.py",
        help="a run folder of an equilibrium model; or a Python file whose function `example()` returns a cell, or an "
        "eq.DEQ, and its inputs: (cell, x, ...)",
    )
    command.add_argument("--windows", type=int, default=4, metavar="N", help="of validation text, for a run")
    command.add_argument("--plot", metavar="FILE", help="draw the picture: .png, .svg or .pdf")
    command.add_argument("--json", metavar="FILE", help="write the findings there too")


def _run(options: argparse.Namespace) -> int:
    if options.windows < 2:
        raise UsageError(f"--windows must be at least 2, so that coupling can be told, not {options.windows}.")
    if options.plot is not None:
        check_plot(Path(options.plot))
    if options.json is not None:
        check_target(Path(options.json))
    subject = Path(options.subject)
    cell, inputs, z0 = _of_file(subject) if subject.suffix == ".py" else _of_run(subject, options.windows)
    try:
        diagnosis = eq.doctor(cell, *inputs, z0=z0)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(diagnosis)
    if options.plot is not None:
        with written(Path(options.plot), "make room on the disk"):
            plot_diagnosis(diagnosis).savefig(options.plot, dpi=100)
    if options.json is not None:
        found = [{"cause": f.cause.name, "detail": f.detail, "samples": f.samples} for f in diagnosis.findings]
        report = {"subject": options.subject, "healthy": diagnosis.healthy, "findings": found}
        with written(Path(options.json), "make room on the disk"):
            runs.write_json(Path(options.json), report)
    return 0 if diagnosis.healthy else 1


def _of_file(path: Path) -> tuple[Any, tuple[Any, ...], Any]:
    if not path.is_file():
        raise UsageError(f"There is no file {path}.")
    try:
        names = runpy.run_path(str(path), run_name="onelayer_doctor")
        example = names.get("example")
        made = None if example is None else example()
    except Exception as error:
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    if not isinstance(made, tuple) or not made or not callable(made[0]):
        raise UsageError(f"{path} must have a function example() that returns a tuple: a cell and its inputs.")
    return made[0], made[1:], None


def _of_run(path: Path, count: int) -> tuple[Any, tuple[Any, ...], Any]:
    model, config = runs.load_model(path)
    if model.depth.layer is None:
        raise UsageError(f"doctor is for equilibrium models, and {path} is {model.config.depth}.")
    corpus = runs.read_corpus(path)
    corpora.require(corpus, config.model)
    batch = next(spread(corpus.validation, config.model.context, count).batches(count, config.model.memory))
    calls: list[tuple[Any, ...]] = []
    hook = model.depth.block.register_forward_pre_hook(lambda block, inputs: calls.append(inputs))
    with torch.no_grad():
        model(batch.inputs.to(next(model.parameters()).device), max_steps=1)
    hook.remove()
    z0, *inputs = calls[0]
    return model.depth.layer, tuple(inputs), z0
