"""The equation of a solve as a function of explicit tensors, mapped over as many axes as there are."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from equilibria.adjoints import Adjoint
from equilibria.loop import Outcome
from equilibria.problem import Equation, Gradient
from equilibria.solution import AdjointReport
from equilibria.status import Failures

Search = Callable[[Equation, Tensor], Outcome]


@dataclass
class Tally:
    """What a forward solve counts, told by the side since it is no tensor."""

    evaluations: int = 0


@dataclass(frozen=True, eq=False)
class Setting:
    """All of a solve that no transform touches.

    Buffers of a state have the shape (*sizes, batch, n), flags of samples (*sizes, batch).

    Attributes:
        problem: the equation of one entry of the mapped axes, whose `args` are replaced.
        rebuild: from the tensors among the arguments to the arguments.
        search: the forward solve, on plain tensors.
        adjoint, failures, report, tally: of the solve.
        sizes: of the mapped axes, outermost first.
        axes: the dimension of each argument tensor that is mapped, or None; one tuple an axis, innermost first.
    """

    problem: Equation
    rebuild: Callable[[tuple[Tensor, ...]], tuple[Any, ...]]
    search: Search
    adjoint: Adjoint
    failures: Failures
    report: AdjointReport
    tally: Tally
    sizes: tuple[int, ...] = ()
    axes: tuple[tuple[int | None, ...], ...] = ()

    def mapped(self, size: int, dims: tuple[int | None, ...]) -> "Setting":
        """The same over one more axis, outside the others: samples of it are samples of one larger batch."""
        return replace(self, sizes=(size, *self.sizes), axes=(*self.axes, dims))

    def equation(self, bad: Tensor | None, leaves: tuple[Tensor, ...]) -> Equation:
        """The equation of the whole batch, in which samples that are `bad` meet no NaN and have derivatives zero."""
        dims: tuple[tuple[int | None, ...], ...] = self.axes
        if bad is None:
            function, args = self._call, leaves
        else:
            function, args = self._call_cleaned, (bad, *leaves)
            dims = tuple((0, *axis) for axis in dims)
        for axis in dims:
            # Random numbers are refused by the equation, whose sentence is the better one.
            function = torch.vmap(function, in_dims=(0, *axis), randomness="different")
        layout = self.problem.layout.repeated(self.sizes)
        if isinstance(self.problem.f, Gradient):
            function = Gradient(function, layout, has_aux=False)
        return self.problem.over(function, args, layout)

    def image(self, z: Tensor, bad: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
        """Where plain iteration goes from `z`, as a function of all tensors that it depends on."""
        equation = self.equation(bad, leaves)
        image = equation.apply(z.reshape(equation.layout.batch, z.shape[-1])).reshape(z.shape)
        return torch.where(bad[..., None], 0, image)

    def _call(self, z: Any, *leaves: Tensor) -> Any:
        f = self.problem.f
        # Minimisers look at the values of the objective, so that it is what gets mapped.
        output = (f.objective if isinstance(f, Gradient) else f)(z, *self.rebuild(leaves))
        return output[0] if self.problem.has_aux else output

    def _call_cleaned(self, z: Any, bad: Tensor, *leaves: Tensor) -> Any:
        layout = self.problem.layout
        parts = layout.spec.flatten_up_to(z)
        z = pytree.tree_unflatten([self._cleaned(part, bad) for part in parts], layout.spec)
        return self._call(z, *(self._cleaned(leaf, bad) for leaf in leaves))

    def _cleaned(self, leaf: Tensor, bad: Tensor) -> Tensor:
        # By ones, since derivatives divide by inputs. A tensor of this shape that belongs to no sample loses nothing: a
        # good sample does not depend on an entry that is NaN; and infinities of good samples, as in an attention mask,
        # are meant.
        shape = self.problem.layout.batch_shape
        if not leaf.is_floating_point() or leaf.shape[: len(shape)] != shape:
            return leaf
        rows, infinite = bad.reshape(*shape, *(1,) * (leaf.ndim - len(shape))), torch.isinf(leaf)
        meant = (infinite & ~rows).any()
        return torch.where(rows & (torch.isnan(leaf) | (infinite & ~meant)), 1, leaf)
