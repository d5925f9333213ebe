"""Solvers, adjoints and cells that each break a law: what the conformance kit must refuse."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import equilibria as eq
from equilibria.status import Failures

# Solvers.


@dataclass(frozen=True)
class Plain:
    """Plain iteration, which all of them are but for one thing."""

    def init(self, problem, z, previous=None):
        return None

    def step(self, problem, evaluation, memory):
        return self.move(problem, evaluation), None

    def move(self, problem, evaluation):
        return evaluation.image


@dataclass
class Thawed:
    init = Plain.init
    step = Plain.step
    move = Plain.move


@dataclass(frozen=True)
class Silent(Plain):
    depth: int = field(default=1, repr=False)


@dataclass(frozen=True)
class Unpicklable(Plain):
    schedule: Any = None


@dataclass(frozen=True)
class Unchecked(Plain):
    relaxation: float = 1.0


@dataclass(frozen=True)
class Still(Plain):
    def move(self, problem, evaluation):
        return evaluation.z


@dataclass(frozen=True)
class Lax(Plain):
    """Loosens the tolerance of the problem."""

    def init(self, problem, z, previous=None):
        problem.rtol, problem.atol = 0.1, 0.1


@dataclass(frozen=True)
class LaxAbsolute(Plain):
    def init(self, problem, z, previous=None):
        problem.atol = 10.0


@dataclass(frozen=True)
class Narrowed(Plain):
    """Moves the first 32 entries alone."""

    def move(self, problem, evaluation):
        return torch.cat([evaluation.image[:, :32], evaluation.z[:, 32:]], dim=1)


@dataclass(frozen=True)
class Clamped(Plain):
    def move(self, problem, evaluation):
        return evaluation.image.clamp(-1, 1)


@dataclass(frozen=True)
class OnAGrid(Plain):
    """Computes in steps of 1 / 64 where the state is not in float64."""

    def move(self, problem, evaluation):
        image = evaluation.image
        return image if image.dtype == torch.float64 else (image * 64).round() / 64


@dataclass(frozen=True)
class Crawling(Plain):
    """Steps that half precision rounds away."""

    def move(self, problem, evaluation):
        return torch.lerp(evaluation.z, evaluation.image, 0.002)


@dataclass(frozen=True)
class Single(Plain):
    def move(self, problem, evaluation):
        return evaluation.image.float()


@dataclass(frozen=True)
class Spreading(Plain):
    """0 * nan is nan."""

    def move(self, problem, evaluation):
        return evaluation.image + 0 * evaluation.residual.mean(dim=0, keepdim=True)


@dataclass(frozen=True)
class Alarmed(Plain):
    def move(self, problem, evaluation):
        if not evaluation.image.isfinite().all():
            raise FloatingPointError("a number is not finite")
        return evaluation.image


@dataclass(frozen=True)
class Overwriting(Plain):
    def move(self, problem, evaluation):
        return evaluation.z.add_(evaluation.residual)


@dataclass(frozen=True)
class Peeking(Plain):
    """Evaluates behind the count."""

    def move(self, problem, evaluation):
        return problem.apply(evaluation.z)


@dataclass(frozen=True)
class Coupled(Plain):
    """The length of a step depends on the worst sample."""

    def move(self, problem, evaluation):
        return torch.lerp(evaluation.z, evaluation.image, 0.6 if evaluation.size.max() > 0.1 else 0.9)


@dataclass(frozen=True)
class LedByTheFirst(Plain):
    def move(self, problem, evaluation):
        return torch.lerp(evaluation.z, evaluation.image, 0.6 if evaluation.size[:1].sum() > 0.1 else 0.9)


@dataclass(frozen=True)
class Rolling(Plain):
    def move(self, problem, evaluation):
        return evaluation.image + 1e-13 * torch.rand_like(evaluation.image)


@dataclass(frozen=True)
class Seeding(Plain):
    def init(self, problem, z, previous=None):
        torch.manual_seed(0)


@dataclass(frozen=True)
class Setting(Plain):
    def init(self, problem, z, previous=None):
        torch.set_default_dtype(torch.float64)


@dataclass(frozen=True)
class Meddling(Plain):
    """Writes into an argument of the user's function."""

    def init(self, problem, z, previous=None):
        problem.args[1].add_(0.1)


@dataclass(frozen=True)
class Moody(Plain):
    """Counts its solves in the class."""

    solves: ClassVar[list[int]] = []

    def init(self, problem, z, previous=None):
        self.solves.append(1)

    def move(self, problem, evaluation):
        return torch.lerp(evaluation.z, evaluation.image, 0.9 if len(self.solves) % 2 else 0.8)


@dataclass(frozen=True)
class Consuming:
    """Momentum, whose memory is written in place."""

    def init(self, problem, z, previous=None):
        return torch.zeros_like(z) if previous is None else previous

    def step(self, problem, evaluation, memory):
        memory.mul_(0.2).add_(evaluation.residual)
        return evaluation.z + memory, memory


@dataclass(frozen=True)
class Peaked(Plain):
    def init(self, problem, z, previous=None):
        return z.abs().amax(dim=1)


