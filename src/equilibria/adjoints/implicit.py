"""The implicit function theorem."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.adjoints.attachment import attach, autocast_state, shield
from equilibria.adjoints.protocol import Solve
from equilibria.linear import GMRES, LinearSolution, LinearSolver
from equilibria.loop import Agree, Outcome, run
from equilibria.options import check_choice, check_integer, check_part, check_tolerance
from equilibria.problem import RTOL, Affine, Equation
from equilibria.solution import AdjointReport
from equilibria.solvers import Picard, Solver
from equilibria.status import Failures, Status

REFUSAL = (
    "Implicit(order=1) gives first derivatives only: take them without create_graph=True, "
    "or use eq.Unrolled(), which has all orders."
)


@dataclass(frozen=True)
class Implicit:
    """Gradients by the implicit function theorem: exact at the equilibrium, at a memory that no step adds to.

    >>> a = torch.tensor([[0.5]], requires_grad=True)
    >>> z = eq.fixed_point(lambda z: a * torch.cos(z), torch.zeros(1, 1), adjoint=eq.Implicit()).value
    >>> torch.autograd.grad(z.sum(), a)[0]
    tensor([[0.7395]])

    For z = f(z, x) and a gradient v of z it solves u = v + J^T u, where J = df/dz, and hands u to f's own backward. The
    products J^T u come from one evaluation of f that backward makes.

    Args:
        solver: a linear solver, or a solver of fixed points: `Implicit(solver=eq.Picard())` is recurrent
            back-propagation. None takes `GMRES`, and plain iteration for the samples it does not solve (a restarted
            GMRES stagnates on nilpotent Jacobians, where plain iteration is exact).
        rtol: tolerance relative to v; None takes that of the forward solve, never looser than 1e-2.
        max_steps: products allowed, for GMRES and for what follows it each.
        order: 1; the highest derivative.

    Sources: Bai, Kolter and Koltun (2019), theorem 1; Almeida (1987); Pineda (1987).
    """

    solver: LinearSolver | Solver | None = None
    rtol: float | None = None
    max_steps: int = 100
    order: int = 1

    def __post_init__(self) -> None:
        if self.solver is not None:
            linear = hasattr(self.solver, "solve")
            check_part("solver", self.solver, ("solve",) if linear else ("init", "step"), "eq.GMRES() or eq.Picard()")
        check_tolerance("rtol", self.rtol)
        check_integer("max_steps", self.max_steps, 1)
        check_integer("order", self.order, 1)
        check_choice("order", self.order, (1,))

    def attach(
        self, problem: Equation, solve: Solve, failures: Failures, report: AdjointReport
    ) -> tuple[Tensor, Outcome]:
        with torch.no_grad():
            outcome = solve(problem)
        z, bad, cleaning = shield(outcome)
        with cleaning as seal:
            image = seal(problem.apply(z))
        report.evaluations += 1
        autocast = autocast_state(z.device)

        def pull(z: Tensor, v: Tensor) -> Tensor:
            with autocast():
                jacobian = problem.linearize(z)
            report.evaluations += 1
            return self._solve(jacobian.transposed_product, v, bad, problem, failures, report)

        value = attach(z, image, bad, pull, REFUSAL)
        return value if bad is None else torch.where(bad[:, None], outcome.z, value), outcome

    def _solve(
        self,
        product: Callable[[Tensor], Tensor],
        v: Tensor,
        bad: Tensor | None,
        problem: Equation,
        failures: Failures,
        report: AdjointReport,
    ) -> Tensor:
        """The u of u = v + J^T u, sample by sample, on gradients scaled to one."""
        assert problem.compute_dtype is not None
        rtol = min(problem.rtol or RTOL[problem.compute_dtype], 1e-2) if self.rtol is None else self.rtol
        scale = v.abs().amax(dim=1) if v.shape[1] else v.new_zeros(v.shape[0])
        usable = torch.isfinite(scale) if bad is None else torch.isfinite(scale) & ~bad
        solvable = usable & (scale > 0)
        b = torch.where(solvable[:, None], v / torch.where(solvable, scale, 1)[:, None], 0)
        found = self._solve_scaled(product, b, rtol, problem.level, failures.agree)
        shape = problem.layout.batch_shape
        report.status = torch.where(usable, found.status, Status.NONFINITE).reshape(shape)
        report.residual = torch.where(usable, found.residual, torch.nan).reshape(shape)
        report.steps = found.steps.reshape(shape)
        # A gradient that comes in as NaN goes on as NaN, which loss scalers look for; it is no failure of this solve.
        told_status = torch.where(usable, found.status, Status.CONVERGED)
        failures.tell("backward solve", told_status, torch.where(usable, found.residual, 0))
        u = torch.where(solvable[:, None], found.x * scale[:, None], v)
        return u if bad is None else torch.where(bad[:, None], 0, u)

    def _solve_scaled(
        self, product: Callable[[Tensor], Tensor], b: Tensor, rtol: float, level: float, agree: Agree
    ) -> LinearSolution:
        def operator(u: Tensor) -> Tensor:
            return u - product(u)

        def iterate(solver: Solver, start: Tensor, b: Tensor) -> LinearSolution:
            problem = Affine(product, b, rtol, level)
            found = run(problem, solver, start, solver.init(problem, start), self.max_steps, agree=agree)
            return LinearSolution(found.z, found.status, found.steps, found.error, found.evaluations)

        if self.solver is None:
            first = GMRES().solve(operator, b, rtol, level, self.max_steps, agree)
            unsolved = first.status == Status.MAX_STEPS
            if not agree(bool(unsolved.any())):
                return first
            # Solved samples wait at the solution of 0 = 0, which takes no step.
            start, rest = (torch.where(unsolved[:, None], t, 0) for t in (first.x, b))
            return _better(first, iterate(Picard(), start, rest), unsolved)
        if isinstance(self.solver, LinearSolver):
            return self.solver.solve(operator, b, rtol, level, self.max_steps, agree)
        return iterate(self.solver, b, b)


def _better(first: LinearSolution, second: LinearSolution, unsolved: Tensor) -> LinearSolution:
    """The solution of the lower residual for each sample that the first left unsolved."""
    take = unsolved & ((second.status == Status.CONVERGED) | (second.residual < first.residual))
    return LinearSolution(
        torch.where(take[:, None], second.x, first.x),
        torch.where(take, second.status, first.status),
        torch.where(unsolved, first.steps + second.steps, first.steps),
        torch.where(take, second.residual, first.residual),
        first.products + second.products,
    )
