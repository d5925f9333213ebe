"""Solvers: each file is one formula; the loop is elsewhere."""

from equilibria.solvers.anderson import Anderson
from equilibria.solvers.broyden import Broyden
from equilibria.solvers.newton import Newton
from equilibria.solvers.picard import Picard
from equilibria.solvers.protocol import Solver
from equilibria.solvers.safeguard import Safeguard

__all__ = ["Anderson", "Broyden", "Newton", "Picard", "Safeguard", "Solver"]
