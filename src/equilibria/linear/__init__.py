"""Linear solvers: per sample, in one batch, by products with the operator alone."""

from equilibria.linear.bicgstab import BiCGSTAB
from equilibria.linear.conjugate_gradient import ConjugateGradient
from equilibria.linear.dense import Dense
from equilibria.linear.gmres import GMRES
from equilibria.linear.krylov import Basis, Operator
from equilibria.linear.protocol import LinearSolution, LinearSolver, dot

__all__ = [
    "GMRES",
    "Basis",
    "BiCGSTAB",
    "ConjugateGradient",
    "Dense",
    "LinearSolution",
    "LinearSolver",
    "Operator",
    "dot",
]
