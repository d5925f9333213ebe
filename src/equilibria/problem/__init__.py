"""The equation to solve, as solvers see it: evaluations on a packed buffer, and products with its Jacobian."""

from equilibria.problem.affine import Affine
from equilibria.problem.equation import Equation
from equilibria.problem.evaluation import ATOL, RTOL, Evaluation, rounding_level
from equilibria.problem.fixed import FixedPoint
from equilibria.problem.linearization import Linearization
from equilibria.problem.root import Gradient, Root
from equilibria.problem.splitting import Splitting

Problem = Equation | Affine

__all__ = [
    "ATOL",
    "RTOL",
    "Affine",
    "Equation",
    "Evaluation",
    "FixedPoint",
    "Gradient",
    "Linearization",
    "Problem",
    "Root",
    "Splitting",
    "rounding_level",
]
