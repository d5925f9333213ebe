"""A diagnosis of a cell, in plain words."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from equilibria.diagnosis.calls import Calls
from equilibria.diagnosis.causes import Cause, Finding
from equilibria.diagnosis.dynamics import Measured, Options, examine
from equilibria.nn import DEQ
from equilibria.nn.deq import start
from equilibria.solvers import Anderson, Solver
from equilibria.steady import hold

# Where these hold there is nothing to solve.
FATAL = {Cause.FAILS, Cause.STRUCTURE, Cause.IN_PLACE, Cause.RANDOM, Cause.STATEFUL, Cause.DETACHED}


@dataclass(frozen=True)
class Diagnosis:
    """What `eq.doctor` found; `str` of it is the report.

    Attributes:
        findings: what is wrong or worth knowing, with causes, details, samples and remedies.
        measured: radii, norms, traces of solvers, paths and gradients; None where the cell could not be solved at all.
    """

    findings: tuple[Finding, ...]
    measured: Measured | None

    @property
    def causes(self) -> tuple[Cause, ...]:
        """Of the findings."""
        return tuple(finding.cause for finding in self.findings)

    @property
    def healthy(self) -> bool:
        """Whether nothing needs to be changed."""
        return not any(cause.needs_change for cause in self.causes)

    def __str__(self) -> str:
        lines = ["Healthy: the cell has an equilibrium that is found, and its gradient can be trusted."]
        if not self.healthy:
            count = sum(cause.needs_change for cause in self.causes)
            lines = [f"Not healthy: {count} thing{'s' if count > 1 else ''} to change."]
        ordered = sorted(self.findings, key=lambda finding: not finding.cause.needs_change)
        lines += [f"{'!' if finding.cause.needs_change else '-'} {finding}" for finding in ordered]
        return "\n".join(lines + _numbers(self.measured))


def _numbers(measured: Measured | None) -> list[str]:
    if measured is None:
        return []
    lines = ["", f"{'solver':24}{'samples solved':>16}{'evaluations':>14}{'worst residual':>16}"]
    for name, one in measured.traces.items():
        solution = one.solution
        solved = f"{int(solution.converged.sum())} of {solution.converged.numel()}"
        residual = float(solution.residual.max()) if solution.residual.numel() else 0.0
        lines.append(f"{name:24}{solved:>16}{solution.evaluations:>14}{residual:>16.1e}")
    known = measured.radius.isfinite()
    if bool(known.any()):
        radius, norm = measured.radius[known], measured.norm[known]
        lines.append("")
        lines.append(f"spectral radius at the equilibrium: {_range(radius)} (plain iteration converges below 1)")
        lines.append(f"operator norm there: {_range(norm)} (a contraction below 1)")
    if measured.paths is not None:
        starts = measured.paths.status.shape[-1]
        distance = measured.paths.distance.nan_to_num(0).max()
        lines.append(f"equilibria from {starts} starts: at most {float(distance):.1e} of their size apart")
    if measured.gradient is not None:
        error = float(measured.gradient.relative_error[-1])
        lines.append(f"gradient at this tolerance: {error:.1e} from the exact one")
    return lines


def _range(values: Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{high:.3f}" if high - low < 5e-4 else f"{low:.3f} to {high:.3f}"


def doctor(
    cell: Callable[..., Any],
    *example: Any,
    z0: Any = None,
    solver: Solver = Anderson(),  # noqa: B008 (a frozen dataclass)
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 100,
    batch_dims: int = 1,
) -> Diagnosis:
    """Examine a cell on an example: whether it has an equilibrium that can be found and differentiated, and what to do.

    >>> diagnosis = eq.doctor(lambda z, x: z + x, torch.ones(2, 3))
    >>> print(str(diagnosis).splitlines()[1])
    ! No solver found an equilibrium, and it is likely that there is none near: the lowest residual of any solver is ...
    >>> diagnosis.healthy, diagnosis.causes
    (False, (<Cause.NO_EQUILIBRIUM: ...>,))

    Nothing is changed: a copy of the cell is examined where it is a module, with copies of the example, and the global
    random state comes back to where it was. Numbers are the same at each call. It takes some 2,000 evaluations of the
    cell at most, and as many products with its Jacobian.

    Args:
        cell: from a state and inputs to a state; or an `eq.DEQ`, whose own options are then examined.
        example: inputs of the cell, of a batch of at least two samples, so that coupling between samples can be told.
        z0: start; None is the cell's `initial_state`, or zeros like the first input.
        solver, rtol, atol, batch_dims: as for `eq.fixed_point`; those of an `eq.DEQ` are its own.
        max_steps: evaluations that the layer will have; every solver here has 200.

    Returns:
        `Diagnosis`. Faults of the cell, errors that it raises among them, are findings and never raised.

    Raises:
        TypeError, ValueError: it is not told where to start: no floating input, no `initial_state` and no `z0`.
    """
    options = Options(solver, rtol, atol, max_steps, batch_dims)
    if isinstance(cell, DEQ):
        layer = cell
        steps = layer.max_steps if layer.training or layer.eval_max_steps is None else layer.eval_max_steps
        options = Options(layer.solver, layer.rtol, layer.atol, steps, layer.batch_dims)
        cell = layer.cell
    example = pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, example)
    z0 = start(cell, example) if z0 is None else z0
    z0 = pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, z0)
    parameters: dict[str, Tensor] = {}
    if isinstance(cell, nn.Module):
        cell = copy.deepcopy(cell)
        parameters = dict(cell.named_parameters())
    devices = [leaf.device for leaf in pytree.tree_leaves(z0) if isinstance(leaf, Tensor) and leaf.is_cuda]
    with torch.random.fork_rng(devices[:1]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = Calls(hold(cell, cell) if isinstance(cell, nn.Module) else cell, z0, example, options.batch_dims)
        calls.parameters = parameters
        found = calls.findings()
        if any(finding.cause in FATAL for finding in found):
            return Diagnosis(tuple(found), None)
        measured, more = examine(calls, options)
    return Diagnosis(tuple(found + more), measured)
