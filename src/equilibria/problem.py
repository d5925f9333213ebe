"""The equation to solve, as solvers see it: evaluations on a packed buffer, and products with its Jacobian."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equilibria.norms import Norm
from equilibria.tree import Layout, detached

# The one table of default tolerances, by the dtype that f computes in.
RTOL = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class Evaluation(NamedTuple):
    """One evaluation of the equation for a whole batch.

    Attributes:
        z: (batch, n), where it was evaluated.
        image: (batch, n), where plain iteration would go.
        residual: (batch, n), `image - z`.
        error: (batch,), what `Solution.residual` reports.
        size: (batch,), the absolute norm of the residual, worst leaf.
        satisfied: (batch,) bool, the tolerance is met.
        best: (batch, n), the iterate of the lowest error so far.
    """

    z: Tensor
    image: Tensor
    residual: Tensor
    error: Tensor
    size: Tensor
    satisfied: Tensor
    best: Tensor


def rounding_level(dtype: torch.dtype) -> float:
    """The relative residual at which rounding in `dtype`, not the solver, may be what stops progress."""
    # Half precision products accumulate in float32 and round once; wider ones gather rounding over the whole sum.
    return torch.finfo(dtype).eps * (16 if dtype in (torch.float64, torch.float32) else 2)


class FixedPoint:
    """The problem z = f(z, *args) on packed buffers; counts its evaluations.

    Args:
        f: the function, on states.
        args: further arguments of `f`.
        layout: of the state.
        norm: from a leaf to one number per sample.
        rtol, atol: tolerances; None for the default of the dtype that `f` computes in.
        has_aux: `f` returns `(state, aux)`.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        args: tuple[Any, ...],
        layout: Layout,
        norm: Norm,
        rtol: float | None,
        atol: float | None,
        has_aux: bool,
    ) -> None:
        self.f = f
        self.args = args
        self.layout = layout
        self.norm = norm
        self.rtol = rtol
        self.atol = atol
        self.has_aux = has_aux
        self.evaluations = 0
        self.compute_dtype: torch.dtype | None = None
        self.aux: Any = None
        self.aux_at: Tensor | None = None

    def apply(self, z: Tensor) -> Tensor:
        """Evaluate `f` on a packed buffer without counting; its auxiliary output is kept as `aux`."""
        output = self.f(self.layout.unpack(z), *self.args)
        if self.has_aux:
            if not (isinstance(output, tuple) and len(output) == 2):
                raise TypeError("has_aux=True needs f to return a pair (state, aux).")
            output, self.aux = output
            self.aux_at = z
        image = self.layout.pack(output)
        if self.compute_dtype is None:
            self.compute_dtype = self._read_dtype(output)
            default = RTOL[self.compute_dtype]
            if self.atol is None:
                # A tolerance that the user gave alone is never overridden by a default of the other.
                self.atol = default / 100 if self.rtol is None else 0.0
            if self.rtol is None:
                self.rtol = default
        return image

    def take_aux(self, z: Tensor, agree: Callable[[bool], bool]) -> Any:
        """The auxiliary output at `z` as data; evaluates `f` only where the last evaluation was elsewhere."""
        if not self.has_aux:
            return None
        if agree(self.aux_at is None or not torch.equal(self.aux_at, z)):
            self.evaluations += 1
            with torch.no_grad():
                self.apply(z)
        aux, self.aux, self.aux_at = self.aux, None, None
        return detached(aux)

    def evaluate(self, z: Tensor) -> Evaluation:
        """Evaluate `f` at `z` and measure the residual there."""
        first = self.evaluations == 0
        self.evaluations += 1
        changed = _watch(z, first)
        generators = _generators(z.device) if first else []
        before = [generator.get_state() for generator in generators]
        image = self.apply(z)
        if not torch.is_grad_enabled() and len(self.layout.sizes) == 1:
            image = image.clone()  # solvers keep it, and f may write all its outputs into one buffer of its own
        if changed():
            raise ValueError("f changed its state in place, and the solver still needs it: use z + ... for z += ...")
        if any(not torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True)):
            self._refuse_random(z, image)
        return self._measure(z, image)

    def round(self, z: Tensor) -> Tensor:
        """The nearest state that the leaves can hold."""
        return self.layout.round(z)

    def linearize(self, z: Tensor) -> "Linearization":
        """Products with the Jacobian of `f` at `z`, by one more evaluation with a graph."""
        jacobian = Linearization(self.apply, z)
        self.aux = self.aux_at = None  # nobody asks for it in backward, and it would keep a graph alive
        return jacobian

    @property
    def level(self) -> float:
        """The relative residual that is at the rounding level; known after the first evaluation."""
        assert self.compute_dtype is not None
        return rounding_level(self.compute_dtype)

    def _measure(self, z: Tensor, image: Tensor) -> Evaluation:
        residual = image - z
        assert self.rtol is not None
        assert self.atol is not None
        with torch.no_grad():
            numerators = [self._norm(leaf) for leaf in self.layout.leaves(residual.detach())]
            denominators = [self._norm(leaf) for leaf in self.layout.leaves(image.detach())]
            # Where norm(f(z)) overflows, so that any residual would seem small beside it, nothing is finite.
            numerators = [num + 0 * den for num, den in zip(numerators, denominators, strict=True)]
            pairs = list(zip(numerators, denominators, strict=True))
            ratios = [torch.where(num == 0, num, num / den) for num, den in pairs]
            met = [num <= den * self.rtol + self.atol for num, den in pairs]
            if len(pairs) == 1:
                error, size, satisfied = ratios[0], numerators[0], met[0]
            else:
                # Several leaves may have norms of several dtypes.
                error = torch.stack([r.to(self.layout.dtype) for r in ratios]).amax(dim=0)
                size = torch.stack([n.to(self.layout.dtype) for n in numerators]).amax(dim=0)
                satisfied = torch.stack(met).all(dim=0)
        return Evaluation(z, image, residual, error, size, satisfied, z)

    def _norm(self, leaf: Tensor) -> Tensor:
        value = self.norm(leaf)
        if not isinstance(value, Tensor) or value.shape != (self.layout.batch,):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"norm must map a leaf of shape {tuple(leaf.shape)} to one number per sample, of shape "
                f"({self.layout.batch},), but returned {shape}."
            )
        return value

    def _read_dtype(self, output: Any) -> torch.dtype:
        dtypes = [leaf.dtype for leaf in self.layout.spec.flatten_up_to(output)]
        kind = self.layout.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            # Normalisations return float32 under autocast although every product in f rounds to the lower dtype.
            dtypes += [torch.get_autocast_dtype(kind)]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    @torch.no_grad()
    def _refuse_random(self, z: Tensor, image: Tensor) -> None:
        # Looked for at the image as well: the usual start is zeros, where dropout changes nothing.
        elsewhere = self.round(torch.nan_to_num(image))
        for first, second in ((image, self.apply(z)), (self.apply(elsewhere), self.apply(elsewhere))):
            difference = torch.nan_to_num(first - second).square().mean().sqrt()
            if difference > 1e-3 * second.nan_to_num().square().mean().sqrt():
                raise ValueError(
                    f"f draws random numbers: two calls at one state differ by {difference.item():.1e}, so it has no "
                    "fixed point; move dropout or noise out of f, or draw its mask once outside and pass it in."
                )
        self.evaluations += 3


