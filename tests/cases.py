"""One case of any entry, solver, adjoint, structure and company, and all that is said about it.

Every law is drawn from `cases`: samples that each have an equation of their own, solved by any public way, alone or in
any company. The equation has an additive `shift`, whose gradient is the solution of the adjoint equation itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from hypothesis import strategies as st
from maps import STRUCTURES, Counted, join, leaves, matrix, normal, split, width
from torch import Tensor, nn

import equilibria as eq

DOUBLE = torch.float64

NEWTONS = [
    eq.Newton(),
    eq.Newton(eq.GMRES(restart=3)),
    eq.Newton(eq.BiCGSTAB()),
    eq.Newton(eq.Dense()),
]
GENERAL = [
    eq.Picard(),
    eq.Picard(relaxation=0.4),
    eq.Anderson(),
    eq.Anderson(history=2, relaxation=0.4),
    eq.Anderson(history=12),  # longer than the state
    eq.Broyden(),
    eq.Broyden(history=3, relaxation=0.5),
    eq.GradientDescent(0.5, momentum=0.3),
]
SOLVERS: dict[str, list[Any]] = {
    "fixed_point": GENERAL + NEWTONS,
    "deq": GENERAL + NEWTONS,
    "root": GENERAL + NEWTONS,
    "argmin": [
        eq.LBFGS(),
        eq.LBFGS(history=2),
        eq.GradientDescent(0.2),
        eq.GradientDescent(0.2, momentum=0.5),
        eq.Newton(eq.ConjugateGradient()),
        eq.Broyden(),
        *NEWTONS,
    ],
    "equality": [*NEWTONS, eq.Broyden()],
}
IMPLICIT = [
    eq.Implicit(),
    eq.Implicit(solver=eq.GMRES()),
    eq.Implicit(solver=eq.GMRES(restart=3)),
    eq.Implicit(solver=eq.BiCGSTAB()),
    eq.Implicit(solver=eq.Dense()),
    eq.Implicit(solver=eq.Picard(relaxation=0.9)),
    eq.Implicit(solver=eq.Anderson()),
    eq.Implicit(solver=eq.Broyden()),
    eq.Implicit(solver=eq.GradientDescent(0.5)),
    eq.Implicit(order=2),
]
CONJUGATE = eq.Implicit(solver=eq.ConjugateGradient())
APPROXIMATE = [eq.Neumann(3), eq.Phantom(2), eq.Phantom(3, relaxation=0.5), eq.OneStep()]
UNROLLED = [eq.Unrolled(), eq.Unrolled(checkpoint=True)]

# What a sample is like. `late` walks upwards until its equation is no longer defined; a sample that diverges does so
# under plain iteration only, and as a minimum is none at all.
EASY = ("plain", "done", "slow")
HARD = ("nan", "infinite", "late", "diverges", "wanders")
CODES = {"wanders": 1.0, "diverges": 2.0, "infinite": 2.0, "late": 3.0}
LIMIT = 9.0


@dataclass(frozen=True)
class Samples:
    """All that belongs to one sample each, (batch, ...)."""

    x: Tensor
    slope: Tensor
    code: Tensor
    v: Tensor  # the gradient that comes in
    b: Tensor  # right-hand side of the equality

    def take(self, rows: Any) -> "Samples":
        return Samples(*(getattr(self, f.name)[rows] for f in fields(self)))

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Found:
    """What became of some samples: everything (batch, ...) but the gradient of the weights, and the counts."""

    value: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    x: Tensor
    slope: Tensor
    shift: Tensor
    adjoint_status: Tensor | None
    adjoint_steps: Tensor | None
    adjoint_residual: Tensor | None
    w: Tensor
    solution: Any
    calls: int

    def take(self, rows: Any) -> "Found":
        kept = ("w", "solution", "calls")
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return Found(**{k: t if k in kept or t is None else t[rows] for k, t in named.items()})


def image(rows: Tensor, w: Tensor, x: Tensor, slope: Tensor, code: Tensor, shift: Tensor) -> Tensor:
    """f, sample by sample."""
    linear = slope * (rows @ w) + x
    gone = 0 * torch.sqrt(torch.where(code == CODES["late"], LIMIT - rows, 1))
    moved = torch.where(code == CODES["wanders"], 3 * torch.sin(7 * linear), torch.tanh(linear))
    return torch.where(code >= CODES["diverges"], linear + gone, moved) + shift


def objective(rows: Tensor, w: Tensor, x: Tensor, slope: Tensor, code: Tensor, shift: Tensor) -> Tensor:
    """One scalar a sample; convex for those that are easy."""
    well = 0.5 * (rows - x).square() + slope * nn.functional.softplus(rows @ w)
    gone = 0 * torch.sqrt(torch.where(code == CODES["late"], LIMIT - rows, 1))
    waves = torch.cos(3 * rows + x) + 0.05 * rows.square()
    entries = torch.where(code == CODES["wanders"], waves, torch.where(code >= CODES["diverges"], -rows + gone, well))
    return (entries + shift * rows).sum(dim=-1)


class Cell(nn.Module):
    def __init__(self, f: Callable[..., Any], w: Tensor) -> None:
        super().__init__()
        self.f = f
        self.w = nn.Parameter(w)

    def forward(self, z: Any, *inputs: Tensor) -> Any:
        return self.f(z, self.w, *inputs)


@dataclass(frozen=True)
class Case:
    """A way to solve, and for whom."""

    entry: str
    solver: Any
    adjoint: Any
    structure: str
    batch_dims: int
    dtype: torch.dtype
    seed: int
    kinds: tuple[str, ...]
    transformed: bool = False  # differentiated by torch.func
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def n(self) -> int:
        return width(self.structure)

    @property
    def tight(self) -> bool:
        return self.dtype == DOUBLE

    def but(self, **changes: Any) -> "Case":
        return replace(self, **changes)

    def given(self, **options: Any) -> "Case":
        return replace(self, options=tuple({**dict(self.options), **options}.items()))

    def weights(self) -> Tensor:
        # Contracts for slopes below 1; the expanding kinds have slopes of their own.
        return matrix(self.n, self.seed, 1.0, self.dtype)

    def constraint(self) -> Tensor:
        return normal(1, self.n, seed=self.seed + 3, dtype=self.dtype)

    def samples(self) -> Samples:
        batch = len(self.kinds)
        x = normal(batch, self.n, seed=self.seed + 1)
        u = torch.rand(batch, 1, generator=torch.Generator().manual_seed(self.seed + 2), dtype=DOUBLE)
        slope, code = 0.05 + 0.75 * u, torch.zeros(batch, 1, dtype=DOUBLE)
        v, b = normal(batch, self.n, seed=self.seed + 4), normal(batch, 1, seed=self.seed + 5)
        for i, kind in enumerate(self.kinds):
            code[i] = CODES.get(kind, 0.0)
            if kind in ("nan", "infinite"):
                x[i, self.seed % self.n] = torch.nan if kind == "nan" else torch.inf
            elif kind == "done":
                x[i] = 0
            elif kind == "late":
                x[i] = 1 + x[i].abs()
            slope[i] = {"slow": 0.97, "late": 1.8, "diverges": 3.0}.get(kind, slope[i].item())
        return Samples(*(t.to(self.dtype) for t in (x, slope, code, v, b)))

    def shape(self, batch: int) -> tuple[int, ...]:
        if self.batch_dims == 2:
            return (batch // 2, 2) if batch % 2 == 0 else (1, batch)
        return (batch,) if self.batch_dims == 1 else ()

    def function(self) -> Callable[..., Any]:
        """Of a state of this structure."""
        if self.entry in ("argmin", "equality"):
            return lambda z, *inputs: objective(join(z, self.batch_dims), *inputs)
        sign = self.entry == "root"

        def f(z: Any, *inputs: Tensor) -> Any:
            rows = join(z, self.batch_dims)
            output = image(rows, *inputs)
            return split(rows - output if sign else output, self.structure)

        return f

    def image_at(self, z: Tensor, s: Samples) -> Tensor:
        """Where plain iteration goes from rows (batch, n), differentiably."""
        w, shift = self.weights(), torch.zeros_like(s.x)
        if self.entry != "argmin":
            return image(z, w, s.x, s.slope, s.code, shift)
        total = objective(z, w, s.x, s.slope, s.code, shift).sum()
        return z - torch.autograd.grad(total, z, create_graph=True)[0]

    def truth(self, s: Samples, found: Found, norm: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The sizes of the residual of each leaf at the value returned, and those of f there, by the definition."""
        put = lambda t: t.reshape(*self.shape(len(s)), t.shape[-1])  # noqa: E731
        inputs = (self.weights(), put(s.x), put(s.slope), put(s.code), torch.zeros_like(put(s.x)))
        f, value = self.function(), found.solution.value
        if self.entry in ("argmin", "equality"):
            at = [leaf.detach().requires_grad_() for leaf in leaves(value)]
            z = pytree.tree_unflatten(at, pytree.tree_structure(value))
            rows = list(torch.autograd.grad(f(z, *inputs).sum(), at))
            if self.entry == "equality":
                multiplier = put(found.solution.aux.reshape(len(s), -1))
                a = self.constraint().to(multiplier.dtype)
                pull = split(multiplier @ a, self.structure)
                rows = [one + two for one, two in zip(rows, leaves(pull), strict=True)]
                rows.append(join(value, self.batch_dims).detach().to(a.dtype) @ a.mT - put(s.b))
            images = rows
        else:
            with torch.no_grad():
                images = leaves(f(value, *inputs))
            # In the buffer's width, as two numbers of half precision differ by one that they cannot hold.
            wide = [leaf.detach().to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves(value)]
            images = [t.to(z.dtype) for t, z in zip(images, wide, strict=True)]
            rows = images if self.entry == "root" else [t - z for t, z in zip(images, wide, strict=True)]
        flat = lambda t: norm(t.reshape(len(s), *t.shape[self.batch_dims :]))  # noqa: E731
        return [flat(t) for t in rows], [flat(t) for t in images]

    def value(self, s: Samples, shift: Tensor) -> Tensor:
        """The rows of the solution, (*batch, n), on the graph of a shift of that shape."""
        put = lambda t: t.reshape(*self.shape(len(s)), t.shape[-1])  # noqa: E731
        w = self.weights() if self.transformed else nn.Parameter(self.weights())
        return join(self._run(s, self.function(), w, put(s.x), put(s.slope), shift).value, self.batch_dims)

    def _run(self, s: Samples, f: Callable[..., Any], w: Tensor, x: Tensor, slope: Tensor, shift: Tensor) -> Any:
        z0 = split(torch.zeros_like(x), self.structure)
        inputs = (x, slope, s.code.reshape(*self.shape(len(s)), 1), shift)
        ways: dict[str, Any] = {"on_failure": "ignore", "max_steps": 40, **dict(self.options)}
        ways.update(solver=self.solver, adjoint=self.adjoint, batch_dims=self.batch_dims)
        if self.entry == "deq":
            return _through_a_layer(f, w, inputs, z0, ways)
        if self.entry == "equality":
            return eq.argmin(f, z0, w, *inputs, equality=(self.constraint(), s.b), **ways)
        return getattr(eq, self.entry)(f, z0, w, *inputs, **ways)

    def attach(self, s: Samples, grad: bool = True) -> "Attached":
        """The solution of some samples, and how to pull gradients back to (weights, x, slope, shift)."""
        shape = self.shape(len(s))
        put = lambda t: t.reshape(*shape, t.shape[-1])  # noqa: E731
        w = nn.Parameter(self.weights())
        x, slope = put(s.x).clone().requires_grad_(), put(s.slope).clone().requires_grad_()
        shift = torch.zeros_like(x).requires_grad_()
        calls = Counted(self.function())
        held: list[Any] = []

        def run(*inputs: Tensor) -> Any:
            held.append(sol := self._run(s, calls, *inputs))
            return join(sol.value, self.batch_dims), (sol.status, sol.steps, sol.residual)

        inputs = (w, x, slope, shift)
        if self.transformed and grad:
            value, back, told = torch.func.vjp(run, *(t.detach() for t in inputs), has_aux=True)
        else:
            with torch.set_grad_enabled(grad):
                value, told = run(*inputs)
            back = lambda v: torch.autograd.grad(value, inputs, v, retain_graph=True)  # noqa: E731

        def pull(v: Tensor) -> tuple[Tensor, ...]:
            w, *rest = back(put(v))
            return w.detach(), *(t.detach().reshape(len(s), t.shape[-1]) for t in rest)

        return Attached(value.detach().reshape(s.x.shape), told, pull, held[-1], calls)

    def solve(self, s: Samples, *, grad: bool = True) -> Found:
        """Everything that is said about each of some samples."""
        batch = len(s)
        attached = self.attach(s, grad)
        nothing = self.weights(), s.x, s.slope, s.x
        w, *rest = attached.pull(s.v) if grad else tuple(torch.zeros_like(t) for t in nothing)
        report = attached.solution.adjoint
        per_sample = (None if t is None else t.reshape(batch) for t in (report.status, report.steps, report.residual))
        told = (t.detach().reshape(batch) for t in attached.told)
        return Found(attached.value, *told, *rest, *per_sample, w, attached.solution, attached.calls.calls)


