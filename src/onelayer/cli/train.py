"""`onelayer train`: a run, from nothing or from where it stopped, on one process or on those of `torchrun`."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from onelayer import corpora, runs
from onelayer.cli.data import DATA
from onelayer.corpora.prepared import is_prepared, open_tokens
from onelayer.errors import UsageError
from onelayer.models.configuration import Architecture, Depth, Form, Positions
from onelayer.parallel import Parallel
from onelayer.presets import PRESETS, Device, Precision, changed, preset
from onelayer.report.record import CAP_LIMIT
from onelayer.training import train

# Options that choose, set or switch on the value of that name in the configuration.
CHOICES: tuple[tuple[str, Any, str], ...] = (
    ("architecture", Architecture, "the block"),
    ("depth", Depth, "its depth"),
    ("block", Form, "form of the Transformer block"),
    ("positions", Positions, "of the Transformer"),
    ("device", Device, "where to train"),
    ("precision", Precision, "of the products"),
)
SWITCHES = {
    "own_unembedding": "read logits off by a matrix of their own",
    "weight_norm": "write matrices as direction and size",
    "warm_start": "start solves at a learnt guess for each token",
}

# Options that set the value of that name in the configuration: name, type, help.
SETTINGS: tuple[tuple[str, type, str], ...] = (
    ("steps", int, "updates of the weights"),
    ("seed", int, "seed of the weights and of the order of the text"),
    ("layers", int, "layers of the untied and tied models"),
    ("width", int, "entries of a token's state"),
    ("heads", int, "attention heads"),
    ("context", int, "tokens of a window"),
    ("vocabulary", int, "tokens; 256, bytes, by default; more are byte pairs learned from the text"),
    ("kernel", int, "tokens that the TrellisNet's convolution spans"),
    ("memory", int, "tokens of the segment before that a window looks back at; 0 by default"),
    ("dropout", float, "share of entries zeroed, the same for a window and a solve; 0 by default"),
    ("jacobian_weight", float, "weight of the Jacobian's size in the loss; 0 by default"),
    ("jacobian_share", float, "share of the updates that it is applied in"),
    ("batch_size", int, "windows of text in an update, those of all processes together"),
    ("accumulate", int, "parts in which each process takes its share, to hold less at once; 1 by default"),
    ("learning_rate", float, "peak of the learning rate"),
    ("warmup_steps", int, "updates over which it rises"),
    ("gradient_clip", float, "largest norm of the gradient"),
    ("unrolled_steps", int, "first updates, through plain applications of the block"),
    ("max_steps", int, "evaluations of the block allowed to a solve in training"),
    ("rtol", float, "relative residual at which a solve is done"),
    ("save_every", int, "updates between saves"),
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of the command."""
    command = commands.add_parser("train", help="train a model, evaluate it, write a report")
    command.set_defaults(act=_run)
    command.add_argument("--preset", help=f"{', '.join(PRESETS)}; small where none is given")
    command.add_argument("--data", metavar="PATH", help=f"{DATA}; Python's own source by default")
    # torchrun takes --run for an abbreviation of its own, so there is a second name.
    command.add_argument(
        "--run", "--out", metavar="FOLDER", help="where to write; runs/<date>-<preset> by default; --out under torchrun"
    )
    command.add_argument("--resume", metavar="RUN", help="go on with an interrupted run, as it was configured")
    for name, kind, description in CHOICES:
        spelled = "--model" if name == "depth" else f"--{name}"
        command.add_argument(spelled, dest=name, help=f"{description}: one of {', '.join(get_args(kind))}")
    for name, description in SWITCHES.items():
        command.add_argument(f"--{name.replace('_', '-')}", action="store_true", default=None, help=description)
    command.add_argument(
        "--cutoffs", type=int, nargs="+", metavar="N", help="tokens at which the clusters of an adaptive softmax begin"
    )
    command.add_argument(
        "--parallel", help=f"under torchrun, how processes share a batch: one of {', '.join(get_args(Parallel))}"
    )
    command.add_argument("--tensorboard", action="store_true", help="write the metrics for TensorBoard too")
    for name, kind, description in SETTINGS:
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=description)


def _run(options: argparse.Namespace) -> None:
    names = [*(name for name, _, _ in CHOICES), *SWITCHES, "cutoffs", *(name for name, _, _ in SETTINGS)]
    values: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    data = None if options.data is None else corpora.resolved(options.data)
    if options.resume is None:
        name = "small" if options.preset is None else options.preset
        if "vocabulary" not in values and data is not None and is_prepared(Path(data)):
            values["vocabulary"] = open_tokens(data).tokenizer.vocabulary
        config = changed(preset(name), values, data)
        run = Path("runs", f"{datetime.now():%Y-%m-%d-%H%M%S}-{name}") if options.run is None else Path(options.run)
        evaluation = train(config, run, False, options.command, options.parallel, options.tensorboard)
    else:
        values |= {name: getattr(options, name) for name in ("preset", "run") if getattr(options, name) is not None}
        if values:
            option = "model" if "depth" in values else next(iter(values)).replace("_", "-")
            raise UsageError(f"A resumed run keeps its configuration: leave out --{option}, or start a new run.")
        run = Path(options.resume)
        config, _ = runs.read_config(run)
        config = changed(config, {}, config.data if data is None else data)
        evaluation = train(config, run, True, options.command, options.parallel, options.tensorboard)
    if evaluation is None:  # the first process tells
        return
    _print_evaluation(evaluation)
    print(f"report: {run / 'report.html'}")


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
        if found["share_at_cap"] > CAP_LIMIT:
            print("                 more than 5%: what was trained is a K-step network, not an equilibrium")
        print(f"allowed 1, 2, 4  {', '.join(f'{allowed[n]:.3f}' for n in (1, 2, 4) if n in allowed)} bits per byte")
