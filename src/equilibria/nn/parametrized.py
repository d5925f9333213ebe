"""Parametrised weights, worked out once for a whole solve and its backward."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from equilibria.transforms import transformed


def worked_out(f: Callable[..., Any], module: Any) -> Callable[..., Any]:
    """`f` with the parametrised tensors of `module` as they are now, together with their graph, at every call.

    Without it each evaluation would work them out anew, and so would backward, when an activation checkpoint around `f`
    would not find what it saved.

    Args:
        f: calls the module.
        module: what may have parts that `torch.nn.utils.parametrize` knows.
    """
    # What transforms have wrapped must not be kept from one evaluation to the next.
    if not isinstance(module, nn.Module) or transformed():
        return f
    held: dict[tuple[int, str], Tensor] = {}
    with parametrize.cached():
        for part in module.modules():
            if parametrize.is_parametrized(part):
                parametrizations: Any = part.parametrizations
                held |= {(id(part), name): getattr(part, name) for name in parametrizations}
    if not held:
        return f

    def call(*inputs: Any, **keywords: Any) -> Any:
        with parametrize.cached():
            known = parametrize._cache.copy()
            parametrize._cache.update(held)  # pyright: ignore[reportArgumentType, reportCallIssue]
            try:
                return f(*inputs, **keywords)
            finally:
                parametrize._cache.clear()
                parametrize._cache.update(known)

    return call
