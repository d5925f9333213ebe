"""Where the solves of known samples ended, for the next ones to start there."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from equilibria.nn.deq import DEQ, check_layer
from equilibria.options import check_integer
from equilibria.solution import Solution
from equilibria.solve import uncompiled
from equilibria.tree import Layout, detached


class StartMemory:
    """The last equilibrium of each sample of a data set, for its next solve to start from.

    >>> layer, data = eq.DEQ(Cell(8)), torch.randn(100, 8)
    >>> memory = eq.nn.StartMemory(samples=100)
    >>> indices = torch.tensor([3, 14, 15])
    >>> for epoch in range(2):
    ...     solution = layer.solve(data[indices], z0=memory.recall(indices, layer, data[indices]))
    ...     memory.store(indices, solution)
    >>> solution.evaluations
    1

    What is recalled for a sample is used where it is fresh enough and where its residual, under the cell as it is now,
    is lower than that of the start the layer would have had. That takes two evaluations of the cell, which change
    nothing; none while no sample of the batch is known.

    A memory is data, like the state of an optimizer and not a part of the model: it is saved where its `state_dict` is.
    It holds one state for each sample, from the first `store` on.

    Args:
        samples: in the data set, whose indices are 0 to `samples - 1`.
        max_age: an entry is too old once `store` has been called more often than this since it was stored; None trusts
            the residual alone.
        device: that holds it; None is that of the first states.

    Source: Bai, Geng, Savani and Kolter (2022), Deep equilibrium optical flow estimation, who reuse the fixed point of
    the frame before; the rule for staleness is this library's.
    """

    def __init__(self, samples: int, max_age: int | None = None, device: torch.device | str | None = None) -> None:
        check_integer("samples", samples, 1)
        if max_age is not None:
            check_integer("max_age", max_age, 0)
        self.samples = samples
        self.max_age = max_age
        self.device = None if device is None else torch.device(device)
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._states: Any = None
        self._clock = 0
        self._stored_at = torch.full((self.samples,), -1)

    @uncompiled
    def recall(self, indices: Tensor, layer: DEQ, *inputs: Any, z0: Any = None, **keywords: Any) -> Any:
        """Where to start the solve of some samples.

        Args:
            indices: of the samples of the batch, integers of shape (batch,).
            layer: that is about to be called.
            inputs, keywords: of its call.
            z0: the start of samples that have none better; None is that of the layer.

        Returns:
            The `z0` of the call, of the structure, dtype and device of the layer's own start.

        Raises:
            IndexError: an index is of no sample.
            TypeError, ValueError: the indices, or states in other shapes than before, make no sense.
        """
        check_layer("StartMemory", layer)
        default = layer._start(inputs) if z0 is None else z0
        layout = Layout.of(default, layer.batch_dims)
        where = self._places(indices, layout.batch_shape)
        age = self._clock - self._stored_at[where]
        fresh = self._stored_at[where] >= 0
        if self.max_age is not None:
            fresh = fresh & (age <= self.max_age)
        if self._states is None or not bool(fresh.any()):
            return default
        self._check_shapes(default)
        fresh = fresh.to(layout.device)

        def choose(mask: Tensor, known: Any) -> Any:
            return pytree.tree_map(lambda k, d: torch.where(_along(mask, d), k, d), known, default)

        known = pytree.tree_map(lambda held, d: held[where.to(held.device)].to(d), self._states, detached(default))
        warm = _residual(layer, choose(fresh, known), inputs, keywords)
        cold = _residual(layer, default, inputs, keywords)
        return choose(fresh & warm.isfinite() & ~(cold <= warm), known)

    @torch.no_grad()
    def store(self, indices: Tensor, solution: Solution) -> None:
        """Keep the equilibria of the samples that converged; of one that is there twice, the last.

        Args:
            indices: of the samples of the batch, integers of shape (batch,).
            solution: of the layer's solve for them.

        Raises:
            IndexError, TypeError, ValueError: as for `recall`.
        """
        where = self._places(indices, solution.status.shape)
        if self._states is not None:
            self._check_shapes(solution.value)
        self._clock += 1
        converged = solution.converged.to("cpu")
        rows = converged.nonzero().flatten()
        if len(rows) == 0:
            return
        unique, inverse = torch.unique(where[rows], return_inverse=True)
        last = torch.zeros_like(unique).scatter_reduce(0, inverse, rows, "amax", include_self=False)
        if self._states is None:
            self._states = pytree.tree_map(
                lambda z: z.new_zeros((self.samples, *z.shape[1:]), device=self.device), solution.value
            )
        for held, z in zip(pytree.tree_leaves(self._states), pytree.tree_leaves(solution.value), strict=True):
            held[unique.to(held.device)] = z.detach()[last.to(z.device)].to(held)
        self._stored_at[unique] = self._clock

    def state_dict(self) -> dict[str, Any]:
        """All that it holds."""
        return {"states": self._states, "stored_at": self._stored_at, "clock": self._clock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what `state_dict` of a memory of as many samples gave."""
        if len(state["stored_at"]) != self.samples:
            raise ValueError(f"The state is of {len(state['stored_at'])} samples; this memory has {self.samples}.")
        states = state["states"]
        if states is not None:
            states = pytree.tree_map(lambda z: z.clone().to(self.device or z.device), states)
        self._states = states
        self._stored_at = state["stored_at"].cpu().clone()
        self._clock = state["clock"]

    def __repr__(self) -> str:
        known = int((self._stored_at >= 0).sum())
        return f"StartMemory(samples={self.samples}, max_age={self.max_age}, device={self.device}, known={known})"

    def _places(self, indices: Any, batch_shape: torch.Size) -> Tensor:
        if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.dtype == torch.bool:
            raise TypeError(f"indices must be a tensor of integers, not {indices!r:.60}.")
        if len(batch_shape) != 1 or indices.shape != batch_shape:
            raise ValueError(
                f"indices must name the samples of a batch in one dimension, {tuple(batch_shape)}, but are of the "
                f"shape {tuple(indices.shape)}."
            )
        indices = indices.detach().to("cpu", torch.int64)
        outside = indices[(indices < 0) | (indices >= self.samples)]
        if len(outside):
            raise IndexError(
                f"Sample {int(outside[0])} is none of the {self.samples}, which are 0 to {self.samples - 1}."
            )
        return indices

    def _check_shapes(self, state: Any) -> None:
        held, given = ([tuple(leaf.shape[1:]) for leaf in pytree.tree_leaves(tree)] for tree in (self._states, state))
        if held != given or pytree.tree_structure(self._states) != pytree.tree_structure(state):
            raise ValueError(
                f"This memory holds states with samples of shapes {held}, and was given {given}: a sample keeps its "
                "shape; clear() forgets them all."
            )


def _along(mask: Tensor, leaf: Tensor) -> Tensor:
    """The mask of samples, to broadcast over the entries of a leaf."""
    return mask.reshape(-1, *(1 for _ in leaf.shape[1:]))


@torch.no_grad()
def _residual(layer: DEQ, z: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Of a state, as in `Solution`, (batch,); by one evaluation of the cell that moves nothing."""
    with layer._posed(inputs, keywords, z, moves=False) as problem:
        error = problem.evaluate(problem.round(problem.layout.pack_start(z))).error
    return error.expand(Layout.of(z, layer.batch_dims).batch)
