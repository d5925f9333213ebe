"""`onelayer prove`: the constructions, measured on the spot."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

from onelayer.proofs import NETWORKS, STACKS, prove


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of the command."""
    command = commands.add_parser("prove", help="show that one layer is all you need, and what that does not say")
    command.set_defaults(act=_run)
    command.add_argument("--out", metavar="FOLDER", help="where to write; runs/<date>-prove by default")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and inputs; 0 by default")


def _run(options: argparse.Namespace) -> int:
    folder = Path("runs", f"{datetime.now():%Y-%m-%d-%H%M%S}-prove") if options.out is None else Path(options.out)
    record = prove(folder, options.seed, NETWORKS, STACKS, options.command)
    print(f"page: {folder / 'proof.html'}")
    return 0 if record.holds else 1
