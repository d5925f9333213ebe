"""A network as the list of its operations, each of which names the earlier ones that it reads."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn


@dataclass(frozen=True)
class Ref:
    """Stands for the value of an earlier step among the arguments of a later one."""

    name: str


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        name: of its value, unique in the program.
        kind: "input", "attribute", "constant", "module", "function" or "method".
        target: the number of the input, the path of the attribute or module, the tensor, the function, the method.
        args, kwargs: trees with a `Ref` in place of each value.
        where: path of the innermost module that it belongs to; "" is the network itself.
        changes: names of the values that it changes in place, of which it is given copies.
    """

    name: str
    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    changes: frozenset[str] = frozenset()

    def __reduce__(self) -> tuple[Any, ...]:
        # Functions that torch makes on the fly, such as F.max_pool2d, are pickled by the name they can be found under.
        target = _Function(*_place(self.target)) if self.kind == "function" else self.target
        return _step, (self.name, self.kind, target, self.args, self.kwargs, self.where, self.changes)

    @property
    def reads(self) -> list[str]:
        """Names of the values among its arguments, each once."""
        return list(dict.fromkeys(references((self.args, self.kwargs))))

    def run(self, network: nn.Module, inputs: tuple[Any, ...], read: Callable[[str], Any]) -> Any:
        """Its value; parameters and modules are looked up in `network` at every call."""
        if self.kind == "input":
            return inputs[self.target]
        if self.kind == "constant":
            return self.target
        if self.kind == "attribute":
            path, _, attribute = self.target.rpartition(".")
            return getattr(network.get_submodule(path), attribute)

        def given(name: str) -> Any:
            value = read(name)
            return pytree.tree_map_only(Tensor, torch.clone, value) if name in self.changes else value

        args, kwargs = substitute(self.args, given), substitute(self.kwargs, given)
        if self.kind == "module":
            return network.get_submodule(self.target)(*args, **kwargs)
        if self.kind == "method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


@dataclass(frozen=True)
class Program:
    """All operations of a network in an order that they can run in, and the tree that it returns."""

    steps: tuple[Step, ...]
    output: Any

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)


@dataclass(frozen=True)
class _Function:
    module: str
    name: str


def _place(function: Any) -> tuple[str, str]:
    module, name = getattr(function, "__module__", None) or "builtins", getattr(function, "__qualname__", "")
    for candidate in (name, getattr(function, "__name__", "")):
        if _found(module, candidate) is function:
            return module, candidate
    if _found("torch", candidate) is function:  # some of torch's own functions name no module
        return "torch", candidate
    raise TypeError(f"{function!r} cannot be pickled, since it stands under no name in its module: define it there.")


def _found(module: str, name: str) -> Any:
    value = sys.modules.get(module)
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _step(name: str, kind: str, target: Any, *rest: Any) -> Step:
    if isinstance(target, _Function):
        __import__(target.module)
        target = _found(target.module, target.name)
    return Step(name, kind, target, *rest)


def substitute(tree: Any, read: Callable[[str], Any]) -> Any:
    """The tree with the value of each `Ref` in its place, slices included."""
    if isinstance(tree, Ref):
        return read(tree.name)
    if isinstance(tree, tuple):
        parts = [substitute(part, read) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        return [substitute(part, read) for part in tree]
    if isinstance(tree, Mapping):
        return {key: substitute(part, read) for key, part in tree.items()}
    if isinstance(tree, slice):
        return slice(*(substitute(part, read) for part in (tree.start, tree.stop, tree.step)))
    return tree


def references(tree: Any) -> Iterator[str]:
    """Names of the values in a tree."""
    found: list[str] = []
    substitute(tree, found.append)
    return iter(found)


def described(network: nn.Module, path: str) -> str:
    """A module in the words of an error."""
    kind = type(network.get_submodule(path)).__name__
    return f"{kind} '{path}'" if path else f"the network itself ({kind})"