@dataclass(frozen=True)
class Attached:
    """A solution on its graph."""

    value: Tensor
    told: tuple[Tensor, ...]
    pull: Callable[[Tensor], tuple[Tensor, ...]]
    solution: Any
    calls: Counted


def _through_a_layer(f: Callable[..., Any], w: Tensor, inputs: tuple[Tensor, ...], z0: Any, ways: Any) -> Any:
    layer = eq.DEQ(Cell(f, w.detach()), **ways)
    if isinstance(w, nn.Parameter):
        layer.cell.w = w
        return layer.solve(*inputs, z0=z0)
    # Under a transform parameters come through `functional_call`, which calls `forward`.
    layer.forward = lambda: layer.solve(*inputs, z0=z0)
    return torch.func.functional_call(layer, {"cell.w": w}, ())


def kinds(hard: bool) -> st.SearchStrategy[tuple[str, ...]]:
    one = st.sampled_from(EASY + HARD if hard else EASY)
    return st.lists(one, min_size=1, max_size=6).map(tuple)


@st.composite
def cases(
    draw: Any,
    entries: tuple[str, ...] = tuple(SOLVERS),
    dtypes: tuple[torch.dtype, ...] = (DOUBLE, torch.float32),
    batch_dims: tuple[int, ...] = (0, 1, 1, 2),
    hard: bool = True,
    adjoints: tuple[Any, ...] = (*IMPLICIT, *APPROXIMATE, *UNROLLED),
    transforms: bool = True,
) -> Case:
    entry = draw(st.sampled_from(entries))
    solver = draw(st.sampled_from(SOLVERS[entry]))
    usable = [a for a in adjoints if not (isinstance(solver, eq.Newton) and isinstance(a, eq.Unrolled))]
    usable += [CONJUGATE] if entry == "argmin" and adjoints else []
    adjoint = draw(st.sampled_from(usable))
    dims = draw(st.sampled_from(batch_dims if entry != "equality" else tuple(d for d in batch_dims if d) or (1,)))
    company = draw(kinds(hard))
    transformed = draw(st.booleans()) if transforms and isinstance(adjoint, eq.Implicit) else False
    return Case(
        entry,
        solver,
        adjoint,
        draw(st.sampled_from(sorted(STRUCTURES))),
        dims,
        draw(st.sampled_from(dtypes)),
        draw(st.integers(0, 9999)),
        company if dims else company[:1],
        transformed=transformed,
    )
