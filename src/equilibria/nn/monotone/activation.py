"""Entrywise activations as proximal operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from equilibria.options import check_callable
from equilibria.problem.linearization import leaf_at, recording

# Projections onto an interval, whose implicit steps of any length are the activation itself.
PROJECTIONS = (torch.relu, nn.functional.relu)
PROJECTING_MODULES = (nn.ReLU, nn.Hardtanh)
# Of the scalar equation behind an implicit step: Newton's steps, with bisection where one would leave the bracket.
ITERATIONS = 60
# Slopes are looked at between these arguments.
RANGE = 30.0


class Activation:
    """An entrywise function with slopes in [0, 1], as the proximal operator (I + G)^{-1} of a monotone G.

    Args:
        function: from a tensor to one of its shape.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.projects = function in PROJECTIONS or isinstance(function, PROJECTING_MODULES)

    def slopes(self, a: Tensor) -> Tensor:
        """The derivative at each entry of `a`, itself differentiable in grad mode."""
        graph = torch.is_grad_enabled() and a.requires_grad
        with recording():
            at = a if graph else leaf_at(a)
            (slopes,) = torch.autograd.grad(self.function(at).sum(), at, create_graph=graph)
        return slopes

    def proximal(self, v: Tensor, step: Tensor | float) -> Tensor:
        """The z in v - step G(z), entrywise, where step broadcasts to `v`."""
        if self.projects:
            return self.function(v)
        # z = activation(a) is in v - step G(z) where step a + (1 - step) activation(a) = v.
        step = torch.as_tensor(step, dtype=v.dtype, device=v.device)
        return self.function(_Preimage.apply(v, step.expand_as(v), self))


class _Preimage(torch.autograd.Function):
    """The a with step a + (1 - step) activation(a) = v, differentiated as the solution of that equation."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, step: Tensor, activation: Activation) -> Tensor:
        a = _solve(v, step, activation)
        ctx.save_for_backward(a, step)
        ctx.activation = activation
        return a

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        a, step = ctx.saved_tensors
        rate = grads[0] / (step + (1 - step) * ctx.activation.slopes(a))
        return rate, rate * (ctx.activation.function(a) - a), None


def _solve(v: Tensor, step: Tensor, activation: Activation) -> Tensor:
    eps = torch.finfo(v.dtype).eps
    a = v.clone()
    excess, noise = _excess(a, v, step, activation)
    # The left-hand side has slopes between 1 and step; twice as far as they bracket the solution, so that Newton's step
    # may end where they say.
    reach = 2 * excess / step.clamp(max=1)
    low, high = torch.minimum(a - reach, a), torch.maximum(a - reach, a)
    for _ in range(ITERATIONS):
        low, high = torch.where(excess < 0, a, low), torch.where(excess > 0, a, high)
        newton = a - excess / (step + (1 - step) * activation.slopes(a))
        # A step onto an end of the bracket is one of a cycle between two pieces of a function with kinks.
        proposal = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        # Each entry stops by itself, so that none depends on the others.
        a = torch.where(excess.abs() > 4 * eps * noise, proposal, a)
        excess, noise = _excess(a, v, step, activation)
        if not bool((excess.abs() > 4 * eps * noise).any()):
            break
    return a


def _excess(a: Tensor, v: Tensor, step: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """How far the left-hand side is above v, and the sum of the sizes of its terms, which rounding is relative to."""
    linear, bent = step * a, (1 - step) * activation.function(a)
    return linear + bent - v, linear.abs() + bent.abs() + v.abs()


def check_activation(function: Any) -> Activation:
    """`function` as an `Activation`, or a sentence that says why it is none."""
    check_callable("activation", function)
    name = getattr(function, "__name__", repr(function))
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        raise ValueError(
            f"The activation {name} has parameters, whose gradient a splitting would miss: take one without."
        )
    activation = Activation(function)
    grid = torch.linspace(-RANGE, RANGE, 6001, dtype=torch.float64)
    with torch.no_grad():
        together, alone = function(grid), function(grid[:, None])
    if together.shape != grid.shape or not torch.allclose(together, alone.reshape(-1), rtol=1e-12, atol=1e-12):
        raise ValueError(f"The activation {name} must act on each entry by itself, as nn.ReLU() does.")
    slopes = activation.slopes(grid)
    low, high = float(slopes.min()), float(slopes.max())
    if low < -1e-9 or high > 1 + 1e-9 or low != low:
        raise ValueError(
            f"The activation {name} has slopes from {low:.2f} to {high:.2f}: that of a monotone equilibrium must have "
            "them in [0, 1], as nn.ReLU(), nn.Tanh(), nn.Softshrink(), nn.Sigmoid(), nn.LeakyReLU() and nn.ELU() have."
        )
    return activation
