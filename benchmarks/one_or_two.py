"""One equilibrium layer or two: training a stacked pair against one layer of as many parameters.

    python benchmarks/one_or_two.py race --out one_or_two.jsonl
    python benchmarks/one_or_two.py fused

`race` trains every arm on two tasks, chooses each arm's learning rate on seeds of their own, and prints the tables of
docs/one-or-two.md; a run that was cut off goes on where --out ends. `fused` trains the pair beside the one layer that
`eq.universal.fuse` makes of it. `--quick` is a trial of a minute.

The cell is that of the theorem, f(z, x) = tanh(W z + U x + b) at each place of an image or a text, so that a pair is
the one layer of summed width whose W is [[W1, 0], [U2, W2]]; the arm `wide` also trains the block that is zero there.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import equilibria as eq
from equilibria.universal import fuse

RATES = (0.003, 0.01, 0.03)
TUNING_SEEDS = (100,)
SOLVER = eq.Picard()
MAX_STEPS = 50
DEPTH = 12
TEST_BATCH = 512
DEQS = ("one", "two", "wide")
ARMS = (*DEQS, "explicit 1", f"tied {DEPTH}")
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What is learnt: `data(seed)` gives the batch of a step, and the batches to choose a rate by and to test on."""

    name: str
    channels: int
    classes: int
    reach: tuple[int, int]
    pooled: bool
    pair_width: int
    steps: int
    data: Callable[[int], tuple[Callable[[int], Batch], Batch, Batch]]


def digits(seed: int) -> tuple[Callable[[int], Batch], Batch, Batch]:
    """Handwritten digits, 8 x 8 pixels: 1000 to train on, 297 to choose by and 500 to test on, drawn by the seed."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8, 1) / 8 - 1
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, choose, test = order[:1000], order[1000:1297], order[1297:]

    def batch(step: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = train[torch.randint(len(train), (32,), generator=generator)]
        return x[rows], y[rows]

    return batch, (x[choose], y[choose]), (x[test], y[test])


def addition(seed: int, length: int = 16, propagating: float = 0.75) -> tuple[Callable[[int], Batch], Batch, Batch]:
    """Bits of the sum of two numbers, lowest first; at three of four places the carry goes on from the place before."""

    def draw(count: int, stream: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000_003 * seed + stream)
        a = torch.rand(count, length, generator=generator) < 0.5
        b = a ^ (torch.rand(count, length, generator=generator) < propagating)
        carry, bits = torch.zeros(count, dtype=torch.bool), []
        for k in range(length):
            bits.append(a[:, k] ^ b[:, k] ^ carry)
            carry = (a[:, k] & b[:, k]) | (carry & (a[:, k] ^ b[:, k]))
        x = torch.stack((a, b), dim=2).float()[:, None] * 2 - 1
        return x, torch.stack(bits, dim=1).long()

    return lambda step: draw(64, step), draw(512, 900_001), draw(1024, 900_002)


TASKS = (
    Task("digits", 1, 10, (1, 1), True, 12, 120, digits),
    Task("addition", 2, 2, (0, 1), False, 13, 120, addition),
)


def neighbours(z: Tensor, reach: tuple[int, int]) -> Tensor:
    """Each place with those up to `reach` rows above and columns before it; zeros beyond the border."""
    rows, columns = z.shape[1:3]
    padded = F.pad(z, (0, 0, reach[1], 0, reach[0], 0))
    return torch.cat(
        [padded[:, i : i + rows, k : k + columns] for i in range(reach[0] + 1) for k in range(reach[1] + 1)], dim=-1
    )


class Cell(nn.Module):
    """tanh(W z + U x + b), where each place reads itself and the places before it; (batch, rows, columns, width)."""

    def __init__(self, task: Task, inputs: int, width: int) -> None:
        super().__init__()
        self.reach, self.width = task.reach, width
        taps = (task.reach[0] + 1) * (task.reach[1] + 1)
        self.recur = nn.Linear(taps * width, width, bias=False)
        self.inject = nn.Linear(taps * inputs, width)
        nn.init.normal_(self.recur.weight, std=0.5 * (taps * width) ** -0.5)
        nn.init.normal_(self.inject.weight, std=(taps * inputs) ** -0.5)

    def initial_state(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.recur(neighbours(z, self.reach)) + self.inject(neighbours(x, self.reach)))


class Explicit(nn.Module):
    """tanh(U x + b): a layer with nothing to iterate."""

    def __init__(self, task: Task, width: int) -> None:
        super().__init__()
        self.reach = task.reach
        taps = (task.reach[0] + 1) * (task.reach[1] + 1)
        self.inject = nn.Linear(taps * task.channels, width)
        nn.init.normal_(self.inject.weight, std=(taps * task.channels) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inject(neighbours(x, self.reach)))


class Tied(nn.Module):
    """The cell applied a fixed number of times, differentiated through each."""

    def __init__(self, cell: Cell, depth: int) -> None:
        super().__init__()
        self.cell, self.depth = cell, depth

    def forward(self, x: Tensor) -> Tensor:
        z = self.cell.initial_state(x)
        for _ in range(self.depth):
            z = self.cell(z, x)
        return z


class Model(nn.Module):
    """Layers in a row and a linear readout: of the mean over the image, or of each place."""

    def __init__(self, task: Task, layers: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.layers, self.pooled = nn.Sequential(*layers), task.pooled
        self.readout = nn.Linear(4 * width if task.pooled else width, task.classes)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layers(x)
        # (batch, 2, 4, 2, 4, width) to the mean of each quarter
        return self.readout(
            z.unflatten(2, (2, 4)).unflatten(1, (2, 4)).mean(dim=(2, 4)).flatten(1) if self.pooled else z[:, 0]
        )


def make(task: Task, arm: str, width: int, seed: int, rtol: float = 1e-3, max_steps: int = MAX_STEPS) -> Model:
    torch.manual_seed(seed)

    def deq(inputs: int) -> eq.DEQ:
        return eq.DEQ(Cell(task, inputs, width), solver=SOLVER, rtol=rtol, max_steps=max_steps, on_failure="ignore")

    if arm == "two":
        return Model(task, (deq(task.channels), deq(width)), width)
    if arm == "explicit 1":
        return Model(task, (Explicit(task, width),), width)
    if arm in DEQS:
        return Model(task, (deq(task.channels),), width)
    return Model(task, (Tied(Cell(task, task.channels, width), DEPTH),), width)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def widths(task: Task) -> dict[str, int]:
    """The pair's is given; the others have as many parameters as it has, but for `wide`, which has its summed width."""
    wanted = parameters(make(task, "two", task.pair_width, 0))

    def nearest(arm: str) -> int:
        size = {width: parameters(make(task, arm, width, 0)) for width in range(1, 50)}
        # One layer of numbers alone is linear in its width.
        top = 50 if size[49] > wanted else 2 * 49 * wanted // size[49]
        return min(range(1, top), key=lambda width: abs(parameters(make(task, arm, width, 0)) - wanted))

    one = nearest("one")
    return {
        "one": one,
        "two": task.pair_width,
        "wide": 2 * task.pair_width,
        "explicit 1": nearest("explicit 1"),
        f"tied {DEPTH}": one,
    }


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


