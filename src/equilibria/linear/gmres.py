"""GMRES."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.linear.krylov import Basis, Operator
from equilibria.linear.protocol import LinearSolution
from equilibria.norms import residual_size
from equilibria.options import check_flag, check_integer
from equilibria.status import Agree, Status


@dataclass(frozen=True)
class GMRES:
    """The generalised minimal residual method, restarted, on a batch of independent systems.

    >>> A = torch.eye(8, dtype=torch.float64) + 0.1 * torch.arange(64.0, dtype=torch.float64).view(8, 8) / 64
    >>> b = torch.ones(3, 8, dtype=torch.float64)
    >>> x = eq.GMRES().solve(lambda x: x @ A.T, b, rtol=1e-10, level=1e-15, max_steps=50, agree=bool).x
    >>> bool(torch.allclose(x @ A.T, b))
    True

    Fewest products of all methods that use products with A alone, until it restarts. A sample stops on its own: its
    solution uses the vectors up to there, whatever the others need.

    Args:
        restart: vectors kept, at least 1; each costs one buffer of the state's size, made when it is needed.
        give_up: stop a sample once the pace of its cycles says that its tolerance is out of reach; for where something
            else takes over, as in `Implicit()`.

    Source: Saad and Schultz (1986), with Givens rotations accumulated, and two Gram-Schmidt passes.
    """

    restart: int = 20
    give_up: bool = False

    def __post_init__(self) -> None:
        check_integer("restart", self.restart, 1)
        check_flag("give_up", self.give_up)

    def solve(
        self, operator: Operator, b: Tensor, rtol: float, level: float, max_steps: int, agree: Agree
    ) -> LinearSolution:
        scale = torch.linalg.vector_norm(b, dim=1)
        x, residual = b, b - operator(b)
        products = 1
        size = torch.linalg.vector_norm(residual, dim=1)
        status = torch.full_like(scale, Status.MAX_STEPS, dtype=torch.int64)
        status = torch.where(scale == 0, Status.CONVERGED, status)
        steps = torch.ones_like(status)
        x = torch.where((scale == 0)[:, None], 0, x)
        size = torch.where(scale == 0, 0, size)
        hopeless = torch.zeros_like(scale, dtype=torch.bool)
        length = min(self.restart, max_steps)
        # Where products round at the tolerance, a cycle that aims at it may end a hair above, with no second chance.
        target = rtol * scale * (1 if level < 0.1 * rtol else 0.5)
        while True:
            running = status == Status.MAX_STEPS
            status = torch.where(running & (size <= rtol * scale), Status.CONVERGED, status)
            status = torch.where(running & ~torch.isfinite(size), Status.NONFINITE, status)
            # What is left to each sample, whatever the others have used, but for a product at the result.
            room = max_steps - 1 - steps
            running = (status == Status.MAX_STEPS) & ~hopeless & (room > 0)
            if not agree(bool(running.any())):
                break
            correction, left, noise, used, broken, count = self._cycle(
                operator, residual, size, running, target, room, length, agree
            )
            products += count
            # Where products are noisy, or the recurrence rounds to the tolerance, only a product at the result tells.
            doubtful = running & (noise > 0.1 * rtol * scale) if level < 0.1 * rtol else running
            if agree(bool(doubtful.any())):
                left = torch.where(doubtful[:, None], b - operator(x + correction), left)
                products, used = products + 1, used + doubtful
            left_size = residual_size(left, x + correction)
            better = running & (left_size < size)
            steps = torch.where(running, steps + used, steps)
            pace = torch.where(better, left_size / size, 1)
            x = torch.where(better[:, None], x + correction, x)
            residual = torch.where(better[:, None], left, residual)
            size = torch.where(better, left_size, size)
            unmet = running & (size > rtol * scale)
            status = torch.where(unmet & (pace > 0.5) & (size <= level * scale), Status.STALLED, status)
            status = torch.where(unmet & (broken != Status.CONVERGED), broken, status)
            hopeless = hopeless | ~better  # the next cycle would be this one over again
            if self.give_up:
                hopeless = hopeless | (unmet & (size * pace ** ((max_steps - steps) / length) > rtol * scale))
        error = torch.where(scale == 0, 0, size / torch.where(scale == 0, 1, scale))
        return LinearSolution(x, status, steps, error, products)

    def _cycle(
        self,
        operator: Operator,
        residual: Tensor,
        size: Tensor,
        running: Tensor,
        target: Tensor,
        room: Tensor,
        length: int,
        agree: Agree,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
        """One Arnoldi cycle.

        Returns the correction, the residual it leaves, to what that is known, the vectors used, how it broke down, and
        the products made.
        """
        batch = residual.shape[0]
        basis = Basis(torch.where((running & (size > 0))[:, None], residual / size[:, None], 0))
        # rotations @ hessenberg = triangle; the rotations are kept multiplied out, so that a new column costs one
        # small product.
        rotations = torch.eye(length + 1, dtype=residual.dtype, device=residual.device).repeat(batch, 1, 1)
        hessenberg = residual.new_zeros(batch, length + 1, length)
        triangle = residual.new_zeros(batch, length, length)
        used = torch.zeros_like(running, dtype=torch.int64)
        broken = torch.full_like(used, Status.CONVERGED)
        for k in range(length):
            image = torch.where(running[:, None], operator(basis[k]), 0)
            column, norm = basis.extend(image)
            hessenberg[:, : k + 1, k] = column
            hessenberg[:, k + 1, k] = norm
            rotated = torch.bmm(rotations[:, : k + 1, : k + 1], column[:, :, None])[:, :, 0]
            pivot = torch.hypot(rotated[:, k], norm)
            safe = torch.where(pivot > 0, pivot, 1)
            cosine, sine = torch.where(pivot > 0, rotated[:, k] / safe, 1)[:, None], (norm / safe)[:, None]
            upper, lower = rotations[:, k].clone(), rotations[:, k + 1].clone()
            rotations[:, k] = cosine * upper + sine * lower
            rotations[:, k + 1] = cosine * lower - sine * upper
            triangle[:, : k + 1, k] = rotated
            triangle[:, k, k] = pivot
            # A pivot at the rounding of its column: the operator is singular on these vectors.
            least = 10 * torch.finfo(pivot.dtype).eps * torch.hypot(torch.linalg.vector_norm(column, dim=1), norm)
            broken = torch.where(running & ~torch.isfinite(pivot), Status.NONFINITE, broken)
            broken = torch.where(running & (pivot <= least), Status.BREAKDOWN, broken)
            sound = torch.isfinite(pivot) & (pivot > least)
            used = torch.where(running & sound, k + 1, used)
            running = running & sound & (size * rotations[:, k + 1, 0].abs() > target) & (norm > 0) & (k + 1 < room)
            if not agree(bool(running.any())):
                break
        correction, left, noise = self._correct(basis, hessenberg, triangle, rotations, size, used)
        return correction, left, noise, used, broken, basis.count - 1

    @staticmethod
    def _correct(
        basis: Basis, hessenberg: Tensor, triangle: Tensor, rotations: Tensor, size: Tensor, used: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = basis.count - 1
        mine = torch.arange(count, device=used.device) < used[:, None]
        eye = torch.eye(count, dtype=triangle.dtype, device=triangle.device)
        square = torch.where(mine[:, :, None] & mine[:, None, :], triangle[:, :count, :count], eye)
        right = torch.where(mine, size[:, None] * rotations[:, :count, 0], 0)
        y = torch.linalg.solve_triangular(square, right[:, :, None], upper=True)
        correction = basis.combine(y[:, :, 0])
        # What is left follows from the Arnoldi relation, which holds to rounding, without another product.
        mapped = torch.where(mine[:, None], hessenberg[:, : count + 1, :count], 0)
        left = -torch.bmm(mapped, y)
        left[:, 0, 0] += size
        # ... to the rounding of the products that it stands for, which on stiff systems is what is left to know.
        noise = (
            torch.finfo(y.dtype).eps
            * torch.linalg.vector_norm(mapped, dim=(1, 2))
            * torch.linalg.vector_norm(y, dim=(1, 2))
        )
        return correction, basis.combine(left[:, :, 0]), 0.25 * noise
