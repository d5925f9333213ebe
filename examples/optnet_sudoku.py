"""OptNet on Sudoku 4 x 4: a quadratic program whose constraints are learnt from solved puzzles, rules unseen.

minimise 0.05 |z|^2 - p'z subject to A z = A 1/4, z >= 0, where p marks the givens and z is read as a cell's digit. Nothing
tells the layer of rows, columns or boxes; A has to become them. Source: Amos and Kolter (2017), OptNet, section 4.4.

    python examples/optnet_sudoku.py --out sudoku.png
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
    rows = list(itertools.permutations(range(4)))
    places = [[i for i in range(4)], *[[4 + i for i in range(4)]]]
    found = []
    for grid in itertools.product(rows, repeat=4):
        units = [*zip(*grid), *[[grid[a + c][b + d] for c in (0, 1) for d in (0, 1)] for a in (0, 2) for b in (0, 2)]]
        if all(len(set(unit)) == 4 for unit in units):
            found.append(grid)
    return nn.functional.one_hot(torch.tensor(found).flatten(1), 4).double()
