"""Random starts of a solve, and the best of what several lead to."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from equilibria.adjoints import Unrolled
from equilibria.nn.deq import DEQ, check_layer
from equilibria.options import check_integer, check_positive
from equilibria.solution import Solution
from equilibria.solve import solve, uncompiled
from equilibria.status import Failures
from equilibria.tree import Layout, detached

# A state, (batch, n), whether it met the tolerance, and its residual.
Candidate = tuple[Tensor, Tensor, Tensor]


class RandomStart(nn.Module):
    """Gaussian noise on where a solve starts, in training alone, so that the equilibrium cannot come to hang on it.

    >>> class Noisy(Cell):
    ...     def __init__(self, width):
    ...         super().__init__(width)
    ...         self.start = eq.nn.RandomStart(scale=0.5)
    ...     def initial_state(self, x):
    ...         return self.start(torch.zeros_like(x))
    >>> layer = eq.DEQ(Noisy(8))
    >>> layer(torch.randn(4, 8)).shape
    torch.Size([4, 8])

    In `eval()` it is the identity. It draws once a solve, from the global generator that follows `torch.manual_seed`,
    or from that of the call.

    Args:
        scale: standard deviation of the noise, in units of the state; take the size of the states that matter.

    Source: Anil et al. (2022), Path independent equilibrium models can better exploit test-time computation.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        check_positive("scale", scale)
        self.scale = scale

    def forward(self, z0: Any, generator: torch.Generator | None = None) -> Any:
        """`z0`, any tree of floating tensors, with noise on every entry in training."""
        if not self.training:
            return z0

        def moved(leaf: Tensor) -> Tensor:
            noise = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype, device=leaf.device)
            return leaf + self.scale * noise

        return pytree.tree_map(moved, z0)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


