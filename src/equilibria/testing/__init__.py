"""The conformance kit: runs a solver, an adjoint or a cell of your own through the laws of the library."""

from equilibria.testing.adjoints import check_adjoint
from equilibria.testing.cells import check_cell
from equilibria.testing.solvers import check_solver

__all__ = ["check_adjoint", "check_cell", "check_solver"]
