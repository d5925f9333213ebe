"""The path of a solve under `torch.func` transforms and in forward mode."""

import copy
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from equilibria.adjoints import Adjoint
from equilibria.functional.rules import Equilibrium
from equilibria.functional.setting import Search, Setting, Tally
from equilibria.problem import Equation
from equilibria.solution import AdjointReport
from equilibria.status import Failures
from equilibria.transforms import Escapes, first, followed, outside, peel, traced


class Result(NamedTuple):
    """The solution, (batch, n), and what became of each sample, (batch,), as the transforms see them."""

    z: Tensor
    status: Tensor
    steps: Tensor
    error: Tensor
    evaluations: int


def solve_transformed(
    problem: Equation, z0: Tensor, search: Search, adjoint: Adjoint, failures: Failures, report: AdjointReport
) -> Result:
    """Solve under transforms: mapped axes become batch dimensions, and derivatives have rules of their own.

    Only what comes through `problem.args` is seen by the transforms; an `f` that captures more is refused.

    Args:
        problem: as one entry of the mapped axes sees it.
        z0: the start, (batch, n).
        search: the forward solve; it is given plain tensors alone.
        adjoint: `Implicit` where derivatives are taken.
        failures, report: as for any solve; the report's tensors are plain, with mapped axes in front.
    """
    if traced():
        raise NotImplementedError(
            "A solve decides by its data when to stop, which torch.func.linearize and make_fx cannot record: use "
            "torch.func.jvp for linearize, and trace around the solve."
        )
    leaves, spec = pytree.tree_flatten(problem.args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        every = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            every[i] = tensor
        return pytree.tree_unflatten(every, spec)

    tensors = tuple(leaves[i] for i in places)
    probe = copy.copy(problem)
    probe.args = rebuild(tuple(peel(tensor, first) for tensor in tensors))
    _refuse_captures(probe, peel(z0, first))
    tally = Tally()
    setting = Setting(problem, rebuild, search, adjoint, failures, report, tally)
    z, status, steps, error = Equilibrium.apply(setting, z0, *tensors)
    return Result(z, status, steps, error, tally.evaluations)


def _refuse_captures(probe: Equation, z: Tensor) -> None:
    """Raise if `f` of plain inputs meets a tensor of a transform, or carries a derivative: it then captures more."""

    def refuse() -> None:
        raise ValueError(
            f"{probe.name} captures a tensor that requires grad, carries a tangent, or comes from inside a torch.func "
            "transform, which follows arguments alone: pass it in *args, or, if it is a constant, make it outside the "
            "transform or in the function itself."
        )

    with outside(), Escapes(refuse):
        image = probe.apply(z)
        # An f that itself differentiates may carry the derivative of a leaf of its own, which transforms have not.
        if followed(image) and followed(torch.func.vjp(probe.apply, z)[0]):
            refuse()
