"""One initial value problem: its samples that fail are left out, and its gradient is the adjoint equation's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from equilibria.adjoints.attachment import sealed
from equilibria.norms import rms_norm
from equilibria.precision import autocast_state, precise
from equilibria.solution import AdjointReport
from equilibria.status import Failures, Status
from equilibria.tree import Layout


def integrators() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Those of torchdiffeq, differentiated through their steps and by the adjoint equation."""
    try:
        from torchdiffeq import odeint, odeint_adjoint
    except ImportError as error:
        raise ImportError("ODELayer integrates by torchdiffeq: pip install 'equilibria[ode]'.") from error
    return odeint, odeint_adjoint


class Spent(Exception):
    """The evaluations allowed are used up."""


class Integration:
    """What torchdiffeq integrates, a rate of the packed state (batch, n), and what became of each sample.

    Attributes:
        status, residual: per sample, (batch,).
        evaluations: calls of the field of all forward integrations.
    """

    def __init__(
        self,
        field: Callable[..., Any],
        layout: Layout,
        method: str,
        adaptive: bool,
        rtol: float,
        atol: float,
        step_size: float | None,
        max_steps: int,
    ) -> None:
        self.field = field
        self.layout = layout
        self.inputs: tuple[Any, ...] = ()
        self.max_steps = max_steps
        self.autocast = autocast_state(layout.device)
        self.adaptive = adaptive
        self.step_size = step_size
        self.settings = {"method": method, "rtol": rtol, "atol": atol}
        self.status = torch.zeros(layout.batch, dtype=torch.int64, device=layout.device)
        self.residual = torch.zeros(layout.batch, dtype=layout.dtype, device=layout.device)
        if not adaptive:
            self.residual.fill_(torch.nan)
        self.evaluations = self.calls = 0
        self.errors = [self.residual, self.residual]

    @property
    def options(self) -> dict[str, Any]:
        """Of torchdiffeq; not kept, since a bound method that is would keep all graphs until garbage is collected."""
        if self.adaptive:
            return self.settings | {"options": {"norm": self.norm}}
        return self.settings | {"options": {} if self.step_size is None else {"step_size": self.step_size}}

    @property
    def callback_accept_step(self) -> Callable[..., None]:
        """What torchdiffeq looks for by this name, and warns of where the steps are fixed."""
        if not self.adaptive:
            raise AttributeError("callback_accept_step")
        return self._accept

    @property
    def bad(self) -> Tensor:
        """Samples that are left out."""
        return self.status != Status.CONVERGED

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        if self.calls >= self.max_steps:
            raise Spent
        self.calls += 1
        good = (~self.bad).nonzero().flatten()
        if len(good) == len(z):
            rate = self._rate(t, z)
        else:
            # A sample left out takes the place of a good one, where the field is finite, and stays where it is.
            bad = self.bad
            place = torch.where(bad[:, None], z[good[0]], z)
            rate = torch.where(bad[:, None], 0, sealed(lambda z: self._rate(t, z), bad)(place))
        if torch.is_grad_enabled() and not rate.requires_grad:
            rate = rate + 0 * z  # torchdiffeq asks for the derivative of what depends on nothing, too
        return rate

    def _rate(self, t: Tensor, z: Tensor) -> Tensor:
        with self.autocast():
            return self.layout.pack(self.field(t, self.layout.unpack(z), *self.inputs), "field")

    @torch.no_grad()
    def norm(self, error: Tensor) -> Tensor:
        """Of the sample that has the largest; NaN is an error like any other, which a shorter step may cure."""
        sizes = rms_norm(error)
        sizes = torch.where(torch.isfinite(sizes), sizes, torch.inf)
        sizes = torch.where(self.bad, 0, sizes)
        self.errors = [self.errors[1], sizes]
        return sizes.max()

    def _accept(self, t: Tensor, z: Tensor, step: Tensor) -> None:
        self.residual = torch.maximum(self.residual, self.errors[1].to(self.residual.dtype))

    def run(self, attempt: Callable[[], Any]) -> Any:
        """What `attempt` returns once all samples that make it fail are left out; None where none is left."""
        while not bool(self.bad.all()):
            self.calls = 0
            if self.adaptive:
                self.residual = torch.where(self.bad, self.residual, 0)
            try:
                result, unsound = attempt()
            except Spent:
                self._leave_out(~self.bad, Status.MAX_STEPS)
                continue
            except AssertionError as error:
                if not str(error).startswith(("underflow in dt", "non-finite values")):
                    raise
                # The step has no length left. The errors of the last trials say for whose sake.
                worst = torch.maximum(*self.errors)
                self._blame(worst)
                continue
            if not bool((unsound & ~self.bad).any()):
                return result
            self._leave_out(unsound & ~self.bad, Status.NONFINITE)
        return None

    def _blame(self, worst: Tensor) -> None:
        running = ~self.bad
        if bool((torch.isinf(worst) & running).any()):
            self._leave_out(torch.isinf(worst) & running, Status.NONFINITE)
        elif bool(((worst > 1) & running).any()):
            self._leave_out((worst > 1) & running, Status.STALLED)
        else:
            self._leave_out(running, Status.STALLED)

    def _leave_out(self, samples: Tensor, status: Status) -> None:
        self.status = torch.where(samples, int(status), self.status)
        self.residual = torch.where(samples, self.errors[1].to(self.residual.dtype), self.residual)
        self.evaluations += self.calls
        self.calls = 0


