"""The report of a run: one page that shows what was learned and whether it is an equilibrium."""

from onelayer.report.page import write_report

__all__ = ["write_report"]
