"""Quadratic programs as a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from equilibria.adjoints import Adjoint, Implicit, Unrolled
from equilibria.linear import GMRES
from equilibria.loop import Outcome
from equilibria.nn.monitor import record
from equilibria.nn.quadratic.inputs import NAMES, Given, check_tensor, gather, trivial
from equilibria.nn.quadratic.program import apply, equilibrate, optimality
from equilibria.nn.quadratic.search import degenerate, search
from equilibria.nn.quadratic.splitting import splitting
from equilibria.norms import max_norm
from equilibria.options import check_choice, check_integer, check_part, check_tolerance
from equilibria.precision import precise
from equilibria.problem import Equation, FixedPoint
from equilibria.solution import AdjointReport, Solution
from equilibria.solve import uncompiled
from equilibria.status import ON_FAILURE, Failures, Status
from equilibria.transforms import transformed
from equilibria.tree import Layout


class QPReport(NamedTuple):
    """What is known of a solution beside itself; data, without gradient.

    Attributes:
        equality: multipliers of A z = b, (..., p).
        inequality: multipliers of G z <= h, (..., m), not negative.
        slack: h - G z, (..., m).
        degenerate: (...), bool; the solution has no single derivative: there are other solutions, or a constraint is
            only just active.
    """

    equality: Tensor
    inequality: Tensor
    slack: Tensor
    degenerate: Tensor


class QPLayer(nn.Module):
    """A layer whose output minimises 1/2 z'P z + q'z subject to A z = b and G z <= h.

    >>> layer = eq.nn.QPLayer(P=torch.eye(2), G=-torch.eye(2), h=torch.zeros(2))  # the nearest point with z >= 0
    >>> q = torch.tensor([[-1.0, 2.0], [3.0, -4.0]], requires_grad=True)
    >>> layer(q=q).round(decimals=4) + 0.0
    tensor([[1., 0.],
            [0., 4.]], grad_fn=<...>)

    Each of the six is given once, as a tensor (a buffer) or an `nn.Parameter` (learnt), or at each call, as you
    like; a call has precedence. P may be missing (a linear program), and so may q, and either pair of constraints. All
    may have leading dimensions, which broadcast: each program of them is a sample. P counts by its symmetric part, that
    must be positive semidefinite; an entry of h may be infinite, which is no constraint.

    The solution is the fixed point of an operator splitting (ADMM), searched by Anderson acceleration and polished by
    Newton's method, and is differentiated at that fixed point. All of it is computed in float64 and returned in the
    dtype of the inputs.

    Programs without a solution are told by their status: `INFEASIBLE`, `UNBOUNDED` (both by a certificate),
    `NONCONVEX`, `NONFINITE`. They return a finite point, which is no solution, and have no gradient. A solution without
    a single derivative converges, is marked in `solve(...).aux.degenerate`, and is told as `DEGENERATE`, by the same
    policy, where a gradient may be asked for.

    Args:
        P: (..., n, n). q: (..., n). A: (..., p, n). b: (..., p). G: (..., m, n). h: (..., m).
        adjoint: None is `eq.Implicit` with unrestarted `eq.GMRES`, to 1e-11; `eq.Implicit(order=2)` for second
            derivatives.
        rtol: largest violation of the constraints and of the stationarity of the Lagrangian, each relative to its
            largest term; None is 1e-8.
        max_steps: evaluations of the splitting operator allowed.
        on_failure: "raise", "warn" (once per cause for each layer) or "ignore".

    Raises:
        SolveError: a sample failed and `on_failure` is "raise".
        TypeError, ValueError: shapes that do not fit, or an option that makes no sense.

    Sources: Amos and Kolter (2017), OptNet; Stellato et al. (2020), OSQP; the splitting's fixed point as the implicit
    layer after Butler and Kwon (2022), Efficient differentiable quadratic programming layers: an ADMM approach.
    """

    P: Tensor | None
    q: Tensor | None
    A: Tensor | None
    b: Tensor | None
    G: Tensor | None
    h: Tensor | None

    def __init__(
        self,
        P: Tensor | None = None,
        q: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        adjoint: Adjoint | None = None,
        rtol: float | None = None,
        max_steps: int = 2000,
        on_failure: str = "warn",
    ) -> None:
        super().__init__()
        if adjoint is not None:
            check_part("adjoint", adjoint, ("attach",), "eq.Implicit()")
            if isinstance(adjoint, Unrolled):
                raise ValueError("A QPLayer cannot be unrolled, since Newton's method polishes it: use eq.Implicit().")
        check_tolerance("rtol", rtol)
        check_integer("max_steps", max_steps, 1)
        check_choice("on_failure", on_failure, ON_FAILURE)
        for name, value in zip(NAMES, (P, q, A, b, G, h), strict=True):
            check_tensor(name, value)
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        self.adjoint = adjoint
        self.rtol = rtol
        self.max_steps = max_steps
        self.on_failure = on_failure
        self._told: set[tuple[str, Status]] = set()

    def forward(
        self,
        P: Tensor | None = None,
        q: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
    ) -> Tensor:
        """The minimisers, (..., n); what is given here takes the place of what the layer has."""
        return self.solve(P, q, A, b, G, h).value

    @uncompiled
    def solve(
        self,
        P: Tensor | None = None,
        q: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
    ) -> Solution:
        """The whole `eq.Solution`, whose `aux` is a `QPReport`; the arguments are those of a call.

        Its residual is the larger of the violation of the constraints and of stationarity, relative to their terms; its
        steps are evaluations of the splitting operator.
        """
        if transformed():
            raise NotImplementedError(
                "QPLayer cannot run inside torch.func transforms: call it on a batch, all leading dimensions are "
                "samples, and differentiate by torch.autograd."
            )
        called = {name: value for name, value in zip(NAMES, (P, q, A, b, G, h), strict=True) if value is not None}
        for name, value in called.items():
            check_tensor(name, value)
        parts = {name: getattr(self, name) for name in NAMES} | called
        given = gather(parts)
        shape, q = given.shape, given.program.q
        rtol = 1e-8 if self.rtol is None else self.rtol
        failures = Failures(self.on_failure, told=self._told)
        with precise(q):
            solution = _solve(given, rtol, self.max_steps, self.adjoint, failures)
        report = QPReport(*(part.reshape((*shape, *part.shape[1:])) for part in solution.aux))
        solution = replace(
            solution,
            value=solution.value.reshape((*shape, solution.value.shape[1])).to(given.dtype),
            aux=report,
            **{name: getattr(solution, name).reshape(shape) for name in ("status", "steps", "residual")},
        )
        record(self, solution)
        return solution

    def extra_repr(self) -> str:
        shapes = [f"{name}={tuple(value.shape)}" for name in NAMES if isinstance(value := getattr(self, name), Tensor)]
        options = [f"{name}={getattr(self, name)!r}" for name in ("adjoint", "rtol", "max_steps", "on_failure")]
        return ", ".join(shapes + options)


def _solve(given: Given, rtol: float, max_steps: int, adjoint: Adjoint | None, failures: Failures) -> Solution:
    program, finite = given.program, given.finite
    with torch.no_grad():
        scales = equilibrate(program)
    scaled = program.scaled(scales)
    with torch.no_grad():
        _, info = torch.linalg.cholesky_ex(scaled.P + 1e-9 * torch.eye(scaled.P.shape[1]).to(scaled.P))
    convex = info == 0
    sound = finite & convex
    scaled = trivial(scaled, sound)
    with torch.no_grad():
        searched = search(scaled, rtol, rtol / 100, max_steps)
        status = torch.where(convex, searched.status, Status.NONCONVEX)
        status = torch.where(finite, status, Status.NONFINITE)
        # Where the cost falls without bound the search is far out, at a point that means nothing.
        nowhere = (status == Status.UNBOUNDED)[:, None]
        x, v = (torch.where(nowhere, 0, part) for part in (searched.found.x, searched.found.v))
        found = searched.found._replace(x=x, v=v)
    split = splitting(scaled, found.penalty)
    layout = Layout.of((found.x, found.v), 1)
    z = layout.pack((found.x, found.v))
    with torch.no_grad():
        multipliers = split.multipliers(found.v)
        reached = optimality(scaled, found.x, multipliers)
        error = torch.where(sound, reached.residual(), torch.nan)
        solved = status == Status.CONVERGED
        weak = solved & degenerate(scaled, found.x, multipliers)
    report = AdjointReport()
    if torch.is_grad_enabled():
        problem = FixedPoint(split.operator, (), layout, max_norm, rtol, rtol / 100, has_aux=False)
        # Where there is no solution there is nothing to differentiate.
        differentiable = solved | (status == Status.MAX_STEPS)
        attached = torch.where(differentiable, status, Status.NONFINITE)

        def hand_over(problem: Equation) -> Outcome:
            problem.evaluate(z)
            return Outcome(z, attached, found.steps, error, searched.evaluations, None)

        size = z.shape[1]
        if adjoint is None:
            adjoint = Implicit(solver=GMRES(restart=size + 1), rtol=1e-11, max_steps=2 * size + 20)
        z, _ = adjoint.attach(problem, hand_over, failures, report)
    failures.tell("solve", status, error)
    if z.requires_grad:
        failures.tell("gradient", torch.where(weak, Status.DEGENERATE, Status.CONVERGED), error)
    value = scales.columns * layout.unpack(z)[0]
    p = program.equalities
    with torch.no_grad():
        y = multipliers * scales.rows / scales.cost[:, None]
        slack = torch.where(given.free, torch.inf, (program.d - apply(program.C, value))[:, p:])
    aux = (y[:, :p], y[:, p:], slack, weak)
    return Solution(value, status, found.steps, error, searched.evaluations, aux, None, report)
