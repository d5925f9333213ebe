"""What became of a solve, sample by sample, and how a failure is told."""

import enum
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Status(enum.IntEnum):
    """What became of one sample.

    >>> Status.STALLED.remedy
    'loosen rtol or compute f in a wider dtype: rounding, not the solver, is what stops it'
    """

    CONVERGED = 0
    MAX_STEPS = 1
    NONFINITE = 2
    STALLED = 3
    BREAKDOWN = 4
    COUPLED = 5
    INFEASIBLE = 6
    UNBOUNDED = 7
    NONCONVEX = 8
    DEGENERATE = 9

    @property
    def meaning(self) -> str:
        """What happened, in words."""
        return _MEANING[self]

    @property
    def remedy(self) -> str:
        """What to try, in words."""
        return _REMEDY[self]


_MEANING = {
    Status.CONVERGED: "met the tolerance",
    Status.MAX_STEPS: "did not meet the tolerance within the allowed evaluations",
    Status.NONFINITE: "met NaN or infinity",
    Status.STALLED: "stopped improving at the rounding level of the dtype",
    Status.BREAKDOWN: "met a singular or indefinite linear system",
    Status.COUPLED: "depended on other samples of the batch",
    Status.INFEASIBLE: "had constraints that no point satisfies",
    Status.UNBOUNDED: "had a cost that falls without bound",
    Status.NONCONVEX: "had a matrix P that is not positive semidefinite",
    Status.DEGENERATE: "had no single derivative at the solution",
}
_REMEDY = {
    Status.CONVERGED: "nothing",
    Status.MAX_STEPS: (
        "raise max_steps, loosen rtol, or lower the solver's relaxation (0.2 to 0.5 where the map expands)"
    ),
    Status.NONFINITE: "look for NaN in the inputs, lower the solver's relaxation, or start nearer by z0",
    Status.STALLED: "loosen rtol or compute f in a wider dtype: rounding, not the solver, is what stops it",
    Status.BREAKDOWN: "take another linear solver (eq.GMRES(), eq.Dense()), or look whether the solution is isolated",
    Status.COUPLED: "solve the batch as one problem, with batch_dims=0",
    Status.INFEASIBLE: "relax b or h, or let slack variables pay for violations",
    Status.UNBOUNDED: "bound the unknowns, or add a multiple of the identity to P",
    Status.NONCONVEX: "make P of a factor, L @ L.mT",
    Status.DEGENERATE: (
        "the gradient is that of one side: add a multiple of the identity to P, or drop constraints that repeat others"
    ),
}


class SolveError(RuntimeError):
    """A solve failed and `on_failure` was "raise"; `status` and `residual` hold it per sample.

    >>> try:
    ...     eq.fixed_point(lambda z: z + 1, torch.zeros(3, 2), solver=eq.Picard())
    ... except eq.SolveError as error:
    ...     print(error.status)
    tensor([1, 1, 1])
    """

    def __init__(self, message: str, status: Tensor, residual: Tensor) -> None:
        super().__init__(message)
        self.status = status
        self.residual = residual

    def __reduce__(self) -> tuple[type["SolveError"], tuple[str, Tensor, Tensor]]:
        return type(self), (str(self), self.status, self.residual)


class ConvergenceWarning(UserWarning):
    """A solve failed for some samples and `on_failure` was "warn"."""


# From "some sample of mine ..." to "some sample on some rank ...": lets ranks that share collectives stop together.
Agree = Callable[[bool], bool]

ON_FAILURE = ("raise", "warn", "ignore")


@dataclass
class Failures:
    """The policy for samples that fail: raises, or warns once per cause, or says nothing.

    Args:
        on_failure: one of `ON_FAILURE`.
        process_group: of the ranks that must stop and fail together, or None.
        told: what has been warned about already; a layer keeps it from call to call.
    """

    on_failure: str
    process_group: Any = None
    told: set[tuple[str, Status]] = field(default_factory=set)

    def agree(self, flag: bool) -> bool:
        """Whether `flag` holds here or, with a process group, on any of its ranks."""
        if self.process_group is None:
            return flag
        cuda = torch.distributed.get_backend(self.process_group) == "nccl"
        shared = torch.tensor(int(flag), device="cuda" if cuda else "cpu")
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, group=self.process_group)
        return bool(shared.item())

    def tell(self, what: str, status: Tensor, residual: Tensor) -> None:
        """Raise or warn about failed samples; `what` failed is the subject of the sentence."""
        if self.on_failure == "ignore":
            return
        failed = bool((status != Status.CONVERGED).any())
        if not (self.agree(failed) if self.on_failure == "raise" else failed):
            return
        causes = [Status(code) for code in torch.unique(status).tolist() if code != Status.CONVERGED]
        sentences = [_sentence(what, cause, status, residual) for cause in causes]
        if self.on_failure == "raise":
            message = " ".join(sentences) or f"{what}: a sample on another rank failed; its error names the cause."
            raise SolveError(message, status.detach(), residual.detach())
        for cause, sentence in zip(causes, sentences, strict=True):
            if (what, cause) not in self.told:
                self.told.add((what, cause))
                warnings.warn(sentence, ConvergenceWarning, stacklevel=_level_of_user())


def _sentence(what: str, cause: Status, status: Tensor, residual: Tensor) -> str:
    failed = (status == cause).nonzero().flatten()
    listed = ", ".join(map(str, failed[:5].tolist())) + (", ..." if len(failed) > 5 else "")
    samples = f"{len(failed)} of {len(status)} sample{'s' if len(status) != 1 else ''} ({listed})"
    worst = residual[failed].max().item()
    return f"{what}: {samples} {cause.meaning} (worst residual {worst:.1e}); {cause.remedy}."


def _level_of_user() -> int:
    """The stacklevel at which a warning points to the line of the user's own code."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("equilibria", "torch"):
        level, frame = level + 1, frame.f_back
    return level
