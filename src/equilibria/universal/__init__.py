"""Constructions that show one layer to be enough."""

from equilibria.universal.embed import embed

__all__ = ["embed"]
