"""`onelayer generate`: text from a trained model."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from onelayer import runs
from onelayer.generation import decode, generate


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of the command."""
    command = commands.add_parser("generate", help="draw text from a trained model")
    command.set_defaults(act=_run)
    command.add_argument("run", metavar="RUN", help="a run folder")
    command.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="what the text starts with; several prompts are continued side by side",
    )
    command.add_argument(
        "--bytes", "--tokens", dest="count", type=int, default=200, metavar="N", help="tokens to draw; 200 by default"
    )
    command.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same text")
    command.add_argument("--chunk", type=int, metavar="N", help="tokens of a prompt read by one solve; all by default")
    command.add_argument("--no-cache", action="store_true", help="solve for the whole text again at every token")
    command.add_argument("--report", action="store_true", help="say on stderr what it took")


def _run(options: argparse.Namespace) -> None:
    model, _ = runs.load_model(Path(options.run))
    tokenizer = runs.load_tokenizer(Path(options.run))
    texts = [prompt.encode("utf-8", "surrogateescape") for prompt in options.prompt]
    prompts = [tokenizer.encode(text).tolist() for text in texts]
    began = time.perf_counter()
    drawn = generate(
        model,
        prompts,
        options.count,
        options.temperature,
        options.seed,
        cache=not options.no_cache,
        chunk=options.chunk,
        on_failure="ignore",
    )
    # A single text is shown as it comes; several are shown one after the other.
    columns = [(tokens[0] for tokens in drawn)] if len(prompts) == 1 else zip(*drawn, strict=True)
    for prompt, tokens in zip(texts, columns, strict=True):
        print(prompt.decode("utf-8", "replace"), end="")
        for text in decode(tokenizer.decode([token]) for token in tokens):
            print(text, end="", flush=True)
        print()
    if options.report:
        print(drawn.report.describe(time.perf_counter() - began), file=sys.stderr)
    complaint = drawn.report.complaint()
    if complaint is not None:
        print(f"onelayer: {complaint}", file=sys.stderr)
