"""The Deep Equilibrium Model as a layer."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from equilibria.adjoints import Adjoint, Implicit
from equilibria.nn.monitor import record
from equilibria.nn.parametrized import WorkedOut
from equilibria.norms import Norm, rms_norm
from equilibria.options import check_callable, check_integer
from equilibria.precision import autocast_dtype
from equilibria.problem import FixedPoint
from equilibria.solution import Solution
from equilibria.solve import WarmStart, check_options, solve, uncompiled
from equilibria.solvers import Anderson, Solver
from equilibria.status import Failures, Status
from equilibria.steady import hold
from equilibria.transforms import transformed
from equilibria.tree import Layout


class DEQ(nn.Module):
    """A layer whose output is the equilibrium z = cell(z, x) of a cell.

    >>> class Cell(nn.Module):
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.linear = nn.Linear(width, width)
    ...     def forward(self, z, x):
    ...         return torch.tanh(0.5 * self.linear(z) + x)
    >>> layer = eq.DEQ(Cell(8))
    >>> layer(torch.randn(4, 8)).shape
    torch.Size([4, 8])

    The start is `cell.initial_state(*inputs)` where the cell has one, else zeros like the first input. Further
    positional and keyword arguments of a call are passed on to the cell.

    BatchNorm in training makes the samples of a batch depend on each other: there the batch is solved as one problem,
    as with `batch_dims=0`, and all samples share its status, steps and residual. Its statistics, and other buffers that
    a call of the cell moves in training, stay as they are at every evaluation and move once, when the call ends.

    Under `torch.compile` the layer stays out and its cell may be compiled on its own: a model whose own `forward` calls
    it becomes two graphs, before and after; of an `nn.Sequential` around it torch compiles none of its own layers.
    Under FSDP2 shard the whole layer, `fully_shard(layer)`, never the cell.

    Under `torch.func`, with `functional_call` or without, parameters, buffers and all arguments of a call take part;
    with a cell that is no module, the arguments alone.

    Args:
        cell: from a state and inputs to a state of the same structure; a module, so that its parameters are registered.
        solver, adjoint, rtol, atol, norm, batch_dims: as for `eq.fixed_point`.
        max_steps: evaluations of the cell allowed.
        eval_max_steps: the same in `eval()` mode; None is `max_steps`.
        on_failure: "raise", "warn" (once per cause for each layer) or "ignore".
        readout: from the equilibrium to what a call returns; `solve` always gives the whole equilibrium.

    Source: Bai, Kolter and Koltun (2019), Deep equilibrium models.
    """

    def __init__(
        self,
        cell: Callable[..., Any],
        solver: Solver = Anderson(),  # noqa: B008 (a frozen dataclass)
        adjoint: Adjoint = Implicit(),  # noqa: B008
        rtol: float | None = None,
        atol: float | None = None,
        max_steps: int = 40,
        eval_max_steps: int | None = None,
        norm: Norm = rms_norm,
        on_failure: str = "warn",
        batch_dims: int = 1,
        readout: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        check_callable("cell", cell)
        if isinstance(cell, type):
            raise TypeError(f"cell must be an instance: write {cell.__name__}(...), not the class {cell.__name__}.")
        check_options(solver, adjoint, rtol, atol, max_steps, norm, batch_dims, on_failure)
        if eval_max_steps is not None:
            check_integer("eval_max_steps", eval_max_steps, 1)
        if readout is not None:
            check_callable("readout", readout)
        if not isinstance(cell, nn.Module):
            warnings.warn(
                "The cell of this DEQ is no nn.Module: parameters that it captures get gradients, but are not "
                "registered, so that layer.parameters(), state_dict() and .to() do not see them; make it a module.",
                UserWarning,
                stacklevel=2,
            )
        self.cell = cell
        self.solver = solver
        self.adjoint = adjoint
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps
        self.eval_max_steps = eval_max_steps
        self.norm = norm
        self.on_failure = on_failure
        self.batch_dims = batch_dims
        self.readout = readout
        self._told: set[tuple[str, Status]] = set()

    def forward(
        self,
        *inputs: Any,
        z0: Any = None,
        state: WarmStart | None = None,
        max_steps: int | None = None,
        **keywords: Any,
    ) -> Any:
        """The equilibrium for `inputs`, through `readout` where there is one.

        Args:
            inputs, keywords: passed on to the cell.
            z0: start, in place of the cell's or zeros.
            state: `Solution.state` of an earlier call on the same shapes, to start from.
            max_steps: evaluations of the cell allowed to this call, in place of the layer's.
        """
        value = self.solve(*inputs, z0=z0, state=state, max_steps=max_steps, **keywords).value
        return value if self.readout is None else self.readout(value)

    def solve(
        self,
        *inputs: Any,
        z0: Any = None,
        state: WarmStart | None = None,
        max_steps: int | None = None,
        **keywords: Any,
    ) -> Solution:
        """The whole `eq.Solution` for `inputs`; the arguments are those of a call."""
        return self._solve(inputs, keywords, z0, state, max_steps)

    @uncompiled
    def _solve(
        self,
        inputs: tuple[Any, ...],
        keywords: dict[str, Any],
        z0: Any,
        state: WarmStart | None,
        max_steps: int | None,
    ) -> Solution:
        max_steps = self._allowed(max_steps)
        if z0 is None:
            # First of all, since a start may take an evaluation of what cannot work.
            _refuse_what_cannot_work(self._parts())
            z0 = self._start(inputs)
        with self._posed(inputs, keywords, z0) as problem:
            solution = solve(problem, z0, self.solver, self.adjoint, max_steps, self._failures(), state)
        return self._recorded(solution, z0)

    def _allowed(self, max_steps: int | None) -> int:
        """The evaluations allowed to a call that asked for `max_steps`."""
        if max_steps is None:
            max_steps = self.max_steps if self.training or self.eval_max_steps is None else self.eval_max_steps
        # Options of a layer are often changed after it was made.
        check_options(
            self.solver, self.adjoint, self.rtol, self.atol, max_steps, self.norm, self.batch_dims, self.on_failure
        )
        return max_steps

    @contextmanager
    def _posed(
        self, inputs: tuple[Any, ...], keywords: dict[str, Any], z0: Any, moves: bool = True
    ) -> Iterator[FixedPoint]:
        """The equation of a call, for the length of a solve; with `moves`, what a call moves is moved at its end."""
        parts = self._parts()
        _refuse_what_cannot_work(parts)
        f, args = self._equation(inputs, keywords)
        working = WorkedOut(f, self.cell)
        held = hold(working, self.cell)
        layout = Layout.of(z0, 0 if _couples(parts) else self.batch_dims)
        yield FixedPoint(held, args, layout, self.norm, self.rtol, self.atol, has_aux=False)
        if moves:
            held.settle()
            working.settle()

    def _parts(self) -> dict[str, nn.Module]:
        return dict(self.cell.named_modules()) if isinstance(self.cell, nn.Module) else {}

    def _failures(self) -> Failures:
        return Failures(self.on_failure, told=self._told)

    def _recorded(self, solution: Solution, z0: Any) -> Solution:
        """The solution of a call, whose samples share what a joint problem has once, as monitors are told."""
        shape = Layout.of(z0, self.batch_dims).batch_shape
        told = {name: getattr(solution, name).expand(shape) for name in ("status", "steps", "residual")}
        solution = replace(solution, **told)
        record(self, solution)
        return solution

    def _equation(
        self, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if not transformed():
            return lambda z, *inputs: self.cell(z, *inputs, **keywords), inputs
        if not isinstance(self.cell, nn.Module):
            cell = self.cell
            return lambda z, inputs, keywords: cell(z, *inputs, **keywords), (inputs, keywords)
        # Transforms follow arguments alone, and `functional_call` leaves theirs in the cell. Each tensor is listed once
        # for each module that holds it, since `functional_call` puts back what it ties itself in the wrong order.
        module, tensors, moving = self.cell, {}, []
        for path, part in module.named_modules():
            buffers = dict(part.named_buffers(path, False, False))
            tensors.update(part.named_parameters(path, False, False))
            tensors.update(buffers)
            moving += buffers if part.training else ()

        def call(z: Any, tensors: dict[str, Tensor], inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            tensors = tensors | {name: tensors[name].clone() for name in moving}
            return torch.func.functional_call(module, tensors, (z, *inputs), keywords, tie_weights=False)

        return call, (tensors, inputs, keywords)

    def _start(self, inputs: tuple[Any, ...]) -> Any:
        return start(self.cell, inputs)

    def extra_repr(self) -> str:
        norm = getattr(self.norm, "__name__", repr(self.norm))
        readout = None if self.readout is None else getattr(self.readout, "__name__", repr(self.readout))
        cell = "" if isinstance(self.cell, nn.Module) else f"cell={self.cell!r}, "
        return (
            f"{cell}solver={self.solver}, adjoint={self.adjoint}, rtol={self.rtol}, atol={self.atol}, "
            f"max_steps={self.max_steps}, eval_max_steps={self.eval_max_steps}, norm={norm}, "
            f"on_failure={self.on_failure!r}, batch_dims={self.batch_dims}, readout={readout}"
        )


def _couples(parts: dict[str, nn.Module]) -> bool:
    """Whether a cell of these parts normalises over the batch, so that its samples have one equilibrium together."""
    kind = nn.modules.batchnorm._BatchNorm
    return any(isinstance(part, kind) and (part.training or part.running_mean is None) for part in parts.values())


def _refuse_what_cannot_work(parts: dict[str, nn.Module]) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards has imported it, which takes a while
    if fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in parts.values()):
        raise ValueError(
            "The cell of this DEQ is sharded, and gathers its parameters at every evaluation: ranks that stop at "
            "different counts would wait for each other for ever. Shard the whole layer, fully_shard(layer), or "
            "solve by eq.fixed_point with process_group."
        )
    for name, module in parts.items():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"{type(module).__name__} '{name}' draws a new mask at every evaluation of the cell, so that there "
                "is no equilibrium: take eq.nn.VariationalDropout, move it out of the cell, or call eval() on it."
            )


def check_layer(what: str, layer: Any) -> None:
    """Raise unless `layer` is a `DEQ` outside of transforms, which `what` takes."""
    if not isinstance(layer, DEQ):
        raise TypeError(f"{what} takes an eq.DEQ, not {type(layer).__name__}.")
    if transformed():
        raise ValueError(f"{what} takes ordinary gradients: call it outside of torch.func and forward mode.")


def start(cell: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """Where a solve starts: at the cell's `initial_state`, or at zeros like the first input."""
    initial_state = getattr(cell, "initial_state", None)
    if initial_state is not None:
        return initial_state(*inputs)
    leaves = pytree.tree_leaves(inputs[0]) if inputs else []
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        raise TypeError(
            "The start cannot be read off the first input, which is no floating tensor: give the cell a method "
            "initial_state(*inputs), or call the layer with z0=..."
        )
    return pytree.tree_map(_zeros_like, inputs[0])


def _zeros_like(leaf: Tensor) -> Tensor:
    # Under autocast inputs come in half precision from the layer before, while a cell may return float32, as those that
    # end in a normalisation do; and a state in half precision would round more than the products do.
    wide = leaf.dtype if autocast_dtype(leaf.device) is None else torch.promote_types(leaf.dtype, torch.float32)
    return torch.zeros_like(leaf, dtype=wide)
