"""Implicit layers ready to use."""

from equilibria.nn.deq import DEQ
from equilibria.nn.monitor import Report, monitor

__all__ = ["DEQ", "Report", "monitor"]
