"""Histories of vectors, (batch, capacity, n), that grow with what is written."""

import torch
from torch import Tensor


def write(buffer: Tensor | None, slot: int, vector: Tensor, capacity: int) -> Tensor:
    """The history with `vector`, (batch, n), at `slot`; at most doubles what is allocated, up to `capacity`.

    `Unrolled` differentiates the very steps of a solver, and autograd then needs the old history: it gets a copy.
    """
    if buffer is None:
        buffer = vector.new_zeros(vector.shape[0], min(4, capacity), vector.shape[1])
    elif slot >= buffer.shape[1]:
        more = min(buffer.shape[1], capacity - buffer.shape[1])
        buffer = torch.cat([buffer, vector.new_zeros(vector.shape[0], more, vector.shape[1])], dim=1)
    elif torch.is_grad_enabled():
        buffer = buffer.clone()
    buffer[:, slot] = vector
    return buffer
