"""Roots: g(z) = 0, and minima, whose gradient is zero."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from equilibria.norms import Norm
from equilibria.precision import precise
from equilibria.problem.equation import Equation
from equilibria.problem.evaluation import ATOL, Evaluation, rounding_level
from equilibria.problem.linearization import leaf_at, recording
from equilibria.transforms import transforming
from equilibria.tree import Layout


class Root(Equation):
    """The equation g(z, *args) = 0, as the fixed point of z - g(z), whose plain iteration promises nothing."""

    name = "g"
    lacks = "root"

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
        super().__init__(f, args, layout, norm, rtol, atol, has_aux)
        # Kept apart from f, which a checkpoint wraps: minimisers look at the values of the objective.
        self.gradient = f if isinstance(f, Gradient) else None

    def settle_tolerances(self, dtype: torch.dtype) -> None:
        if self.atol is None:
            self.atol = ATOL[dtype]

    def image(self, z: Tensor, output: Tensor) -> Tensor:
        return z - output

    def measure(self, z: Tensor, output: Tensor) -> Evaluation:
        assert self.atol is not None
        with torch.no_grad():
            size = self.worst(self.sizes(output))
            if self.evaluations == 1:
                # The values that g takes at the start are the scale of what its rounding leaves.
                self.floor = rounding_level(self.compute_dtype or z.dtype) * size
            satisfied = size <= self.atol
        values = None if self.gradient is None else self.gradient.values
        return Evaluation(z, z - output, -output, size, size, satisfied, z, size, values)


class Gradient:
    """The gradient of an objective of one scalar a sample; `values` are those of the last call, (batch,).

    Args:
        objective: from a state and further arguments to a tensor of one scalar a sample, or to that and an aux.
        layout: of the state.
        has_aux: the objective returns `(scalars, aux)`.
    """

    def __init__(self, objective: Callable[..., Any], layout: Layout, has_aux: bool) -> None:
        self.objective = objective
        self.layout = layout
        self.has_aux = has_aux
        self.values: Tensor | None = None

    def __call__(self, z: Any, *args: Any) -> Any:
        if transforming():
            return self._transformed(z, *args)
        create_graph = torch.is_grad_enabled()
        leaves, spec = pytree.tree_flatten(z)
        with recording():
            leaves = [leaf if leaf.requires_grad and create_graph else leaf_at(leaf) for leaf in leaves]
            output, aux = self._evaluate(pytree.tree_unflatten(leaves, spec), args)
            gradients = (None,) * len(leaves)
            if output.requires_grad:
                with precise(output):
                    gradients = torch.autograd.grad(output.sum(), leaves, create_graph=create_graph, allow_unused=True)
        self.values = output.detach().reshape(self.layout.batch)
        gradients = [torch.zeros_like(z) if g is None else g for g, z in zip(gradients, leaves, strict=True)]
        result = pytree.tree_unflatten(gradients, spec)
        return (result, aux) if self.has_aux else result

    def _transformed(self, z: Any, *args: Any) -> Any:
        # Transforms refuse requires_grad_; and what is computed inside one of them must not leave it by the side.
        result = torch.func.grad(lambda z: self._evaluate(z, args)[0].sum())(z)
        return (result, self._evaluate(z, args)[1]) if self.has_aux else result

    def _evaluate(self, z: Any, args: tuple[Any, ...]) -> tuple[Tensor, Any]:
        output, aux = self.objective(z, *args), None
        if self.has_aux:
            if not (isinstance(output, tuple) and len(output) == 2):
                raise TypeError("has_aux=True needs the objective to return a pair (scalars, aux).")
            output, aux = output
        shape = self.layout.batch_shape
        if not isinstance(output, Tensor) or output.shape != shape or not output.is_floating_point():
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"The objective must return one floating scalar a sample, of shape {tuple(shape)}, but returned "
                f"{got}: sum over the entries of each sample."
            )
        return output, aux