class Runner:
    """A model of one arm in training, and what its solves and steps took."""

    def __init__(self, task: Task, arm: str, width: int, rate: float, seed: int, steps: int) -> None:
        self.arm, self.rate = arm, rate
        self.model = make(task, arm, width, seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / steps)
        self.seconds: list[float] = []
        self.forward: list[list[int]] = []
        self.backward: list[list[int]] = []
        self.capped: list[float] = []
        self.backward_unsolved: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        began = time.perf_counter()
        with eq.monitor(self.model) as reports:
            self.optimizer.zero_grad()
            loss_of(self.model(x), y).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - began)
        self.schedule.step()
        self.forward.append([report.evaluations for report in reports])
        self.backward.append([int(_told(report.adjoint.steps).max()) for report in reports])
        for report in reports:
            self.capped.append((report.status == eq.Status.MAX_STEPS).float().mean().item())
            unsolved = _told(report.adjoint.status) != eq.Status.CONVERGED
            self.backward_unsolved.append(unsolved.float().mean().item())

    @torch.no_grad()
    def measure(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        self.model.eval()
        with eq.monitor(self.model) as reports:
            logits = torch.cat([self.model(part) for part in x.split(TEST_BATCH)])
        self.model.train()
        wrong = logits.argmax(-1) != y
        found = {"loss": loss_of(logits, y).item(), "error": wrong.float().mean().item()}
        if reports:
            residual = torch.cat([report.residual for report in reports])
            status = torch.cat([report.status for report in reports])
            found["residual median"] = residual.median().item()
            found["residual worst"] = residual.max().item()
            found["capped"] = (status == eq.Status.MAX_STEPS).float().mean().item()
        return found


def _told(value: Tensor | None) -> Tensor:
    assert value is not None, "backward has not run"
    return value


def column_means(rows: list[list[int]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def race(task: Task, entries: list[tuple[str, float]], seed: int, steps: int, bar: tqdm[Any]) -> list[dict[str, Any]]:
    """Train the arms side by side, step by step, on the same batches: the arms' times are then taken in turns."""
    batch, choose, test = task.data(seed)
    width = widths(task)
    runners = [Runner(task, arm, width[arm], rate, seed, steps) for arm, rate in entries]
    for step in range(steps):
        x, y = batch(step)
        for runner in runners:
            runner.step(x, y)
            bar.update()
    rows = []
    for runner in runners:
        row = {"task": task.name, "seed": seed, "arm": runner.arm, "rate": runner.rate, "steps": steps}
        row |= {"width": width[runner.arm], "parameters": parameters(runner.model)}
        row |= {"choose": runner.measure(*choose), "test": runner.measure(*test)}
        row |= {"seconds": statistics.median(runner.seconds)}
        if runner.forward[0]:
            row |= {"forward": column_means(runner.forward), "backward": column_means(runner.backward)}
            row |= {"capped": statistics.fmean(runner.capped)}
            row |= {"backward unsolved": statistics.fmean(runner.backward_unsolved)}
        rows.append(row)
    return rows


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of --out, after the races that it lacks: those that choose a rate for each arm, then those that are told."""
    seeds = range(2 if options.quick else options.seeds)
    tuning, rates = (TUNING_SEEDS[:1], RATES[:2]) if options.quick else (TUNING_SEEDS, RATES)
    path = Path(options.out)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    tasks = [task for task in TASKS if task.name in options.tasks]
    steps = {task.name: 20 if options.quick else options.steps or task.steps for task in tasks}
    entries = len(ARMS) * (len(rates) * len(tuning) + len(seeds))
    with tqdm(total=entries * sum(steps.values()), unit="step") as bar:

        def ensure(task: Task, seed: int, wanted: list[tuple[str, float]]) -> list[dict[str, Any]]:
            bar.set_description(f"{task.name}, seed {seed}")

            def there() -> list[dict[str, Any]]:
                key = (task.name, seed, steps[task.name])
                same = [row for row in rows if (row["task"], row["seed"], row["steps"]) == key]
                return [row for row in same if (row["arm"], row["rate"]) in wanted]

            had = {(row["arm"], row["rate"]) for row in there()}
            missing = [entry for entry in wanted if entry not in had]
            bar.update(steps[task.name] * len(had))
            if missing:
                new = race(task, missing, seed, steps[task.name], bar)
                with path.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
                rows.extend(new)
            return there()

        used: list[dict[str, Any]] = []
        for task in tasks:
            grid = [(arm, rate) for rate in rates for arm in ARMS]
            tried = [row for seed in tuning for row in ensure(task, seed, grid)]
            chosen = {arm: best_rate(tried, arm, rates) for arm in ARMS}
            raced = [row for seed in seeds for row in ensure(task, seed, list(chosen.items()))]
            used += [row | {"phase": "tuning"} for row in tried] + [row | {"phase": "race"} for row in raced]
    return used


def choice_loss(rows: list[dict[str, Any]], arm: str, rate: float) -> float:
    return statistics.fmean(row["choose"]["loss"] for row in rows if (row["arm"], row["rate"]) == (arm, rate))


def best_rate(rows: list[dict[str, Any]], arm: str, rates: Sequence[float]) -> float:
    return min(rates, key=lambda rate: choice_loss(rows, arm, rate))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n| {' | '.join(header)} |\n| --- |{' ---: |' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def spread(values: Sequence[float], digits: str = ".3f") -> str:
    return f"{statistics.fmean(values):{digits}} ± {statistics.stdev(values):{digits}}"


def tell(rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["task"] for row in rows):
        tuning = [row for row in rows if row["task"] == name and row["phase"] == "tuning"]
        raced = [row for row in rows if row["task"] == name and row["phase"] == "race"]
        print(f"\n## {name}, {raced[0]['steps']} steps")
        rates = sorted({row["rate"] for row in tuning})
        table(
            ["loss on the tuning seeds", *(f"rate {rate:g}" for rate in rates)],
            [[arm, *(f"{choice_loss(tuning, arm, rate):.3f}" for rate in rates)] for arm in ARMS],
        )
        of = {arm: sorted((row for row in raced if row["arm"] == arm), key=lambda row: row["seed"]) for arm in ARMS}
        seeds = [str(row["seed"]) for row in of["one"]]
        for metric in ("loss", "error"):
            values = {arm: [row["test"][metric] for row in of[arm]] for arm in ARMS}
            table(
                [f"test {metric}", "parameters", "state", *(f"seed {seed}" for seed in seeds), "mean ± sd"],
                [
                    [
                        arm,
                        str(of[arm][0]["parameters"]),
                        f"{of[arm][0]['width']} + {of[arm][0]['width']}" if arm == "two" else str(of[arm][0]["width"]),
                        *(f"{value:.3f}" for value in values[arm]),
                        spread(values[arm]),
                    ]
                    for arm in ARMS
                ],
            )
            pairs = []
            for first, second in (("two", "one"), ("two", "wide"), ("wide", "one")):
                gaps = [a - b for a, b in zip(values[first], values[second], strict=True)]
                lower = sum(gap < 0 for gap in gaps)
                pairs.append([f"{first} - {second}", spread(gaps), f"{lower} of {len(gaps)}"])
            table([f"paired difference of {metric}", "mean ± sd", "first lower"], pairs)
        table(
            [
                "a step of training",
                *("evaluations", "products", "at cap", "backward unsolved"),
                *("at cap in test", "residual, median", "worst", "ms"),
            ],
            [costs(arm, of[arm]) for arm in ARMS],
        )
        for arm in DEQS:
            share = statistics.fmean(row["capped"] for row in of[arm])
            if share > 0.05:
                # The last evaluation measures the residual of what is returned.
                print(f"\n{share:.0%} of the solves of `{arm}` hit the cap: it is a network of {MAX_STEPS - 1} steps.")


def costs(arm: str, rows: list[dict[str, Any]]) -> list[str]:
    def mean(name: str) -> float:
        return statistics.fmean(row[name] for row in rows)

    def layers(name: str) -> str:
        return " + ".join(
            f"{statistics.fmean(column):.1f}" for column in zip(*(row[name] for row in rows), strict=True)
        )

    milliseconds = f"{1e3 * statistics.median(row['seconds'] for row in rows):.0f}"
    if arm not in DEQS:
        return [arm, "1" if arm == "explicit 1" else str(DEPTH), *([""] * 6), milliseconds]
    return [
        arm,
        layers("forward"),
        layers("backward"),
        f"{mean('capped'):.1%}",
        f"{mean('backward unsolved'):.1%}",
        f"{statistics.fmean(row['test']['capped'] for row in rows):.1%}",
        f"{statistics.median(row['test']['residual median'] for row in rows):.0e}",
        f"{max(row['test']['residual worst'] for row in rows):.0e}",
        milliseconds,
    ]


def fused(steps: int = 20) -> None:
    """The pair and the one layer that it is, trained side by side in float64 on the same batches."""
    rows = []
    for task in TASKS:
        pair = make(task, "two", task.pair_width, 0, rtol=1e-10, max_steps=400).double()
        joint = copy.deepcopy(pair)
        parts = [part for part in joint.layers if isinstance(part, eq.DEQ)]
        joint.layers = nn.Sequential(fuse(*parts))
        models, losses = (pair, joint), ([], [])
        evaluations: list[list[list[int]]] = [[], []]
        optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
        batch, _, _ = task.data(0)
        for step in tqdm(range(steps), desc=task.name):
            x, y = batch(step)
            for k, model in enumerate(models):
                with eq.monitor(model) as reports:
                    loss = loss_of(model(x.double()), y)
                optimizers[k].zero_grad()
                loss.backward()
                optimizers[k].step()
                losses[k].append(loss.item())
                evaluations[k].append([report.evaluations for report in reports])
        gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
        weights = max((a - b).abs().max().item() for a, b in zip(pair.parameters(), joint.parameters(), strict=True))
        counts = [" + ".join(f"{value:.1f}" for value in column_means(found)) for found in evaluations]
        rows.append([task.name, f"{losses[0][0]:.3f}", f"{losses[0][-1]:.3f}", f"{gap:.1e}", f"{weights:.1e}", *counts])
    header = ["task", "first loss", "last loss", "largest gap in loss", "in weights", "evaluations, pair", "fused"]
    table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="One equilibrium layer or two, trained.")
    parser.add_argument("what", choices=("race", "fused"), nargs="?", default="race")
    parser.add_argument("--out", default="one_or_two.jsonl", help="raw results, a JSON object a line; goes on there")
    parser.add_argument("--tasks", nargs="+", choices=[task.name for task in TASKS], default=[t.name for t in TASKS])
    parser.add_argument("--steps", type=int, help="of training, instead of each task's own")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a minute's trial")
    options = parser.parse_args()
    if options.what == "fused":
        fused()
    else:
        tell(run_all(options))


if __name__ == "__main__":
    main()