@uncompiled
def restarts(
    layer: DEQ,
    *inputs: Any,
    starts: int = 16,
    scale: float = 1.0,
    seed: int = 0,
    chunk: int | None = None,
    z0: Any = None,
    max_steps: int | None = None,
    **keywords: Any,
) -> Solution:
    """Solve from several starts, and go on, for each sample, from the one that led to the lowest residual.

    >>> class Hard(nn.Module):
    ...     def forward(self, z, x):
    ...         return 3 * torch.sin(2 * z + x)
    >>> layer, x = eq.DEQ(Hard(), max_steps=30, on_failure="ignore"), torch.linspace(-3, 3, 50)[:, None]
    >>> with torch.no_grad():
    ...     one, best = layer.solve(x), eq.nn.restarts(layer, x)
    >>> int(one.converged.sum()) < int(best.converged.sum())
    True

    The first start is the layer's own; the others are that plus Gaussian noise, the same for every sample, so that what
    becomes of a sample depends on no other. Starts are searched from without gradient, as one batch of samples times
    starts; an equilibrium that met its tolerance is preferred to a state that did not, and among equals the one of
    lower residual. From there the layer is solved once more, with its gradient: one evaluation where the state is an
    equilibrium, and up to `max_steps` further ones where no start led to one.

    Args:
        layer: what is solved; its norm, tolerances and policy on failures are those of the answer.
        inputs: of the call; every tensor among them has the samples in its first dimensions, since it is repeated.
        starts: how many.
        scale: standard deviation of the noise, in units of the state.
        seed: of the noise; the global random state is neither read nor changed by it.
        chunk: starts that are solved at a time, which bounds the memory; None is all. With 1 nothing is repeated, and a
            cell may hold, or be given, what it likes.
        z0: the first start; None is that of the layer.
        max_steps: evaluations allowed from each start; None is that of the layer.
        keywords: of the call; passed on as they are.

    Returns:
        `eq.Solution`, whose `steps` and `evaluations` count those of all solves.

    Raises:
        SolveError: no start led to an equilibrium of a sample and the layer's `on_failure` is "raise".
        TypeError, ValueError: an option or an input makes no sense.

    Source: Anil et al. (2022), for equilibria as what computation at test time is spent on; choice by residual is this
    library's.
    """
    check_layer("restarts", layer)
    check_integer("starts", starts, 1)
    check_positive("scale", scale)
    check_integer("seed", seed, 0)
    if chunk is not None:
        check_integer("chunk", chunk, 1)
    if isinstance(layer.adjoint, Unrolled):
        raise ValueError(
            "eq.Unrolled() differentiates the steps that led to an equilibrium, and those from many starts are not "
            "kept: take eq.Implicit(), eq.Phantom(...) or eq.OneStep()."
        )
    max_steps = layer._allowed(max_steps)
    z0 = layer._start(inputs) if z0 is None else z0
    layout = Layout.of(z0, layer.batch_dims)
    together = 1 if layer.batch_dims == 0 else min(chunk or starts, starts)
    if together > 1:
        _check_samples(inputs, layout.batch_shape)
    origin = layout.pack_start(detached(z0))
    noise = torch.randn(starts, origin.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise[0] = 0
    best = None
    steps, evaluations = 0, 0
    for some in (scale * noise).to(origin).split(together):
        found = _search(layer, inputs, keywords, layout, origin + some[:, None], max_steps)
        evaluations += found.evaluations
        for candidate in zip(found.z, found.converged, found.residual, strict=True):
            best = candidate if best is None else _better(best, candidate)
        steps = steps + found.steps.sum(dim=0).reshape(layout.batch_shape)
    assert best is not None
    start = layout.unpack(best[0])
    with layer._posed(inputs, keywords, start) as problem:
        solution = solve(problem, start, layer.solver, layer.adjoint, max_steps, layer._failures())
    evaluations += solution.evaluations
    return layer._recorded(replace(solution, steps=solution.steps + steps, evaluations=evaluations), z0)


class _Found(NamedTuple):
    """What became of several starts: (starts, batch, ...) each, and the evaluations of them together."""

    z: Tensor
    converged: Tensor
    residual: Tensor
    steps: Tensor
    evaluations: int


@torch.no_grad()
def _search(
    layer: DEQ, inputs: tuple[Any, ...], keywords: dict[str, Any], layout: Layout, states: Tensor, max_steps: int
) -> _Found:
    """Solve from states of shape (starts, batch, n), all at once."""
    count = len(states)
    if count == 1:
        start = layout.unpack(states[0])
    else:
        start = pytree.tree_map(lambda leaf: leaf.flatten(0, 1), layout.repeated((count,)).unpack(states.flatten(0, 1)))
        inputs = pytree.tree_map(lambda x: torch.cat([x] * count) if isinstance(x, Tensor) else x, inputs)
    with layer._posed(inputs, keywords, start, moves=False) as problem:
        if problem.layout.batch != count * layout.batch:
            raise ValueError(
                "BatchNorm in training makes one problem of a batch, in which no sample has a start of its own to "
                "choose: call eval() on it."
            )
        found = solve(problem, start, layer.solver, layer.adjoint, max_steps, Failures("ignore"))
        z = problem.layout.pack(found.value)
    met, residual, steps = (t.reshape(count, layout.batch) for t in (found.converged, found.residual, found.steps))
    return _Found(z.reshape(states.shape), met, residual, steps, found.evaluations)


def _better(one: Candidate, other: Candidate) -> Candidate:
    """The one of two states that each sample prefers."""
    (_, met, residual), (_, other_met, other_residual) = one, other
    # A residual of NaN is lower than none.
    lower = other_residual.nan_to_num(torch.inf) < residual.nan_to_num(torch.inf)
    take = (other_met & ~met) | ((other_met == met) & lower)
    z = torch.where(take[:, None], other[0], one[0])
    return z, torch.where(take, other_met, met), torch.where(take, other_residual, residual)


def _check_samples(inputs: tuple[Any, ...], batch_shape: torch.Size) -> None:
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.shape[: len(batch_shape)] != batch_shape:
            raise ValueError(
                f"To be repeated for each start, an input must have the samples {tuple(batch_shape)} in its first "
                f"dimensions, and one has the shape {tuple(leaf.shape)}: pass it by keyword, or take chunk=1."
            )
