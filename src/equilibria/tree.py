"""A state of any structure as one buffer of shape (batch, n), and back."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

STATE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layout:
    """How the leaves of a state lie in a buffer of shape (batch, n).

    >>> layout = Layout.of({"h": torch.zeros(4, 3), "c": torch.zeros(4, 2, 2)}, batch_dims=1)
    >>> layout.pack({"h": torch.ones(4, 3), "c": torch.zeros(4, 2, 2)}).shape
    torch.Size([4, 7])

    The buffer is never narrower than float32, so that a solver's algebra keeps its digits where the state is in half
    precision; `round` gives the buffer that the leaves can hold.
    """

    spec: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    batch_shape: torch.Size
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tree: Any, batch_dims: int, state_dtype: torch.dtype | None = None) -> "Layout":
        """Read the layout off a state, or say what about it cannot be solved for."""
        leaves, spec = pytree.tree_flatten(tree)
        if not leaves:
            raise ValueError("The state z0 holds no tensor: give a tensor, or a tuple, list or dict of tensors.")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"Every leaf of the state z0 must be a tensor, not {type(leaf).__name__}.")
            if leaf.dtype not in STATE_DTYPES:
                raise TypeError(
                    f"The state z0 must be of float64, float32, bfloat16 or float16, not {leaf.dtype}: "
                    "convert it, for example with z0.float()."
                )
            if leaf.ndim < batch_dims:
                raise ValueError(
                    f"batch_dims={batch_dims} needs leaves of at least {batch_dims} dimensions, but one has the shape "
                    f"{tuple(leaf.shape)}: pass batch_dims=0 to solve one joint problem."
                )
        batch_shape = leaves[0].shape[:batch_dims]
        for leaf in leaves:
            if leaf.shape[:batch_dims] != batch_shape:
                raise ValueError(
                    f"All leaves of the state must share their first {batch_dims} dimensions (the samples), but there "
                    f"are {tuple(batch_shape)} and {tuple(leaf.shape[:batch_dims])}."
                )
            if leaf.device != leaves[0].device:
                raise ValueError(f"The state lies on {leaves[0].device} and on {leaf.device}: move it to one device.")
        dtypes = tuple(state_dtype or leaf.dtype for leaf in leaves)
        width = torch.float32
        for dtype in dtypes:
            width = torch.promote_types(width, dtype)
        return Layout(
            spec,
            tuple(leaf.shape for leaf in leaves),
            dtypes,
            batch_shape,
            tuple(math.prod(leaf.shape[batch_dims:]) for leaf in leaves),
            width,
            leaves[0].device,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # torch warns of the specs of leaves where they are pickled or copied: a tree of numbers says as much.
        tree = pytree.tree_unflatten(range(len(self.shapes)), self.spec)
        return _layout, (tree, *(getattr(self, field.name) for field in fields(self)[1:]))

    @property
    def batch(self) -> int:
        """The number of independent samples."""
        return math.prod(self.batch_shape)

    def repeated(self, sizes: tuple[int, ...]) -> "Layout":
        """The layout of a state with further batch dimensions in front of the others."""
        shapes = tuple(torch.Size((*sizes, *shape)) for shape in self.shapes)
        return replace(self, shapes=shapes, batch_shape=torch.Size((*sizes, *self.batch_shape)))

    def pack(self, tree: Any, name: str = "f") -> Tensor:
        """Lay a tree of this structure into one buffer; `name` says in errors whose output it is."""
        try:
            leaves = self.spec.flatten_up_to(tree)
        except ValueError:
            raise TypeError(
                f"{name} must return the structure of the state, {_describe(self.spec)}, but returned "
                f"{_describe(pytree.tree_structure(tree))}."
            ) from None
        for leaf, shape, dtype in zip(leaves, self.shapes, self.dtypes, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name} must return tensors, but returned {type(leaf).__name__}.")
            if leaf.shape != shape:
                raise ValueError(
                    f"{name} must return the shape of the state, {tuple(shape)}, but returned {tuple(leaf.shape)}."
                )
            if leaf.dtype == dtype:
                continue
            if not leaf.is_floating_point() or torch.promote_types(leaf.dtype, dtype) != dtype:
                raise TypeError(
                    f"{name} returned {leaf.dtype} for a state of {dtype}: its dtype may be lower than the state's, "
                    f"never other; pass z0 or state_dtype in {leaf.dtype}, or convert the output."
                )
        parts = [leaf.reshape(self.batch, size) for leaf, size in zip(leaves, self.sizes, strict=True)]
        if len(parts) == 1:
            return parts[0].to(self.dtype)
        return torch.cat([part.to(self.dtype) for part in parts], dim=1)

    def pack_start(self, tree: Any) -> Tensor:
        """Lay a start into a buffer, cast to the dtype of the state."""
        leaves = pytree.tree_leaves(tree)
        return self.pack(pytree.tree_unflatten([t.to(d) for t, d in zip(leaves, self.dtypes, strict=True)], self.spec))

    def unpack(self, buffer: Tensor) -> Any:
        """The tree that a buffer holds, each leaf in its own dtype."""
        parts = buffer.split(self.sizes, dim=1) if len(self.sizes) > 1 else (buffer,)
        leaves = [
            part.to(dtype).reshape(shape) for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.spec)

    def leaves(self, buffer: Tensor) -> list[Tensor]:
        """Views of the leaves as (batch, ...), which is what a norm sees."""
        parts = buffer.split(self.sizes, dim=1) if len(self.sizes) > 1 else (buffer,)
        dims = len(self.batch_shape)
        return [part.reshape(self.batch, *shape[dims:]) for part, shape in zip(parts, self.shapes, strict=True)]

    def round(self, buffer: Tensor) -> Tensor:
        """The nearest buffer that the leaves can hold: what is evaluated is then what is returned."""
        if all(dtype == self.dtype for dtype in self.dtypes):
            return buffer
        parts = buffer.split(self.sizes, dim=1)
        return torch.cat([p.to(d).to(self.dtype) for p, d in zip(parts, self.dtypes, strict=True)], dim=1)


def _layout(tree: Any, *rest: Any) -> Layout:
    return Layout(pytree.tree_structure(tree), *rest)


def detached(tree: Any) -> Any:
    """The tree as data: its tensors without their graphs, everything else as it is."""
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _describe(spec: pytree.TreeSpec) -> str:
    if spec.is_leaf():
        return "one tensor"
    kind = spec.type.__name__ if spec.type is not None else "None"
    if spec.type is dict:
        return f"a dict with the keys {sorted(map(str, spec.context))}"
    return f"a {kind} of {spec.num_children}"