@dataclass(frozen=True)
class Detaching(Plain):
    def move(self, problem, evaluation):
        return evaluation.image.detach()


@dataclass(frozen=True)
class Twice(Plain):
    """Takes second derivatives, which compiled functions do not have."""

    def move(self, problem, evaluation):
        with torch.enable_grad():
            z = evaluation.z.detach().requires_grad_()
            image = problem.apply(z)
            (slope,) = torch.autograd.grad(image.sum(), z, create_graph=True)
            torch.autograd.grad(slope.sum(), z)
        problem.evaluations += 1
        return evaluation.image


@dataclass(frozen=True)
class Hoarding(Plain):
    kept: ClassVar[list[Tensor]] = []

    def move(self, problem, evaluation):
        self.kept.append(evaluation.image)
        return evaluation.image


@dataclass(frozen=True)
class Circular:
    """A memory that refers to itself."""

    def init(self, problem, z, previous=None):
        return None

    def step(self, problem, evaluation, memory):
        memory = SimpleNamespace(image=evaluation.image)
        memory.itself = memory
        return evaluation.image, memory


# Adjoints: a right one, and what is done to the gradient that comes in.


@dataclass(frozen=True)
class Right:
    def attach(self, problem, solve, failures, report):
        value, outcome = self.base().attach(problem, solve, failures, report)
        if value.requires_grad:
            value.register_hook(lambda v: self.pull(v, problem, outcome, report))
        return value, outcome

    def base(self):
        return eq.Implicit()

    def pull(self, v, problem, outcome, report):
        return v


@dataclass
class ThawedAdjoint:
    attach = Right.attach
    base = Right.base
    pull = Right.pull


@dataclass(frozen=True)
class UncheckedAdjoint(Right):
    terms: int = 3


@dataclass(frozen=True)
class ReturningImage(Right):
    def attach(self, problem, solve, failures, report):
        value, outcome = super().attach(problem, solve, failures, report)
        return value + (problem.apply(outcome.z) - outcome.z).detach(), outcome


@dataclass(frozen=True)
class AddingZero(Right):
    def attach(self, problem, solve, failures, report):
        value, outcome = super().attach(problem, solve, failures, report)
        return value + 0.0, outcome


@dataclass(frozen=True)
class Shrinking(Right):
    def pull(self, v, problem, outcome, report):
        return 0.9 * v


@dataclass(frozen=True)
class ArgumentsAlone(Right):
    def attach(self, problem, solve, failures, report):
        if problem.args:
            return super().attach(problem, solve, failures, report)
        with torch.no_grad():
            outcome = solve(problem)
        return outcome.z, outcome


@dataclass(frozen=True)
class Clipping(Right):
    def pull(self, v, problem, outcome, report):
        return v.clamp(-1, 1)


@dataclass(frozen=True)
class AbsoluteTolerance(Right):
    def pull(self, v, problem, outcome, report):
        return torch.where(v.abs() < 1e-6, 0, v)


@dataclass(frozen=True)
class Decaying(Right):
    def attach(self, problem, solve, failures, report):
        value, outcome = super().attach(problem, solve, failures, report)
        factors = iter((1.0, 0.5))
        if value.requires_grad:
            value.register_hook(lambda v: next(factors) * v)
        return value, outcome


@dataclass(frozen=True)
class Centring(Right):
    def pull(self, v, problem, outcome, report):
        return v - 0.1 * v.mean(dim=0)


@dataclass(frozen=True)
class Naive(Right):
    """One step, shielded from nothing."""

    def attach(self, problem, solve, failures, report):
        with torch.no_grad():
            outcome = solve(problem)
        image = problem.apply(outcome.z.detach())
        report.evaluations += 1
        return outcome.z + (image - image.detach()), outcome


@dataclass(frozen=True)
class DroppingUnconverged(Right):
    def pull(self, v, problem, outcome, report):
        return torch.where((outcome.status == eq.Status.CONVERGED)[:, None], v, 0)


@dataclass(frozen=True)
class Stale(Right):
    """Reads the outcome of the last solve, of whatever problem."""

    last: ClassVar[list[Tensor]] = []

    def attach(self, problem, solve, failures, report):
        value, outcome = super().attach(problem, solve, failures, report)
        self.last[:] = [outcome.z.detach()]
        return value, outcome

    def pull(self, v, problem, outcome, report):
        return v * (1 + self.last[0].square())


@dataclass(frozen=True)
class AlwaysAGraph(Right):
    def attach(self, problem, solve, failures, report):
        value, outcome = super().attach(problem, solve, failures, report)
        return value + -0.0 * torch.zeros((), dtype=value.dtype, requires_grad=True), outcome


@dataclass(frozen=True)
class BackwardInBackward(Right):
    def pull(self, v, problem, outcome, report):
        with torch.enable_grad():
            (0 * problem.apply(outcome.z)).sum().backward()
        return v


@dataclass(frozen=True)
class Uncounted(Right):
    def pull(self, v, problem, outcome, report):
        problem.apply(outcome.z)
        return v


@dataclass(frozen=True)
class FlatReport(Right):
    def base(self):
        return eq.OneStep()

    def pull(self, v, problem, outcome, report):
        report.residual = torch.zeros(len(v))
        return v


