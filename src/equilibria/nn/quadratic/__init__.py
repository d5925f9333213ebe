"""Quadratic programs as a layer: an operator splitting whose fixed point is polished and differentiated."""

from equilibria.nn.quadratic.layer import QPLayer, QPReport

__all__ = ["QPLayer", "QPReport"]
