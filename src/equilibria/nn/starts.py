"""Where solves start: at the equilibrium of the last visit, or at several random places; and where they pass by."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from equilibria.adjoints import Adjoint, OneStep
from equilibria.nn.deq import DEQ, start
from equilibria.options import check_integer, check_positive
from equilibria.problem import FixedPoint
from equilibria.solution import Solution
from equilibria.status import Status
from equilibria.steady import hold
from equilibria.tree import Layout


class StartMemory(nn.Module):
    """Remembers the equilibrium of each sample of a data set, to start from when the sample comes again.

    >>> layer, memory = eq.DEQ(Cell(8)), eq.nn.StartMemory(100)
    >>> indices, x = torch.tensor([3, 14, 15, 92]), torch.randn(4, 8)
    >>> for _ in range(2):
    ...     solution = layer.solve(x, z0=memory.recall(layer, indices, x))
    ...     memory.store(indices, solution)
    >>> solution.steps.max() <= 2
    tensor(True)

    A recalled start is taken only where the residual of the cell as it is now is lower there than at the start that the
    layer would take else, which costs two evaluations of the cell: what training has made stale is not used. Only
    samples that converged are stored. Two entries of a batch that are the same sample leave the later one. What is
    remembered is in the state dict.

    Args:
        count: samples of the data set.
        max_age: calls of `store` after which an entry is not used any more; None for no limit.

    Source: Bai, Geng, Savani and Kolter (2022), Deep equilibrium optical flow estimation, section 3.3, for the reuse of
    equilibria.
    """

    def __init__(self, count: int, max_age: int | None = None) -> None:
        super().__init__()
        check_integer("count", count, 1)
        if max_age is not None:
            check_integer("max_age", max_age, 1)
        self.count = count
        self.max_age = max_age
        self._leaves: list[Tensor] = []
        self._stored = torch.full((count,), -1, dtype=torch.int64)
        self._calls = 0

    @torch.no_grad()
    def recall(self, layer: DEQ, indices: Tensor, *inputs: Any) -> Any:
        """A start for each sample of a batch: the remembered equilibrium where it is known and better, else the usual.

        Args:
            layer: that is to be solved; its samples are the first dimension.
            indices: int64, (batch,), which samples of the data set these are.
            inputs: of the layer.
        """
        indices = self._checked(indices)
        usual = start(layer.cell, inputs)
        leaves, spec = pytree.tree_flatten(usual)
        if any(len(leaf) != len(indices) for leaf in leaves):
            raise ValueError(f"There are {len(indices)} indices for a batch of {len(leaves[0])} samples.")
        known = self._stored[indices] >= 0
        if self.max_age is not None:
            known &= self._calls - self._stored[indices] < self.max_age
        if not bool(known.any()):
            return usual
        shapes = [leaf.shape[1:] for leaf in leaves]
        if shapes != [leaf.shape[1:] for leaf in self._leaves]:
            kept = [tuple(leaf.shape[1:]) for leaf in self._leaves]
            raise ValueError(
                f"The states remembered are of shapes {kept}, those of this layer of {[tuple(one) for one in shapes]}: "
                "take a StartMemory for each layer."
            )
        known = known.to(leaves[0].device)
        pairs = list(zip(self._leaves, leaves, strict=True))
        found = [_chosen(known, old[indices].to(leaf), leaf) for old, leaf in pairs]
        recalled = pytree.tree_unflatten(found, spec)
        better = known & (_residual(layer, recalled, inputs) < _residual(layer, usual, inputs))
        return pytree.tree_map(lambda one, other: _chosen(better, one, other), recalled, usual)

    @torch.no_grad()
    def store(self, indices: Tensor, solution: Solution) -> None:
        """Remember the samples of a solution that converged."""
        indices = self._checked(indices)
        leaves = pytree.tree_leaves(solution.value)
        if len(solution.status) != len(indices):
            raise ValueError(f"There are {len(indices)} indices for {len(solution.status)} samples.")
        if [leaf.shape[1:] for leaf in self._leaves] != [leaf.shape[1:] for leaf in leaves]:
            self._leaves = [torch.zeros(self.count, *leaf.shape[1:], dtype=leaf.dtype) for leaf in leaves]
            self._stored.fill_(-1)
        self._calls += 1
        good = (solution.status == Status.CONVERGED).cpu()
        # An assignment to one place twice takes either; so the last alone is kept.
        last = {int(index): k for k, index in enumerate(indices.tolist()) if good[k]}
        places, rows = torch.tensor(list(last), dtype=torch.int64), torch.tensor(list(last.values()), dtype=torch.int64)
        for memory, leaf in zip(self._leaves, leaves, strict=True):
            memory[places] = leaf.detach().cpu()[rows]
        self._stored[places] = self._calls

    def get_extra_state(self) -> dict[str, Any]:
        """For `state_dict`."""
        return {"leaves": self._leaves, "stored": self._stored, "calls": self._calls}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From `load_state_dict`."""
        if len(state["stored"]) != self.count:
            raise ValueError(f"The memory saved is of {len(state['stored'])} samples, and this one of {self.count}.")
        self._leaves = [leaf.clone() for leaf in state["leaves"]]
        self._stored, self._calls = state["stored"].clone(), state["calls"]

    def _checked(self, indices: Tensor) -> Tensor:
        if indices.ndim != 1 or indices.dtype != torch.int64:
            raise TypeError("indices must be an int64 tensor of one dimension, the samples of the batch.")
        indices = indices.cpu()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.count:
            raise ValueError(f"indices must lie from 0 to {self.count - 1}: make the StartMemory as large as the data.")
        return indices

    def extra_repr(self) -> str:
        return f"count={self.count}, max_age={self.max_age}"


