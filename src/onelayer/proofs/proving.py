"""`onelayer prove`: everything measured, printed and drawn."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from onelayer import runs
from onelayer.errors import UsageError
from onelayer.proofs import limits
from onelayer.proofs.measure import Embedding, Fusion, embedding, fusion
from onelayer.proofs.networks import NETWORKS, Subject, perceptron
from onelayer.proofs.page import (
    EMBEDDING_COLUMNS,
    FUSION_COLUMNS,
    LIMITS,
    embedding_cells,
    fusion_cells,
    page,
    reach_sentence,
    verdict,
)
from onelayer.proofs.record import Record
from onelayer.proofs.stacks import STACKS, Stack
from onelayer.report import html

Made = TypeVar("Made")


def prove(
    folder: Path,
    seed: int = 0,
    networks: Sequence[Subject] = NETWORKS,
    stacks: Sequence[Stack] = STACKS,
    command: str = "onelayer prove",
) -> Record:
    """Puts claims A and C to the proof, prints the tables, and writes a page and its numbers into a new folder.

    >>> prove(Path("proof"), networks=NETWORKS[:1], stacks=[]).holds            # doctest: +SKIP
    True

    Args:
        folder: where `proof.html` and `proof.json` go.
        seed: of all weights, inputs and starts.
        networks, stacks: what claims A and C are put to the proof on.
        command: what the user typed, for the record.

    Returns:
        All that was measured.

    Raises:
        UsageError: the seed or the folder will not do, or the digits are missing.
    """
    if seed < 0:
        raise UsageError(f"seed must be at least 0, not {seed}.")
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        made = [(subject, _seeded(seed, subject.network)) for subject in networks]
        runs.new_folder(folder, "name another one by --out")
        record = Record(command, seed)
        with tqdm(total=len(networks) + len(stacks) + 1, unit="proof", dynamic_ncols=True) as bar:
            for subject, network in made:
                bar.set_postfix_str(subject.name)
                record.embeddings.append(embedding(subject, network, seed))
                bar.update()
            for stack in stacks:
                bar.set_postfix_str(stack.name)
                record.fusions.append(fusion(stack.name, *_seeded(seed, stack.build)))
                bar.update()
            bar.set_postfix_str("limits and pictures")
            _look_inside(record, made, stacks)
            bar.update()
            bar.set_postfix_str("")
    record.seconds = time.perf_counter() - began
    runs.write_json(folder / "proof.json", _values(record))
    html.write(page(record), folder / "proof.html")
    print(table(record))
    return record


def _look_inside(record: Record, made: Sequence[tuple[Subject, nn.Module]], stacks: Sequence[Stack]) -> None:
    seed = record.seed
    small = _seeded(seed, lambda: perceptron(6, 12, nn.Tanh, 5 / 3)).double()
    record.blocks = limits.blocks(small, _seeded(seed, lambda: torch.randn(4, 12)).double())
    deep = _seeded(seed, lambda: perceptron(16, 24, nn.Tanh, 5 / 3)).double()
    x = _seeded(seed, lambda: torch.randn(4, 24)).double()
    record.filling = limits.filling(deep, x)
    trained = [(subject, network) for subject, network in made if subject.score is not None]
    if trained:
        subject, network = trained[0]
        record.film = limits.film(network, *(x.double() for x in subject.inputs(1)))
    deep = _seeded(seed, lambda: perceptron(12, 16, nn.Tanh, 5 / 3)).double()
    record.reach = limits.reach(deep, _seeded(seed, lambda: torch.randn(4, 16)).double())
    if stacks:
        longest = max(stacks, key=lambda stack: record.fusions[stacks.index(stack)].joint_evaluations)
        record.convergence = limits.convergence(*_seeded(seed, longest.build))


def _seeded(seed: int, make: Callable[[], Made]) -> Made:
    torch.manual_seed(seed)
    return make()


def _values(record: Record) -> dict[str, Any]:
    """What `proof.json` holds: all that was measured, and whether it held."""
    return dataclasses.asdict(record) | {"holds": record.holds, "broken": record.broken}


def table(record: Record) -> str:
    """The tables in plain text.

    >>> print(table(Record()))
    Both claims held on everything that was measured.
    """
    reached = [] if record.reach is None else [reach_sentence(record.reach)]
    parts = [
        _aligned(EMBEDDING_COLUMNS, [embedding_cells(row) for row in record.embeddings], record.embeddings),
        _aligned(FUSION_COLUMNS, [fusion_cells(row) for row in record.fusions], record.fusions),
        "\n".join([*reached, *LIMITS] if reached else []),
        verdict(record),
    ]
    return "\n\n".join(part for part in parts if part)


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[str]], holds: Sequence[Embedding | Fusion]) -> str:
    if not rows:
        return ""
    told = [[*row, "holds" if of.holds else "DOES NOT HOLD"] for row, of in zip(rows, holds, strict=True)]
    lines = [[*columns, ""], *told]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    first, *others = widths
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))])
        for line in lines
    )
