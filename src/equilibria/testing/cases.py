"""Problems with known answers, for every entry point, dtype and structure of the state."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from equilibria.adjoints import Adjoint, Implicit
from equilibria.fixed_point import fixed_point
from equilibria.root import root
from equilibria.solution import Solution
from equilibria.solvers import Solver

Entry = Callable[..., Solution]

# Leaves by their shape within one sample.
STRUCTURES: dict[str, tuple[tuple[int, ...], ...]] = {
    "tensor": ((4,),),
    "tuple": ((2,), (1, 3)),
    "dict": ((3,), (2, 1)),
    "nested": ((2,), (1,), (2,)),
}
SLOPES = (0.1, 0.8, 0.5, 0.7, 0.3, 0.6)

# What is wrong with a sample, beside nothing.
FINE, UNSOLVABLE, LATE_NAN, JUMPS = 0.0, 1.0, 2.0, 3.0


@dataclass(frozen=True)
class Case:
    """A batch of problems that all have one equilibrium, in the form that an entry point takes.

    The equilibrium is that of image(z) = tanh(slope (z W) + x), or slope (z W) + x where `linear`: of norm `slope` in z
    and so contracting. `root` is given z - image(z), and `argmin` the convex objective whose gradient that is.

    Attributes:
        entry: `eq.fixed_point`, `eq.root` or `eq.argmin`.
        structure: a key of `STRUCTURES`; the width of "tensor" is free.
        batch_dims: leading dimensions of x.
        linear: the image is linear.
        w: (n, n), of operator norm 1, symmetric for `argmin`.
        x: (*batch, n).
        slope, fault: (*batch, 1), how fast each sample converges, and what is wrong with it.
    """

    entry: Entry
    structure: str
    batch_dims: int
    linear: bool
    w: Tensor
    x: Tensor
    slope: Tensor
    fault: Tensor

    def __str__(self) -> str:
        name = getattr(self.entry, "__name__", "solve")
        kind = "linear" if self.linear else "tanh"
        dtype = str(self.x.dtype).removeprefix("torch.")
        return (
            f"{name} of a {kind} map, {self.structure}, batch {tuple(self.x.shape[:-1])}, n={self.x.shape[-1]}, {dtype}"
        )

    @property
    def args(self) -> tuple[Tensor, ...]:
        return self.w, self.x, self.slope, self.fault

    @property
    def z0(self) -> Any:
        return self.split(torch.zeros_like(self.x))

    @property
    def rtol(self) -> float:
        """A bound on relative errors of an answer to the default tolerances."""
        return {torch.float64: 1e-6, torch.float32: 2e-3}.get(self.x.dtype, 0.1)

    def with_args(self, *args: Tensor) -> "Case":
        """The same problem at other values."""
        w, x, slope, fault = args
        return replace(self, w=w, x=x, slope=slope, fault=fault)

    def take(self, rows: Any) -> "Case":
        """Some of the samples, along the first dimension."""
        return replace(self, x=self.x[rows], slope=self.slope[rows], fault=self.fault[rows])

    def spoil(self, row: int, fault: float) -> "Case":
        """The same problem with one sample at fault; NaN for one whose input is NaN."""
        if fault != fault:
            x = self.x.clone()
            x[row, 0] = torch.nan
            return replace(self, x=x)
        faults = self.fault.clone()
        faults[row] = fault
        return replace(self, fault=faults)

    def split(self, rows: Tensor) -> Any:
        """The state whose entries, sample by sample, are `rows`, (*batch, n)."""
        if self.structure == "tensor":
            return rows
        shapes = STRUCTURES[self.structure]
        parts = rows.split([torch.Size(shape).numel() for shape in shapes], dim=-1)
        parts = [part.reshape(*rows.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]
        if self.structure == "tuple":
            return tuple(parts)
        if self.structure == "dict":
            return {"h": parts[0], "c": parts[1]}
        return {"a": [parts[0], (parts[1],)], "b": parts[2]}

    def join(self, state: Any) -> Tensor:
        """The entries of a state, (*batch, n), in the order of `split`."""
        if self.structure == "tensor":
            return state
        leaves = [state["h"], state["c"]] if self.structure == "dict" else pytree.tree_leaves(state)
        return torch.cat([leaf.flatten(self.batch_dims) for leaf in leaves], dim=-1)

    def image(self, z: Tensor, w: Tensor, x: Tensor, slope: Tensor, fault: Tensor) -> Tensor:
        """Where plain iteration goes, on rows."""
        if self.is_argmin:
            image = x + 0.5 * slope * (z @ w + z @ w.mT)
            if not self.linear:
                image = x - 0.5 * slope * torch.tanh(slope * (z @ w)) @ w.mT
        else:
            product = slope * (z @ w) + x
            image = product if self.linear else torch.tanh(product)
        image = torch.where(fault == UNSOLVABLE, z + 1 + z.abs(), image)
        image = torch.where(fault == JUMPS, torch.where(z > 0, -1.0, 1.0).to(z.dtype), image)
        return torch.where(_moved(z, fault), torch.nan, 1.0).to(z.dtype) * image

    def f(self, state: Any, *args: Tensor) -> Any:
        """What the entry point is given."""
        w, x, slope, fault = args
        z = self.join(state)
        if self.entry is fixed_point:
            return self.split(self.image(z, *args))
        if self.entry is root:
            return self.split(z - self.image(z, *args))
        value = 0.5 * z.square() - x * z
        if self.linear:
            value = value - 0.5 * z * (slope * (z @ w))
        else:
            value = value + 0.5 * _log_cosh(slope * (z @ w))
        value = torch.where(fault == UNSOLVABLE, -z - 0.5 * z * z.abs(), value)
        return (torch.where(_moved(z, fault), torch.nan, 1.0).to(z.dtype) * value).sum(dim=-1)

    @property
    def is_argmin(self) -> bool:
        return self.entry is not fixed_point and self.entry is not root

    def solve(
        self,
        solver: Solver,
        adjoint: Adjoint | None = None,
        max_steps: int = 400,
        tolerance: float | None = None,
        f: Callable[..., Any] | None = None,
        args: tuple[Tensor, ...] | None = None,
        z0: Any = None,
        state: Any = None,
        callback: Callable[[Any], object] | None = None,
        on_failure: str = "ignore",
    ) -> Solution:
        """Solve it; `tolerance` is relative for `fixed_point` and absolute for others."""
        return self.entry(
            self.f if f is None else f,
            self.z0 if z0 is None else z0,
            *(self.args if args is None else args),
            solver=solver,
            adjoint=adjoint or Implicit(),
            max_steps=max_steps,
            batch_dims=self.batch_dims,
            on_failure=on_failure,
            state=state,
            callback=callback,
            **({} if tolerance is None else {"rtol" if self.entry is fixed_point else "atol": tolerance}),
        )

    def answer(self, *args: Tensor, steps: int = 150) -> Tensor:
        """The equilibrium by plain iteration in float64, with its derivatives: nothing of the library takes part."""
        args = tuple(arg.double() for arg in args or self.args)
        z = torch.zeros_like(args[1])
        for _ in range(steps):
            z = self.image(z, *args)
        return z

    def residual(self, value: Any) -> Tensor:
        """The residual of a value by its definition, worst leaf, per sample."""
        with torch.enable_grad():
            leaves, spec = pytree.tree_flatten(value)
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            output = self.f(pytree.tree_unflatten(leaves, spec), *(arg.detach() for arg in self.args))
            outputs = torch.autograd.grad(output.sum(), leaves) if self.is_argmin else pytree.tree_leaves(output)
        sizes = []
        for new, old in zip(outputs, leaves, strict=True):
            new, old = new.detach().flatten(self.batch_dims), old.detach().flatten(self.batch_dims)
            if self.entry is fixed_point:
                gap = (new - old).square().mean(dim=-1).sqrt()
                size = torch.where(gap == 0, gap, gap / new.square().mean(dim=-1).sqrt())
            else:
                size = new.square().mean(dim=-1).sqrt()
            sizes.append(size)
        return torch.stack(sizes).amax(dim=0)


def _moved(z: Tensor, fault: Tensor) -> Tensor:
    return (fault == LATE_NAN) & (z != 0).any(dim=-1, keepdim=True)


def _log_cosh(x: Tensor) -> Tensor:
    return x.abs() + torch.log1p(torch.exp(-2 * x.abs()))


def make_case(
    entry: Entry,
    structure: str = "tensor",
    batch: tuple[int, ...] = (6,),
    n: int = 4,
    dtype: torch.dtype = torch.float64,
    linear: bool = False,
    seed: int = 0,
) -> Case:
    """A case of the given form, from a random generator of its own."""
    shapes = STRUCTURES[structure]
    n = n if structure == "tensor" else sum(torch.Size(shape).numel() for shape in shapes)
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, n, generator=generator, dtype=torch.float64)
    if entry is not fixed_point and entry is not root:
        w = w + w.mT
    if n:
        w = w / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(*batch, n, generator=generator, dtype=torch.float64)
    count = torch.Size(batch).numel()
    slope = torch.tensor(SLOPES, dtype=torch.float64).repeat(count // len(SLOPES) + 1)[:count].reshape(*batch, 1)
    w, x, slope = (tensor.to(dtype) for tensor in (w, x, slope))
    return Case(entry, structure, len(batch), linear, w, x, slope, torch.zeros_like(slope))
