"""The command line: onelayer tokenize | train | generate | evaluate | prove."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, get_args

# Read when torch is loaded, so it stands above the imports. By default threads spin for long while they wait for each
# other, which makes a training step several times slower on cores that something else uses too (docs/log.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from onelayer import corpora, runs, tokenizer
from onelayer.errors import UsageError
from onelayer.evaluation import Measurement, measure
from onelayer.generation import decode, generate
from onelayer.models.configuration import Depth
from onelayer.presets import PRESETS, Device, Precision, changed, preset
from onelayer.proofs import NETWORKS, STACKS, prove
from onelayer.training import train

# Options of `train` that set the value of that name in the configuration: name, type, help.
SETTINGS: tuple[tuple[str, type, str], ...] = (
    ("steps", int, "updates of the weights"),
    ("seed", int, "seed of the weights and of the order of the text"),
    ("layers", int, "layers of the untied and tied models"),
    ("width", int, "entries of a token's state"),
    ("heads", int, "attention heads"),
    ("context", int, "bytes that the model sees at once"),
    ("batch_size", int, "windows of text in an update"),
    ("learning_rate", float, "peak of the learning rate"),
    ("max_steps", int, "evaluations of the block allowed to a solve in training"),
    ("rtol", float, "relative residual at which a solve is done"),
    ("save_every", int, "updates between saves"),
)

DATA = "a file or folder of text, hf:owner/name of Hugging Face, or a folder made by onelayer tokenize"


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
        options = _parser().parse_args(arguments)
        options.command = shlex.join(["onelayer", *arguments])
        code = options.act(options)
        sys.stdout.flush()
        return code or 0
    except UsageError as error:
        print(f"onelayer: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("onelayer: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="onelayer", description="Language models whose whole depth is the equilibrium of one layer.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("tokenize", help="turn text into tokens once, for many runs to train on")
    command.set_defaults(act=_tokenize)
    command.add_argument("--data", metavar="PATH", help=f"{DATA}; Python's own source by default")
    command.add_argument("--out", required=True, metavar="FOLDER", help="where the tokens go; give it as --data then")
    tokens = command.add_mutually_exclusive_group()
    tokens.add_argument("--vocabulary", type=int, metavar="N", help="learn so many byte pairs; 256, bytes, by default")
    tokens.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json of a byte-level BPE")

    command = commands.add_parser("train", help="train a model, evaluate it, write a report")
    command.set_defaults(act=_train)
    command.add_argument("--preset", help=f"{', '.join(PRESETS)}; small where none is given")
    command.add_argument("--data", metavar="PATH", help=f"{DATA}; Python's own source by default")
    command.add_argument("--run", metavar="FOLDER", help="where to write; runs/<date>-<preset> by default")
    command.add_argument("--resume", metavar="RUN", help="go on with an interrupted run, as it was configured")
    command.add_argument("--model", dest="depth", help=f"one of {', '.join(get_args(Depth))}")
    command.add_argument("--device", help=f"one of {', '.join(get_args(Device))}")
    command.add_argument("--precision", help=f"one of {', '.join(get_args(Precision))}")
    for name, kind, description in SETTINGS:
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=description)

    command = commands.add_parser("generate", help="draw text from a trained model")
    command.set_defaults(act=_generate)
    command.add_argument("run", metavar="RUN", help="a run folder")
    command.add_argument("--prompt", required=True, metavar="TEXT", help="what the text starts with")
    command.add_argument("--bytes", type=int, default=200, metavar="N", help="bytes to draw; 200 by default")
    command.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest byte")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same text")

    command = commands.add_parser("evaluate", help="measure a trained model on validation text")
    command.set_defaults(act=_evaluate)
    command.add_argument("run", metavar="RUN", help="a run folder")
    command.add_argument("--data", metavar="PATH", help=f"{DATA}; that of the run by default")
    command.add_argument("--max-steps", type=int, metavar="N", help="evaluations of the block allowed to a solve")

    command = commands.add_parser("prove", help="show that one layer is all you need, and what that does not say")
    command.set_defaults(act=_prove)
    command.add_argument("--out", metavar="FOLDER", help="where to write; runs/<date>-prove by default")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and inputs; 0 by default")
    return parser


def _train(options: argparse.Namespace) -> None:
    names = ["depth", "device", "precision", *(name for name, _, _ in SETTINGS)]
    values: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    data = None if options.data is None else corpora.resolved(options.data)
    if options.resume is None:
        name = "small" if options.preset is None else options.preset
        config = changed(preset(name), values, data)
        run = Path("runs", f"{datetime.now():%Y-%m-%d-%H%M%S}-{name}") if options.run is None else Path(options.run)
        evaluation = train(config, run, command=options.command)
    else:
        values |= {name: getattr(options, name) for name in ("preset", "run") if getattr(options, name) is not None}
        if values:
            option = "model" if "depth" in values else next(iter(values)).replace("_", "-")
            raise UsageError(f"A resumed run keeps its configuration: leave out --{option}, or start a new run.")
        run = Path(options.resume)
        config, _ = runs.read_config(run)
        evaluation = train(changed(config, {}, config.data if data is None else data), run, resume=True)
    _print_evaluation(evaluation)
    print(f"report: {run / 'report.html'}")


def _generate(options: argparse.Namespace) -> None:
    model, _ = runs.load_model(Path(options.run))
    prompt = options.prompt.encode("utf-8", "surrogateescape")
    drawn = generate(model, prompt, options.bytes, options.temperature, options.seed)
    print(prompt.decode("utf-8", "replace"), end="")
    for text in decode(drawn):
        print(text, end="", flush=True)
    print()


def _evaluate(options: argparse.Namespace) -> None:
    if options.max_steps is not None and options.max_steps < 1:
        raise UsageError(f"--max-steps must be at least 1, not {options.max_steps}.")
    model, config = runs.load_model(Path(options.run))
    corpus = runs.read_corpus(Path(options.run))
    with tempfile.TemporaryDirectory() as folder:
        if options.data is not None:
            corpus = corpora.prepare(options.data, Path(folder, "tokens"), tokenizer=corpus.tokenizer)
        corpora.require(corpus, config.model)
        windows = config.training.evaluation_windows
        inputs, targets = corpora.validation_windows(corpus.validation, config.model.context, windows)
        print(corpus.describe())
    _print_measurement(measure(model, config, inputs, targets, options.max_steps))


def _tokenize(options: argparse.Namespace) -> None:
    of_these = None if options.tokenizer is None else tokenizer.read(options.tokenizer)
    corpus = corpora.prepare(options.data, options.out, options.vocabulary, of_these)
    if corpus.folder != Path(options.out):
        raise UsageError(f"{options.data} holds tokens already: train on it as it is, or give the text itself.")
    print(f"{corpus.describe()}\ntokens: {corpus.folder}")


def _prove(options: argparse.Namespace) -> int:
    folder = Path("runs", f"{datetime.now():%Y-%m-%d-%H%M%S}-prove") if options.out is None else Path(options.out)
    record = prove(folder, options.seed, NETWORKS, STACKS, options.command)
    print(f"page: {folder / 'proof.html'}")
    return 0 if record.holds else 1


def _print_measurement(found: Measurement) -> None:
    print(f"bits per byte    {found.bits_per_byte:.3f}")
    if found.residual is not None and found.steps is not None and found.share_at_cap is not None:
        median, p95 = float(found.residual.median()), float(found.residual.quantile(0.95))
        print(f"residual         {median:.1e} median, {p95:.1e} 95th percentile")
        print(f"evaluations      {found.steps.float().mean():.1f} on average, {int(found.steps.max())} at most")
        print(f"solves at cap    {found.share_at_cap:.1%}")


def _print_evaluation(found: dict[str, Any]) -> None:
    orders = ", ".join(f"{bits:.3f} of order {order}" for order, bits in found["ngrams"].items())
    print(
        f"bits per byte    {found['bits_per_byte']:.3f} on validation text (byte models, of at most 32 MiB: {orders})"
    )
    if found["residual"] is not None:
        allowed = {row["max_steps"]: row["bits_per_byte"] for row in found["by_allowed_evaluations"]}
        print(f"residual         {found['residual']:.1e} median, {found['residual_p95']:.1e} 95th percentile")
        print(f"evaluations      {found['evaluations']['mean']:.1f} on average")
        print(f"solves at cap    {found['share_at_cap']:.1%}")
        print(f"allowed 1, 2, 4  {', '.join(f'{allowed[n]:.3f}' for n in (1, 2, 4) if n in allowed)} bits per byte")


if __name__ == "__main__":
    sys.exit(main())
