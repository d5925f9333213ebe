"""Linear solvers: per sample, in one batch, by products with the operator alone."""

from equilibria.linear.gmres import GMRES
from equilibria.linear.krylov import Basis, Operator
from equilibria.linear.protocol import LinearSolution, LinearSolver

__all__ = ["GMRES", "Basis", "LinearSolution", "LinearSolver", "Operator"]
