"""The parts of a quadratic program as they are given, as one batch of programs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.nn.quadratic.program import Program

NAMES = ("P", "q", "A", "b", "G", "h")


class Given(NamedTuple):
    """What was given.

    Attributes:
        shape: leading dimensions.
        dtype: of the result.
        program: in float64, its samples in one dimension.
        finite: (batch,), whether a sample has neither NaN nor an infinity that has no meaning.
        free: (batch, m), inequalities that are none, since their h is infinite.
    """

    shape: torch.Size
    dtype: torch.dtype
    program: Program
    finite: Tensor
    free: Tensor


def gather(parts: dict[str, Tensor | None]) -> Given:
    """The parts as one batch of programs, or what about them does not fit."""
    tensors = {name: value for name, value in parts.items() if value is not None}
    for one, other in (("A", "b"), ("G", "h")):
        if (one in tensors) != (other in tensors):
            raise ValueError(
                f"{one} and {other} make constraints together, but {other if one in tensors else one} is missing."
            )
    if not tensors.keys() & {"P", "q", "A", "G"}:
        raise ValueError("There is no program: give at least one of P and q, to the layer or to the call.")
    n = next(tensors[name].shape[-1] for name in ("q", "P", "A", "G") if name in tensors)
    rows = {name: tensors[name].shape[-1] if name in tensors else 0 for name in ("b", "h")}
    wanted = {"P": (n, n), "q": (n,), "A": (rows["b"], n), "b": (rows["b"],), "G": (rows["h"], n), "h": (rows["h"],)}
    for name, tensor in tensors.items():
        if tuple(tensor.shape[tensor.ndim - len(wanted[name]) :]) != wanted[name]:
            raise ValueError(
                f"{name} must end in the shape {wanted[name]}, by the {n} unknowns and the other parts of the program, "
                f"but it is of shape {tuple(tensor.shape)}."
            )
        if tensor.device != next(iter(tensors.values())).device:
            raise ValueError("The parts of the program lie on several devices: move them to one.")
    leading = {name: tensor.shape[: tensor.ndim - len(wanted[name])] for name, tensor in tensors.items()}
    try:
        shape = torch.broadcast_shapes(*leading.values())
    except RuntimeError:
        told = ", ".join(f"{name} {tuple(dims)}" for name, dims in leading.items())
        raise ValueError(f"The leading dimensions do not broadcast: {told}.") from None
    dtype = tensors[next(iter(tensors))].dtype
    for tensor in tensors.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    like = next(iter(tensors.values()))
    batch = shape.numel()

    def part(name: str) -> Tensor:
        tensor = tensors.get(name)
        if tensor is None:
            return like.new_zeros((batch, *wanted[name]), dtype=torch.float64)
        return tensor.double().expand(*shape, *wanted[name]).reshape(batch, *wanted[name])

    P, q, A, b, G, h = map(part, NAMES)
    free = h == torch.inf
    G, h = torch.where(free[:, :, None], 0, G), torch.where(free, 1, h)
    program = Program((P + P.mT) / 2, q, torch.cat([A, G], dim=1), torch.cat([b, h], dim=1), rows["b"])
    finite = torch.stack([torch.isfinite(t).flatten(1).all(dim=1) for t in program[:4]]).all(dim=0)
    return Given(shape, dtype, trivial(program, finite), finite, free)


def check_tensor(name: str, value: Tensor | None) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating tensor, not {kind}.")
    if value.ndim < (2 if name in ("P", "A", "G") else 1):
        raise ValueError(
            f"{name} must have at least {2 if name in ('P', 'A', 'G') else 1} dimensions, not {value.ndim}."
        )


def trivial(program: Program, sound: Tensor) -> Program:
    """The program, where that is not sound the one of the least norm of all points; its gradients end there."""
    P, q, C, d, p = program
    unit = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    keep = sound[:, None]
    return Program(
        torch.where(keep[:, None], P, unit),
        torch.where(keep, q, 0),
        torch.where(keep[:, None], C, 0),
        torch.where(keep, d, 0),
        p,
    )