class Linearization:
    """Products with the Jacobian J of a function of a packed buffer at one point.

    Args:
        call: from (batch, n) to (batch, n).
        z: the point, of shape (batch, n).
    """

    def __init__(self, call: Callable[[Tensor], Tensor], z: Tensor) -> None:
        with torch.enable_grad():
            self.z = z.detach().requires_grad_()
            self.image = call(self.z)

    def transposed_product(self, u: Tensor) -> Tensor:
        """J^T u for each sample; zero where the function does not depend on its state."""
        if not self.image.requires_grad:
            return torch.zeros_like(u)
        u = u.to(self.image.dtype)
        (product,) = torch.autograd.grad(self.image, self.z, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(u) if product is None else product

    def product(self, u: Tensor) -> Tensor:
        """J u for each sample, by differentiating the transposed product, which is linear in its vector."""
        if not self.image.requires_grad:
            return torch.zeros_like(u)
        with torch.enable_grad():
            w = torch.zeros_like(self.image, requires_grad=True)
            (transposed,) = torch.autograd.grad(self.image, self.z, w, create_graph=True, allow_unused=True)
        if transposed is None or not transposed.requires_grad:
            return torch.zeros_like(u)
        (product,) = torch.autograd.grad(transposed, w, u.to(transposed.dtype), allow_unused=True)
        return torch.zeros_like(u) if product is None else product


class Affine:
    """The fixed-point problem u = b + M u, for solving linear systems (I - M) u = b by a nonlinear solver.

    The residual it reports is relative to `b`, which is what a gradient's accuracy is measured against.

    Args:
        product: u -> M u, of shape (batch, n).
        b: right-hand side, of shape (batch, n), finite.
        rtol: relative tolerance of the residual.
        level: the relative residual that rounding alone explains.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], b: Tensor, rtol: float, level: float) -> None:
        self.product = product
        self.b = b
        self.rtol = rtol
        self.level = level
        self.evaluations = 0
        self._scale = torch.linalg.vector_norm(b, dim=1)

    def evaluate(self, u: Tensor) -> Evaluation:
        """One product, and the residual at `u`."""
        self.evaluations += 1
        image = self.b + self.product(u)
        residual = image - u
        # Where u has outgrown b by 1 / eps, b + M u - u cancels whatever u is: no residual is known to less than this.
        noise = 0.25 * torch.finfo(u.dtype).eps * torch.linalg.vector_norm(u, dim=1)
        size = torch.maximum(torch.linalg.vector_norm(residual, dim=1), noise)
        error = torch.where(size == 0, size, size / self._scale)
        return Evaluation(u, image, residual, error, size, size <= self.rtol * self._scale, u)

    def round(self, u: Tensor) -> Tensor:
        """The vector itself: it is never handed out in another dtype."""
        return u


Problem = FixedPoint | Affine


def _generators(device: torch.device) -> list[torch.Generator]:
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    return generators


def _watch(z: Tensor, first: bool) -> Callable[[], bool]:
    """Tells whether `z` has been changed in place since; in inference mode, which counts no versions, at first only."""
    if not z.is_inference():
        version = z._version
        return lambda: z._version != version
    copy = z.clone() if first else z
    return lambda: first and not torch.equal(z.nan_to_num(), copy.nan_to_num())
