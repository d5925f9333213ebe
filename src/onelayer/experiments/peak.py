"""Peak memory of a piece of work, counted rather than read off the process: bytes that its tensors hold at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """Largest number of bytes held at once by tensors made during some work, beside those that were there before.

    >>> 4_000_000 <= peak_bytes(lambda: torch.zeros(1000, 1000) + 1) <= 8_100_000
    True

    Args:
        work: on that device.
        device: `"cpu"`, where the profiler counts, or `"cuda"`, where the allocator does.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    found = profiler.profiler.kineto_results
    assert found is not None
    held = peak = 0
    events = (event for event in found.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops what native code writes to stderr: the profiler announces each start and stop there."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
