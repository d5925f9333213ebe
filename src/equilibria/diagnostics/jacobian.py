"""The Jacobian at a point, and what the iterations that measure it share."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equilibria.norms import rms_norm
from equilibria.options import check_callable, check_integer
from equilibria.problem import FixedPoint, Linearization
from equilibria.status import ConvergenceWarning
from equilibria.tree import Layout

# Estimates are looked at every so many steps: the first ones of a start that hardly holds the leading vector agree
# with each other long before they are right.
LOOK = 5


def jacobian_at(f: Callable[..., Any], z: Any, args: tuple[Any, ...], batch_dims: int) -> tuple[Layout, Linearization]:
    """Products with df/dz at `z`, and how `z` lies in their buffers."""
    check_callable("f", f)
    check_integer("batch_dims", batch_dims, 0)
    layout = Layout.of(z, batch_dims)
    problem = FixedPoint(f, args, layout, rms_norm, None, None, has_aux=False)
    return layout, problem.linearize(layout.pack(z))


def fixed_start(image: Tensor) -> Tensor:
    """A random unit vector, the same for every sample in whatever batch, in place of `image` of shape (batch, n)."""
    # A generator of its own: the global one stays untouched.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(image.shape[1], generator=generator, dtype=torch.float64).to(image)
    return (start / torch.linalg.vector_norm(start)).expand_as(image).clone()


def warn_missed(name: str, missed: Tensor, rtol: float, limit: int) -> None:
    """Warn where samples missed their tolerance; to be called by the function that the user called."""
    if bool(missed.any()):
        warnings.warn(
            f"{name}: {int(missed.sum())} of {len(missed)} samples missed rtol={rtol} within {limit} steps; "
            "raise max_steps or loosen rtol.",
            ConvergenceWarning,
            stacklevel=3,
        )
