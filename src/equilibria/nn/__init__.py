"""Implicit layers ready to use, and what cells are made of."""

from equilibria.nn.affine_projection import AffineProjection
from equilibria.nn.corrections import corrections
from equilibria.nn.deq import DEQ
from equilibria.nn.dropout import VariationalDropout
from equilibria.nn.flow import ImplicitStep, PseudoTransient, SteadyState
from equilibria.nn.jacobian import jacobian_penalty
from equilibria.nn.monitor import Report, monitor
from equilibria.nn.monotone import MonotoneConv2d, MonotoneDEQ, MonotoneLinear
from equilibria.nn.ode import ODELayer
from equilibria.nn.projections import (
    BoxProjection,
    L1BallProjection,
    SecondOrderConeProjection,
    SimplexProjection,
)
from equilibria.nn.quadratic import QPLayer, QPReport
from equilibria.nn.restarts import RandomStart, restarts
from equilibria.nn.spectral_norm import spectral_norm
from equilibria.nn.start_memory import StartMemory

__all__ = [
    "DEQ",
    "AffineProjection",
    "BoxProjection",
    "ImplicitStep",
    "L1BallProjection",
    "MonotoneConv2d",
    "MonotoneDEQ",
    "MonotoneLinear",
    "ODELayer",
    "PseudoTransient",
    "QPLayer",
    "QPReport",
    "RandomStart",
    "Report",
    "SecondOrderConeProjection",
    "SimplexProjection",
    "StartMemory",
    "SteadyState",
    "VariationalDropout",
    "corrections",
    "jacobian_penalty",
    "monitor",
    "restarts",
    "spectral_norm",
]
