"""Euclidean projections: the nearest point of a convex set, along the last dimension of a tensor."""

import math

import torch
from torch import Tensor, nn

from equilibria.nn.held import at, check_broadcast, check_input, hold, hold_radius, shown, with_radius, working_dtype


class SimplexProjection(nn.Module):
    """The nearest point of the simplex {z >= 0, sum z = radius}.

    >>> eq.nn.SimplexProjection()(torch.tensor([[0.9, 0.3, -1.0]]))
    tensor([[0.8000, 0.2000, 0.0000]])

    Args:
        radius: a number of at least 0, or a tensor or `nn.Parameter` that broadcasts to the input's shape without its
            last dimension; gradient flows into it.

    Returns:
        From (..., n), n at least 1, the same shape and dtype; computed in float32 at least. A row with a NaN, an
        infinity or a negative radius becomes NaN, with zero gradient; an entry of -inf is taken as one that is masked.

    Raises:
        TypeError, ValueError: the radius, or an input, makes no sense.

    Source: Held, Wolfe and Crowder (1974), Validation of subgradient optimization.
    """

    radius: Tensor | float

    def __init__(self, radius: Tensor | float = 1.0) -> None:
        super().__init__()
        hold_radius(self, radius)

    def forward(self, x: Tensor) -> Tensor:
        """`x`, of shape (..., n), projected."""
        wide, radius = with_radius(x, self.radius)
        return _simplex(wide, radius).to(x.dtype)

    def extra_repr(self) -> str:
        return f"radius={shown(self.radius)}"


class L1BallProjection(nn.Module):
    """The nearest point of the ball {sum |z| <= radius}.

    >>> eq.nn.L1BallProjection()(torch.tensor([[0.9, -0.3, 0.1], [0.2, 0.3, 0.0]]))
    tensor([[ 0.8000, -0.2000,  0.0000],
            [ 0.2000,  0.3000,  0.0000]])

    Args:
        radius: as for `SimplexProjection`.

    Returns:
        From (..., n), n at least 1, the same shape and dtype; computed in float32 at least. A row that is not finite or
        has a negative radius becomes NaN, with zero gradient.

    Raises:
        TypeError, ValueError: the radius, or an input, makes no sense.

    Source: Duchi, Shalev-Shwartz, Singer and Chandra (2008), section 4.
    """

    radius: Tensor | float

    def __init__(self, radius: Tensor | float = 1.0) -> None:
        super().__init__()
        hold_radius(self, radius)

    def forward(self, x: Tensor) -> Tensor:
        """`x`, of shape (..., n), projected."""
        wide, radius = with_radius(x, self.radius)
        finite = wide.isfinite().all(-1, keepdim=True)
        clean = torch.where(finite, wide, 0)
        inside = clean.detach().abs().sum(-1, keepdim=True) <= radius
        out = torch.where(inside, clean, clean.sign() * _simplex(clean.abs(), radius))
        return torch.where(finite, out, math.nan).to(x.dtype)

    def extra_repr(self) -> str:
        return f"radius={shown(self.radius)}"


class BoxProjection(nn.Module):
    """The nearest point of the box {low <= z <= high}.

    >>> eq.nn.BoxProjection(0, torch.tensor([1.0, 2.0]))(torch.tensor([[-1.0, 3.0], [0.5, 0.5]]))
    tensor([[0.0000, 2.0000],
            [0.5000, 0.5000]])

    Args:
        low, high: numbers, infinite ones too, or tensors or `nn.Parameter` that broadcast to the input's shape, with
            low <= high; gradient flows into them.

    Returns:
        From any shape the same, in the same dtype. An entry that is NaN, or whose bounds have crossed since
        construction, becomes NaN, with zero gradient.

    Raises:
        TypeError, ValueError: a bound, or an input, makes no sense.
    """

    low: Tensor | float
    high: Tensor | float

    def __init__(self, low: Tensor | float, high: Tensor | float) -> None:
        super().__init__()
        hold(self, "low", low)
        hold(self, "high", high)
        below = torch.as_tensor(self.low) <= torch.as_tensor(self.high)
        if not bool(below.all()):
            raise ValueError("low must be at most high in every entry: exchange them where they cross.")

    def forward(self, x: Tensor) -> Tensor:
        """`x`, with each entry moved to the nearest bound where it is beyond it."""
        check_input(x)
        dtype = working_dtype(x, self.low, self.high)
        wide, low, high = x.to(dtype), at(self.low, x, dtype), at(self.high, x, dtype)
        check_broadcast("low", low, x.shape)
        check_broadcast("high", high, x.shape)
        # torch.clamp gives neither bound a gradient where both are equal.
        out = torch.where(wide < low, low, torch.where(wide > high, high, wide))
        return torch.where((wide == wide) & (low <= high), out, math.nan).to(x.dtype)

    def extra_repr(self) -> str:
        return f"low={shown(self.low)}, high={shown(self.high)}"


