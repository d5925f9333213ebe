"""Parametrised weights, worked out once for a whole solve and its backward."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from equilibria.steady import hold
from equilibria.transforms import transformed


class WorkedOut:
    """`f` with the parametrised tensors of `module` as they are now, together with their graph, at every call.

    Without it each evaluation would work them out anew, and so would backward, when an activation checkpoint around `f`
    would not find what it saved. What they move by being worked out, as torch's spectral normalisation its vectors,
    stays as it was until `settle`.

    Args:
        f: calls the module.
        module: what may have parts that `torch.nn.utils.parametrize` knows.
    """

    def __init__(self, f: Callable[..., Any], module: Any) -> None:
        self.f = f
        parts: list[nn.Module] = []
        # What transforms have wrapped must not be kept from one evaluation to the next.
        if isinstance(module, nn.Module) and not transformed():
            parts = [part for part in module.modules() if parametrize.is_parametrized(part)]
        self._working = hold(lambda: _tensors(parts), module) if parts else None
        self._tensors = {} if self._working is None else self._working()

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        if self._working is None:
            return self.f(*inputs, **keywords)
        with parametrize.cached():
            known = parametrize._cache.copy()
            parametrize._cache.update(self._tensors)  # pyright: ignore[reportArgumentType, reportCallIssue]
            try:
                return self.f(*inputs, **keywords)
            finally:
                parametrize._cache.clear()
                parametrize._cache.update(known)

    def settle(self) -> None:
        """Move what working them out moves."""
        if self._working is not None:
            self._working.settle()


def _tensors(parts: list[nn.Module]) -> dict[tuple[int, str], Tensor]:
    with parametrize.cached():
        return {(id(part), name): getattr(part, name) for part in parts for name in _names(part)}


def _names(part: nn.Module) -> list[str]:
    parametrizations: Any = part.parametrizations
    return list(parametrizations)
