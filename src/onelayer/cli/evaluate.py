"""`onelayer evaluate`: how well a trained model predicts a text, at any number of allowed evaluations."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from onelayer import corpora, runs
from onelayer.cli.data import DATA
from onelayer.corpora.token_files import Tokens
from onelayer.errors import UsageError
from onelayer.files import check_target, written
from onelayer.presets import RunConfig
from onelayer.quality import Quality, Windows, doubling, score, spread, strided
from onelayer.report.tables import cap_note, lines, table

try:
    from onelayer.report.compute import check_plot, plot_compute
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "matplotlib":
        raise

    def check_plot(path: Path) -> None:
        raise UsageError("--plot needs matplotlib: install equilibria[viz], or leave it out.")

    def plot_compute(found: Sequence[Quality], path: Path) -> None:
        check_plot(path)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of the command."""
    command = commands.add_parser("evaluate", help="measure a trained model on validation text")
    command.set_defaults(act=_run)
    command.add_argument("run", metavar="RUN", help="a run folder")
    command.add_argument("--data", metavar="PATH", help=f"{DATA}; that of the run by default")
    command.add_argument(
        "--max-steps", type=int, nargs="+", default=[], metavar="N", help="evaluations allowed to a solve, one or more"
    )
    command.add_argument(
        "--stride",
        type=int,
        metavar="S",
        help="score every token of the text once, by windows that advance by so many; by default some windows of it",
    )
    command.add_argument("--tokens", type=int, metavar="N", help="with --stride: score the first N only")
    command.add_argument("--plot", metavar="FILE", help="draw allowed evaluations against quality: .png, .svg or .pdf")
    command.add_argument("--json", metavar="FILE", help="write the figures there too")


def _run(options: argparse.Namespace) -> None:
    for steps in options.max_steps:
        if steps < 1:
            raise UsageError(f"--max-steps must be at least 1, not {steps}.")
    if options.tokens is not None and options.stride is None:
        raise UsageError("--tokens needs --stride, which scores tokens in their order: give both.")
    if options.json is not None:
        check_target(Path(options.json))
    model, config = runs.load_model(Path(options.run))
    allowed = tuple(options.max_steps)
    if options.plot is not None:
        if not model.is_equilibrium:
            raise UsageError(
                f"--plot is for equilibrium models, and {options.run} is {model.config.depth}: leave it out."
            )
        check_plot(Path(options.plot))
        allowed = allowed or doubling(model.config.eval_max_steps)
    corpus = runs.read_corpus(Path(options.run))
    with tempfile.TemporaryDirectory() as folder:
        if options.data is not None:
            corpus = corpora.prepare(options.data, Path(folder, "tokens"), tokenizer=corpus.tokenizer)
        corpora.require(corpus, config.model)
        windows = _windows(corpus.validation, config, options)
        print(corpus.describe())
        found = score(model, config, windows, corpus.tokenizer.lengths, allowed)
    print(table(found) if len(found) > 1 else lines(found[0]))
    note = cap_note(found)
    if note is not None:
        print(note)
    if options.json is not None:
        rows = [asdict(quality) for quality in found]
        values = {"run": str(options.run), "data": corpus.name, "context": config.model.context}
        with written(Path(options.json), "make room on the disk"):
            runs.write_json(Path(options.json), values | {"stride": options.stride, "rows": rows})
    if options.plot is not None:
        plot_compute(found, Path(options.plot))


def _windows(text: Tokens, config: RunConfig, options: argparse.Namespace) -> Windows:
    if options.stride is None:
        return spread(text, config.model.context, config.training.evaluation_windows)
    return strided(text, config.model.context, options.stride, options.tokens)
