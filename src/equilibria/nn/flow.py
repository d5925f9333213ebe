"""Steady states and implicit time steps of differential equations, as equilibria."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from equilibria.adjoints import Adjoint, Implicit
from equilibria.linear import GMRES, LinearSolver
from equilibria.nn.deq import DEQ, start
from equilibria.nn.ode import check_field
from equilibria.norms import Norm, rms_norm
from equilibria.options import check_fraction, check_integer, check_part, check_positive
from equilibria.problem import Evaluation, FixedPoint, Problem
from equilibria.solution import Solution
from equilibria.solvers import Newton, Solver
from equilibria.tree import Layout

# The largest state, in entries a sample, whose eigenvalues are all computed.
MAX_SIZE = 1024


class Memory(NamedTuple):
    """The length of each sample's last step, and the residual that it started from; both (batch,)."""

    length: Tensor
    size: Tensor


@dataclass(frozen=True)
class PseudoTransient:
    """Implicit Euler steps of growing length along dz/dt = f(z) - z: to where the flow goes, then as fast as Newton.

    >>> cell = lambda z: z + z - z**3  # two stable equilibria, -1 and 1, and an unstable one, 0
    >>> z0 = torch.full((1, 1), 0.3)
    >>> eq.fixed_point(cell, z0, solver=eq.nn.PseudoTransient()).value
    tensor([[1.0000]])
    >>> eq.fixed_point(cell, z0, solver=eq.Newton(), rtol=0.0, atol=1e-6).value.abs() < 1e-6  # the unstable one
    tensor([[True]])

    A step of length h solves (I / h - J) d = f(z) - z, where J is the Jacobian of the right-hand side. Each sample's
    step grows as its residual falls. A step takes one differentiable evaluation of f besides its products with J.

    Args:
        first_step: the shortest step and the first; below the time in which the flow grows by a factor of e.
        growth: largest growth of a step from one to the next.
        linear_solver: of the steps; `eq.GMRES()`, or `eq.Dense()` for small systems.
        linear_rtol: relative residual to which a step is solved for.
        max_products: products with the Jacobian allowed for one step.

    Source: Kelley and Keyes (1998), Convergence analysis of pseudo-transient continuation.
    """

    first_step: float = 0.1
    growth: float = 10.0
    linear_solver: LinearSolver = GMRES()  # noqa: RUF009 (a frozen dataclass)
    linear_rtol: float = 1e-4
    max_products: int = 100

    def __post_init__(self) -> None:
        check_positive("first_step", self.first_step)
        check_positive("growth", self.growth)
        if self.growth <= 1:
            raise ValueError(f"growth must be above 1, not {self.growth}.")
        check_part("linear_solver", self.linear_solver, ("solve",), "eq.GMRES()")
        check_fraction("linear_rtol", self.linear_rtol)
        check_integer("max_products", self.max_products, 1)

    def init(self, problem: Problem, z: Tensor, previous: Memory | None = None) -> None:
        return None

    def step(self, problem: Problem, evaluation: Evaluation, memory: Memory | None) -> tuple[Tensor, Memory]:
        if torch.is_grad_enabled():
            raise ValueError(
                "PseudoTransient cannot be unrolled, since its steps come from solves of their own: differentiate its "
                "solution by eq.Implicit()."
            )
        z, residual = evaluation.z, evaluation.residual
        size = torch.linalg.vector_norm(residual, dim=1)
        length = torch.full_like(size, self.first_step)
        if memory is not None:
            fall = (memory.size / size).nan_to_num(1.0, posinf=self.growth)
            length = (memory.length * fall.clamp(max=self.growth)).clamp(self.first_step, 1 / torch.finfo(z.dtype).eps)
        jacobian = problem.linearize(z)
        problem.evaluations += 1
        level = min(problem.level, 0.05 * self.linear_rtol)
        # The image is z + field(z), so that a product with the Jacobian of the field is one with the image's less d.
        found = self.linear_solver.solve(
            lambda d: d + length[:, None] * (d - jacobian.product(d)),
            length[:, None] * residual,
            self.linear_rtol,
            level,
            self.max_products,
            evaluation.agree,
        )
        usable = torch.isfinite(found.x).all(dim=1) & (found.residual < 1)
        step = torch.where(usable[:, None], found.x, self.first_step * residual)
        return z + step, Memory(length, size)


