"""Dropout that a cell may use."""

import torch
from torch import Tensor, nn

from equilibria.options import check_dimensions, check_probability
from equilibria.solve import uncompiled
from equilibria.steady import draw, solving


class VariationalDropout(nn.Module):
    """Dropout whose mask stays the same through a solve and its backward, so that a cell with it has an equilibrium.

    >>> dropout = eq.nn.VariationalDropout(0.25, shared_dims=1)  # one mask for all positions of a sequence
    >>> dropout(torch.ones(2, 5, 8)).shape
    torch.Size([2, 5, 8])

    Each call of the layer around it draws new masks, also where backward of an earlier call has yet to come. Outside of
    a cell it draws at every call, as `torch.nn.Dropout` does, and so do explicit networks made of the same block. In
    `eval()` it is the identity. Masks follow `torch.manual_seed`; entries of an axis that `torch.vmap` maps share them.

    Args:
        p: probability of an entry to be zeroed, in [0, 1); the others are scaled by 1 / (1 - p).
        shared_dims: dimensions of the input along which the mask is one and the same, such as that of time.

    Raises:
        RuntimeError: an activation checkpoint inside of the cell evaluates it again in backward, where the masks of the
            solve are out of reach.

    Source: Gal and Ghahramani (2016); Bai, Kolter and Koltun (2019), section 3.2, for masks fixed within a solve.
    """

    def __init__(self, p: float = 0.5, shared_dims: int | tuple[int, ...] = ()) -> None:
        super().__init__()
        check_probability("p", p)
        self.p = p
        self.shared_dims = check_dimensions("shared_dims", shared_dims)
        self._within = False

    def forward(self, x: Tensor) -> Tensor:
        """`x`, of any shape, with entries zeroed in training."""
        if not self.training or self.p == 0:
            return x
        shape = list(x.shape)
        for dim in self.shared_dims:
            shape[dim] = 1
        keep = _numbers(self, torch.Size(shape), x.device) >= self.p
        return torch.where(keep, x / (1 - self.p), 0)

    def extra_repr(self) -> str:
        return f"p={self.p}, shared_dims={self.shared_dims}"


@uncompiled
def _numbers(module: VariationalDropout, shape: torch.Size, device: torch.device) -> Tensor:
    recomputing = torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]
    if module._within and recomputing and not solving():
        raise RuntimeError(
            "VariationalDropout was evaluated again in backward by an activation checkpoint inside of a cell, where "
            "the masks of the solve are out of reach: put the checkpoint around the layer, or use "
            "eq.Unrolled(checkpoint=True)."
        )
    module._within = solving()
    return draw(shape, device)
