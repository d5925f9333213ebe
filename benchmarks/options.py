"""What each option of the language model costs and brings, one at a time, on the small preset's model.

    python benchmarks/options.py --out options.jsonl

trains each variant with the same trainer on the same windows and appends a row to the file as soon as it is measured;
rows that are there already are not measured again, so that a run that was cut off goes on where it stopped. It ends
with the table of docs/log.md. Evaluations are per solve: forward and backward of the last tenth of training, where a
solve may take 32, and those of validation, where it may take 64.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onelayer import corpora
from onelayer.corpora import Corpus, batches
from onelayer.learner import learning_rate_at, make_optimizer
from onelayer.models.language_model import LanguageModel, bits
from onelayer.presets import RunConfig, changed, preset

VARIANTS: dict[str, dict[str, Any]] = {
    "post": {},
    "subtracted": {"block": "subtracted"},
    "relative": {"positions": "relative"},
    "trellisnet": {"architecture": "trellisnet", "width": 112},
    "trellisnet, rate 0.012": {"architecture": "trellisnet", "width": 112, "learning_rate": 0.012},
    "dropout 0.1": {"dropout": 0.1},
    "weight norm": {"weight_norm": True},
    "Jacobian 0.1": {"jacobian_weight": 0.1},
    "Jacobian 1": {"jacobian_weight": 1.0},
    "warm start": {"warm_start": True},
    "memory 64": {"memory": 64},
    "post, pairs": {"memory": 64, "forget": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the options of the language model.")
    parser.add_argument("--out", type=Path, required=True, help="a JSON-lines file that rows are appended to")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _compare(options, corpora.prepare(None, Path(folder, "tokens")))


def _compare(options: argparse.Namespace, corpus: Corpus) -> None:
    print(f"{options.steps} steps, {torch.get_num_threads()} threads, {corpus.describe()}", file=sys.stderr)
    rows = read(options.out)
    for name in options.only:
        key = {"variant": name, "steps": options.steps, "seed": options.seed}
        if not any(key.items() <= row.items() for row in rows):
            row = key | trained(name, options.steps, options.seed, corpus)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    print("| variant | parameters | bits/byte | forward | backward | validation | residual | at the cap |")
    print("| --- |" + " ---: |" * 7)
    for row in (row for row in rows if row["steps"] == options.steps and row["seed"] == options.seed):
        print(
            f"| {row['variant']} | {row['parameters']:,} | {row['bits_per_byte']:.3f} | {row['forward']:.1f} "
            f"| {row['backward']:.1f} | {row['check']:.1f} | {row['residual']:.1e} | {row['at_cap']:.0%} |"
        )


def read(path: Path) -> list[dict[str, Any]]:
    """Rows that are there; a last line that was cut off is none."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def trained(name: str, steps: int, seed: int, corpus: Corpus) -> dict[str, Any]:
    """One variant trained and measured.

    With a memory, each update reads a window twice as long in two segments, learns from the second and takes the first
    as its memory; `forget` learns from the same second segments without it.
    """
    values = VARIANTS[name] | {"steps": steps, "unrolled_steps": 0, "seed": seed}
    forget = values.pop("forget", False)
    config = changed(preset("small"), values)
    training, context = config.training, config.model.context
    before = config.model.memory
    torch.manual_seed(seed)
    model = LanguageModel(config.model)
    optimizer = make_optimizer(model, training)
    forward, backward, at_cap = [], [], []
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, training)
        x, y = batches.batch(corpus.train, step, training.batch_size, before + context, seed)
        model.train()
        memory = recalled(model, x[:, :before]) if before and not forget else None
        found = model(x[:, before:], y[:, before:], memory=memory)
        (found.losses.mean() + found.penalty).backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= 0.9 * steps:
            forward.append(float(found.solution.steps.float().mean()))
            backward.append(float(found.solution.adjoint.steps.float().mean()))
            at_cap.append(float((~found.solution.converged).float().mean()))
    seconds = time.perf_counter() - began
    return {
        "parameters": model.parameter_counts()[0],
        "forward": mean(forward),
        "backward": mean(backward),
        "at_cap": mean(at_cap),
        "seconds": round(seconds),
    } | checked(model, config, corpus, 0 if forget else before)


@torch.no_grad()
def recalled(model: LanguageModel, x: Tensor) -> Any:
    return model(x).memory


@torch.no_grad()
def checked(model: LanguageModel, config: RunConfig, corpus: Corpus, before: int) -> dict[str, float]:
    """Validation: the same bytes for all, after as many bytes of memory as the variant has."""
    model.eval()
    inputs, targets = batches.validation_windows(corpus.validation, 64 + config.model.context, 128)
    losses, steps, residual = [], [], []
    for x, y in zip(inputs.split(32), targets.split(32), strict=True):
        memory = recalled(model, x[:, 64 - before : 64]) if before else None
        found = model(x[:, 64:], y[:, 64:], memory=memory)
        losses.append(found.losses)
        steps.append(found.solution.steps.float())
        residual.append(found.solution.residual)
    return {
        "bits_per_byte": float(bits(torch.cat(losses))),
        "check": float(torch.cat(steps).mean()),
        "residual": float(torch.cat(residual).median()),
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


if __name__ == "__main__":
    main()
