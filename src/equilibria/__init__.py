"""Implicit layers and Deep Equilibrium Models for PyTorch."""

from equilibria import diagnostics, nn, testing, universal
from equilibria.adjoints import Adjoint, Implicit, Neumann, OneStep, Phantom, Unrolled
from equilibria.argmin import argmin
from equilibria.diagnosis import Cause, Diagnosis, Finding, doctor
from equilibria.fixed_point import fixed_point
from equilibria.linear import GMRES, BiCGSTAB, ConjugateGradient, Dense, LinearSolution, LinearSolver
from equilibria.loop import Iterate
from equilibria.nn import DEQ, monitor
from equilibria.norms import max_norm, rms_norm
from equilibria.root import root
from equilibria.solution import AdjointReport, Solution
from equilibria.solvers import (
    LBFGS,
    Anderson,
    Broyden,
    ForwardBackward,
    GradientDescent,
    Newton,
    PeacemanRachford,
    Picard,
    Solver,
)
from equilibria.status import ConvergenceWarning, SolveError, Status

__version__ = "0.1.0.dev0"

__all__ = [
    "DEQ",
    "GMRES",
    "LBFGS",
    "Adjoint",
    "AdjointReport",
    "Anderson",
    "BiCGSTAB",
    "Broyden",
    "Cause",
    "ConjugateGradient",
    "ConvergenceWarning",
    "Dense",
    "Diagnosis",
    "Finding",
    "ForwardBackward",
    "GradientDescent",
    "Implicit",
    "Iterate",
    "LinearSolution",
    "LinearSolver",
    "Neumann",
    "Newton",
    "OneStep",
    "PeacemanRachford",
    "Phantom",
    "Picard",
    "Solution",
    "SolveError",
    "Solver",
    "Status",
    "Unrolled",
    "__version__",
    "argmin",
    "diagnostics",
    "doctor",
    "fixed_point",
    "max_norm",
    "monitor",
    "nn",
    "rms_norm",
    "root",
    "testing",
    "universal",
]