class SteadyState(nn.Module):
    """A layer whose output is the steady state z of a flow, field(z, *inputs) = 0.

    >>> class Relaxation(nn.Module):
    ...     def forward(self, z, x):
    ...         return x - z**3
    >>> layer = eq.nn.SteadyState(Relaxation())
    >>> z = layer(torch.tensor([[8.0]]), z0=torch.ones(1, 1))
    >>> z, layer.stable(z, torch.tensor([[8.0]]))
    (tensor([[2.0000]]), tensor([True]))

    With `PseudoTransient`, the default, it is the state that the flow goes to from z0, as long as the steps are short
    beside the times of the flow; `eq.Newton()` may land on an unstable state. Neither looks at stability by itself:
    `stable` does. The start is `field.initial_state(*inputs)` where the field has one, else zeros like the first input.

    Args:
        field: from a state and the inputs to the rate of the state, of its structure; a module, so that its parameters
            are registered.
        solver: of the equation z = z + field(z, *inputs).
        adjoint, norm, on_failure, batch_dims: as for `eq.DEQ`.
        rtol, atol: a sample has converged when norm(field) <= atol + rtol norm(z + field); None as for
            `eq.fixed_point`.
        max_steps: evaluations of the field allowed.

    Source: Pineda (1987), Generalization of back-propagation to recurrent neural networks.
    """

    def __init__(
        self,
        field: Callable[..., Any],
        solver: Solver = PseudoTransient(),
        adjoint: Adjoint = Implicit(),  # noqa: B008
        rtol: float | None = None,
        atol: float | None = None,
        max_steps: int = 200,
        norm: Norm = rms_norm,
        on_failure: str = "warn",
        batch_dims: int = 1,
    ) -> None:
        super().__init__()
        check_field(field)
        self.equilibrium = DEQ(
            _Moved(field), solver, adjoint, rtol, atol, max_steps, None, norm, on_failure, batch_dims
        )

    @property
    def field(self) -> Callable[..., Any]:
        """The right-hand side."""
        cell: Any = self.equilibrium.cell
        return cell.field

    def forward(self, *inputs: Any, z0: Any = None) -> Any:
        """The steady state for `inputs`, found from `z0`."""
        return self.solve(*inputs, z0=z0).value

    def solve(self, *inputs: Any, z0: Any = None) -> Solution:
        """The whole `eq.Solution`, whose residual is norm(field) / norm(z + field)."""
        return self.equilibrium.solve(*inputs, z0=start(self.field, inputs) if z0 is None else z0)

    def abscissa(self, z: Any, *inputs: Any) -> Tensor:
        """The largest real part of the eigenvalues of the Jacobian of the field at `z`, per sample.

        Args:
            z: the steady state, of at most `MAX_SIZE` entries a sample, since it takes a product for each.
            inputs: those of the call.

        Returns:
            Tensor per sample, without gradient: the state is stable where it is below 0; NaN where the Jacobian is not
            finite.
        """
        layout = Layout.of(z, self.equilibrium.batch_dims)
        n = sum(layout.sizes)
        if n > MAX_SIZE:
            raise ValueError(
                f"The eigenvalues of {n} entries a sample would take {n} products: measure the outer ones, by "
                "eq.diagnostics.spectrum(field, z, *inputs)."
            )
        if n * layout.batch == 0:
            return torch.full(layout.batch_shape, -torch.inf, dtype=layout.dtype, device=layout.device)
        problem = FixedPoint(self.field, inputs, layout, rms_norm, None, None, has_aux=False)
        jacobian = problem.linearize(layout.pack(z).detach())
        units = torch.eye(n, dtype=layout.dtype, device=layout.device)
        rows = [jacobian.transposed_product(unit.expand(layout.batch, n)) for unit in units]
        matrix = torch.stack(rows, dim=1).double()
        finite = torch.isfinite(matrix).all(dim=2).all(dim=1)
        values = torch.linalg.eigvals(torch.where(finite[:, None, None], matrix, 0)).real.amax(dim=1)
        return torch.where(finite, values, torch.nan).to(layout.dtype).reshape(layout.batch_shape)

    def stable(self, z: Any, *inputs: Any) -> Tensor:
        """Bool tensor per sample: small displacements from the steady state `z` die out; `abscissa` is below 0."""
        return self.abscissa(z, *inputs) < 0


