"""What a solve says about each sample, and how two of them are compared."""

from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.adjoints import Adjoint
from equilibria.solution import Solution
from equilibria.solvers import Solver
from equilibria.testing.cases import Case
from equilibria.testing.laws import distance, expect


class Found(NamedTuple):
    """Everything that is said about each sample, by rows."""

    value: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    gradient: Tensor  # of x

    def take(self, rows: list[int]) -> "Found":
        return Found(*(field[rows] for field in self))


def weights(rows: Tensor) -> Tensor:
    """A gradient of the value that weighs entries unevenly, and samples alike."""
    return torch.linspace(-1, 2, rows.shape[-1], dtype=rows.dtype).expand(rows.shape)


def own_weights(case: Case) -> Tensor:
    """One that weighs samples unevenly too, each by what is its own wherever it stands."""
    return weights(case.x) * (1 + case.slope)


def gradients(
    case: Case, solver: Solver, adjoint: Adjoint | None = None, max_steps: int = 400, tolerance: float | None = None
) -> tuple[Solution, Tensor, Tensor]:
    """A solution, and the gradients of w and of x."""
    w, x, slope, fault = case.args
    w, x = w.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    solution = case.solve(solver, adjoint, max_steps, tolerance, args=(w, x, slope, fault))
    rows = case.join(solution.value)
    grad_w, grad_x = torch.autograd.grad(rows, (w, x), own_weights(case), allow_unused=True)
    grad_w = torch.zeros_like(w) if grad_w is None else grad_w
    grad_x = torch.zeros_like(x) if grad_x is None else grad_x
    return solution, grad_w, grad_x


def find(case: Case, solver: Solver, adjoint: Adjoint | None = None, max_steps: int = 400) -> Found:
    """What becomes of every sample of a case."""
    solution, _, grad_x = gradients(case, solver, adjoint, max_steps)
    value = case.join(solution.value).detach()
    return Found(value, solution.status, solution.steps, solution.residual, grad_x)


def agree(found: Found, expected: Found, where: str, case: Case) -> None:
    """Check that samples fared alike: exactly in float64, within a step at the tolerance in float32."""
    expect(
        torch.equal(found.status, expected.status),
        f"status is {expected.status.tolist()} and {where} {found.status.tolist()}, on {case}: let each sample's step "
        "depend on that sample alone.",
    )
    exact = case.x.dtype == torch.float64
    apart = int((found.steps - expected.steps).abs().max()) if found.steps.numel() else 0
    expect(
        apart <= (0 if exact else 1),
        f"steps are {expected.steps.tolist()} and {where} {found.steps.tolist()}, on {case}: let each sample's step "
        "depend on that sample alone, not on a mean, maximum or norm over the batch.",
    )
    for name, bound in (("value", 1e-9), ("gradient", 1e-7)):
        off = distance(getattr(found, name), getattr(expected, name))
        expect(
            off <= (bound if exact else 2e-3),
            f"the {name} of a sample moves by {off:.1e} {where}, on {case}: sum over the entries of a sample, never "
            "over samples.",
        )
