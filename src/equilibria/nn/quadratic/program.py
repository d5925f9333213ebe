"""Quadratic programs as data: their conditions of optimality, and scales in which they are well posed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 10  # of scaling; more change little (Stellato et al., 2020, use as many)


class Program(NamedTuple):
    """Minimise 1/2 z'P z + q'z subject to A z = b and G z <= h, for each sample of a batch.

    Attributes:
        P: (batch, n, n), symmetric and positive semidefinite.
        q: (batch, n).
        C: (batch, p + m, n), the rows of A and then those of G.
        d: (batch, p + m), b and then h.
        equalities: p.
    """

    P: Tensor
    q: Tensor
    C: Tensor
    d: Tensor
    equalities: int

    def take(self, samples: Tensor) -> Program:
        """Some of the samples."""
        return Program(self.P[samples], self.q[samples], self.C[samples], self.d[samples], self.equalities)

    def scaled(self, scales: Scales) -> Program:
        """The program of `z / columns`, with rows times `rows` and the cost times `cost`, differentiably."""
        columns, rows, cost = scales
        P = cost[:, None, None] * columns[:, :, None] * self.P * columns[:, None, :]
        C = rows[:, :, None] * self.C * columns[:, None, :]
        return Program(P, cost[:, None] * columns * self.q, C, rows * self.d, self.equalities)

    def bounded(self, values: Tensor) -> Tensor:
        """The nearest values that C z may have, (batch, p + m): b, and at most h."""
        p = self.equalities
        # At h itself the derivative is that of the constraint, not the half of it that torch.minimum has.
        return torch.cat([self.d[:, :p], torch.where(values[:, p:] < self.d[:, p:], values[:, p:], self.d[:, p:])], 1)


class Scales(NamedTuple):
    """Units: of the entries of z (batch, n), of the constraints (batch, p + m) and of the cost (batch,)."""

    columns: Tensor
    rows: Tensor
    cost: Tensor


class Optimality(NamedTuple):
    """How far a point is from the Karush-Kuhn-Tucker conditions, and how large the terms are that cancel, (batch,).

    Complementarity and the sign of the multipliers hold by the way in which these are made.
    """

    stationarity: Tensor
    stationarity_scale: Tensor
    violation: Tensor
    violation_scale: Tensor

    def residual(self) -> Tensor:
        """The larger of the two, relative to its terms."""
        return torch.maximum(
            _ratio(self.stationarity, self.stationarity_scale), _ratio(self.violation, self.violation_scale)
        )

    def within(self, rtol: float, atol: float) -> Tensor:
        """Whether both are as small as asked; False where they are not numbers."""
        return (self.stationarity <= atol + rtol * self.stationarity_scale) & (
            self.violation <= atol + rtol * self.violation_scale
        )


def optimality(program: Program, z: Tensor, multipliers: Tensor) -> Optimality:
    """The conditions at `z`, (batch, n), with multipliers (batch, p + m), those of inequalities not negative."""
    Pz, Cz = apply(program.P, z), apply(program.C, z)
    Cy = apply(program.C.mT, multipliers)
    return Optimality(
        largest(Pz + program.q + Cy),
        torch.maximum(torch.maximum(largest(Pz), largest(Cy)), largest(program.q)),
        largest(Cz - program.bounded(Cz)),
        torch.maximum(largest(Cz), largest(program.d)),
    )


def equilibrate(program: Program) -> Scales:
    """Units in which the rows of [[P, C'], [C, 0]], and the cost, are of about the size one.

    Source: Ruiz (2001), A scaling algorithm to equilibrate both rows and columns norms in matrices; Stellato et al.,
    OSQP, 2020, algorithm 2.
    """
    batch, n = program.q.shape
    scales = Scales(program.q.new_ones(batch, n), program.d.new_ones(program.d.shape), program.q.new_ones(batch))
    for _ in range(ROUNDS):
        now = program.scaled(scales)
        columns = torch.maximum(_sizes(now.P), _sizes(now.C))
        scales = scales._replace(
            columns=scales.columns * _inverse_root(columns), rows=scales.rows * _inverse_root(_sizes(now.C.mT))
        )
    now = program.scaled(scales)
    size = torch.maximum(largest(_sizes(now.P)), largest(now.q))
    return scales._replace(cost=1 / torch.where(size > 0, size, 1))


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """Products of each sample, (batch, rows)."""
    return (matrix @ vector[:, :, None])[:, :, 0]


def largest(values: Tensor) -> Tensor:
    """The largest size of an entry, (batch,); 0 where there are none."""
    return torch.nn.functional.pad(values.abs(), (0, 1)).amax(dim=1)


def _sizes(matrix: Tensor) -> Tensor:
    """The largest size of an entry in each column, (batch, columns)."""
    return torch.nn.functional.pad(matrix.abs(), (0, 0, 0, 1)).amax(dim=1)


def _inverse_root(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, 1).clamp(1e-8, 1e8).rsqrt()


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(part == 0, part, part / whole)