class SecondOrderConeProjection(nn.Module):
    """The nearest point of the cone of all (t, x) with |x| <= t, t being the first entry of the last dimension.

    >>> eq.nn.SecondOrderConeProjection()(torch.tensor([[0.0, 3.0, 4.0], [-9.0, 1.0, 0.0]]))
    tensor([[2.5000, 1.5000, 2.0000],
            [0.0000, 0.0000, 0.0000]])

    Returns:
        From (..., n), n at least 1, the same shape and dtype; computed in float32 at least. A row that is not finite
        becomes NaN, with zero gradient.

    Raises:
        TypeError, ValueError: an input that makes no sense.

    Source: Parikh and Boyd (2014), Proximal algorithms, section 6.3.2.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x`, of shape (..., n), projected."""
        check_input(x)
        wide = x.to(working_dtype(x))
        finite = wide.isfinite().all(-1, keepdim=True)
        clean = torch.where(finite, wide, 0)
        # Only rows whose squares would overflow or vanish are scaled: the gradient of others is not touched.
        largest = clean.detach().abs().amax(-1, keepdim=True)
        limits = torch.finfo(wide.dtype)
        extreme = (largest > limits.max**0.25) | (largest < limits.tiny**0.25)
        scale = torch.where(extreme & (largest > 0), largest, 1)
        t, v = (clean / scale).split([1, x.shape[-1] - 1], dim=-1)
        size = torch.linalg.vector_norm(v.detach(), dim=-1, keepdim=True)
        inside, polar = size <= t, size <= -t
        between = ~(inside | polar)
        # The norm has no derivative at zero, where it is not used.
        norm = torch.where(between, torch.linalg.vector_norm(torch.where(between, v, 1), dim=-1, keepdim=True), 1)
        half = (t / 2 + norm / 2) * scale
        boundary = torch.cat([half, half * (v / norm)], dim=-1)
        out = torch.where(inside, clean, torch.where(polar, 0, boundary))
        return torch.where(finite, out, math.nan).to(x.dtype)


def _simplex(x: Tensor, radius: Tensor) -> Tensor:
    largest = x.detach().amax(-1, keepdim=True)
    ok = largest.isfinite() & (radius >= 0) & radius.isfinite()
    radius = torch.where(ok, radius, 0)
    y = torch.where(ok, x - torch.where(ok, largest, 0), 0)
    # The threshold is the largest of these means. What is far below may be infinite, and comes after all that count.
    fixed = y.detach()
    total = fixed.sort(dim=-1, descending=True).values.cumsum(-1) - radius.detach()
    threshold = (total / torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)).amax(-1, keepdim=True)
    # Once more without, then with gradient: sums of what is above it keep digits that a running sum loses.
    above = (fixed > threshold) | (fixed == 0)
    above = (fixed > _mean_above(fixed, above, radius.detach())) | (fixed == 0)
    z = torch.where(above, y - _mean_above(y, above, radius), 0).clamp(min=0)
    return torch.where(ok, z, math.nan)


def _mean_above(y: Tensor, above: Tensor, radius: Tensor) -> Tensor:
    return (torch.where(above, y, 0).sum(-1, keepdim=True) - radius) / above.sum(-1, keepdim=True)
