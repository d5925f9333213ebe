"""How far a monotone equilibrium moves with its input."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equilibria.nn.monotone.coupling import Coupling
from equilibria.nn.monotone.operators import MonotoneConv2d, MonotoneLinear

DOUBLE = torch.float64


class Sensitivity:
    """Bounds in float64 from the symmetric part S of I - W.

    Where W z + U x + b changes by d, an equilibrium moves by y = D (d + W y) with D diagonal in [0, 1]; then
    y'S y <= y'd, that is |S^{1/2} y - S^{-1/2} d / 2| <= |S^{-1/2} d| / 2.

    Args:
        operator: with the weights.
    """

    def __init__(self, operator: MonotoneLinear | MonotoneConv2d) -> None:
        with torch.no_grad():
            rate = operator.coupling(DOUBLE).rate
            self.symmetric = (rate + rate.mH) / 2
            self.frame, self.input_frame = operator.frame, operator.input_frame
            self.operator = operator
            weight = operator.U.to(DOUBLE)
            units = self.input_frame.units(weight)
            shape = (len(units), *operator.input_shape)
            images = operator.inject(units.reshape(shape)) - operator.inject(torch.zeros_like(units).reshape(shape))
            self.injection = self.frame.response(images)
            self.solved = torch.linalg.solve(self.symmetric, self.injection)
            # |S^{-1/2} U|
            self.reach = torch.linalg.eigvalsh(self.injection.mH @ self.solved).amax().clamp(min=0).sqrt()

    @torch.no_grad()
    def of_state(self) -> Tensor:
        """|S^{-1/2}| |S^{-1/2} U|, or the norm of S^{-1} U and half of what rounds it to a ball, where that is less."""
        least = torch.linalg.eigvalsh(self.symmetric).amin()
        centre = torch.linalg.matrix_norm(self.solved, 2).amax()
        return (centre + self.reach / least.sqrt()) / 2

    @torch.no_grad()
    def of_differences(self, readout: Callable[[Any], Tensor]) -> Tensor:
        """(classes, classes), for each difference of two entries of an affine readout."""
        rows = self._rows(readout)
        return self._differences(*self._grams(rows))

    @torch.no_grad()
    def radius(self, readout: Callable[[Any], Tensor], z: Tensor, residual: Tensor, coupling: Coupling) -> Tensor:
        """(batch,), see `MonotoneDEQ.certified_radius`, for states z of the given residual."""
        rows = self._rows(readout)
        logits = self._read(readout, z)
        predicted = rows @ z.mT - rows @ torch.zeros_like(z).mT
        offset = logits - predicted.mT
        if len(z) and not torch.allclose(offset, self._read(readout, torch.zeros_like(z)), rtol=1e-5, atol=1e-4):
            raise ValueError("The readout must be affine, as nn.Linear is: what comes after has no bound of this kind.")
        metric, pulled = self._grams(rows)
        bounds = self._differences(metric, pulled)
        # f(z) is the exact equilibrium of a problem whose b is off by W (z - f(z)).
        shift = coupling.product(residual)
        slack = (self._solve(shift) * shift).sum(dim=1).clamp(min=0).sqrt()
        best = logits.argmax(dim=1)
        margin = logits.gather(1, best[:, None]) - logits
        read = residual @ rows.mT
        unsure = (read.gather(1, best[:, None]) - read).abs() + slack[:, None] * _apart(metric)[best]
        ratio = (margin - unsure) / bounds[best]
        ratio.scatter_(1, best[:, None], torch.inf)
        return ratio.amin(dim=1).clamp(min=0).nan_to_num(0, posinf=torch.inf)

    def _differences(self, metric: Tensor, pulled: Tensor) -> Tensor:
        return (_apart(pulled) + self.reach * _apart(metric)) / 2

    def _grams(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """V S^{-1} V' and V S^{-1} U U' S^{-1} V', for the rows of V."""
        pulled = self.input_frame.back(self.solved.mH @ self.frame.to(rows))
        metric = rows @ self._solve(rows).mT
        return (metric + metric.mT) / 2, pulled @ pulled.mT

    def _solve(self, d: Tensor) -> Tensor:
        return self.frame.back(torch.linalg.solve(self.symmetric, self.frame.to(d)))

    def _rows(self, readout: Callable[[Any], Tensor]) -> Tensor:
        with torch.enable_grad():
            zeros = torch.zeros(1, self.frame.n, dtype=self.operator.U.dtype, device=self.operator.U.device)
            zeros.requires_grad_()
            logits = readout(self.operator.state(zeros))
            if logits.ndim != 2 or logits.shape[0] != 1:
                raise ValueError(
                    f"The readout must return (batch, classes), not {tuple(logits.shape)} for a batch of 1."
                )
            rows = [torch.autograd.grad(entry, zeros, retain_graph=True)[0] for entry in logits[0]]
        return torch.cat(rows).to(DOUBLE)

    def _read(self, readout: Callable[[Any], Tensor], z: Tensor) -> Tensor:
        return readout(self.operator.state(z.to(self.operator.U.dtype))).to(DOUBLE)


def _apart(gram: Tensor) -> Tensor:
    """Distances of each two vectors of a Gram matrix."""
    own = gram.diagonal()
    return (own[:, None] + own[None, :] - 2 * gram).clamp(min=0).sqrt()
