"""What is wrong with a cell, and what to do about it."""

from equilibria.diagnosis.causes import Cause, Finding
from equilibria.diagnosis.doctor import Diagnosis, doctor

__all__ = ["Cause", "Diagnosis", "Finding", "doctor"]
