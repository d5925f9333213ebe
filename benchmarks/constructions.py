"""What the constructions cost and where they end: embedded networks under every solver, fused layers against stacks.

    python benchmarks/constructions.py

prints the tables of docs/fusing.md. All are counts of seed 0 in float64 that do not depend on the machine, but for the
last two columns of the last table: ratios of times, medians of 5 paired and interleaved repetitions, with the range.
"""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import equilibria as eq

WIDTH, BATCH, DEPTHS, SCALES = 4, 2, (8, 24, 64), (1.0, 3.0)
KINDS = ("tanh", "linear")
# A solve that has not ended by then has failed. A direction of Newton's method takes up to as many products as entries.
EVALUATIONS, NEWTON_EVALUATIONS, PRODUCTS = 600, 24, 600
# Entries a sample up to which Newton's method is given whole matrices: each direction takes as many products.
LARGEST = 128

SOLVERS = {
    "Picard()": eq.Picard(),
    "Anderson()": eq.Anderson(),
    "Anderson(history=20)": eq.Anderson(history=20),
    "Broyden()": eq.Broyden(),
    "Broyden(history=100)": eq.Broyden(history=100),
    "Newton()": eq.Newton(),
    "Newton(Dense())": eq.Newton(eq.Dense()),
}
ADJOINTS = {
    "None: GMRES, Picard, Dense in turn": None,
    "GMRES()": eq.GMRES(),
    "BiCGSTAB()": eq.BiCGSTAB(),
    "Dense()": eq.Dense(),
    "Picard()": eq.Picard(),
}


def network(depth: int, scale: float, kind: str, width: int = WIDTH) -> nn.Sequential:
    """`depth` linear layers, orthogonal matrices times `scale` and biases, with a tanh behind each or without."""
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(scale * nn.init.orthogonal_(torch.empty(width, width, dtype=torch.float64)))
        modules += [linear, nn.Tanh()] if kind == "tanh" else [linear]
    return nn.Sequential(*modules)