def integrate(
    task: Integration,
    z0: Tensor,
    t: Tensor,
    inputs: tuple[Any, ...],
    parameters: tuple[Tensor, ...],
    adjoint: bool,
    failures: Failures,
    report: AdjointReport,
) -> Tensor:
    """The packed states at the times, (times, batch, n), attached to autograd."""
    task.inputs = inputs
    unsound = ~torch.isfinite(z0.detach()).all(dim=1)
    task.status = torch.where(unsound, Status.NONFINITE, task.status)
    task.residual = torch.where(unsound, torch.inf, task.residual)
    if z0.numel() == 0:
        return z0.expand(len(t), *z0.shape)
    graph = adjoint and torch.is_grad_enabled()
    start, clock, extra = z0, t, {}
    sources = twins = ()
    if graph:
        # Copies without history: else what an input comes from would get its gradient twice where the field has it too.
        start, clock = (_leaf(tensor) for tensor in (z0, t))
        leaves, spec = pytree.tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        copies = [_leaf(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        task.inputs = pytree.tree_unflatten(copies, spec)
        copies = [leaf for leaf in copies if isinstance(leaf, Tensor)]
        captured = _captured(task, clock, start, copies, parameters, report)
        sources, twins = (z0, t, *tensors, *captured), (start, clock, *copies, *captured)
        extra["adjoint_params"] = tuple(tensor for tensor in (*copies, *captured) if tensor.requires_grad)
    direct, by_adjoint = integrators()
    solve = by_adjoint if graph else direct

    def attempt() -> tuple[Tensor, Tensor]:
        settled = torch.where(task.bad[:, None], 0, start)
        states = solve(task, settled, clock, **task.options, **extra)
        assert isinstance(states, Tensor)
        return states, ~torch.isfinite(states.detach()).all(dim=2).all(dim=0)

    with precise(z0):
        states = task.run(attempt)
    task.evaluations += task.calls
    failures.tell("solve", task.status, task.residual)
    kept = z0.detach().expand(len(t), *z0.shape)
    if states is None:
        return kept
    if graph and states.requires_grad:
        pull = _pull(task, states, twins, failures, report)
        states = _Attached.apply(states.detach(), pull, *sources)
    return torch.where(task.bad[:, None], kept, states)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _captured(
    task: Integration,
    t: Tensor,
    z: Tensor,
    given: Sequence[Tensor],
    parameters: tuple[Tensor, ...],
    report: AdjointReport,
) -> tuple[Tensor, ...]:
    """The leaves that the field depends on besides its arguments: its parameters, and what it captures."""
    report.evaluations += 1
    with precise(z):
        rate = task._rate(t[0].to(z.dtype), torch.nan_to_num(z))
    known = {id(tensor) for tensor in (t, z, *given)}
    found = {id(tensor): tensor for tensor in parameters if tensor.requires_grad}
    nodes, seen = [rate.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in known:
            found.setdefault(id(leaf), leaf)
        nodes += [following for following, _ in node.next_functions]
    return tuple(found.values())


def _pull(
    task: Integration, states: Tensor, sources: Sequence[Tensor], failures: Failures, report: AdjointReport
) -> Callable[[Tensor], list[Tensor | None]]:
    """From the gradient of the states to those of the sources, by the adjoint equation."""
    forward, wanted = task.status, [source for source in sources if source.requires_grad]

    def pull(grad: Tensor) -> list[Tensor | None]:
        task.status, task.residual = forward, torch.zeros_like(task.residual)
        # The tolerances are meant for gradients of size one; the equation is linear.
        size = torch.where(torch.isfinite(grad), grad, 0).abs().max()
        size = torch.where(size > 0, size, 1)
        spent = task.evaluations

        def attempt() -> tuple[tuple[Tensor | None, ...], Tensor]:
            scaled = torch.where(task.bad[:, None], 0, grad / size)
            grads = torch.autograd.grad(states, wanted, scaled, retain_graph=True, allow_unused=True)
            start = grads[0] if sources[0].requires_grad else None
            sound = torch.ones_like(task.bad) if start is None else torch.isfinite(start).all(dim=1)
            return grads, ~sound

        with precise(states):
            grads = task.run(attempt)
        steps = task.calls + task.evaluations - spent
        report.evaluations += steps
        task.evaluations = spent
        report.status, report.residual = (x.reshape(task.layout.batch_shape) for x in (task.status, task.residual))
        report.steps = torch.full_like(report.status, steps)
        fresh = torch.where(forward == Status.CONVERGED, task.status, Status.CONVERGED)
        failures.tell("backward solve", fresh, task.residual)
        found = iter([None] * len(wanted) if grads is None else grads)
        pulled = [next(found) if source.requires_grad else None for source in sources]
        return [None if g is None else g * size.to(g.dtype) for g in pulled]

    return pull


class _Attached(torch.autograd.Function):
    """A value whose gradient reaches the sources by `pull`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, pull: Callable[[Tensor], list[Tensor | None]], *sources: Tensor) -> Tensor:
        ctx.pull = pull
        ctx.save_for_backward(*sources)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The gradient of the adjoint equation has no derivative of its own: make the layer with adjoint=False."
            )
        _ = ctx.saved_tensors  # raises where one has been changed in place since
        return None, None, *ctx.pull(grads[0])
