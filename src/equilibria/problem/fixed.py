"""Equilibria: z = f(z)."""

import torch
from torch import Tensor

from equilibria.problem.equation import Equation
from equilibria.problem.evaluation import RTOL, Evaluation, rounding_level


class FixedPoint(Equation):
    """The equation z = f(z, *args)."""

    def settle_tolerances(self, dtype: torch.dtype) -> None:
        default = RTOL[dtype]
        if self.atol is None:
            # A tolerance that the user gave alone is never overridden by a default of the other.
            self.atol = default / 100 if self.rtol is None else 0.0
        if self.rtol is None:
            self.rtol = default
        self.floor = rounding_level(dtype)

    def image(self, z: Tensor, output: Tensor) -> Tensor:
        return output

    def measure(self, z: Tensor, output: Tensor) -> Evaluation:
        if not torch.is_grad_enabled() and len(self.layout.sizes) == 1:
            output = output.clone()  # solvers keep it, and f may write all its outputs into one buffer of its own
        residual = output - z
        rtol, atol = self.rtol, self.atol
        assert rtol is not None
        assert atol is not None
        with torch.no_grad():
            denominators = self.sizes(output)
            # Where norm(f(z)) overflows, so that any residual would seem small beside it, nothing is finite.
            numerators = [
                torch.add(num, den, alpha=0) for num, den in zip(self.sizes(residual), denominators, strict=True)
            ]
            pairs = list(zip(numerators, denominators, strict=True))
            error = self.worst([torch.where(num == 0, num, num / den) for num, den in pairs])
            met = [torch.sub(num, den, alpha=rtol) <= atol for num, den in pairs]
            satisfied = met[0] if len(met) == 1 else torch.stack(met).all(dim=0)
        return Evaluation(z, output, residual, error, self.worst(numerators), satisfied, z, error)