def example(width: int = WIDTH, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def header(first: str) -> list[tuple[str, float, int]]:
    """Print the head of a table over networks; returns its columns."""
    columns = [(kind, scale, depth) for kind in KINDS for scale in SCALES for depth in DEPTHS]
    print(f"| {first} | " + " | ".join(f"{kind} x{scale:g}, {depth}" for kind, scale, depth in columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    return columns


def forward_table() -> None:
    columns = header("evaluations / error")
    for name, solver in SOLVERS.items():
        row = []
        for kind, scale, depth in columns:
            net, x = network(depth, scale, kind), example()
            layer = eq.universal.embed(net, x)
            layer.solver, layer.rtol, layer.atol, layer.on_failure = solver, 1e-8, 0.0, "ignore"
            if solver == eq.Newton(eq.Dense()) and sum(layer.cell.widths.values()) > LARGEST:  # pyright: ignore
                row.append("-")
                continue
            layer.max_steps = NEWTON_EVALUATIONS if isinstance(solver, eq.Newton) else EVALUATIONS
            with torch.no_grad():
                solution, want = layer.solve(x), net(x)
                error = relative(layer.cell.readout(solution.value), want)  # pyright: ignore
            row.append(f"{solution.evaluations} / {error:.0e}" if bool(solution.converged.all()) else "failed")
        print(f"| `{name}` | " + " | ".join(row) + " |", flush=True)


def backward_table() -> None:
    columns = header("products / error")
    for name, solver in ADJOINTS.items():
        row = []
        for kind, scale, depth in columns:
            net, x = network(depth, scale, kind), example()
            layer = eq.universal.embed(net, x)
            layer.adjoint = eq.Implicit(solver, rtol=1e-8, max_steps=PRODUCTS)
            layer.on_failure = "ignore"
            parameters = list(net.parameters())
            exact = torch.autograd.grad(net(x).sum(), parameters)
            solution = layer.solve(x)
            value = layer.cell.readout(solution.value)  # pyright: ignore
            found = torch.autograd.grad(value.sum(), parameters)
            error = max(relative(got, want) for got, want in zip(found, exact, strict=True))
            status, steps = solution.adjoint.status, solution.adjoint.steps
            assert status is not None
            assert steps is not None
            row.append(f"{int(steps.max())} / {error:.0e}" if bool((status == 0).all()) else "failed")
        print(f"| `{name}` | " + " | ".join(row) + " |", flush=True)


def reach_table(depth: int = 24) -> None:
    """Which matrices of a network get a gradient, and whether it is the exact one."""
    net, x = network(depth, 1.0, "linear", WIDTH), example()
    layer = eq.universal.embed(net, x)
    parameters = [p for p in net.parameters() if p.ndim == 2]
    exact = torch.autograd.grad(net(x).square().sum(), parameters)
    print(f"| adjoint | layers of {depth} reached | which | error there |\n| --- | ---: | --- | ---: |")
    for adjoint in (eq.OneStep(), eq.Phantom(4), eq.Phantom(12), eq.Neumann(4), layer.adjoint):
        layer.adjoint = adjoint
        found = torch.autograd.grad(layer(x).square().sum(), parameters, materialize_grads=True)
        reached = [k for k, grad in enumerate(found, start=1) if grad.abs().max() > 0]
        error = max(relative(found[k - 1], exact[k - 1]) for k in reached)
        print(f"| `{adjoint}` | {len(reached)} | {reached[0]} to {reached[-1]} | {error:.0e} |")


def width_table() -> None:
    print("| network | widest activation | entries of the state | stages |\n| --- | ---: | ---: | ---: |")
    for name, sizes in {"64 x 8": [64] * 9, "32-256-256-10": [32, 256, 256, 10], "784-128-10": [784, 128, 10]}.items():
        pairs = itertools.pairwise(sizes)
        modules = [module for a, b in pairs for module in (nn.Linear(a, b), nn.Tanh())][:-1]
        cell = eq.universal.embed(nn.Sequential(*modules), torch.zeros(1, sizes[0])).cell
        widths = cell.widths  # pyright: ignore
        print(f"| {name} | {max(widths.values())} | {sum(widths.values())} | {len(widths)} |")


class Cell(nn.Module):
    """tanh(A z + x) with an A of the given norm, so that its pace is known."""

    def __init__(self, width: int, pace: float) -> None:
        super().__init__()
        self.A = nn.Parameter(pace * torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.A + x)


def contractions(width: int, *paces: float, solver: eq.Solver) -> list[eq.DEQ]:
    torch.manual_seed(0)
    return [eq.DEQ(Cell(width, pace), solver=solver, rtol=1e-8, max_steps=1000) for pace in paces]


def fused_table() -> None:
    nets = [network(depth, 1.0, "tanh") for depth in (8, 8)]
    stacks = {
        "2 of pace 0.8, width 16, Picard": (contractions(16, 0.8, 0.8, solver=eq.Picard()), 16, 8),
        "4 of pace 0.8, width 16, Picard": (contractions(16, *[0.8] * 4, solver=eq.Picard()), 16, 8),
        "2 of pace 0.8, width 16, Anderson": (contractions(16, 0.8, 0.8, solver=eq.Anderson()), 16, 8),
        "4 of pace 0.8, width 16, Anderson": (contractions(16, *[0.8] * 4, solver=eq.Anderson()), 16, 8),
        "2 of pace 0.8, width 512, Anderson": (contractions(512, 0.8, 0.8, solver=eq.Anderson()), 512, 64),
        "4 of pace 0.8, width 512, Anderson": (contractions(512, *[0.8] * 4, solver=eq.Anderson()), 512, 64),
        "paces 0.95, 0.3, width 512, Anderson": (contractions(512, 0.95, 0.3, solver=eq.Anderson()), 512, 64),
        "2 embedded networks of 8 layers": ([eq.universal.embed(net, example()) for net in nets], WIDTH, BATCH),
    }
    print("| layers | evaluations of each | joint | cells, joint / each | time, forward | time, with backward |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, (layers, width, batch) in stacks.items():
        fused, x = eq.universal.fuse(*layers), example(width, batch)
        counts, value = [], x
        with torch.no_grad():
            for layer in layers:
                with eq.monitor(layer) as reports:
                    value = layer(value)
                counts.append(reports[0].evaluations)
            joint = fused.solve(x)
        assert relative(fused(x), value) < 1e-5
        cells = len(layers) * joint.evaluations / sum(counts)
        ratios = [ratio(fused, nn.Sequential(*layers), x, backward) for backward in (False, True)]
        each = " + ".join(map(str, counts))
        print(f"| {name} | {each} | {joint.evaluations} | {cells:.2f} | " + " | ".join(ratios) + " |", flush=True)


def ratio(fused: nn.Module, stack: nn.Module, x: Tensor, backward: bool) -> str:
    """The time of one over that of the other, pair by pair."""

    def seconds(model: nn.Module) -> float:
        with torch.set_grad_enabled(backward):
            began = time.perf_counter()
            for _ in range(3):
                value = model(x)
                if backward:
                    value.square().sum().backward()
            return time.perf_counter() - began

    seconds(fused), seconds(stack)
    found = sorted(seconds(fused) / seconds(stack) for _ in range(5))
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def main() -> None:
    warnings.simplefilter("ignore", eq.ConvergenceWarning)
    sections: dict[str, Callable[[], None]] = {
        "Solvers on embedded networks": forward_table,
        "Gradients of embedded networks": backward_table,
        "Reach of approximate gradients": reach_table,
        "Width": width_table,
        "Fused layers against stacks": fused_table,
    }
    for title, table in sections.items():
        print(f"\n## {title}\n")
        table()


if __name__ == "__main__":
    main()
