"""Runs laws on a part, and tells all that are broken in one error."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Subject = TypeVar("Subject")
Law = Callable[[Subject], None]


def title(law: Callable[..., None]) -> str:
    """The name of a law in words."""
    return getattr(law, "__name__", repr(law)).replace("_", " ")


def hold(what: str, part: Any, subject: Subject, laws: Sequence[Law[Subject]]) -> None:
    """Run all laws on a subject; raise one AssertionError that lists each law broken, with what was seen.

    Anything else that a law raises counts as that law broken, and its traceback comes with the error.
    """
    broken: list[str] = []
    unexpected: list[Exception] = []
    for law in laws:
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.rand(3)  # away from where a part that seeds the generator would put it
                law(subject)
        except AssertionError as error:
            broken.append(f"- {title(law)}: {error}")
        except Exception as error:
            said = str(error).strip().split("\n\n")[0]  # gradcheck goes on with whole matrices; the cause has them
            broken.append(f"- {title(law)}: raised {type(error).__name__}: {said}")
            unexpected.append(error)
    if broken:
        count = f"{len(broken)} of {len(laws)} laws {'is' if len(broken) == 1 else 'are'} broken"
        message = "\n".join([f"{what}({part!r}): {count}.", *broken])
        raise AssertionError(message) from (ExceptionGroup("raised by the part", unexpected) if unexpected else None)


def expect(condition: bool | Tensor, sentence: str) -> None:
    """Raise an AssertionError with a sentence unless the condition holds, also under `python -O`."""
    if not bool(condition):
        raise AssertionError(sentence)


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, signs of zeros and NaN included; trees of tensors."""
    one, other = pytree.tree_leaves(a), pytree.tree_leaves(b)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}

    def bits(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor.view(integer[tensor.element_size()]) if tensor.is_floating_point() else tensor

    return len(one) == len(other) and all(
        torch.equal(bits(x), bits(y)) if isinstance(x, Tensor) and x.dtype == y.dtype else x is y or x == y
        for x, y in zip(one, other, strict=True)
    )


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of entries, relative to the largest entry expected or 1; NaN only where both have it."""
    if found.shape != expected.shape:
        raise AssertionError(f"has the shape {tuple(found.shape)} where {tuple(expected.shape)} was expected")
    if found.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    if not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    scale = max(1.0, float(expected.nan_to_num().abs().max()))
    return float((found - expected).nan_to_num().abs().max()) / scale


@contextmanager
def untouched(what: dict[str, Any]) -> Iterator[None]:
    """Checks that named trees of tensors leave the block as they entered it, to the last bit."""
    before = {name: pytree.tree_map(_copied, tree) for name, tree in what.items()}
    yield
    for name, tree in what.items():
        expect(same(tree, before[name]), f"{name} was written into: work on a copy, for example z + ... for z += ...")


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


@contextmanager
def settings_untouched() -> Iterator[None]:
    """Checks that the block draws no global random numbers and changes no global setting of torch."""
    settings: dict[str, Callable[[], Any]] = {
        "the default dtype": torch.get_default_dtype,
        "grad mode": torch.is_grad_enabled,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
        "the number of threads": torch.get_num_threads,
        "anomaly detection": torch.is_anomaly_enabled,
    }
    state, before = torch.get_rng_state(), {name: read() for name, read in settings.items()}
    try:
        yield
        drew = not torch.equal(torch.get_rng_state(), state)
        changed = [name for name, read in settings.items() if read() != before[name]]
    finally:
        torch.set_rng_state(state)
        torch.set_default_dtype(before["the default dtype"])
        torch.set_grad_enabled(before["grad mode"])
    expect(not drew, "global random numbers were drawn: use a torch.Generator of your own, or none.")
    expect(not changed, f"{', '.join(changed)} changed and stayed so: a part changes no global setting.")


class Births(TorchDispatchMode):
    """Remembers which tensors operations make, to see which of them are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.born: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.born += [weakref.ref(leaf) for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
        return made


def freed(make: Callable[[], Any]) -> None:
    """Check that nothing which `make` computes outlives its result, with the garbage collector off."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with Births() as births:
            made = make()
        del made
        kept = [tensor for ref in births.born if (tensor := ref()) is not None]
        expect(
            not kept,
            f"{len(kept)} tensors outlived everything that was returned: a reference cycle, or something kept by the "
            "part or a global; let memory and closures hold no reference to themselves.",
        )
    finally:
        if enabled:
            gc.enable()


def is_a_frozen_dataclass_of_its_options(part: Any) -> None:
    """Value semantics: `==`, `hash`, `repr`, `pickle` and `deepcopy`, so that parts can be options and keys."""
    name = type(part).__name__
    frozen = is_dataclass(part) and getattr(type(part), "__dataclass_params__").frozen  # noqa: B009 (untyped)
    if not frozen or isinstance(part, type):
        raise AssertionError(
            f"{name} is no frozen dataclass: write @dataclass(frozen=True) above it, and keep all state in what its "
            "methods return."
        )
    shown = repr(part)
    missing = [field.name for field in fields(part) if field.repr is False or f"{field.name}=" not in shown]
    expect(name in shown and not missing, f"its repr, {shown}, does not show {', '.join(missing) or 'its name'}.")
    hash(part)
    copied = copy.deepcopy(part)
    expect(copied == part and hash(copied) == hash(part), f"its deep copy, {copied!r}, does not equal it.")
    try:
        pickled = pickle.loads(pickle.dumps(part))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(
            f"it cannot be pickled ({error}): define its class, and functions among its options, at the top of a "
            "module."
        ) from error
    expect(pickled == part and hash(pickled) == hash(part), f"its pickled copy, {pickled!r}, does not equal it.")


def refuses_meaningless_options(part: Any) -> None:
    """An option of a nonsense value is an error at construction, not later and not never."""
    if not is_dataclass(part) or isinstance(part, type):
        return  # told by the law above
    for option in fields(part):
        if not option.init:
            continue
        nonsense: list[Any] = [object()]
        if isinstance(getattr(part, option.name), (int, float)):
            nonsense.append(float("nan"))
        for value in nonsense:
            try:
                replace(part, **{option.name: value})
            except (TypeError, ValueError):
                continue
            raise AssertionError(
                f"{option.name}={value!r} was accepted: raise a TypeError or ValueError in __post_init__ that says "
                "what is allowed."
            )
