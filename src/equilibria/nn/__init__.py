"""Implicit layers ready to use, and what cells are made of."""

from equilibria.nn.deq import DEQ
from equilibria.nn.dropout import VariationalDropout
from equilibria.nn.flow import ImplicitStep, PseudoTransient, SteadyState
from equilibria.nn.jacobian import jacobian_penalty
from equilibria.nn.monitor import Report, monitor
from equilibria.nn.ode import ODELayer

__all__ = [
    "DEQ",
    "ImplicitStep",
    "ODELayer",
    "PseudoTransient",
    "Report",
    "SteadyState",
    "VariationalDropout",
    "jacobian_penalty",
    "monitor",
]
