"""Windows: drawn from a file of tokens by seed and step alone, shared among processes, or read as streams."""

import hashlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onelayer.corpora import batches, token_files
from onelayer.corpora.token_files import Tokens
from onelayer.errors import UsageError


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def counting(folder: Path, length: int) -> Tokens:
    """The numbers from 0 as tokens."""
    path = folder / f"{length}.bin"
    if not path.exists():
        token_files.write(path, [np.arange(length)], np.dtype(np.uint16))
    return Tokens(path, np.dtype(np.uint16), vocabulary=1 << 16)


@given(
    length=st.integers(2, 200),
    context=st.integers(1, 199),
    size=st.integers(1, 9),
    step=st.integers(0),
    seed=st.integers(0),
    streams=st.booleans(),
)
def test_a_batch_is_windows_of_the_text_and_depends_on_seed_and_step_alone(
    folder: Path, length: int, context: int, size: int, step: int, seed: int, streams: bool
):
    context = min(context, length - 1)
    tokens = counting(folder, length)
    state = torch.random.get_rng_state()
    inputs, targets = batches.batch(tokens, step, size, context, seed, streams=streams)
    again, _ = batches.batch(tokens, step, size, context, seed, streams=streams)
    assert inputs.shape == targets.shape == (size, context)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(inputs, again)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(context))
    assert torch.equal(state, torch.random.get_rng_state())


@given(
    processes=st.integers(1, 5),
    each=st.integers(1, 4),
    step=st.integers(0, 1000),
    seed=st.integers(0, 9),
    streams=st.booleans(),
)
def test_processes_share_the_windows_of_one(
    folder: Path, processes: int, each: int, step: int, seed: int, streams: bool
):
    tokens, size = counting(folder, 500), processes * each
    whole = batches.batch(tokens, step, size, 7, seed, streams=streams)
    shares = [
        batches.batch(tokens, step, size, 7, seed, range(rank * each, (rank + 1) * each), streams)
        for rank in range(processes)
    ]
    for part in (0, 1):
        assert torch.equal(torch.cat([share[part] for share in shares]), whole[part])
    apart = batches.batch(tokens, step, size, 7, seed, range(processes - 1, size, processes), streams)
    assert torch.equal(apart[0], whole[0][processes - 1 :: processes])
    nothing, _ = batches.batch(tokens, step, size, 7, seed, range(0), streams)
    assert nothing.shape == (0, 7)


def test_windows_are_drawn_as_they_always_were(folder: Path):
    starts = np.random.default_rng((3, 41)).integers(0, 1000 - 16, size=8)
    inputs, _ = batches.batch(counting(folder, 1000), 41, 8, 16, seed=3)
    assert inputs[:, 0].tolist() == starts.tolist()


@given(length=st.integers(2, 400), context=st.integers(1, 60), size=st.integers(1, 9), seed=st.integers(0, 9))
def test_streams_go_on_where_they_ended_and_read_the_whole_text(
    folder: Path, length: int, context: int, size: int, seed: int
):
    context = min(context, length - 1)
    tokens, windows = counting(folder, length), (length - 1) // context
    steps = [batches.batch(tokens, step, size, context, seed, streams=True) for step in range(windows + 1)]
    for (_, before), (after, _) in itertools.pairwise(steps):
        goes_on = before[:, -1] == after[:, 0]
        wraps = (after[:, 0] == 0) & (before[:, -1] == windows * context)
        assert bool((goes_on | wraps).all())
    assert torch.equal(steps[0][0], steps[windows][0])
    everything = list(range(windows * context))
    for row in range(size):
        assert sorted(torch.cat([inputs[row] for inputs, _ in steps[:windows]]).tolist()) == everything
    starts = (steps[0][0][:, 0] // context).tolist()
    gaps = [(b - a) % windows for a, b in zip(starts, starts[1:] + starts[:1], strict=True)]
    assert max(gaps) - min(gaps) <= 1 or size == 1
    assert len(set(starts)) == min(size, windows)


def test_streams_of_different_seeds_start_at_different_places(folder: Path):
    tokens = counting(folder, 2000)
    starts = {int(batches.batch(tokens, 0, 4, 8, seed, streams=True)[0][0, 0]) for seed in range(20)}
    assert len(starts) > 10


def test_batches_of_different_steps_and_seeds_differ_and_cover_the_text(folder: Path):
    tokens = counting(folder, 200)
    draws = [batches.batch(tokens, step, 64, 4, seed)[0] for step in range(40) for seed in range(2)]
    assert len({hashlib.sha256(draw.numpy().tobytes()).digest() for draw in draws}) == 80
    starts = torch.cat(draws)[:, 0]
    assert set(starts.tolist()) == set(range(196))


@given(length=st.integers(2, 250), context=st.integers(1, 249), count=st.integers(1, 300))
def test_validation_windows_never_predict_the_same_token_twice(folder: Path, length: int, context: int, count: int):
    context = min(context, length - 1)
    inputs, targets = batches.validation_windows(counting(folder, length), context, count)
    assert len(inputs) == min(count, (length - 1) // context)
    assert torch.equal(targets, inputs + 1)
    predicted = targets.flatten().tolist()
    assert len(set(predicted)) == len(predicted)
    if len(inputs) > 1:
        assert inputs[0, 0] == 0
        assert targets[-1, -1] == length - 1


@pytest.mark.parametrize(("context", "count"), [(0, 1), (1, 0), (10, 1), (-1, 1)])
def test_meaningless_windows_are_refused(folder: Path, context: int, count: int):
    tokens = counting(folder, 10)
    with pytest.raises(UsageError):
        batches.batch(tokens, 0, count, context, 0)
    with pytest.raises(UsageError):
        batches.validation_windows(tokens, context, count)


def test_meaningless_seeds_and_rows_are_refused(folder: Path):
    with pytest.raises(UsageError, match="0 or more"):
        batches.batch(counting(folder, 10), 0, 1, 2, seed=-1)
    for rows in (range(3, 5), range(-1, 2)):
        with pytest.raises(UsageError, match="not among the 4"):
            batches.batch(counting(folder, 10), 0, 4, 2, 0, rows)
