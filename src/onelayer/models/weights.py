"""Matrices that a forward evaluates once and a solve then uses at every evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class Linear(nn.Linear):
    """A linear map without bias, whose matrix is asked for once per forward.

    >>> Linear(3, 4, normalised=True).matrix().shape
    torch.Size([4, 3])

    Args:
        in_features, out_features: entries before and after.
        normalised: whether the matrix is written as direction and size of each row.

    Source: Salimans and Kingma, "Weight normalization", 2016 (arXiv:1602.07868).
    """

    def __init__(self, in_features: int, out_features: int, normalised: bool = False) -> None:
        super().__init__(in_features, out_features, bias=False)
        nn.init.normal_(self.weight, std=in_features**-0.5)
        if normalised:
            weight_norm(self)

    def matrix(self) -> Tensor:
        """The matrix `(out_features, in_features)`, evaluated now, in the precision that products here have."""
        weight = self.weight
        device = weight.device.type
        if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
            return weight.to(torch.get_autocast_dtype(device))
        return weight
