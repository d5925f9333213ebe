"""Words whose state has to be tracked: bits with their parity, and elements of the group A5 with their product."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Permutation = tuple[int, ...]

# Of five points; these two generate all of A5.
FIVE_CYCLE, THREE_CYCLE = (1, 2, 3, 4, 0), (1, 2, 0, 3, 4)


def after(one: Permutation, other: Permutation) -> Permutation:
    """The permutation that does the other first and then the one.

    >>> after((1, 0, 2), (0, 2, 1))
    (1, 2, 0)
    """
    return tuple(one[k] for k in other)


def even_permutations(points: int) -> list[Permutation]:
    """The alternating group of so many points, in alphabetical order, the identity first.

    >>> len(even_permutations(5))
    60
    """
    pairs = list(itertools.combinations(range(points), 2))
    return [p for p in itertools.permutations(range(points)) if sum(p[i] > p[j] for i, j in pairs) % 2 == 0]


@dataclass(frozen=True, eq=False)
class Words:
    """The word problem of a finite group: which element the product of a word's letters is, at each of its positions.

    >>> parity().products(torch.tensor([[1, 0, 1, 1]]))
    tensor([[1, 1, 0, 1]])

    Attributes:
        table: the element that a product is, int64 `(elements, elements)`; the row stands left of the column.
        letters: elements that words are made of, int64.
    """

    table: Tensor
    letters: Tensor

    @property
    def elements(self) -> int:
        """Number of elements, one of which is right by chance."""
        return len(self.table)

    def draw(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random words with the products of their prefixes, int64 `(count, length)` each.

        Args:
            count: of the words.
            length: of each.
            generator: that the letters are drawn from, independently and uniformly.
        """
        words = self.letters[torch.randint(len(self.letters), (count, length), generator=generator)]
        return words, self.products(words)

    def products(self, words: Tensor) -> Tensor:
        """The product of each prefix, first letter leftmost, of words `(count, length)`."""
        found = [words[:, 0]]
        for k in range(1, words.shape[1]):
            found.append(self.table[found[-1], words[:, k]])
        return torch.stack(found, dim=1)


def parity() -> Words:
    """Bits, and whether an odd number of them were 1: the word problem of the group of two elements."""
    return Words(torch.tensor([[0, 1], [1, 0]]), torch.arange(2))


def alternating(letters: Sequence[Permutation] | None = None) -> Words:
    """The word problem of A5, the smallest group that is not solvable.

    >>> alternating().elements
    60

    Args:
        letters: permutations of five points that words are made of; `None` for all 60.

    Source: Barrington, "Bounded-width polynomial-size branching programs recognize exactly those languages in NC1",
    1989: this word problem is complete for NC1. Merrill, Petty and Sabharwal, "The Illusion of State in State-Space
    Models", 2024 (arXiv:2404.08819): as a test of sequence models.
    """
    elements = even_permutations(5)
    number = {element: k for k, element in enumerate(elements)}
    table = torch.tensor([[number[after(one, other)] for other in elements] for one in elements])
    return Words(table, torch.tensor([number[letter] for letter in letters or elements]))
