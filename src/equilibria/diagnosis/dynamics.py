"""What solves of a cell tell: whether there is an equilibrium, who finds it, and what its Jacobian is like."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equilibria.adjoints import Implicit
from equilibria.diagnosis.calls import Calls
from equilibria.diagnosis.causes import Cause, Finding
from equilibria.diagnostics import (
    GradientQuality,
    PathIndependence,
    Spectrum,
    Trace,
    gradient_quality,
    operator_norm,
    path_independence,
    spectrum,
    trace,
)
from equilibria.norms import rms_norm
from equilibria.problem import RTOL
from equilibria.solvers import Anderson, Broyden, Newton, Picard, Solver
from equilibria.status import ConvergenceWarning, Status

SOLVERS: dict[str, Solver] = {
    "Picard": Picard(),
    "Picard, relaxation 0.3": Picard(relaxation=0.3),
    "Anderson": Anderson(),
    "Broyden": Broyden(),
    "Newton": Newton(),
}
# Evaluations allowed to each solver, and products to each measurement of a Jacobian.
BUDGET = 200
PRODUCTS = 60
STARTS = 6
# A cell whose eigenvalues have at least this mean is a residual block.
IDENTITY = 0.9
# A tolerance relative to the state is also met by a state that runs away: an equilibrium has less than this part of the
# residual of the start, unless that was small beside the start itself.
FALLEN = 0.1


@dataclass(frozen=True)
class Options:
    """How the equilibrium is to be solved for: those of `eq.fixed_point`."""

    solver: Solver
    rtol: float | None
    atol: float | None
    max_steps: int
    batch_dims: int


@dataclass(frozen=True)
class Measured:
    """What was measured; per sample, NaN for those without an equilibrium.

    Attributes:
        traces: of each solver, by name.
        radius, norm: spectral radius and operator norm of the Jacobian at the equilibrium.
        spectrum: outer eigenvalues there.
        paths: solves from several starts.
        gradient: that of the adjoint against the exact one; None where there is nothing to differentiate for.
    """

    traces: dict[str, Trace]
    radius: Tensor
    norm: Tensor
    spectrum: Spectrum | None
    paths: PathIndependence | None
    gradient: GradientQuality | None


def examine(calls: Calls, options: Options) -> tuple[Measured, list[Finding]]:
    """Solves by every solver, and measurements where one has converged."""
    z0, layout = calls.layout.unpack(calls.start.clone()), calls.layout
    common: dict[str, Any] = {"batch_dims": options.batch_dims, "rtol": options.rtol, "atol": options.atol}
    traces = {}
    own_name = next((name for name, solver in SOLVERS.items() if solver == options.solver), "the layer's own")
    for name, solver in {**SOLVERS, own_name: options.solver}.items():
        traces[name] = trace(calls.cell, z0, *calls.inputs, solver=solver, max_steps=BUDGET, **common)
    nan = torch.full((layout.batch,), torch.nan, dtype=torch.float64)
    values, done = _best(calls, traces)
    found = _solves(calls, traces, own_name, options, done)
    if not bool(done.any()):
        return Measured(traces, nan, nan, None, None, None), found
    z = layout.unpack(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        outer = spectrum(calls.cell, z, *calls.inputs, max_steps=PRODUCTS, batch_dims=options.batch_dims)
        norm = operator_norm(calls.cell, z, *calls.inputs, max_steps=PRODUCTS, batch_dims=options.batch_dims)
        paths = path_independence(
            calls.cell,
            z0,
            *calls.inputs,
            starts=STARTS,
            scale=float(values[done].square().mean().sqrt().clamp(min=1e-3)),
            solver=options.solver,
            max_steps=BUDGET,
            **common,
        )
        gradient = _gradient(calls, z0, options)
    outer_values = outer.values.reshape(layout.batch, -1)
    radius = torch.where(done, outer_values.abs().nan_to_num(0).amax(dim=1), nan)
    norm = torch.where(done, norm.double().reshape(-1), nan)
    found += _spectra(calls, values, outer_values, radius, norm, done, traces)
    found += _several(paths, done, options, calls)
    if gradient is not None and bool((gradient.relative_error[-1:] > 0.1).any()):
        found.append(Finding(Cause.LOOSE_GRADIENT, f"by {float(gradient.relative_error[-1]):.0%}"))
    return Measured(traces, radius, norm, outer, paths, gradient), found


def _best(calls: Calls, traces: dict[str, Trace]) -> tuple[Tensor, Tensor]:
    """The equilibrium of each sample by the solver of the lowest residual, and which samples have one."""
    values, lowest = calls.start.clone(), torch.full((calls.layout.batch,), torch.inf, dtype=torch.float64)
    for one in traces.values():
        residual = one.solution.residual.double().reshape(-1)
        value = calls.layout.pack(one.solution.value)
        take = one.solution.converged.reshape(-1) & (residual < lowest) & ~_ran_away(calls, value)
        values = torch.where(take[:, None], value, values)
        lowest = torch.where(take, residual, lowest)
    return values, lowest < torch.inf


def _ran_away(calls: Calls, z: Tensor) -> Tensor:
    """Which states are of a residual that is small beside nothing but their own size."""
    image = calls.call(calls.start)
    first, last = rms_norm(image - calls.start), rms_norm(calls.call(z) - z)
    return (last > FALLEN * first) & (rms_norm(z) > 10 * rms_norm(image))


def _solves(calls: Calls, traces: dict[str, Trace], own_name: str, options: Options, done: Tensor) -> list[Finding]:
    statuses = {name: one.solution.status.reshape(-1) for name, one in traces.items()}
    found = []
    lost = ~done & calls.call(calls.start).isfinite().all(dim=1)
    if bool(lost.any()):
        sizes = []
        for one in traces.values():
            residual = one.solution.residual.double().reshape(-1).nan_to_num(torch.inf)
            sizes.append(torch.where(_ran_away(calls, calls.layout.pack(one.solution.value)), torch.inf, residual))
        best = torch.stack(sizes).amin(dim=0)
        rounding = lost & (best <= 20 * calls.level)
        for cause, which in ((Cause.BELOW_ROUNDING, rounding), (Cause.NO_EQUILIBRIUM, lost & ~rounding)):
            if bool(which.any()):
                lowest = float(best[which].max())
                detail = f"the lowest residual of any solver is {lowest:.1e}"
                if lowest == torch.inf:
                    detail = "the state runs away, and residuals are small beside its size alone, where they are"
                found.append(Finding(cause, detail, _listed(which)))
    own = traces[own_name]
    missed = done & (statuses[own_name] != Status.CONVERGED)
    if bool(missed.any()):
        helpers = [name for name, status in statuses.items() if bool((status[missed] == Status.CONVERGED).all())]
        detail = f"{', '.join(helpers)} {'does' if len(helpers) == 1 else 'do'}" if helpers else ""
        found.append(Finding(Cause.OWN_SOLVER, detail, _listed(missed)))
    late = done & ~missed & (own.solution.steps.reshape(-1) > options.max_steps)
    if bool(late.any()):
        most = int(own.solution.steps.reshape(-1)[late].max())
        found.append(Finding(Cause.NOT_ENOUGH_STEPS, f"it takes {most} and has {options.max_steps}", _listed(late)))
    return found


def _spectra(
    calls: Calls,
    values: Tensor,
    outer: Tensor,
    radius: Tensor,
    norm: Tensor,
    done: Tensor,
    traces: dict[str, Trace],
) -> list[Finding]:
    found = []
    count = outer.shape[1]
    leading = outer.gather(1, outer.abs().nan_to_num(-1).argmax(dim=1, keepdim=True))[:, 0] if count else radius
    negative = (leading.real < 0) & (leading.imag.abs() < 0.3 * leading.abs())
    expands = done & (radius >= 1 + 1e-3)
    plain = traces["Picard"].solution.converged.reshape(-1)
    for cause, which in ((Cause.OSCILLATES, expands & negative), (Cause.EXPANDS, expands & ~negative)):
        if bool((which & ~plain).any()):
            which = which & ~plain
            value = complex(leading[which][radius[which].argmax()])
            shown = f"{value.real:.2f}" if abs(value.imag) < 1e-6 * abs(value) else f"{value:.2f}"
            found.append(Finding(cause, f"its leading eigenvalue is {shown}", _listed(which)))
    near = (outer - 1).abs().nan_to_num(torch.inf).amin(dim=1) if count else radius
    singular = done & (near < 5e-3)
    identity = done & (_mean_eigenvalue(calls, values) > IDENTITY)
    if bool(identity.any()):
        found.append(Finding(Cause.RESIDUAL, "the mean of its eigenvalues is near 1", _listed(identity)))
    if bool((singular & ~identity).any()):
        least = float(near[singular & ~identity].min())
        found.append(Finding(Cause.SINGULAR, f"at a distance of {least:.1e}", _listed(singular & ~identity)))
    skew = done & (radius < 1) & (norm > 10) & (norm > 10 * radius)
    if bool(skew.any()):
        detail = f"{float(norm[skew].max()):.1f} against {float(radius[skew].max()):.2f}"
        found.append(Finding(Cause.NON_NORMAL, detail, _listed(skew)))
    slow = done & (radius > 0.95) & (radius < 1) & ~identity & ~singular
    if bool(slow.any()):
        found.append(Finding(Cause.SLOW, f"it is {float(radius[slow].max()):.3f}", _listed(slow)))
    return found


def _mean_eigenvalue(calls: Calls, z: Tensor) -> Tensor:
    """The trace of the Jacobian over its size, from random signs: the same for each sample (Hutchinson, 1990)."""
    jacobian = calls.problem.linearize(z)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(len(z), dtype=torch.float64)
    for _ in range(8):
        signs = (torch.randint(0, 2, (z.shape[1],), generator=generator) * 2 - 1).to(z).expand_as(z)
        total = total + (signs * jacobian.transposed_product(signs)).double().mean(dim=1) / 8
    return total


def _several(paths: PathIndependence, done: Tensor, options: Options, calls: Calls) -> list[Finding]:
    rtol = options.rtol or RTOL[calls.problem.compute_dtype or torch.float32]
    distance = paths.distance.double().reshape(-1).nan_to_num(0)
    apart = done & (distance > max(0.02, 20 * rtol))
    if not bool(apart.any()):
        return []
    return [
        Finding(Cause.SEVERAL, f"they lie up to {float(distance[apart].max()):.2f} of their size apart", _listed(apart))
    ]


def _gradient(calls: Calls, z0: Any, options: Options) -> GradientQuality | None:
    tensors = {name: leaf for name, leaf in calls.parameters.items() if leaf.requires_grad}
    if not tensors:
        return None
    return gradient_quality(
        calls.cell,
        z0,
        *calls.inputs,
        adjoint=Implicit(),
        parameters=tensors,
        solver=options.solver,
        rtol=options.rtol,
        atol=options.atol,
        max_steps=BUDGET,
        batch_dims=options.batch_dims,
        max_size=256,
    )


def _listed(which: Tensor) -> tuple[int, ...]:
    return () if bool(which.all()) else tuple(which.nonzero().flatten().tolist())
