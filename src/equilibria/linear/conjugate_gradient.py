"""Conjugate gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.linear.krylov import Operator
from equilibria.linear.protocol import LinearSolution, dot, finish
from equilibria.status import Agree, Status


@dataclass(frozen=True)
class ConjugateGradient:
    """Conjugate gradients, for operators that are symmetric and positive definite, such as Hessians at a minimum.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> b = torch.tensor([[3.0, 4.0], [1.0, -2.0]])
    >>> eq.ConjugateGradient().solve(lambda x: x @ A.T, b, rtol=1e-5, level=1e-7, max_steps=9, agree=bool).x
    tensor([[ 1.,  1.],
            [ 1., -1.]])

    Four buffers of the state's size. A direction of no or negative curvature is reported as `BREAKDOWN`; on operators
    that are not symmetric the residual that is measured at the end tells.

    Source: Hestenes and Stiefel (1952).
    """

    def solve(
        self, operator: Operator, b: Tensor, rtol: float, level: float, max_steps: int, agree: Agree
    ) -> LinearSolution:
        target = rtol * torch.linalg.vector_norm(b, dim=1)
        x = b
        residual = b - operator(x)
        direction = residual
        square = dot(residual, residual)
        running = torch.isfinite(square) & (target > 0)
        broken = torch.zeros_like(running)
        steps = torch.ones_like(running, dtype=torch.int64)
        products = 1
        while True:
            running = running & (square.sqrt() > target)
            if products >= max_steps - 1 or not agree(bool(running.any())):
                break
            image = operator(direction)
            products += 1
            steps = torch.where(running, products, steps)
            curvature = dot(direction, image)
            broken = broken | (running & (curvature <= 0))
            running = running & (curvature > 0) & torch.isfinite(curvature)
            alpha = torch.where(running, square / curvature, 0)[:, None]
            step = torch.where(running[:, None], direction, 0)
            x = x + alpha * step
            residual = residual - alpha * torch.where(running[:, None], image, 0)
            new_square = torch.where(running, dot(residual, residual), square)
            beta = torch.where(running, new_square / square, 0)[:, None]
            direction = residual + beta * step
            square = new_square
        return finish(
            operator, b, x, rtol, level, steps, products, torch.where(broken, Status.BREAKDOWN, Status.MAX_STEPS)
        )
