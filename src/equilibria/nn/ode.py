"""Neural ordinary differential equations as a layer, integrated by torchdiffeq."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from equilibria.nn.integration import Integration, integrate, integrators
from equilibria.nn.monitor import record
from equilibria.options import check_callable, check_choice, check_flag, check_integer, check_positive, check_tolerance
from equilibria.precision import autocast_dtype
from equilibria.problem import RTOL
from equilibria.solution import AdjointReport, Solution
from equilibria.solve import uncompiled
from equilibria.status import ON_FAILURE, Failures, Status
from equilibria.steady import steady
from equilibria.transforms import transformed
from equilibria.tree import Layout

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun3", "rk4")


class ODELayer(nn.Module):
    """A layer whose output is the state at the last time of dz/dt = field(t, z, *inputs) from z0.

    >>> class Decay(nn.Module):
    ...     def forward(self, t, z, rate):
    ...         return -rate * z
    >>> layer = eq.nn.ODELayer(Decay(), times=(0.0, 1.0), rtol=1e-6)
    >>> layer(torch.ones(2, 1), torch.tensor([[1.0], [2.0]]))  # exp(-rate)
    tensor([[0.3679],
            [0.1353]])

    Gradients reach the state, the inputs, the times and whatever the field captures. With `adjoint=True` they come from
    the adjoint equation, integrated backward at a memory that no step adds to; they are as accurate as the tolerance.
    With `adjoint=False` they come from the very steps that were taken, and have derivatives of their own.

    All samples of a batch share the steps of an adaptive method, so that the answer of one depends on its company,
    within the tolerance. The sample with the largest error decides each step: a tolerance means the same for each
    sample. One that meets NaN is left out, and the others are integrated again without it.

    Args:
        field: from a time (a scalar), a state and the inputs of the call to the rate of the state, of its structure.
        times: at least two times, rising or falling; a call may bring its own.
        method: adaptive, "dopri5", "dopri8", "bosh3", "fehlberg2" or "adaptive_heun", or with fixed steps, "euler",
            "midpoint", "heun3" or "rk4".
        rtol, atol: bounds of the local error of adaptive methods, atol + rtol |z|, forward and backward; None is for
            rtol 1e-8, 1e-4 or 1e-2 in float64, float32 and half precision, for atol a hundredth of rtol.
        step_size: of methods with fixed steps; None takes one step between each two times.
        adjoint: whether gradients come from the adjoint equation.
        max_steps: evaluations of the field allowed to one integration, forward or backward.
        on_failure: "raise", "warn" (once per cause for each layer) or "ignore". A sample that fails returns z0, with
            zero gradient.
        batch_dims: as for `eq.fixed_point`.

    Raises:
        ImportError: torchdiffeq is not installed.

    Source: Chen, Rubanova, Bettencourt and Duvenaud (2018), Neural ordinary differential equations.
    """

    def __init__(
        self,
        field: Callable[..., Any],
        times: Sequence[float] | Tensor = (0.0, 1.0),
        method: str = "dopri5",
        rtol: float | None = None,
        atol: float | None = None,
        step_size: float | None = None,
        adjoint: bool = True,
        max_steps: int = 10_000,
        on_failure: str = "warn",
        batch_dims: int = 1,
    ) -> None:
        super().__init__()
        integrators()  # asked for here, so that it is missed before training starts
        check_field(field)
        check_choice("method", method, ADAPTIVE + FIXED)
        check_tolerance("rtol", rtol)
        check_tolerance("atol", atol)
        if step_size is not None:
            check_positive("step_size", step_size)
            if method in ADAPTIVE:
                raise ValueError(f"step_size is for fixed steps, and {method!r} chooses its own: use one of {FIXED}.")
        check_flag("adjoint", adjoint)
        check_integer("max_steps", max_steps, 1)
        check_choice("on_failure", on_failure, ON_FAILURE)
        check_integer("batch_dims", batch_dims, 0)
        _as_times(times, torch.device("cpu"))
        self.field = field
        self.times = times if isinstance(times, Tensor) else tuple(times)
        self.method = method
        self.rtol = rtol
        self.atol = atol
        self.step_size = step_size
        self.adjoint = adjoint
        self.max_steps = max_steps
        self.on_failure = on_failure
        self.batch_dims = batch_dims
        self._told: set[tuple[str, Status]] = set()

    def forward(
        self, z0: Any, *inputs: Any, times: Sequence[float] | Tensor | None = None, trajectory: bool = False
    ) -> Any:
        """The state at the last time, or at all times.

        Args:
            z0: the state at the first time, any pytree of tensors whose first dimensions are the samples.
            inputs: passed on to the field.
            times: of this call, in place of the layer's; they get gradients where they require them.
            trajectory: the states at all times, (times, *shape) each, in place of the last one.
        """
        return self.solve(z0, *inputs, times=times, trajectory=trajectory).value

    def solve(
        self, z0: Any, *inputs: Any, times: Sequence[float] | Tensor | None = None, trajectory: bool = False
    ) -> Solution:
        """The whole `eq.Solution`; the arguments are those of a call.

        `steps` and `evaluations` are calls of the field. `residual` is the largest local error of a step that was
        accepted, in parts of the tolerance; NaN for fixed steps, which estimate none. `adjoint` tells of the backward
        integration, whose `evaluations` hold the one call that looked for what the field captures.
        """
        return self._solve(z0, inputs, self.times if times is None else times, trajectory)

    @uncompiled
    def _solve(self, z0: Any, inputs: tuple[Any, ...], times: Sequence[float] | Tensor, trajectory: bool) -> Solution:
        if transformed():
            raise RuntimeError(
                "ODELayer cannot be transformed by torch.func, since torchdiffeq cannot: take torch.autograd, "
                "or eq.nn.ImplicitStep for single steps."
            )
        if isinstance(self.field, nn.Module):
            _refuse_random(self.field)
        layout = Layout.of(z0, self.batch_dims)
        t = _as_times(times, layout.device)
        failures = Failures(self.on_failure, told=self._told)
        rtol = _default_rtol(layout) if self.rtol is None else self.rtol
        atol = rtol / 100 if self.atol is None else self.atol
        report = AdjointReport()
        with steady(self.field) as field:
            adaptive = self.method in ADAPTIVE
            task = Integration(field, layout, self.method, adaptive, rtol, atol, self.step_size, self.max_steps)
            parameters = self.field.parameters() if isinstance(self.field, nn.Module) else ()
            states = integrate(
                task, layout.pack_start(z0), t, inputs, tuple(parameters), self.adjoint, failures, report
            )
        shape = layout.batch_shape
        status, residual = task.status.reshape(shape), task.residual.reshape(shape)
        steps = torch.full_like(status, task.evaluations)
        if trajectory:
            trees = [layout.unpack(state) for state in states]
            value = pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
        else:
            value = layout.unpack(states[-1])
        solution = Solution(value, status, steps, residual, task.evaluations, adjoint=report)
        record(self, solution)
        return solution

    def extra_repr(self) -> str:
        field = "" if isinstance(self.field, nn.Module) else f"field={self.field!r}, "
        return (
            f"{field}times={self.times}, method={self.method!r}, rtol={self.rtol}, atol={self.atol}, "
            f"step_size={self.step_size}, adjoint={self.adjoint}, max_steps={self.max_steps}, "
            f"on_failure={self.on_failure!r}, batch_dims={self.batch_dims}"
        )


def check_field(field: Any) -> None:
    """Raise where a field cannot be one; warn where its parameters are not registered."""
    check_callable("field", field)
    if isinstance(field, type):
        raise TypeError(f"field must be an instance: write {field.__name__}(...), not the class {field.__name__}.")
    if not isinstance(field, nn.Module):
        warnings.warn(
            "The field of this layer is no nn.Module: parameters that it captures get gradients, but are not "
            "registered, so that layer.parameters(), state_dict() and .to() do not see them; make it a module.",
            UserWarning,
            stacklevel=3,
        )


def _as_times(times: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    given = times if isinstance(times, Tensor) else torch.tensor(tuple(times), dtype=torch.float64)
    t = given.to(device)
    if t.ndim != 1 or len(t) < 2 or not t.is_floating_point():
        raise ValueError(f"times must be at least two numbers in a row, not of shape {tuple(t.shape)}, {t.dtype}.")
    gaps = t.detach().diff()
    if not bool(torch.isfinite(t.detach()).all()) or not (bool((gaps > 0).all()) or bool((gaps < 0).all())):
        raise ValueError(f"times must be finite and all rise or all fall, not {t.tolist()}.")
    return t.double()


def _default_rtol(layout: Layout) -> float:
    autocast = autocast_dtype(layout.device)
    dtypes = layout.dtypes if autocast is None else (*layout.dtypes, autocast)
    return max(RTOL[dtype] for dtype in dtypes)


def _refuse_random(field: nn.Module) -> None:
    for name, module in field.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"{type(module).__name__} '{name}' draws a new mask at every evaluation of the field, so that no step "
                "is accurate: take eq.nn.VariationalDropout, move it out of the field, or call eval() on it."
            )
