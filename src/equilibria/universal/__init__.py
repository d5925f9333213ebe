"""Constructions: what one equilibrium layer can be."""

from equilibria.universal.embed import embed
from equilibria.universal.fuse import fuse
from equilibria.universal.unfold import unfold

__all__ = ["embed", "fuse", "unfold"]
