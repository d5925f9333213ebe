"""Forward-backward splitting."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.options import check_positive
from equilibria.problem import Evaluation, Problem, Splitting

# A step times the local size of I - W stays below 1/2, which is where the reflected method converges.
BOUND = 0.49
# The k-th step may be longer than the one before by a factor of 1 + GROWTH / k^1.5: all of them together are finite.
GROWTH = 10.0


class Memory(NamedTuple):
    """The last point of each sample, the rate (I - W) z - b there, the step taken from it, and the number of steps."""

    z: Tensor  # (batch, n)
    rate: Tensor  # (batch, n)
    length: Tensor  # (batch,)
    taken: int


@dataclass(frozen=True)
class ForwardBackward:
    """Forward-backward splitting of a monotone equilibrium, z = activation(W z + b); one product with W a step.

    >>> layer = eq.nn.MonotoneDEQ(eq.nn.MonotoneLinear(3, 8), solver=eq.ForwardBackward())
    >>> layer.solve(torch.randn(2, 3)).converged
    tensor([True, True])

    The textbook's step, z <- prox(z - step ((I - W) z - b)), converges for steps below 2 m / |I - W|^2, where m is the
    margin of monotonicity, and slowly; with step 1 it is plain iteration. Without a step given the rate of the step
    before is reflected, z <- prox(z - s rate - s' (rate - rate')), which converges for steps below 1 / (2 |I - W|),
    whatever the margin; each sample's step follows the size of I - W along its own path, which is often smaller.

    Args:
        step_size: of the textbook's method; None is the reflected one, which converges on every monotone equilibrium.

    Sources: Winston and Kolter (2020), Monotone operator equilibrium networks, section 3.3; Malitsky and Tam (2020), A
    forward-backward splitting method for monotone inclusions without cocoercivity.
    """

    step_size: float | None = None

    def __post_init__(self) -> None:
        if self.step_size is not None:
            check_positive("step_size", self.step_size)

    def init(self, problem: Problem, z: Tensor, previous: Memory | None = None) -> None:
        return None

    def step(self, problem: Problem, evaluation: Evaluation, memory: Memory | None) -> tuple[Tensor, Memory | None]:
        split = parts(problem, "ForwardBackward")
        z, rate = evaluation.z, evaluation.z - split.preactivation
        if self.step_size is not None:
            return split.proximal(z - self.step_size * rate, self.step_size), None
        shortest = BOUND / split.size
        if memory is None:
            length = z.new_full((z.shape[0],), shortest)
            return split.proximal(z - length[:, None] * rate, length[:, None]), Memory(z, rate, length, 1)
        with torch.no_grad():
            moved, turned = (torch.linalg.vector_norm(d, dim=1) for d in (z - memory.z, rate - memory.rate))
            longest = memory.length * (1 + GROWTH / memory.taken**1.5)
            local = BOUND * moved / turned
            # What does not move says nothing of sizes.
            length = torch.where(local < longest, local, longest).clamp(min=shortest)
        reflected = length[:, None] * rate + memory.length[:, None] * (rate - memory.rate)
        return split.proximal(z - reflected, length[:, None]), Memory(z, rate, length, memory.taken + 1)


def parts(problem: Problem, name: str) -> Splitting:
    """The two parts of the equation of a monotone layer."""
    if problem.splitting is None:
        raise TypeError(
            f"{name} takes steps along the linear part and the activation of an eq.nn.MonotoneDEQ in turns, and this "
            "equation does not come in such parts: take eq.Anderson()."
        )
    return problem.splitting
