"""Constructions: what one equilibrium layer can be."""

from equilibria.universal.fuse import fuse
from equilibria.universal.unfold import unfold

__all__ = ["fuse", "unfold"]
