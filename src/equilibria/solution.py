"""What a solve returns."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from equilibria.status import Status


@dataclass
class AdjointReport:
    """The backward solve's own report, filled in when backward has run.

    Attributes:
        status, residual, steps: per sample, as in `Solution`; None until backward has run, and for adjoints that solve
            nothing. The residual is relative to the incoming gradient, the steps are products with the transposed
            Jacobian.
        evaluations: differentiable calls of `f` that the gradient took, the one that attached it included.
    """

    status: Tensor | None = None
    residual: Tensor | None = None
    steps: Tensor | None = None
    evaluations: int = 0


@dataclass
class Solution:
    """The solution of a batch of equations, with what became of each sample.

    >>> sol = eq.fixed_point(torch.cos, torch.zeros(3, 1))
    >>> bool(sol.converged.all()), sol.evaluations == int(sol.steps.max())
    (True, True)

    Attributes:
        value: the state, of the structure of `z0`, attached to autograd.
        status: int tensor per sample (of the shape of the batch dimensions), an `eq.Status` each.
        steps: int tensor per sample, evaluations of `f` until it stopped.
        residual: float tensor per sample, of the returned value: relative for `fixed_point`, absolute for others.
        evaluations: calls of `f` that the forward solve made.
        aux: the second output of `f` at the returned value, where `has_aux`; data, without gradient.
        state: pass it as `state=` to the next solve to start from here.
        adjoint: the backward solve's report.
    """

    value: Any
    status: Tensor
    steps: Tensor
    residual: Tensor
    evaluations: int
    aux: Any = None
    state: Any = field(default=None, repr=False)
    adjoint: AdjointReport = field(default_factory=AdjointReport)

    @property
    def converged(self) -> Tensor:
        """Bool tensor per sample: the tolerance was met."""
        return self.status == Status.CONVERGED
