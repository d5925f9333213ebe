"""The equation of a monotone equilibrium, forward and backward."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from equilibria.adjoints import Implicit
from equilibria.adjoints.attachment import shield
from equilibria.adjoints.protocol import Solve
from equilibria.linear import LinearSolution
from equilibria.loop import Outcome, run
from equilibria.nn.monotone.activation import Activation
from equilibria.nn.monotone.coupling import Coupling
from equilibria.norms import Norm, residual_size
from equilibria.problem import Affine, Equation, Evaluation, FixedPoint
from equilibria.solution import AdjointReport
from equilibria.solvers import ForwardBackward, PeacemanRachford, Solver
from equilibria.status import Agree, Failures
from equilibria.tree import Layout

# Solvers that take the equation's parts in turns.
SPLITTINGS = (ForwardBackward, PeacemanRachford)


class Parts:
    """z = activation(W z + b), with b of (batch, n)."""

    preactivation: Tensor

    def __init__(self, coupling: Coupling, bias: Tensor, activation: "Activation | Gate") -> None:
        self.coupling = coupling
        self.bias = bias
        self.activation = activation
        self.size = coupling.size

    def image(self, z: Tensor) -> Tensor:
        """activation(W z + b)."""
        self.preactivation = self.coupling.product(z) + self.bias
        return self.activation.function(self.preactivation)

    def resolvent(self, v: Tensor, step: float) -> Tensor:
        return self.coupling.resolvent(v + step * self.bias, step)

    def proximal(self, v: Tensor, step: Tensor | float) -> Tensor:
        return self.activation.proximal(v, step)


class MonotoneEquation(FixedPoint):
    """The equation of a layer, which comes in parts, and whose products round as W is large."""

    def __init__(self, parts: Parts, layout: Layout, norm: Norm, rtol: float | None, atol: float | None) -> None:
        super().__init__(lambda z: layout.unpack(parts.image(layout.pack(z))), (), layout, norm, rtol, atol, False)
        self.splitting = parts

    def settle_tolerances(self, dtype: torch.dtype) -> None:
        super().settle_tolerances(dtype)
        assert self.splitting is not None
        self.floor = self.level * max(1.0, self.splitting.size)


class Gate:
    """The linear activation a -> slopes a, with slopes in [0, 1]: the derivative of another."""

    def __init__(self, slopes: Tensor) -> None:
        self.slopes = slopes

    def function(self, a: Tensor) -> Tensor:
        return self.slopes * a

    def proximal(self, v: Tensor, step: Tensor | float) -> Tensor:
        return self.slopes * v / (step + (1 - step) * self.slopes)


class Backward(Affine):
    """q = D (b + W^T q), where D are the slopes of the activation: u = b + W^T q then solves u = b + J^T u.

    Its residual is that of u, or rather a bound on it, relative to b.
    """

    def __init__(self, coupling: Coupling, slopes: Tensor, b: Tensor, rtol: float, level: float) -> None:
        self.parts = Parts(coupling.transposed, b, Gate(slopes))
        super().__init__(self.parts.image, b, rtol, level)
        self.splitting = self.parts
        self._norm = 1 + coupling.size
        self.floor = level * self._norm

    def evaluate(self, u: Tensor) -> Evaluation:
        self.evaluations += 1
        image = self.parts.image(u)
        residual = image - u
        size = self._norm * residual_size(residual, u)
        scale = torch.linalg.vector_norm(self.b, dim=1)
        error = torch.where(size == 0, size, size / scale)
        return Evaluation(u, image, residual, error, size, size <= self.rtol * scale, u, error)


@dataclass(frozen=True)
class SplitLinear:
    """Solves (I - J^T) u = b of a monotone equilibrium by a splitting method, which does not use products with J^T."""

    solver: Solver
    coupling: Coupling
    slopes: Tensor

    def solve(
        self, operator: Any, b: Tensor, rtol: float, level: float, max_steps: int, agree: Agree
    ) -> LinearSolution:
        problem = Backward(self.coupling, self.slopes, b, rtol, level)
        start = self.slopes * b
        found = run(problem, self.solver, start, self.solver.init(problem, start), max_steps, agree=agree)
        u = b + problem.parts.coupling.product(found.z)
        return LinearSolution(u, found.status, found.steps, found.error, found.evaluations)


@dataclass(frozen=True)
class SplitImplicit:
    """`Implicit` whose solver is a splitting method, told of the parts that it works on."""

    implicit: Implicit

    def attach(
        self, problem: Equation, solve: Solve, failures: Failures, report: AdjointReport
    ) -> tuple[Tensor, Outcome]:
        with torch.no_grad():
            outcome = solve(problem)
            z, _ = shield(outcome, failures.agree)
            parts: Any = problem.splitting
            parts.image(z)
            slopes = parts.activation.slopes(parts.preactivation).nan_to_num(0)
        solver = SplitLinear(self.implicit.solver, parts.coupling, slopes)  # pyright: ignore[reportArgumentType]
        return replace(self.implicit, solver=solver).attach(problem, lambda problem: outcome, failures, report)
