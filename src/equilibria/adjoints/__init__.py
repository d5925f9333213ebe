"""Adjoints: how a solution is attached to the autograd graph."""

from equilibria.adjoints.attachment import attach, restore, sealed, shield
from equilibria.adjoints.implicit import Implicit
from equilibria.adjoints.neumann import Neumann
from equilibria.adjoints.onestep import OneStep
from equilibria.adjoints.phantom import Phantom
from equilibria.adjoints.protocol import Adjoint
from equilibria.adjoints.unrolled import Unrolled

# What an adjoint of one's own is made of stands beside the adjoints: see docs/extending.md.
__all__ = [
    "Adjoint",
    "Implicit",
    "Neumann",
    "OneStep",
    "Phantom",
    "Unrolled",
    "attach",
    "restore",
    "sealed",
    "shield",
]
