"""Everything that was measured, for the page, the table and `proof.json`."""

from __future__ import annotations

from dataclasses import dataclass, field

from onelayer.proofs.limits import Blocks, Curve, Filling, Film, Reach
from onelayer.proofs.measure import Embedding, Fusion


@dataclass
class Record:
    """What `onelayer prove` found.

    >>> Record().holds
    True

    Attributes:
        command: what the user typed.
        seed: of weights and inputs.
        embeddings, fusions: claims A and C, a row each.
        blocks, filling, film, convergence, reach: what the drawings show; None where it was not measured.
        seconds: all of it.
    """

    command: str = "onelayer prove"
    seed: int = 0
    embeddings: list[Embedding] = field(default_factory=list)
    fusions: list[Fusion] = field(default_factory=list)
    blocks: Blocks | None = None
    filling: Filling | None = None
    film: Film | None = None
    convergence: tuple[list[Curve], Curve] | None = None
    reach: Reach | None = None
    seconds: float = 0.0

    @property
    def broken(self) -> list[str]:
        """What did not hold, by name."""
        parts = [("the block matrix", self.blocks), ("the reach of truncated gradients", self.reach)]
        rows = [(row.name, row) for row in [*self.embeddings, *self.fusions]]
        return [name for name, part in [*rows, *parts] if part is not None and not part.holds]

    @property
    def holds(self) -> bool:
        """Whether every claim does, on everything that was measured."""
        return not self.broken