def restarts(layer: DEQ, *inputs: Any, starts: int = 16, scale: float = 1.0, seed: int = 0) -> Solution:
    """Solve from several random starts, and go on from where the residual of each sample is lowest.

    >>> layer = eq.DEQ(Cell(8))
    >>> eq.nn.restarts(layer, torch.randn(4, 8), starts=4).converged
    tensor([True, True, True, True])

    The starts are the layer's own and that plus Gaussian noise, the same for every sample, so that a sample's answer
    does not depend on its batch. They are solved one after the other without gradient, at the memory of one; the
    chosen one is solved once more, from where it ended, and differentiated. Statistics of a BatchNorm in training move
    at each of them: it is meant for `eval()`.

    Args:
        layer: to solve.
        inputs: of the layer.
        starts: how many, at least 1.
        scale: standard deviation of the noise, in units of the state.
        seed: of the noise; the global random state is neither read nor changed.

    Returns:
        The `Solution` of the layer from there.

    Source: Anil et al. (2022), Path independent equilibrium models can better exploit test-time computation.
    """
    check_integer("starts", starts, 1)
    check_positive("scale", scale)
    quiet = copy.copy(layer)
    quiet.on_failure = "ignore"
    usual = start(layer.cell, inputs)
    layout = Layout.of(usual, layer.batch_dims)
    origin, generator = layout.pack_start(usual), torch.Generator().manual_seed(seed)
    best, lowest = origin, torch.full((layout.batch,), torch.inf, dtype=torch.float64, device=origin.device)
    for k in range(starts):
        noise = torch.randn(origin.shape[1], generator=generator, dtype=torch.float64).to(origin)
        with torch.no_grad():
            found = quiet.solve(*inputs, z0=layout.unpack(origin if k == 0 else origin + scale * noise))
        residual = found.residual.reshape(-1).double()
        better = residual < lowest
        best = torch.where(better[:, None], layout.pack(found.value), best)
        lowest = torch.where(better, residual, lowest)
    return layer.solve(*inputs, z0=layout.unpack(best))


def corrections(layer: DEQ, *inputs: Any, steps: Sequence[int], adjoint: Adjoint = OneStep()) -> list[Solution]:  # noqa: B008
    """The states that a solve passes by after some numbers of evaluations, each with a gradient of its own.

    A loss on all of them, the later the heavier, teaches the cell to come close in few evaluations.

    >>> layer, x, y = eq.DEQ(Cell(8)), torch.randn(4, 8), torch.randn(4, 8)
    >>> *early, last = eq.nn.corrections(layer, x, steps=(2, 4))
    >>> loss = (last.value - y).square().mean() + sum(0.5 * (one.value - y).square().mean() for one in early)
    >>> loss.backward()

    Args:
        layer: to solve.
        inputs: of the layer.
        steps: evaluations after which to look, rising.
        adjoint: of the states on the way; the equilibrium has the layer's own.

    Returns:
        A `Solution` for each of `steps`, then that of the layer, which goes on from the last. Samples that have
        converged before give their equilibrium.

    Source: Bai, Geng, Savani and Kolter (2022), Deep equilibrium optical flow estimation, section 3.2, sparse
    fixed-point correction.
    """
    steps = list(steps)
    for step in steps:
        check_integer("steps", step, 1)
    if not steps or any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"steps must rise, and be at least one; they are {steps}.")
    early = copy.copy(layer)
    early.adjoint, early.on_failure = adjoint, "ignore"
    found: list[Solution] = []
    state, taken = None, 0
    for step in steps:
        solution = early.solve(*inputs, state=state, max_steps=step - taken)
        found.append(solution)
        state, taken = solution.state, step
    return [*found, layer.solve(*inputs, state=state)]


def _residual(layer: DEQ, z: Any, inputs: tuple[Any, ...]) -> Tensor:
    layout = Layout.of(z, layer.batch_dims)
    # Held, so that a look moves no statistics.
    cell = hold(layer.cell)
    error = FixedPoint(cell, inputs, layout, layer.norm, None, None, has_aux=False).evaluate(layout.pack(z)).error
    return torch.where(error.isfinite(), error, torch.inf)


def _chosen(which: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(which.reshape(-1, *(1,) * (one.ndim - 1)), one, other)
