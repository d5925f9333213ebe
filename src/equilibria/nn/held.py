"""What projections hold, numbers or tensors, and checks of what they are given."""

import torch
from torch import Tensor, nn

from equilibria.options import check_tolerance


def hold(module: nn.Module, name: str, value: Tensor | float) -> None:
    """Register `value` as what it is: a parameter, a buffer or a number."""
    if isinstance(value, nn.Parameter):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, not one of {value.dtype}.")
        module.register_parameter(name, value)
    elif isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, not one of {value.dtype}.")
        module.register_buffer(name, value)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a floating tensor, not {value!r:.60}.")
    else:
        setattr(module, name, float(value))


def hold_radius(module: nn.Module, radius: Tensor | float) -> None:
    """Register `radius` where it is one."""
    if isinstance(radius, Tensor):
        if not bool(((radius >= 0) & radius.isfinite()).all()):
            raise ValueError("radius must be finite and not negative in every entry.")
    else:
        check_tolerance("radius", radius, optional=False)
    hold(module, "radius", radius)


def with_radius(x: Tensor, radius: Tensor | float) -> tuple[Tensor, Tensor]:
    """Input and radius in the dtype to compute in, the radius with a last dimension of 1."""
    check_input(x)
    dtype = working_dtype(x, radius)
    tensor = at(radius, x, dtype)
    check_broadcast("radius", tensor, x.shape[:-1])
    return x.to(dtype), tensor[..., None]


def at(value: Tensor | float, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as a tensor beside `x`."""
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=x.device)


def working_dtype(*values: Tensor | float) -> torch.dtype:
    """The dtype to compute in: float32 at least."""
    dtype = torch.float32
    for value in values:
        if isinstance(value, Tensor):
            dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def check_input(x: Tensor) -> None:
    """Raise unless `x` is a floating tensor with a last dimension."""
    if not x.is_floating_point():
        raise TypeError(f"The input must be a floating tensor, not one of {x.dtype}.")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"The input must have a last dimension of at least 1; its shape is {tuple(x.shape)}.")


def check_broadcast(name: str, value: Tensor, shape: torch.Size) -> None:
    """Raise unless `value` broadcasts to `shape`, which stays what it is."""
    trailing = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.ndim > len(shape) or any(mine not in (1, size) for mine, size in trailing):
        raise ValueError(f"{name}, of shape {tuple(value.shape)}, must broadcast to {tuple(shape)}.")


def shown(value: Tensor | float) -> str:
    """`value` in a repr."""
    return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
