"""The command line: onelayer tokenize | train | generate | evaluate | prove | compare | doctor, a module each."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

# Read when torch is loaded, so it stands above the imports. By default threads spin for long while they wait for each
# other, which makes a training step several times slower on cores that something else uses too (docs/log.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from onelayer.cli import compare, doctor, evaluate, generate, prove, tokenize, train
from onelayer.errors import UsageError

# Seconds that other processes of a machine wait with what they have to say: torchrun stops all of them when the first,
# which mostly says the same, has ended.
_PATIENCE = 20


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[0].upper()}{message[1:]}: see {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    >>> main(["generate", "nowhere", "--prompt", "def "])                       # prints why on stderr
    2

    Args:
        argv: the arguments after the program's name; `None` for those of the process.

    Returns:
        The exit code: 0, or 1 for a claim that did not hold, or 2 for what the user can mend, or 130 for an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parser().parse_args(arguments)
        options.command = shlex.join(["onelayer", *arguments])
        code = options.act(options)
        sys.stdout.flush()
        return code or 0
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_PATIENCE)
        print(f"onelayer: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("onelayer: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of the command line, which raises `UsageError` for what it does not understand.

    >>> parser().parse_args(["evaluate", "runs/first", "--max-steps", "4", "8"]).max_steps
    [4, 8]
    """
    whole = _Parser(prog="onelayer", description="Language models whose whole depth is the equilibrium of one layer.")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for command in (tokenize, train, generate, evaluate, prove, compare, doctor):
        command.add(commands)
    return whole
