"""Solvers: each file is one formula; the loop is elsewhere."""

from equilibria.solvers.anderson import Anderson
from equilibria.solvers.broyden import Broyden
from equilibria.solvers.forward_backward import ForwardBackward
from equilibria.solvers.gradient_descent import GradientDescent
from equilibria.solvers.lbfgs import LBFGS
from equilibria.solvers.newton import Newton
from equilibria.solvers.peaceman_rachford import PeacemanRachford
from equilibria.solvers.picard import Picard
from equilibria.solvers.protocol import Solver
from equilibria.solvers.safeguard import Safeguard

__all__ = [
    "LBFGS",
    "Anderson",
    "Broyden",
    "ForwardBackward",
    "GradientDescent",
    "Newton",
    "PeacemanRachford",
    "Picard",
    "Safeguard",
    "Solver",
]
