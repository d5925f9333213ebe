"""Measurements on equilibria."""

from equilibria.diagnostics.spectral import spectral_radius

__all__ = ["spectral_radius"]
