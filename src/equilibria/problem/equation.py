"""An equation on packed buffers: what all kinds of problems have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equilibria.norms import Norm
from equilibria.precision import autocast_dtype, autocast_state
from equilibria.problem.evaluation import Evaluation, rounding_level
from equilibria.problem.linearization import Linearization
from equilibria.problem.randomness import CALLS, Watch, culprits, difference
from equilibria.problem.splitting import Splitting
from equilibria.status import Agree
from equilibria.tree import Layout, detached


class Equation:
    """An equation for a state, as solvers and adjoints see it; counts its evaluations.

    A kind of equation says what plain iteration would do next (`image`), how a residual is measured (`measure`), and
    what its default tolerances are (`settle_tolerances`).

    Args:
        f: the user's function, of a state and `args`.
        args: further arguments of `f`.
        layout: of the state.
        norm: from a leaf to one number per sample.
        rtol, atol: tolerances; None for the default of the dtype that `f` computes in.
        has_aux: `f` returns `(output, aux)`.
    """

    name = "f"
    # What a random function lacks, for the error that says so.
    lacks = "fixed point"
    # Its parts, where it comes in some.
    splitting: Splitting | None = None

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
        self.autocast = autocast_state(layout.device)
        self.evaluations = 0
        self.compute_dtype: torch.dtype | None = None
        self.aux: Any = None
        self.aux_at: Tensor | None = None
        # The error below which rounding alone may be what stops progress: a number, or one for each sample.
        self.floor: float | Tensor = 0.0

    def over(self, f: Callable[..., Any], args: tuple[Any, ...], layout: Layout) -> "Equation":
        """The same kind of equation, to the same tolerances, of another function, which has no aux."""
        other = type(self)(f, args, layout, self.norm, self.rtol, self.atol, has_aux=False)
        other.autocast = self.autocast
        return other

    def image(self, z: Tensor, output: Tensor) -> Tensor:
        """Where plain iteration goes from `z`, differentiably."""
        raise NotImplementedError

    def measure(self, z: Tensor, output: Tensor) -> Evaluation:
        """The residual at `z` and its sizes."""
        raise NotImplementedError

    def settle_tolerances(self, dtype: torch.dtype) -> None:
        """Put defaults for tolerances that are None, knowing the dtype that `f` computes in."""
        raise NotImplementedError

    def apply(self, z: Tensor) -> Tensor:
        """The image of `z`, without counting."""
        return self.image(z, self._call(z))

    def _call(self, z: Tensor) -> Tensor:
        with self.autocast():
            return self._call_cast(z)

    def _call_cast(self, z: Tensor) -> Tensor:
        output = self.f(self.layout.unpack(z), *self.args)
        if self.has_aux:
            if not (isinstance(output, tuple) and len(output) == 2):
                raise TypeError(f"has_aux=True needs {self.name} to return a pair (state, aux).")
            output, self.aux = output
            self.aux_at = z
        packed = self.layout.pack(output, self.name)
        if self.compute_dtype is None:
            self.compute_dtype = self._read_dtype(output)
            self.settle_tolerances(self.compute_dtype)
        return packed

    def take_aux(self, z: Tensor, agree: Agree) -> Any:
        """The auxiliary output at `z` as data; evaluates `f` only where the last evaluation was elsewhere."""
        if not self.has_aux:
            return None
        if agree(self.aux_at is None or not torch.equal(self.aux_at, z)):
            self.evaluations += 1
            with torch.no_grad():
                self._call(z)
        aux, self.aux, self.aux_at = self.aux, None, None
        return detached(aux)

    def evaluate(self, z: Tensor) -> Evaluation:
        """Evaluate `f` at `z` and measure the residual there."""
        first = self.evaluations == 0
        self.evaluations += 1
        changed = _watch(z, first)
        watch = Watch(z.device) if first else None
        output = self._call(z)
        if changed():
            raise ValueError(
                f"{self.name} changed its state in place, and the solver still needs it: use z + ... for z += ..."
            )
        if watch is not None and watch.moved():
            self._refuse_random(z, output)
        return self.measure(z, output)

    def round(self, z: Tensor) -> Tensor:
        """The nearest state that the leaves can hold."""
        return self.layout.round(z)

    def linearize(self, z: Tensor) -> Linearization:
        """Products with the Jacobian of the image at `z`, by one more evaluation with a graph, not counted."""
        jacobian = Linearization(self.apply, z)
        self.aux = self.aux_at = None  # nobody asks for it here, and it would keep a graph alive
        return jacobian

    @property
    def level(self) -> float:
        """The relative accuracy that rounding leaves to a product; known after the first evaluation."""
        assert self.compute_dtype is not None
        return rounding_level(self.compute_dtype)

    def sizes(self, buffer: Tensor) -> list[Tensor]:
        """The norm of each leaf of a buffer, for each sample."""
        sizes = []
        for leaf in self.layout.leaves(buffer.detach()):
            value = self.norm(leaf)
            if not isinstance(value, Tensor) or value.shape != (self.layout.batch,):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"norm must map a leaf of shape {tuple(leaf.shape)} to one number per sample, of shape "
                    f"({self.layout.batch},), but returned {shape}."
                )
            sizes.append(value)
        return sizes

    def worst(self, values: list[Tensor]) -> Tensor:
        """The largest over the leaves, whose norms may be of several dtypes."""
        if len(values) == 1:
            return values[0]
        return torch.stack([value.to(self.layout.dtype) for value in values]).amax(dim=0)

    def _read_dtype(self, output: Any) -> torch.dtype:
        dtypes = [leaf.dtype for leaf in self.layout.spec.flatten_up_to(output)]
        autocast = autocast_dtype(self.layout.device)
        if autocast is not None:
            # Normalisations return float32 under autocast although every product in f rounds to the lower dtype.
            dtypes += [autocast]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    @torch.no_grad()
    def _refuse_random(self, z: Tensor, output: Tensor) -> None:
        apart = difference(self._call, z, output, self.round(torch.nan_to_num(output)))
        if apart:
            where = culprits(lambda: self._call(z), z.device)
            raise ValueError(
                f"{self.name} draws random numbers{where}: two calls at one state differ by {apart:.1e}, so it has "
                f"no {self.lacks}; take eq.nn.VariationalDropout for dropout, or draw outside and pass it in."
            )
        self.evaluations += CALLS


def _watch(z: Tensor, first: bool) -> Callable[[], bool]:
    """Tells whether `z` has been changed in place since; in inference mode, which counts no versions, at first only."""
    if not z.is_inference():
        version = z._version
        return lambda: z._version != version
    copy = z.clone() if first else z
    return lambda: first and not torch.equal(z.nan_to_num(), copy.nan_to_num())
