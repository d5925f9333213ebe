"""Checks of options at construction: each names the option, what was given and what is allowed."""

import math
from collections.abc import Callable
from typing import Any


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raise unless `value` is an integer of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer of at least {minimum}, not {value!r}.")
    if value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, not {value}.")


def check_tolerance(name: str, value: Any, optional: bool = True) -> None:
    """Raise unless `value` is a finite number that is not negative, or None where that is allowed."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        allowed = "None (a default for the dtype) or a number" if optional else "a number"
        raise TypeError(f"{name} must be {allowed}, not {value!r}.")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and not negative, not {value}.")


def check_fraction(name: str, value: Any) -> None:
    """Raise unless `value` lies in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in (0, 1], not {value!r}.")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], not {value}.")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}.")


def check_callable(name: str, value: Any) -> Callable[..., Any]:
    """Raise unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {value!r}.")
    return value


def check_part(name: str, value: Any, methods: tuple[str, ...], example: str) -> None:
    """Raise unless `value` is an instance that has `methods`, such as a solver or an adjoint."""
    if isinstance(value, type):
        raise TypeError(f"{name} must be an instance: write {value.__name__}(), not the class {value.__name__}.")
    missing = [method for method in methods if not callable(getattr(value, method, None))]
    if missing:
        raise TypeError(f"{name} must have {' and '.join(methods)}, as {example} has; {value!r} lacks {missing[0]}.")


def check_positive(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number above 0, not {value!r}.")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, not {value}.")


def check_probability(name: str, value: Any) -> None:
    """Raise unless `value` lies in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), not {value!r}.")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), not {value}.")


def check_dimensions(name: str, value: Any) -> tuple[int, ...]:
    """The dimensions of a tensor that `value`, an integer or several, names; raises where it is neither."""
    dims = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(dim, int) and not isinstance(dim, bool) for dim in dims):
        raise TypeError(f"{name} must be a dimension or a tuple of dimensions, not {value!r}.")
    return dims


def check_flag(name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}.")
