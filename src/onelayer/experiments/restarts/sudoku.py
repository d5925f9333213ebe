"""Sudoku of 4 by 4 cells: all its grids, which givens leave one of them, and puzzles to learn and to be tested on."""

from __future__ import annotations

from functools import cache
from itertools import permutations, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onelayer.errors import UsageError
from onelayer.models.language_model import IGNORED

SIDE, BOX, CELLS = 4, 2, 16
BLANK, VOCABULARY = 0, SIDE + 1  # of the tokens of a puzzle: a blank, and the digits themselves
_SETS = 2**CELLS  # of givens: the i-th bit of a number stands for the i-th cell


@cache
def grids() -> NDArray[np.int64]:
    """All full grids, `(288, 16)`, row by row.

    >>> len(grids()), grids()[0].tolist()
    (288, [1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1])
    """
    digits = list(permutations(range(1, SIDE + 1)))
    bands = [pair for pair in product(digits, repeat=BOX) if _boxes_are_whole(pair)]
    found = [(*upper, *lower) for upper, lower in product(bands, repeat=2)]
    return np.array(
        [np.concatenate(rows) for rows in found if all(len(set(c)) == SIDE for c in zip(*rows, strict=True))]
    )


def _boxes_are_whole(band: tuple[tuple[int, ...], ...]) -> bool:
    return all(len({row[column + k] for row in band for k in range(BOX)}) == SIDE for column in range(0, SIDE, BOX))


@cache
def patterns() -> NDArray[np.int64]:
    """One grid of each class that renaming of digits makes: those with 1 2 3 4 in the first row, `(12, 16)`.

    >>> len(patterns())
    12
    """
    every = grids()
    return every[(every[:, :SIDE] == np.arange(1, SIDE + 1)).all(1)]


@cache
def puzzles(pattern: int, givens: int) -> NDArray[np.int64]:
    """Sets of so many givens that leave only that grid, as numbers whose i-th bit stands for the i-th cell.

    >>> [len(puzzles(0, givens)) for givens in (3, 4, 5, 6)]
    [0, 12, 400, 2208]

    Args:
        pattern: number of the grid in `patterns`; another name for its digits changes nothing.
        givens: cells that are not blank.
    """
    chosen = np.arange(_SETS)
    chosen = chosen[((chosen[:, None] >> np.arange(CELLS)) & 1).sum(1) == givens]
    # Another grid is ruled out where it differs from this one in a cell that is given.
    apart = np.unique((grids() != patterns()[pattern]) @ (1 << np.arange(CELLS)))
    for cells in apart[apart > 0]:
        chosen = chosen[(chosen & cells) != 0]
    return chosen


def solutions(puzzle: Tensor) -> list[list[int]]:
    """All grids that agree with the givens of a puzzle.

    >>> solutions(torch.tensor([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 0, 0, 0, 0]))
    [[1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]]

    Args:
        puzzle: int64 `(16,)`, 0 for a blank.
    """
    cells = puzzle.numpy()
    return grids()[((grids() == cells) | (cells == BLANK)).all(1)].tolist()


class Puzzles:
    """Puzzles with one solution each, some classes of grids held back for the test.

    Grids that differ by the names of their digits alone are of one class, and a class is held back as a whole. The
    classes are the same 12 for every seed; which of them are held back is drawn from it.

    >>> generator = torch.Generator().manual_seed(1)
    >>> tokens, targets = Puzzles(seed=0, held_back=4).draw(generator, 3, givens=(4, 6), test=True)
    >>> tokens.shape, targets.shape
    (torch.Size([3, 16]), torch.Size([3, 16]))

    Args:
        seed: of the split.
        held_back: classes of 24 grids each, of 12.

    Raises:
        UsageError: that leaves nothing to learn from, or nothing to test on.
    """

    def __init__(self, seed: int, held_back: int) -> None:
        count = len(patterns())
        if not 0 < held_back < count:
            raise UsageError(f"held_back must be between 1 and {count - 1}, not {held_back}.")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        self.tested, self.learnt = order[:held_back], order[held_back:]

    def draw(
        self, generator: torch.Generator, count: int, givens: tuple[int, int], test: bool
    ) -> tuple[Tensor, Tensor]:
        """Puzzles and what stands in their blanks, int64 `(count, 16)` each; a given's target is `IGNORED`.

        Args:
            generator: that says which.
            count: of puzzles.
            givens: the fewest and the most; each number between them is as likely.
            test: from the classes held back, or from the others.
        """
        fewest, most = givens
        classes = self.tested if test else self.learnt

        def number(below: int) -> int:
            return int(torch.randint(below, (), generator=generator))

        tokens, targets = [], []
        for _ in range(count):
            pattern = classes[number(len(classes))]
            chosen = puzzles(pattern, fewest + number(most - fewest + 1))
            given = torch.tensor(int(chosen[number(len(chosen))]) >> np.arange(CELLS)) & 1 == 1
            names = torch.randperm(SIDE, generator=generator) + 1
            solution = names[torch.from_numpy(patterns()[pattern]) - 1]
            tokens.append(torch.where(given, solution, BLANK))
            targets.append(torch.where(given, IGNORED, solution))
        return torch.stack(tokens), torch.stack(targets)
