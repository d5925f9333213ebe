"""A safeguard for accelerated solvers that keeps what plain iteration guarantees."""

from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.problem import Evaluation

# A residual that has grown by this factor over the lowest of its phase leads nowhere: back to the best iterate.
BLOW_UP = 1e3


class Safeguard(NamedTuple):
    """Which samples iterate plainly now, and for how long; everything is per sample, of shape (batch,).

    Acceleration runs until it has not lowered the residual for `patience` evaluations; then plain iteration has its
    turn, for a budget that doubles each time. Where plain iteration converges, or ends exactly after L steps as on a
    nilpotent Jacobian, whose residual need not fall before the last step, some turn is long enough. A residual that
    blows up, under acceleration or by the end of a plain turn, sends the sample back to its best iterate.
    """

    lowest: Tensor
    since: Tensor
    plain: Tensor
    budget: Tensor
    idle: bool = True  # no sample steps plainly: known on the host, for a shorter path

    @staticmethod
    def init(z: Tensor, budget: int) -> "Safeguard":
        zeros = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
        infinite = torch.full((z.shape[0],), torch.inf, dtype=z.dtype, device=z.device)
        return Safeguard(infinite, zeros, zeros, zeros + budget)

    @torch.no_grad()
    def update(self, evaluation: Evaluation, patience: int) -> tuple["Safeguard", Tensor | None, Tensor | None]:
        """The next safeguard; which samples step plainly now, or None; and which of these restart from their best."""
        size = evaluation.size
        lower = size < 0.9 * self.lowest
        stopped = evaluation.stopped
        if self.idle and bool((lower if stopped is None else lower | stopped).all()):
            return self._replace(lowest=size, since=self.plain), None, None  # idle: zeros
        plainly = self.plain > 0
        blown = ~(size <= BLOW_UP * self.lowest)
        since = torch.where(lower, 0, self.since + 1)
        trip = ~plainly & (since >= patience)
        ends = self.plain == 1
        plain = torch.where(trip, self.budget, (self.plain - 1).clamp(min=0))
        begin = trip | ends  # a phase is measured against its own start
        guard = Safeguard(
            torch.where(begin | lower, size, self.lowest),
            torch.where(begin, 0, since),
            plain,
            torch.where(trip, 2 * self.budget, self.budget),
        )
        stepping = plain > 0
        idle = not bool((stepping if stopped is None else stepping > stopped).any())
        return guard._replace(idle=idle), stepping, blown & (~plainly | ends)
