"""What every operation of a network yields, found out without computing it."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode

from equilibria.nn.dropout import VariationalDropout
from equilibria.transforms import outside
from equilibria.universal.program import Program, Step, described, references

_UNSUPPORTED = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


def propagate(program: Program, network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Program, dict[str, Any]]:
    """The program, told which steps change values in place, and what each step yields, as tensors without data.

    Raises where a step draws random numbers or changes what others see. Where an operation has no form without data, as
    a solve inside the network has none, the whole is computed once.
    """
    with outside(), torch.inference_mode(False), torch.no_grad(), _quiet():
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                return _run(program, network, pytree.tree_map_only(Tensor, _empty, inputs), _empty)
        except _UNSUPPORTED:
            return _run(program, network, pytree.tree_map_only(Tensor, torch.clone, inputs), torch.clone)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from logging what is raised anyway, and handled where sizes are tried."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    kept, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = kept


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _run(
    program: Program, network: nn.Module, inputs: tuple[Any, ...], stand_in: Any
) -> tuple[Program, dict[str, Any]]:
    call = _Call(program, network)
    # Buffers are stood in for as well: what moves in training is moved by none of this.
    places = [*call.named_parameters(remove_duplicate=False), *call.named_buffers(remove_duplicate=False)]
    copies: dict[int, Tensor] = {}
    tensors = {name: copies.setdefault(id(tensor), stand_in(tensor.detach())) for name, tensor in places}
    return torch.func.functional_call(call, tensors, inputs, tie_weights=False)


class _Call(nn.Module):
    """Runs the program once, looking at each step; a module so that others can stand in for its tensors."""

    def __init__(self, program: Program, network: nn.Module) -> None:
        super().__init__()
        self.program = program
        self.network = network

    def forward(self, *inputs: Any) -> tuple[Program, dict[str, Any]]:
        values: dict[str, Any] = {}
        steps = []
        for step in self.program:
            _refuse_batch_statistics(step, self.network)
            read = {name: [(t, t._version) for t in _tensors(values[name])] for name in step.reads}
            with _refusing_random(step, self.network):
                value = step.run(self.network, inputs, values.__getitem__)
            changed = {name for name, tensors in read.items() if any(t._version != version for t, version in tensors)}
            if changed:
                self._refuse_seen(step, changed, values)
            values[step.name] = value
            steps.append(replace(step, changes=step.changes | changed))
        return Program(tuple(steps), self.program.output), values

    def _refuse_seen(self, step: Step, changed: set[str], values: dict[str, Any]) -> None:
        """Raise where what a step changes in place is looked at afterwards under another name, or not ours."""
        storages = _storages([values[name] for name in changed])
        same = {name for name, value in values.items() if not storages.isdisjoint(_storages(value))}
        steps = self.program.steps
        given = any(other.name in same and other.kind in ("input", "attribute", "constant") for other in steps)
        later = steps[steps.index(step) + 1 :]
        seen = any(name in same for other in later for name in other.reads)
        if given or seen or same & set(references(self.program.output)):
            raise ValueError(
                f"embed cannot take {_place(step, self.network)} since it changes in place what others see as well: "
                "take its form that is not in place (inplace=False, or the function without the underscore)."
            )


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _storages(value: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors(value)}


def _place(step: Step, network: nn.Module) -> str:
    if step.kind == "module":
        return described(network, step.where)
    name = step.target if step.kind == "method" else getattr(step.target, "__name__", str(step.target))
    return f"'{name}' in {described(network, step.where)}"


def _refuse_batch_statistics(step: Step, network: nn.Module) -> None:
    if step.kind == "function" and step.target is F.batch_norm:
        given = inspect.signature(F.batch_norm).bind(*step.args, **dict(step.kwargs))
        given.apply_defaults()
        if given.arguments["training"]:
            raise ValueError(
                f"embed cannot take {_place(step, network)} since it normalises over the batch: call eval() first, or "
                "take a normalisation of single samples."
            )


def refuse_batch_norms(network: nn.Module) -> None:
    """Raise where a part normalises over the batch, which no sample on its own can do."""
    for path, part in network.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None):
            raise ValueError(
                f"embed cannot take {described(network, path)} since it normalises over the batch here: call eval() on "
                "it (with track_running_stats=True), or take a normalisation of single samples."
            )


@contextmanager
def _refusing_random(step: Step, network: nn.Module) -> Iterator[None]:
    if step.kind == "module" and isinstance(network.get_submodule(step.target), VariationalDropout):
        yield  # its masks stay the same through a solve
        return
    with _Random() as seen:
        yield
    if seen.name:
        raise ValueError(
            f"embed cannot take {_place(step, network)} since it draws random numbers ({seen.name}) at every "
            "evaluation, so that there is no equilibrium: call eval() on it, or take eq.nn.VariationalDropout."
        )


class _Random(TorchDispatchMode):
    """Notes the first operation that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""

    def __enter__(self) -> "_Random":
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.name and torch.Tag.nondeterministic_seeded in func.tags:
            given = {argument.name: argument.default_value for argument in func._schema.arguments}
            given |= dict(zip(given, args, strict=False)) | kwargs
            # Fused attention and layers with a rate of their own bear the tag even where they draw nothing.
            rates = [given[name] for name in ("p", "dropout_p", "dropout") if given.get(name) is not None]
            modes = [given[name] for name in ("train", "training") if given.get(name) is not None]
            if all(rates) and all(modes):
                self.name = func._schema.name.rpartition("::")[2]
        return func(*args, **kwargs)
