"""BiCGSTAB."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.linear.krylov import Operator
from equilibria.linear.protocol import LinearSolution, dot, finish
from equilibria.status import Agree, Status


@dataclass(frozen=True)
class BiCGSTAB:
    """The stabilised bi-conjugate gradient method: two products a step, and memory that does not grow.

    >>> A = torch.tensor([[2.0, 1.0], [-1.0, 3.0]])
    >>> b = torch.tensor([[3.0, 2.0], [0.0, 7.0]])
    >>> eq.BiCGSTAB().solve(lambda x: x @ A.T, b, rtol=1e-5, level=1e-7, max_steps=9, agree=bool).x
    tensor([[ 1.0000,  1.0000],
            [-1.0000,  2.0000]])

    Eight buffers of the state's size, whatever the number of steps; take it where the vectors of `GMRES` do not fit.
    Its residual does not fall steadily, so the best iterate is what is returned. A vanishing inner product is reported
    as `BREAKDOWN`.

    Source: van der Vorst (1992).
    """

    def solve(
        self, operator: Operator, b: Tensor, rtol: float, level: float, max_steps: int, agree: Agree
    ) -> LinearSolution:
        target = rtol * torch.linalg.vector_norm(b, dim=1)
        tiny = torch.finfo(b.dtype).eps ** 2
        x = best = b
        residual = shadow = direction = b - operator(x)
        size = best_size = torch.linalg.vector_norm(residual, dim=1)
        rho = dot(shadow, residual)
        running = torch.isfinite(size) & (target > 0)
        broken = torch.zeros_like(running)
        steps = torch.ones_like(running, dtype=torch.int64)
        products = 1
        while True:
            running = running & (size > target)
            if products >= max_steps - 2 or not agree(bool(running.any())):
                break
            image = torch.where(running[:, None], operator(direction), 0)
            angle = dot(shadow, image)
            alpha = torch.where(running & (angle != 0), rho / angle, 0)[:, None]
            half = residual - alpha * image
            half_image = torch.where(running[:, None], operator(half), 0)
            products += 2
            steps = torch.where(running, products, steps)
            energy = dot(half_image, half_image)
            omega = torch.where(energy > 0, dot(half_image, half) / energy, 0)[:, None]
            new_x = x + alpha * torch.where(running[:, None], direction, 0) + omega * half
            new_residual = half - omega * half_image
            new_rho = dot(shadow, new_residual)
            x = torch.where(running[:, None], new_x, x)
            residual = torch.where(running[:, None], new_residual, residual)
            size = torch.where(running, torch.linalg.vector_norm(residual, dim=1), size)
            better = size < best_size
            best = torch.where(better[:, None], x, best)
            best_size = torch.where(better, size, best_size)
            scale = torch.linalg.vector_norm(shadow, dim=1) * size
            vanished = (new_rho.abs() <= tiny * scale) | (omega[:, 0] == 0) | (angle == 0)
            broken = broken | (running & vanished & (size > target))
            running = running & ~vanished & torch.isfinite(size)
            beta = torch.where(running, (new_rho / rho) * (alpha / omega)[:, 0], 0)[:, None]
            direction = residual + beta * (torch.where(running[:, None], direction - omega * image, 0))
            rho = new_rho
        return finish(
            operator, b, best, rtol, level, steps, products, torch.where(broken, Status.BREAKDOWN, Status.MAX_STEPS)
        )
