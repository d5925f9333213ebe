"""Implicit layers ready to use, and what cells are made of."""

from equilibria.nn.deq import DEQ
from equilibria.nn.dropout import VariationalDropout
from equilibria.nn.jacobian import jacobian_penalty
from equilibria.nn.monitor import Report, monitor
from equilibria.nn.quadratic import QPLayer, QPReport

__all__ = ["DEQ", "QPLayer", "QPReport", "Report", "VariationalDropout", "jacobian_penalty", "monitor"]
