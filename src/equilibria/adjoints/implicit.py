"""The implicit function theorem."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equilibria.adjoints.attachment import Call, attach, restore, sealed, shield
from equilibria.adjoints.protocol import Solve
from equilibria.linear import GMRES, Dense, LinearSolution, LinearSolver
from equilibria.loop import Outcome, run
from equilibria.options import check_choice, check_integer, check_part, check_tolerance
from equilibria.precision import precise
from equilibria.problem import RTOL, Affine, Equation, Linearization
from equilibria.solution import AdjointReport
from equilibria.solvers import Picard, Solver
from equilibria.status import Agree, Failures, Status

REFUSAL = (
    "This gradient was taken with create_graph=True beyond the order of its adjoint: "
    "use eq.Implicit(order=2) for second derivatives, eq.Unrolled() for all."
)

Product = Callable[[Tensor], Tensor]


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
            back-propagation. None takes `GMRES`; plain iteration for the samples it does not solve (a restarted GMRES
            stagnates on nilpotent Jacobians, where plain iteration is exact); and `Dense` for those that this does not
            solve either, where the state has no more entries than `max_steps`.
        rtol: tolerance relative to v; None takes that of the forward solve, never looser than 1e-2.
        max_steps: products allowed, for each of the solvers that have their turn.
        order: 1, or 2 where derivatives of the gradient are asked for; it costs one more evaluation and one more
            backward solve.

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
        check_choice("order", self.order, (1, 2))

    def attach(
        self, problem: Equation, solve: Solve, failures: Failures, report: AdjointReport
    ) -> tuple[Tensor, Outcome]:
        with torch.no_grad():
            outcome = solve(problem)
        z, bad = shield(outcome, failures.agree)

        def apply(z: Tensor) -> Tensor:
            report.evaluations += 1
            return problem.apply(z)

        def solve_linear(product: Product, v: Tensor) -> Tensor:
            return self.solve_linear(product, v, bad, problem, failures, report)

        value = implicit(apply, z, bad, self.order, solve_linear)
        return restore(value, outcome, bad), outcome

    def solve_linear(
        self,
        product: Product,
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
        with precise(v):
            found = self._solve_scaled(product, b, rtol, problem.level, failures.agree)
            if failures.agree(bool((solvable & (found.status == Status.CONVERGED)).any())):
                found = self._checked(found, product, b, scale, solvable, rtol, problem.level)
        shape = problem.layout.batch_shape
        report.status = torch.where(usable, found.status, Status.NONFINITE).reshape(shape)
        report.residual = torch.where(usable, found.residual, torch.nan).reshape(shape)
        report.steps = found.steps.reshape(shape)
        # A gradient that comes in as NaN goes on as NaN, which loss scalers look for; it is no failure of this solve.
        told_status = torch.where(usable, found.status, Status.CONVERGED)
        failures.tell("backward solve", told_status, torch.where(usable, found.residual, 0))
        u = torch.where(solvable[:, None], found.x * scale[:, None], v)
        return u if bad is None else torch.where(bad[:, None], 0, u)

    @staticmethod
    def _checked(
        found: LinearSolution, product: Product, b: Tensor, scale: Tensor, solvable: Tensor, rtol: float, level: float
    ) -> LinearSolution:
        """The solution with its residual measured once more, by a product with all samples as they are.

        Each was solved for at a scale of its own, as if the others did not matter. Where f couples them they do, and
        that shows nowhere else.
        """
        u = torch.where(solvable[:, None], found.x * scale[:, None], 0)
        left = b + torch.where(solvable[:, None], (product(u) - u) / torch.where(solvable, scale, 1)[:, None], 0)
        size = torch.where(solvable, torch.linalg.vector_norm(b, dim=1), 1)
        error = torch.linalg.vector_norm(left, dim=1) / size
        noise = level * (1 + torch.linalg.vector_norm(found.x, dim=1) / size)
        claimed = solvable & (found.status == Status.CONVERGED)
        coupled = claimed & (error > 10 * noise.clamp(min=rtol))
        return replace(
            found,
            status=torch.where(coupled, Status.COUPLED, found.status),
            residual=torch.where(coupled, error, found.residual),
            steps=found.steps + claimed,
            products=found.products + 1,
        )

    def _solve_scaled(self, product: Product, b: Tensor, rtol: float, level: float, agree: Agree) -> LinearSolution:
        def operator(u: Tensor) -> Tensor:
            return u - product(u)

        def iterate(solver: Solver, start: Tensor, b: Tensor) -> LinearSolution:
            problem = Affine(product, b, rtol, level, plain=solver == Picard())
            found = run(problem, solver, start, solver.init(problem, start), self.max_steps, agree=agree)
            return LinearSolution(found.z, found.status, found.steps, found.error, found.evaluations)

        if self.solver is None:
            found = GMRES(give_up=True).solve(operator, b, rtol, level, self.max_steps, agree)
            unsolved = (found.status == Status.MAX_STEPS) | (found.status == Status.BREAKDOWN)
            if agree(bool(unsolved.any())):
                # Solved samples wait at the solution of 0 = 0, which takes no step.
                start, rest = (torch.where(unsolved[:, None], t, 0) for t in (found.x, b))
                found = _better(found, iterate(Picard(), start, rest), unsolved)
            unsolved = unsolved & (found.status != Status.CONVERGED) & (found.status != Status.STALLED)
            if b.shape[1] <= self.max_steps and agree(bool(unsolved.any())):
                rest = torch.where(unsolved[:, None], b, 0)
                found = _better(found, Dense().solve(operator, rest, rtol, level, self.max_steps, agree), unsolved)
            return found
        if isinstance(self.solver, LinearSolver):
            return self.solver.solve(operator, b, rtol, level, self.max_steps, agree)
        return iterate(self.solver, b, b)


def implicit(
    call: Call,
    z: Tensor,
    bad: Tensor | None,
    order: int,
    solve_linear: Callable[[Product, Tensor], Tensor],
) -> Tensor:
    """`z`, the solution of z = call(z), with derivatives up to `order`; each is one Newton step whose value is zero.

    The backward of a step solves u = v + J^T u. Where backward is itself differentiated, u is in turn the solution of
    that equation, which depends on v, on z and on all that `call` captures, and is attached in the same way. With a
    single step second derivatives would miss how the solution moves the Jacobian.

    Args:
        call: the map.
        z: detached, (batch, n).
        bad: samples to leave out, or None.
        order: highest derivative.
        solve_linear: from products u -> J^T u and v to u.
    """

    def pull(z: Tensor, v: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return solve_linear(Linearization(call, z).transposed_product, v)
        if order == 1:
            raise RuntimeError(REFUSAL)
        with torch.no_grad():
            u = solve_linear(Linearization(call, z).transposed_product, v)
        start = z.view_as(z) if z.requires_grad else z.detach().requires_grad_()
        image = sealed(call, bad)(start)

        def adjoint_equation(u: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(image, start, u, create_graph=True, materialize_grads=True)
            return v + product

        return implicit(adjoint_equation, u, bad, order - 1, solve_linear)

    value = z
    for _ in range(order):
        value = attach(value, sealed(call, bad)(value), bad, pull)
    return value


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
