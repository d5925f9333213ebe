"""What a forward evaluates once and a solve then uses at every evaluation: matrices, and the masks of dropout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import equilibria as eq


class Prepared(NamedTuple):
    """What a block has of its own in a forward, the same at every application of it.

    Attributes:
        matrices: of its linear maps.
        masks: factors `(batch, 1, width)` of entries that dropout zeroes or scales; `None` where it leaves all alone.
    """

    matrices: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]


class Linear(nn.Module):
    """A linear map without bias, whose matrix is asked for once per forward.

    >>> Linear(3, 4, normalised=True).matrix().shape
    torch.Size([4, 3])

    Args:
        in_features, out_features: entries before and after.
        normalised: whether the matrix is written as direction and size of each row.

    Source: Salimans and Kingma, "Weight normalization", 2016 (arXiv:1602.07868), equation 2.
    """

    def __init__(self, in_features: int, out_features: int, normalised: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)
        self.size = nn.Parameter(self.weight.detach().norm(dim=1)) if normalised else None

    @property
    def columns(self) -> int:
        """Entries of what the map reads."""
        return self.weight.shape[1]

    def matrix(self) -> Tensor:
        """The matrix `(out_features, in_features)`, evaluated now, in the precision that products here have."""
        weight = self.weight
        if self.size is not None:
            weight = weight * (self.size / weight.norm(dim=1)).unsqueeze(1)
        device = weight.device.type
        if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
            return weight.to(torch.get_autocast_dtype(device))
        return weight

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{columns}, {rows}, normalised={self.size is not None}"


def mask(dropout: eq.nn.VariationalDropout, x: Tensor, width: int) -> Tensor | None:
    """Factors by which dropout multiplies the entries of all tokens of a window alike.

    >>> mask(eq.nn.VariationalDropout(0.1), torch.zeros(3, 10, 64), 64).shape
    torch.Size([3, 1, 64])

    Args:
        dropout: in training mode or not.
        x: any tensor of the window, `(batch, time, ...)`.
        width: number of entries.

    Returns:
        A tensor `(batch, 1, width)`, or `None` where dropout leaves all alone.
    """
    if not dropout.training or dropout.p == 0:
        return None
    return dropout(x.new_ones(len(x), 1, width))


def masked(a: Tensor, factors: Tensor | None) -> Tensor:
    """Entries of tokens `(batch, time, width)` after dropout.

    >>> masked(torch.ones(1, 2, 3), None).shape
    torch.Size([1, 2, 3])
    """
    return a if factors is None else a * factors