@dataclass(frozen=True)
class EarlyReport(Right):
    def attach(self, problem, solve, failures, report):
        value, outcome = super().attach(problem, solve, failures, report)
        report.status = outcome.status.reshape(problem.layout.batch_shape)
        return value, outcome


@dataclass(frozen=True)
class AlwaysConverged(Right):
    def base(self):
        return eq.OneStep()

    def pull(self, v, problem, outcome, report):
        report.status = torch.zeros(problem.layout.batch_shape, dtype=torch.int64)
        return v


@dataclass(frozen=True)
class Mute(Right):
    def attach(self, problem, solve, failures, report):
        return super().attach(problem, solve, Failures("ignore"), report)


@dataclass(frozen=True)
class OneDtype(Right):
    def pull(self, v, problem, outcome, report):
        if problem.compute_dtype != v.dtype:
            raise TypeError("f computes in another dtype")
        return v


@dataclass(frozen=True)
class Caching(Right):
    """Solves no problem of one shape twice."""

    cache: ClassVar[dict[Any, Any]] = {}

    def attach(self, problem, solve, failures, report):
        key = problem.layout.shapes
        if key not in self.cache:
            self.cache[key] = super().attach(problem, solve, failures, report)
        return self.cache[key]


@dataclass(frozen=True)
class SeedingAdjoint(Right):
    def pull(self, v, problem, outcome, report):
        torch.manual_seed(0)
        return v


@dataclass(frozen=True)
class OverwritingGradient(Right):
    def attach(self, problem, solve, failures, report):
        problem.args[1].detach().mul_(1.5)
        return super().attach(problem, solve, failures, report)


@dataclass(frozen=True)
class PeakedAdjoint(Right):
    def pull(self, v, problem, outcome, report):
        scale = v.abs().amax(dim=1, keepdim=True)
        return v / scale * scale


@dataclass(frozen=True)
class TwiceAdjoint(Right):
    def attach(self, problem, solve, failures, report):
        value, outcome = super().attach(problem, solve, failures, report)
        z = outcome.z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(problem.apply(z).sum(), z, create_graph=True)
        torch.autograd.grad(slope.sum(), z)
        return value, outcome


@dataclass(frozen=True)
class CircularAdjoint(Right):
    def attach(self, problem, solve, failures, report):
        value, outcome = super().attach(problem, solve, failures, report)
        report.value = value
        return value, outcome


# Cells.


class Fine(nn.Module):
    """tanh(0.4 (A z) + x), which all of them are but for one thing."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(width, width, generator=generator)
            self.linear.weight.copy_(weight / torch.linalg.matrix_norm(weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.4 * self.linear(z) + x)


class Widening(Fine):
    def forward(self, z, x):
        return torch.cat([super().forward(z, x), x[..., :1]], dim=-1)


class Upcasting(Fine):
    def forward(self, z, x):
        return super().forward(z, x).double()


class Dropping(Fine):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, z, x):
        return self.dropout(super().forward(z, x))


class Noisy(Fine):
    def forward(self, z, x):
        return super().forward(z, x) + 0.01 * torch.randn_like(z)


class Drawing(Fine):
    def forward(self, z, x):
        torch.rand(1)
        return super().forward(z, x)


class WritingState(Fine):
    def forward(self, z, x):
        return super().forward(z.mul_(0.5), x)


class WritingInput(Fine):
    def forward(self, z, x):
        return super().forward(z, x.clamp_(max=0.1))


class Normalising(Fine):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, z, x):
        return torch.tanh(0.2 * self.norm(self.linear(z) + x) + x)


class Averaging(Fine):
    def forward(self, z, x):
        return super().forward(z, x) + 0.1 * z.mean(dim=0)


class Loose(Fine):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(0.4)

    def forward(self, z, x):
        return torch.tanh(self.scale * self.linear(z) + x)


class HoldingALambda(Fine):
    def __init__(self) -> None:
        super().__init__()
        self.activation = lambda x: x.tanh()


class Expanding(Fine):
    def forward(self, z, x):
        return z + z.abs() + x.abs() + 1


class SinglePrecision(Fine):
    def forward(self, z, x):
        return torch.tanh(0.4 * nn.functional.linear(z.float(), self.linear.weight.float()) + x.float())


class Remembering(Fine):
    """Keeps the scaled weight of its first call, with whatever graph it had."""

    def forward(self, z, x):
        if not hasattr(self, "scaled"):
            object.__setattr__(self, "scaled", [0.4 * self.linear.weight])
        return torch.tanh(z @ self.scaled[0].mT + self.linear.bias + x)


class Blending(Fine):
    """`lerp` wants one dtype, and under autocast has two."""

    def forward(self, z, x):
        return torch.tanh(torch.lerp(0.1 * z, self.linear(z), 0.4) + x)


class ShyOfCompilers(Fine):
    def forward(self, z, x):
        return super().forward(z, x) + (0.1 if torch.compiler.is_compiling() else 0)


class FourAtATime(Fine):
    def forward(self, z, x):
        return super().forward(z.view(4, 5), x)
