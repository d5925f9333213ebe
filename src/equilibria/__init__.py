"""Implicit layers and Deep Equilibrium Models for PyTorch."""

__version__ = "0.1.0.dev0"
