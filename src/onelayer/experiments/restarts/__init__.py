"""Restarts and depth at test time: equilibria of one block that solve Sudoku, started at zeros or at random."""

from onelayer.experiments.restarts.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