class ImplicitStep(nn.Module):
    """A layer that takes one implicit step in time, z1 = z0 + h ((1 - theta) field(z0) + theta field(z1)).

    >>> class Decay(nn.Module):
    ...     def forward(self, z):
    ...         return -1000.0 * z
    >>> eq.nn.ImplicitStep(Decay(), step=0.1)(torch.ones(1, 1))  # 1 / 101; an explicit step would give -99
    tensor([[0.0099]])

    theta = 1 is backward Euler, of order 1, which damps what is stiff; theta = 1/2 the trapezoidal rule, of order 2,
    which does not. Both are stable at any step on a stable linear flow. z1 is an equilibrium: its gradient takes one
    linear solve, and no step of the solver is kept.

    Args:
        field: from a state and the inputs to the rate of the state, of its structure.
        step: h, the length of the step.
        theta: in (0, 1], the part of the rate taken at the end; stable at any step from 1/2 on.
        solver, adjoint, rtol, atol, max_steps, norm, on_failure, batch_dims: as for `eq.DEQ`; the tolerance of z1.

    Source: Hairer and Wanner (1996), Solving ordinary differential equations II.
    """

    def __init__(
        self,
        field: Callable[..., Any],
        step: float,
        theta: float = 1.0,
        solver: Solver = Newton(),  # noqa: B008 (a frozen dataclass)
        adjoint: Adjoint = Implicit(),  # noqa: B008
        rtol: float | None = None,
        atol: float | None = None,
        max_steps: int = 100,
        norm: Norm = rms_norm,
        on_failure: str = "warn",
        batch_dims: int = 1,
    ) -> None:
        super().__init__()
        check_field(field)
        check_positive("step", step)
        check_fraction("theta", theta)
        self.step = step
        self.theta = theta
        self.equilibrium = DEQ(
            _Theta(field), solver, adjoint, rtol, atol, max_steps, None, norm, on_failure, batch_dims
        )

    @property
    def field(self) -> Callable[..., Any]:
        """The right-hand side."""
        cell: Any = self.equilibrium.cell
        return cell.field

    def forward(self, z0: Any, *inputs: Any, step: float | Tensor | None = None) -> Any:
        """The state one step after `z0`.

        Args:
            z0: any pytree of tensors whose first dimensions are the samples.
            inputs: passed on to the field.
            step: of this call, in place of the layer's; a tensor gets its gradient.
        """
        return self.solve(z0, *inputs, step=step).value

    def solve(self, z0: Any, *inputs: Any, step: float | Tensor | None = None) -> Solution:
        """The whole `eq.Solution` of the step; evaluations of the field at z0, one where theta < 1, are not counted."""
        h = self.step if step is None else step
        base = z0
        if self.theta < 1:
            base = pytree.tree_map(lambda z, rate: z + (1 - self.theta) * h * rate, z0, self.field(z0, *inputs))
        return self.equilibrium.solve(base, self.theta * h, *inputs, z0=z0)

    def extra_repr(self) -> str:
        return f"step={self.step}, theta={self.theta}"


class _Moved(nn.Module):
    """z + field(z, *inputs), whose equilibrium is a steady state."""

    def __init__(self, field: Callable[..., Any]) -> None:
        super().__init__()
        self.field = field

    def forward(self, z: Any, *inputs: Any) -> Any:
        return pytree.tree_map(torch.add, z, self.field(z, *inputs))


class _Theta(nn.Module):
    """base + h field(z, *inputs), whose equilibrium is the end of an implicit step."""

    def __init__(self, field: Callable[..., Any]) -> None:
        super().__init__()
        self.field = field

    def forward(self, z: Any, base: Any, h: float | Tensor, *inputs: Any) -> Any:
        return pytree.tree_map(lambda base, rate: base + h * rate, base, self.field(z, *inputs))
