"""What solvers are told about a point."""

from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.status import Agree

# The one table of default tolerances, by the dtype that f computes in: of fixed points, and of roots and minima.
RTOL = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
ATOL = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class Evaluation(NamedTuple):
    """One evaluation of the equation for a whole batch.

    Attributes:
        z: (batch, n), where it was evaluated.
        image: (batch, n), where plain iteration would go.
        residual: (batch, n), `image - z`.
        error: (batch,), what `Solution.residual` reports.
        size: (batch,), the absolute norm of the residual, worst leaf.
        satisfied: (batch,) bool, the tolerance is met.
        best: (batch, n), the iterate of the lowest error so far.
        best_error: (batch,), that error.
        values: (batch,), of the objective, where there is one.
        stopped: (batch,) bool, samples whose next iterate no longer matters; None where there is none.
        agree: makes ranks that share collectives take the same way, for solvers that evaluate f or its products.
    """

    z: Tensor
    image: Tensor
    residual: Tensor
    error: Tensor
    size: Tensor
    satisfied: Tensor
    best: Tensor
    best_error: Tensor
    values: Tensor | None = None
    stopped: Tensor | None = None
    agree: Agree = bool


def rounding_level(dtype: torch.dtype) -> float:
    """The relative residual at which rounding in `dtype`, not the solver, may be what stops progress."""
    # Half precision products accumulate in float32 and round once; wider ones gather rounding over the whole sum.
    return torch.finfo(dtype).eps * (16 if dtype in (torch.float64, torch.float32) else 2)
