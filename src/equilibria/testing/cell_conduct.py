"""Laws of cells: what one call of a cell returns, and what it leaves alone."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from equilibria.nn import DEQ, VariationalDropout
from equilibria.steady import hold
from equilibria.testing.laws import distance, expect, same, settings_untouched, untouched


@dataclass(frozen=True)
class Called:
    """A layer around a cell, and the inputs of a call."""

    layer: DEQ
    inputs: tuple[Any, ...]

    @property
    def cell(self) -> Callable[..., Any]:
        return self.layer.cell

    @property
    def f(self) -> Callable[..., Any]:
        """The cell as a solve sees it: one function, whose buffers and masks stay as they are."""
        return hold(self.cell)

    @property
    def name(self) -> str:
        return type(self.cell).__name__

    @property
    def start(self) -> Any:
        """The state that a solve starts from."""
        with torch.no_grad():
            return pytree.tree_map(torch.clone, self.layer._start(self.inputs))

    @property
    def state(self) -> Any:
        """A state in general position: where a start of zeros may hide what the cell does."""
        generator = torch.Generator().manual_seed(0)

        def fill(leaf: Tensor) -> Tensor:
            noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            return leaf + 0.5 * noise.to(leaf.device, leaf.dtype)

        return pytree.tree_map(fill, self.start)

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(pytree.tree_leaves(self.start)[0].shape[: self.layer.batch_dims])

    def per_sample(self, change: Callable[[Tensor], Tensor], tree: Any) -> Any:
        """The tree with those tensors changed whose first dimensions are those of the batch."""
        dims, batch = self.layer.batch_dims, self.batch

        def apply(leaf: Any) -> Any:
            mine = isinstance(leaf, Tensor) and leaf.ndim >= dims and tuple(leaf.shape[:dims]) == batch
            return change(leaf) if mine else leaf

        return pytree.tree_map(apply, tree)

    def rows(self, count: int) -> "Called":
        """The first samples alone."""
        return replace(self, inputs=self.per_sample(lambda leaf: leaf[:count], self.inputs))

    def copied(self, double: bool = False) -> "Called":
        """A deep copy, in float64 where asked for."""
        layer, inputs = copy.deepcopy(self.layer), pytree.tree_map(_detached, self.inputs)
        for part in layer.modules():
            if isinstance(part, VariationalDropout):
                part.eval()  # the layer draws new masks for each call, so that no two could be compared
        if double:
            layer, inputs = layer.double(), pytree.tree_map(_doubled, inputs)
        return replace(self, layer=layer, inputs=inputs)


def _detached(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _doubled(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def returns_the_form_of_its_state(called: Called) -> None:
    state = called.start
    with torch.no_grad():
        output = called.copied().cell(state, *called.inputs)
    expected, found = pytree.tree_structure(state), pytree.tree_structure(output)
    expect(found == expected, f"{called.name} returns {found} for a state of {expected}.")
    for one, other in zip(pytree.tree_leaves(output), pytree.tree_leaves(state), strict=True):
        expect(isinstance(one, Tensor), f"{called.name} returns {type(one).__name__} among its tensors.")
        expect(
            one.shape == other.shape and torch.promote_types(one.dtype, other.dtype) == other.dtype,
            f"{called.name} returns {tuple(one.shape)} in {one.dtype} for a state of {tuple(other.shape)} in "
            f"{other.dtype}: give it a method initial_state(*inputs) that returns a start of the right form.",
        )


def gives_one_answer(called: Called) -> None:
    cell, state = copy.deepcopy(called.cell), called.state
    f = hold(cell)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        first, second = (f(state, *called.inputs) for _ in range(2))
    expect(
        same(first, second),
        f"two calls of {called.name} at one state differ{_random_layers(cell)}: take "
        "eq.nn.VariationalDropout, or move dropout and noise out of the cell.",
    )


def _random_layers(cell: Any) -> str:
    if not isinstance(cell, nn.Module):
        return ""
    names = [
        f"{type(module).__name__} '{name}'"
        for name, module in cell.named_modules()
        if "Dropout" in type(module).__name__ and not isinstance(module, VariationalDropout) and module.training
    ]
    return f" ({', '.join(names)})" if names else ""


def leaves_state_inputs_and_settings_alone(called: Called) -> None:
    cell, state = called.copied().cell, called.state
    with torch.no_grad(), settings_untouched(), untouched({"the state": state, "an input": called.inputs}):
        cell(state, *called.inputs)


def keeps_samples_apart(called: Called) -> None:
    if called.layer.batch_dims == 0:
        return
    expect(
        called.batch[0] > 1,
        "the example holds one sample, which cannot show whether samples are kept apart: give two or more.",
    )
    f, state = called.copied().f, called.state

    def moved(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        leaf = leaf.clone()
        leaf[0] = leaf[0] * 1.5 + 1
        return leaf

    with torch.no_grad():
        before = f(state, *called.inputs)
        after = f(called.per_sample(moved, state), *called.per_sample(moved, called.inputs))
    off = max(
        distance(one[1:], other[1:])
        for one, other in zip(pytree.tree_leaves(after), pytree.tree_leaves(before), strict=True)
    )
    expect(
        off <= 1e-4,
        f"moving the first sample moves others by {off:.1e}{_coupling_layers(called.cell)}: normalise within samples "
        "(LayerNorm, GroupNorm); or, where it is meant, solve one joint problem: eq.DEQ(cell, batch_dims=0).",
    )


def _coupling_layers(cell: Any) -> str:
    if not isinstance(cell, nn.Module):
        return ""
    names = [
        f"{type(module).__name__} '{name}' in training"
        for name, module in cell.named_modules()
        if "BatchNorm" in type(module).__name__ and module.training
    ]
    return f" ({', '.join(names)})" if names else ""


def registers_its_tensors(called: Called) -> None:
    if not isinstance(called.cell, nn.Module):
        return
    for path, module in called.cell.named_modules():
        loose = [f"{path}.{name}".lstrip(".") for name, value in vars(module).items() if isinstance(value, Tensor)]
        expect(
            not loose,
            f"{', '.join(loose)}: a plain tensor, which .to(), state_dict() and load_state_dict() do not see: make it "
            "an nn.Parameter or register_buffer it.",
        )


def survives_copies(called: Called) -> None:
    if not isinstance(called.cell, nn.Module):
        return
    with torch.no_grad():
        fresh = called.copied()
        expected = fresh.cell(called.state, *called.inputs)
        original = called.copied()
        blank = called.copied()
        for tensor in (*blank.layer.parameters(), *blank.layer.buffers()):
            tensor.zero_()
        blank.layer.load_state_dict(original.layer.state_dict())
        copies = {"a deep copy": original.cell, "a copy from its state_dict": blank.cell}
        try:
            if not any(map(is_parametrized, original.layer.modules())):  # torch itself refuses to pickle those
                copies["a pickled copy"] = pickle.loads(pickle.dumps(original.cell))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise AssertionError(
                f"{called.name} cannot be pickled ({error}): define its class, and functions that it holds, at the top "
                "of a module."
            ) from error
        for what, cell in copies.items():
            found = cell(called.state, *called.inputs)
            expect(same(found, expected), f"{what} of {called.name} gives another answer: register all it needs.")
