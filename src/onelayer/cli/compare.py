"""`onelayer compare`: equilibrium models beside explicit ones, measured."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from onelayer.errors import UsageError

try:
    from onelayer.experiments import EXPERIMENTS, compare
    from onelayer.experiments.language import OWN
    from onelayer.experiments.page import plain
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("scipy", "matplotlib"):
        raise
    EXPERIMENTS = {}
    compare = plain = None
    OWN = ""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of the command."""
    command = commands.add_parser(
        "compare",
        help="measure equilibrium models beside explicit ones",
        description="Without an experiment it lists them.",
        epilog="A command that is given again goes on where it stopped.",
    )
    command.set_defaults(act=_run)
    command.add_argument("experiment", nargs="?", metavar="EXPERIMENT", help="what to measure")
    command.add_argument("--preset", default="cpu", metavar="NAME", help="cpu, gpu or tiny; cpu by default")
    command.add_argument(
        "--out", metavar="FOLDER", help="where results are kept, and found again; runs/compare/EXPERIMENT by default"
    )
    command.add_argument(
        "--data", nargs="+", default=[], metavar="FILE", help="for language: texts to learn beside Python's own source"
    )
    command.add_argument("--workers", type=int, metavar="N", help="trials at a time; one a core by default")


def _run(options: argparse.Namespace) -> int:
    if compare is None or plain is None:
        raise UsageError("onelayer compare needs SciPy and matplotlib: install equilibria[compare].")
    if options.experiment is None:
        for experiment in EXPERIMENTS.values():
            minutes = experiment.presets["cpu"].minutes
            print(f"{experiment.name:10} {experiment.title} (about {minutes} min on two cores)")
        return 0
    if options.experiment not in EXPERIMENTS:
        raise UsageError(f"There is no experiment {options.experiment!r}: choose one of {', '.join(EXPERIMENTS)}.")
    experiment = EXPERIMENTS[options.experiment]
    if options.preset not in experiment.presets:
        raise UsageError(f"There is no preset {options.preset!r}: choose one of {', '.join(experiment.presets)}.")
    settings = experiment.presets[options.preset]
    if options.data:
        if not hasattr(settings, "texts"):
            raise UsageError("--data is for the experiment language: leave it out.")
        names = [Path(text).stem for text in options.data]
        if len({OWN, *names}) <= len(names):
            raise UsageError(
                f"Texts have the same name ({', '.join([OWN, *names])}), and results go by it: rename one."
            )
        for text in options.data:
            if not Path(text).exists():
                raise UsageError(f"There is no text {text}: give the path of a file or folder.")
        settings = replace(settings, texts=tuple(options.data))
    folder = Path(options.out or Path("runs", "compare", f"{experiment.name}-{options.preset}"))
    print(f"{experiment.question}\nAbout {settings.minutes} minutes on the machine that it is meant for; {folder}")
    findings = compare(experiment, settings, folder, options.workers, options.command)
    print(f"\n{plain(findings)}\npage: {folder / 'report.html'}")
    return 0 if all(claim.holds for claim in findings.claims) else 1
