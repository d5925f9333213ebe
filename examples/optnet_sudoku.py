"""OptNet on Sudoku 4 x 4: a quadratic program whose rules are learnt from solved puzzles.

z = argmin 0.05 |z|^2 - p'z + 1/2 |A (z - 1/4)|^2 subject to z >= 0, where p marks the givens and z says which digit
stands in a cell. Nothing tells of rows, columns and boxes: A starts at random. After Amos and Kolter (2017),
OptNet, section 4.4, whose A are equalities.    python examples/optnet_sudoku.py --out sudoku.png
"""

import argparse
import itertools

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import trange

import equilibria as eq


def grids() -> Tensor:
    """All 288 solved grids, one-hot: (288, 16 cells, 4 digits)."""
    found, corners = [], list(itertools.product((0, 2), repeat=2))
    for grid in itertools.product(itertools.permutations(range(4)), repeat=4):
        boxes = [[grid[a + c][b + d] for c in (0, 1) for d in (0, 1)] for a, b in corners]
        if all(len(set(unit)) == 4 for unit in (*zip(*grid, strict=True), *boxes)):
            found.append(grid)
    return nn.functional.one_hot(torch.tensor(found).flatten(1), 4).double()


def puzzles(solved: Tensor, every: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Puzzles of 5 to 8 givens that have one solution among all grids, and these solutions."""
    pairs: list[tuple[Tensor, Tensor]] = []
    while len(pairs) < count:
        solution, givens = solved[torch.randint(len(solved), ())], int(torch.randint(5, 9, ()))
        puzzle = solution * (torch.randperm(16) < givens)[:, None]
        if int(((every * puzzle).sum((1, 2)) == givens).sum()) == 1:
            pairs.append((puzzle, solution))
    return torch.stack([p for p, _ in pairs]), torch.stack([s for _, s in pairs])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="optnet_sudoku.png")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    every, unit = grids()[torch.randperm(288)], torch.eye(64, dtype=torch.float64)
    test = puzzles(every[200:], every, 200)
    layer = eq.nn.QPLayer(G=-unit, h=torch.zeros(64, dtype=torch.float64), rtol=1e-6)
    A = nn.Parameter(0.1 * torch.randn(64, 64, dtype=torch.float64))
    optimizer, losses = torch.optim.Adam([A], lr=0.02), []

    def solve(puzzle: Tensor) -> Tensor:
        K = A.T @ A
        return layer(P=0.1 * unit + K, q=-puzzle.flatten(1) - K.sum(1) / 4).unflatten(1, (16, 4))

    for _ in trange(options.steps):
        puzzle, solution = puzzles(every[:200], every, 32)
        loss = (solve(puzzle) - solution).square().sum((1, 2)).mean()
        (A.grad,) = torch.autograd.grad(loss, A)
        optimizer.step()
        losses.append(loss.item())
    found = solve(test[0]).detach()
    right = float((found.argmax(2) == test[1].argmax(2)).all(1).double().mean())
    print(f"squared error of a grid: {losses[0]:.3f} at the first update, {losses[-1]:.3f} at the last")
    print(f"unseen puzzles solved: {right:.1%} of {len(test[0])}, of grids that training has not seen")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    axes[0].semilogy(losses)
    axes[0].set(xlabel="updates", ylabel="squared error of a grid", title=f"{right:.1%} of unseen puzzles solved")
    axes[1].imshow((A.T @ A).detach(), cmap="RdBu_r", vmin=-1, vmax=1)
    axes[1].set(title="the rules it has learnt, A'A, by cell and digit")
    axes[2].imshow(found[0].max(1).values.reshape(4, 4), cmap="Blues", vmin=0, vmax=2)
    for cell, (given, digit) in enumerate(zip(test[0][0].sum(1), found[0].argmax(1) + 1, strict=True)):
        axes[2].text(cell % 4, cell // 4, int(digit), ha="center", size=16, weight="bold" if given else "normal")
    axes[2].set(title="one of them, its givens in bold", xticks=[], yticks=[])
    figure.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
