"""What a token costs: with the one-slot cache, without it, and in explicit models of the same effective depth.

    OMP_NUM_THREADS=1 python benchmarks/generation.py --run RUN            # a trained equilibrium model, context of 512
    OMP_NUM_THREADS=1 python benchmarks/generation.py --train 400          # trains one first, on Python's own source

One sequence of validation text on the CPU, one token after the other as they stand there. For each tolerance and each
length of the context, in turn at every token, so that all see the same machine:

- cached: the equilibrium of the new token alone, with the keys and values of the tokens before it in one slot, from the
  state of the last, as `onelayer generate` does it;
- cold: the equilibrium of the whole sequence, from zeros;
- warm: the same, from the equilibrium of the sequence one token shorter, the new token from the state of the last;
- tied, untied: explicit models with a cache of one slot a layer, as many layers as the cached solve takes evaluations.

Seconds are processor time of this process, which other processes disturb less than the clock; ratios are taken token by
token, and their median and quartiles printed. Tied layers have the weights of the equilibrium model, untied ones random
weights, which take the same time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from onelayer import corpora, runs
from onelayer.models.language_model import LanguageModel
from onelayer.models.window import window
from onelayer.presets import changed, preset
from onelayer.readers import CachedReader, Reader, WholeReader
from onelayer.training import train

TWINS: tuple[Literal["tied"], Literal["untied"]] = ("tied", "untied")


@dataclass
class Timed:
    """Seconds and evaluations of a way to read tokens, one entry a token."""

    seconds: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    stored: int = 0


def advance(reader: Reader, token: int, into: Timed) -> None:
    began = time.process_time()
    output = reader.advance([token])
    into.seconds.append(time.process_time() - began)
    into.evaluations.append(len(output.left) if output.solution is None else output.solution.evaluations)


def explicit(model: LanguageModel, depth: Literal["tied", "untied"], layers: int) -> LanguageModel:
    """The explicit model of that many layers; tied ones share the weights of the equilibrium."""
    config = replace(model.config, depth=depth, layers=layers, warm_start=False, jacobian_weight=0.0)
    twin = LanguageModel(config).eval()
    if depth == "tied":
        names = {
            name.replace("depth.layer.cell.", "depth.blocks.0."): value for name, value in model.state_dict().items()
        }
        twin.load_state_dict({name: value for name, value in names.items() if not name.startswith("guess.")})
    return twin


def race(model: LanguageModel, text: Tensor, context: int, tokens: int) -> dict[str, Timed]:
    """Reads `tokens` more tokens after `context - tokens` ones, in every way."""
    # The last of them is read with a whole context before it and behind it in the cache.
    first = text[: context - tokens].tolist()
    cached, cold, warm = CachedReader(model, warm=True), WholeReader(model), WholeReader(model, warm=True)
    found = {name: Timed() for name in ("cached", "cold", "warm", "tied", "untied")}
    tokens_left = text[context - tokens : context].tolist()
    trial, counted = CachedReader(model, warm=True), Timed()
    trial.restart([first])
    for token in tokens_left:
        advance(trial, token, counted)
    layers = round(statistics.mean(counted.evaluations))
    twins = {name: CachedReader(explicit(model, name, layers)) for name in TWINS}
    for reader in (cached, cold, warm, *twins.values()):
        reader.restart([first])
    for token in tokens_left:
        for name, reader in {"cached": cached, "cold": cold, "warm": warm, **twins}.items():
            advance(reader, token, found[name])
    for name, reader in {"cached": cached, **twins}.items():
        found[name].stored = reader.stored_bytes
    return found


def block_alone(model: LanguageModel, context: int) -> tuple[float, float]:
    """Seconds of an evaluation of the block, of a whole sequence and of a token: what a solver that is free leaves."""
    block, config = model.depth.block, model.config
    found = []
    for time_, stored in ((context, 0), (1, context - 1)):
        x = torch.randn(1, time_, config.width)
        z = torch.randn(1, time_, block.state_width)
        prepared, past = block.prepare(x), None
        if stored:
            before = torch.randn(1, stored, config.width)
            state = torch.randn(1, stored, block.state_width)
            earlier = block.place(window(stored, x.device), x.dtype)
            past = block.remember(state, before, block.context(before, earlier, prepared))
        frame = block.place(window(time_, x.device, stored), x.dtype)
        fixed = block.context(x, frame, prepared, past)
        seconds = []
        for _ in range(20):
            began = time.process_time()
            block(z, x, fixed)
            seconds.append(time.process_time() - began)
        found.append(statistics.median(seconds))
    return found[0], found[1]


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})" if middle < 10 else f"{middle:.0f} ({low:.0f} to {high:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="What a token costs with the one-slot cache and without it.")
    parser.add_argument("--run", type=Path, help="a run folder of an equilibrium model")
    parser.add_argument("--train", type=int, metavar="STEPS", help="train a model first: width 256, context 512")
    parser.add_argument(
        "--width", type=int, default=256, help="without --run: of the model; random weights without --train"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rtol", type=float, nargs="+", default=[5e-3, 1e-4, 1e-6])
    parser.add_argument("--tokens", type=int, default=15, help="tokens to time for each line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    values = {"width": options.width, "context": max(options.contexts), "batch_size": 4, "learning_rate": 4e-3}
    config = changed(preset("small"), values)
    if options.run is not None:
        model, weights = runs.load_model(options.run)[0], f"trained: {options.run.name}"
    elif options.train is not None:
        run = Path(tempfile.mkdtemp()) / "run"
        train(changed(config, {"steps": options.train}), run)
        model, weights = runs.load_model(run)[0], f"trained for {options.train} steps"
    else:
        model, weights = LanguageModel(config.model).eval(), "random"
    layer = model.depth.layer
    assert layer is not None, "The model has no equilibrium."
    with tempfile.TemporaryDirectory() as folder:
        text = corpora.prepare(None, Path(folder) / "tokens").validation.read(np.array([20_000]), 10_000)[0]
    load = f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    print(f"weights {weights}, width {model.config.width}, one thread{load}")
    print(
        "| rtol | context | cached, ms | evaluations: cached, cold, warm | cold / cached | warm / cached | "
        "tied / cached | untied / cached | KiB: one slot, explicit | one block, ms: whole, token |"
    )
    print("| ---: " * 10 + "|")
    with torch.inference_mode():
        for rtol in options.rtol:
            layer.rtol, layer.eval_max_steps = rtol, 200
            for context in options.contexts:
                race(model, text, context, 2)  # warms caches up
                found = race(model, text, context, options.tokens)
                cached = found["cached"].seconds
                ratio = {
                    name: quartiles([a / b for a, b in zip(found[name].seconds, cached, strict=True)])
                    for name in ("cold", "warm", "tied", "untied")
                }
                counts = ", ".join(
                    f"{statistics.mean(found[name].evaluations):.1f}" for name in ("cached", "cold", "warm")
                )
                used = context / model.config.context / 1024  # slots are allocated for the whole context of the model
                stored = f"{used * found['cached'].stored:,.0f}, {used * found['tied'].stored:,.0f}"
                blocks = ", ".join(f"{1e3 * seconds:.2f}" for seconds in block_alone(model, context))
                print(
                    f"| {rtol:g} | {context} | {1e3 * statistics.median(cached):.1f} | {counts} | {ratio['cold']} | "
                    f"{ratio['warm']} | {ratio['tied']} | {ratio['untied']} | {stored} | {blocks} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
