"""What corrections, starts from memory and restarts buy on small tasks.

    python benchmarks/starts.py

Medians over three seeds, lowest and highest in brackets; float32, one thread; about five minutes.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

import equilibria as eq

SEEDS = (0, 1, 2)


class Cell(nn.Module):
    """tanh(A z + B x + b), A of norm 0.9 at first."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.state, self.input = nn.Linear(width, width), nn.Linear(inputs, width)
        nn.init.orthogonal_(self.state.weight, 0.9)

    def initial_state(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.state.in_features)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.state(z) + self.input(x))


class Waves(nn.Module):
    """Has several equilibria and, in between, chaos."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 2 * torch.sin(1.5 * torch.roll(z, 1, dims=1) + x)


def across(measure: Callable[[int], list[float]], digits: int) -> str:
    """Cells of a row: the median over the seeds of each number, and its range."""
    columns = zip(*(measure(seed) for seed in SEEDS), strict=True)
    return " | ".join(
        f"{statistics.median(column):.{digits}f} ({min(column):.{digits}f}-{max(column):.{digits}f})"
        for column in columns
    )


def cut_short(seed: int, after: tuple[int, ...], updates: int = 300) -> list[float]:
    """Error in percent of the target's variance after 2, 3 and 5 evaluations, at the equilibrium; evaluations there."""
    torch.manual_seed(seed)
    teacher, x, held_back = eq.DEQ(Cell(8, 8), max_steps=200), torch.randn(1024, 8), torch.randn(1024, 8)
    with torch.no_grad():
        target, wanted = teacher(x)[:, :4], teacher(held_back)[:, :4]
    layer = eq.DEQ(Cell(8, 16), max_steps=100)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(updates):
        batch = torch.randint(len(x), (128,))
        pairs = eq.nn.corrections(layer, x[batch], after=after)
        loss = sum(weight * (z[:, :4] - target[batch]).square().mean() for weight, z in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        pairs = eq.nn.corrections(layer, held_back, after=(2, 3, 5))
        evaluations = layer.solve(held_back).steps.double().mean()
    errors = [(z[:, :4] - wanted).square().mean() / wanted.var() for _, z in pairs]
    return [100 * float(error) for error in errors] + [float(evaluations)]


def remembered(seed: int, solver: eq.Solver, rtol: float, rate: float, warm: bool) -> list[float]:
    """Evaluations a solve, recalling included, in the epochs 2, 5 and 10 of a training."""
    torch.manual_seed(seed)
    x = torch.randn(256, 16)
    target = torch.roll(x, 1, dims=1).tanh()
    layer, memory = eq.DEQ(Cell(16, 16), solver=solver, rtol=rtol, max_steps=300), eq.nn.StartMemory(len(x))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += not torch.is_grad_enabled()

    layer.cell.register_forward_hook(count)
    optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
    spent = []
    for _ in range(10):
        calls = 0
        batches = torch.randperm(len(x)).split(16)
        for batch in batches:
            z0 = memory.recall(batch, layer, x[batch]) if warm else None
            solution = layer.solve(x[batch], z0=z0)
            memory.store(batch, solution)
            optimizer.zero_grad()
            (solution.value - target[batch]).square().mean().backward()
            optimizer.step()
        spent.append(calls / len(batches))
    return [spent[1], spent[4], spent[9]]


@torch.no_grad()
def solved(seed: int, solver: eq.Solver) -> list[float]:
    """Share of samples, in percent, that have an equilibrium from 1, 4, 16 and 64 starts."""
    torch.manual_seed(seed)
    layer, x = eq.DEQ(Waves(), solver=solver, max_steps=40, on_failure="ignore"), 2 * torch.randn(1000, 6)
    found = (eq.nn.restarts(layer, x, starts=count, scale=2.0, chunk=16) for count in (1, 4, 16, 64))
    return [100 * float(solution.converged.double().mean()) for solution in found]


def main() -> None:
    torch.set_num_threads(1)
    print("| corrections after | 2 evaluations | 3 | 5 | solved | evaluations then |\n" + "| --- " * 6 + "|")
    for after in ((), (1, 2, 4), (2, 4), (4,)):
        print(f"| {', '.join(map(str, after)) or 'none'} | {across(lambda seed, k=after: cut_short(seed, k), 1)} |")
    print("\n| solver, rtol, rate | starts | epoch 2 | 5 | 10 |\n" + "| --- " * 5 + "|")
    for solver in (eq.Anderson(), eq.Picard()):
        for rtol, rate in ((1e-3, 1e-3), (1e-5, 1e-3), (1e-3, 1e-4)):
            for warm in (False, True):
                row = across(lambda seed, k=(solver, rtol, rate, warm): remembered(seed, *k), 1)
                name = f"{type(solver).__name__}, {rtol:.0e}, {rate:.0e}"
                print(f"| {name} | {'from memory' if warm else 'zeros'} | {row} |", flush=True)
    print("\n| solver | 1 start | 4 | 16 | 64 |\n" + "| --- " * 5 + "|")
    for solver in (eq.Picard(0.5), eq.Anderson(relaxation=0.5), eq.Broyden()):
        print(f"| {type(solver).__name__} | {across(lambda seed, k=solver: solved(seed, k), 0)} |", flush=True)


if __name__ == "__main__":
    main()
