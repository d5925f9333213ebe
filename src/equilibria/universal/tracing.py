"""A network's operations, recorded by `torch.fx`."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from equilibria.universal.program import Program, Ref, Step, described

# Functions that make a tensor from sizes alone: torch.fx records them only where it is told to.
FACTORIES = (
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.tensor,
    torch.tril_indices,
    torch.triu_indices,
    torch.zeros,
)


def trace(network: nn.Module, inputs: tuple[Any, ...]) -> Program:
    """The operations of `network` at inputs of this form; raises where they depend on data."""
    if _Tracer().is_leaf_module(network, ""):
        steps = [Step(f"input_{k}", "input", k) for k in range(len(inputs))]
        call = Step("output", "module", "", tuple(Ref(step.name) for step in steps))
        return Program((*steps, call), Ref("output"))
    names, constants = _bind(network, inputs)
    tracer = _Tracer()
    before = set(vars(network))
    generator = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = tracer.trace(network, constants or None)
    except Exception as error:
        path = tracer.failed or ""
        raise ValueError(
            f"embed cannot trace {described(network, path)} since its forward branches on data or shapes, or leaves "
            f"torch ({_first_line(error)}): write the branch with torch.where, or put that part into a function of its "
            "own under torch.fx.wrap."
        ) from error
    finally:
        if tracer.drew is None and not torch.equal(generator, torch.get_rng_state()):
            tracer.drew = ""
        torch.set_rng_state(generator)
        # Tensors made while tracing are left on the network by torch.fx; the program keeps them instead.
        made = {name: vars(network).pop(name) for name in set(vars(network)) - before}
    if tracer.drew is not None:
        raise ValueError(
            f"embed cannot take {described(network, tracer.drew)}, which draws random numbers: every evaluation would "
            "draw others, so that there is no equilibrium; draw outside and pass them in."
        )
    return _program(graph, names, made)


def differing(one: Program, other: Program) -> str | None:
    """Where two traces of one network differ, as the path of a module, or None."""
    for a, b in zip(one, other, strict=False):
        if a.kind == b.kind == "constant":
            if not torch.equal(a.target, b.target):
                return a.where
        elif a != b:
            return a.where
    if len(one.steps) != len(other.steps) or one.output != other.output:
        return ""
    return None


class _Tracer(fx.Tracer):
    """Records calls of torch's own modules, and of implicit layers, as one operation each."""

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math,), autowrap_functions=FACTORIES)
        self._autowrap_search.append(torch)
        self.proxy_buffer_attributes = True
        self.failed: str | None = None
        self.drew: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or type(m).__module__.startswith("equilibria.nn")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        node = obj.node
        if node.target in ("chunk", torch.chunk) and len(node.args) > 1 and isinstance(node.args[1], int):
            items: Any = obj
            return iter([items[k] for k in range(node.args[1])])
        return super().iter(obj)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        generator = torch.get_rng_state()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = path if self.failed is None else self.failed
            raise
        finally:
            if self.drew is None and not torch.equal(generator, torch.get_rng_state()):
                self.drew = path


def _bind(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, int], dict[str, Any]]:
    """The number of the input that each parameter of forward takes, and the values of those that hold no tensor."""
    signature = inspect.signature(network.forward)
    try:
        bound = signature.bind(*inputs)
    except TypeError as error:
        raise TypeError(
            f"{type(network).__name__} cannot be called with the {len(inputs)} inputs of the example ({error}): give "
            "a tuple with one entry for each input."
        ) from None
    names = {name: k for k, name in enumerate(bound.arguments)}
    bound.apply_defaults()
    constants = {name: value for name, value in bound.arguments.items() if not _holds_tensor(value)}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in signature.parameters.items():
        if parameter.kind in variadic:
            constants.pop(name, None)
    return names, constants


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _program(graph: fx.Graph, names: dict[str, int], made: dict[str, Tensor]) -> Program:
    live: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    result = waiting[0].args[0]
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting += node.all_input_nodes
    # What changes a value in place and returns nothing that is used still matters.
    kinds = {
        "placeholder": "input",
        "get_attr": "attribute",
        "call_module": "module",
        "call_function": "function",
        "call_method": "method",
    }
    steps, dropped = [], set()
    for node in graph.nodes:
        # torch.fx asserts that the arguments without tensors are those of the example; the cell looks at them itself.
        aside = node.op in ("placeholder", "output") or node.target is torch._assert
        if node not in live and (aside or not dropped.isdisjoint(node.all_input_nodes)):
            dropped.add(node)
            continue
        if node.op == "output":
            continue
        kind, target = kinds[node.op], node.target
        if kind == "input":
            target = names[str(target).lstrip("*")]
        elif kind == "attribute" and target in made:
            kind, target = "constant", made[target]
        where = node.target if kind == "module" else _innermost(node)
        args, kwargs = _referring(node.args), _referring(node.kwargs)
        steps.append(Step(node.name, kind, target, () if kind == "input" else args, kwargs, where))
    return Program(tuple(steps), _referring(result))


def _referring(tree: Any) -> Any:
    if isinstance(tree, fx.Node):
        return Ref(tree.name)
    if isinstance(tree, tuple):
        parts = [_referring(part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        return [_referring(part) for part in tree]
    if isinstance(tree, dict):
        return {key: _referring(part) for key, part in tree.items()}
    if isinstance(tree, slice):
        return slice(_referring(tree.start), _referring(tree.stop), _referring(tree.step))
    return tree


def _innermost(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".:") or type(error).__name__
