"""`onelayer tokenize`: a text as tokens, once, for many runs to train on."""

from __future__ import annotations

import argparse
from pathlib import Path

from onelayer import corpora
from onelayer.cli.data import DATA
from onelayer.corpora import tokenizer
from onelayer.errors import UsageError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of the command."""
    command = commands.add_parser("tokenize", help="turn text into tokens once, for many runs to train on")
    command.set_defaults(act=_run)
    command.add_argument("--data", metavar="PATH", help=f"{DATA}; Python's own source by default")
    command.add_argument("--out", required=True, metavar="FOLDER", help="where the tokens go; give it as --data then")
    tokens = command.add_mutually_exclusive_group()
    tokens.add_argument("--vocabulary", type=int, metavar="N", help="learn so many byte pairs; 256, bytes, by default")
    tokens.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json of a byte-level BPE")


def _run(options: argparse.Namespace) -> None:
    of_these = None if options.tokenizer is None else tokenizer.read(options.tokenizer)
    corpus = corpora.prepare(options.data, options.out, options.vocabulary, of_these)
    if corpus.folder != Path(options.out):
        raise UsageError(f"{options.data} holds tokens already: train on it as it is, or give the text itself.")
    print(f"{corpus.describe()}\ntokens: {corpus.folder}")
