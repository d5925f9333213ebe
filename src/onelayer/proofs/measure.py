"""Claims A and C measured: one equilibrium layer against the network, or the stack of layers, that it stands for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import equilibria as eq
from onelayer.proofs.networks import Subject

VALUE_BOUND, GRADIENT_BOUND = 1e-10, 1e-9
BATCHES = (1, 32)  # the example that a network is embedded by has two samples


@dataclass(frozen=True)
class Errors:
    """Largest relative errors, each relative to the largest entry of its own tensor."""

    value: float
    gradient: float

    @property
    def within_bounds(self) -> bool:
        """Whether both are rounding; NaN is not."""
        return self.value <= VALUE_BOUND and self.gradient <= GRADIENT_BOUND


@dataclass(frozen=True)
class Embedding:
    """One network of claim A.

    Attributes:
        name: of the network.
        parameters: numbers in it.
        stages: of the embedding, which updates them all at once.
        state, widest: entries of a sample's state, and of the widest stage alone.
        evaluations: of the function, until nothing moved.
        products: with the transposed Jacobian, in the backward solve.
        converged: the solves say so themselves.
        errors: of the output, and of the gradient of every parameter and floating input, over all batch sizes.
        seconds, seconds_embedded: of one forward and backward, of the network and of its embedding.
        scores: what the subject's own score says of the two, where it has one.
    """

    name: str
    parameters: int
    stages: int
    state: int
    widest: int
    evaluations: int
    products: int
    converged: bool
    errors: Errors
    seconds: float
    seconds_embedded: float
    scores: tuple[float, float] | None

    @property
    def holds(self) -> bool:
        """Whether the claim does: equal to rounding, found by plain iteration in no more than stages + 1."""
        return self.errors.within_bounds and self.converged and self.evaluations <= self.stages + 1


@dataclass(frozen=True)
class Fusion:
    """One stack of claim C.

    Attributes:
        name: of the stack.
        widths: entries of a sample's state in each layer.
        evaluations, joint_evaluations: of each layer in the stack, and of all of them at once.
        converged: all solves say so themselves.
        errors: of the fused layer against the stack.
        seconds, joint_seconds: of one forward and backward.
    """

    name: str
    widths: list[int]
    evaluations: list[int]
    joint_evaluations: int
    converged: bool
    errors: Errors
    seconds: float
    joint_seconds: float

    @property
    def holds(self) -> bool:
        """Whether the claim does: equal to rounding. It says nothing of the number of evaluations."""
        return self.errors.within_bounds and self.converged


def embedding(subject: Subject, network: nn.Module, seed: int = 0) -> Embedding:
    """Embeds a network and holds it against itself, in float64 and in evaluation mode.

    >>> from onelayer.proofs.networks import NETWORKS
    >>> torch.manual_seed(0).initial_seed()
    0
    >>> embedding(NETWORKS[0], NETWORKS[0].network()).holds
    True

    Args:
        subject: what the network takes and is called.
        network: is changed to float64.
        seed: of the inputs.
    """
    network = network.double().eval()
    torch.manual_seed(seed)
    deq = eq.universal.embed(network, _double(subject.inputs(2)))
    deq.on_failure = "ignore"  # told by the reports
    found, reports = [], []
    for inputs in [_double(subject.inputs(batch)) for batch in BATCHES]:
        with eq.monitor(deq) as heard:
            found.append(compare(deq, network, inputs))
        reports += heard
    cell: Any = deq.cell
    widths = list(cell.widths.values())
    timed = _double(subject.inputs(BATCHES[-1]))
    return Embedding(
        subject.name,
        sum(parameter.numel() for parameter in network.parameters()),
        len(cell.stages),
        sum(widths),
        max(widths),
        max(report.evaluations for report in reports),
        max(_products(report) for report in reports),
        all(_converged(report) for report in reports),
        Errors(worst([e.value for e in found]), worst([e.gradient for e in found])),
        seconds(lambda: differentiate(network, timed)),
        seconds(lambda: differentiate(deq, timed)),
        None if subject.score is None else (subject.score(network), subject.score(deq)),
    )


def fusion(name: str, layers: Sequence[eq.DEQ], inputs: tuple[Tensor, ...]) -> Fusion:
    """Fuses layers and holds them against their stack.

    >>> from onelayer.proofs.stacks import STACKS
    >>> torch.manual_seed(0).initial_seed()
    0
    >>> fusion("two", *STACKS[0].build()).holds
    True

    Args:
        name: of the stack.
        layers: first to last.
        inputs: of the first.
    """
    stack, joint = nn.Sequential(*layers), eq.universal.fuse(*layers)
    with eq.monitor(stack) as apart, eq.monitor(joint) as together:
        errors = compare(joint, stack, inputs)
    return Fusion(
        name,
        [sum(leaf[0].numel() for leaf in pytree.tree_leaves(state)) for state in joint.solve(*inputs).value],
        [report.evaluations for report in apart],
        together[0].evaluations,
        all(_converged(report) for report in [*apart, *together]),
        errors,
        seconds(lambda: differentiate(stack, inputs)),
        seconds(lambda: differentiate(joint, inputs)),
    )


def compare(found: nn.Module, wanted: nn.Module, inputs: tuple[Tensor, ...]) -> Errors:
    """Errors of one module's output and gradients against another's, which has the same parameters.

    >>> layer = nn.Linear(3, 2)
    >>> compare(layer, layer, (torch.randn(4, 3),))
    Errors(value=0.0, gradient=0.0)
    """
    parameters = list(wanted.parameters())
    (values, gradients), (right_values, right_gradients) = (
        differentiate(module, inputs, parameters) for module in (found, wanted)
    )
    return Errors(relative_error(values, right_values), relative_error(gradients, right_gradients))


def differentiate(
    module: nn.Module, inputs: tuple[Tensor, ...], parameters: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a call, and the gradient of a fixed random combination of them, parameters first, then the inputs.

    >>> [len(part) for part in differentiate(nn.Linear(3, 2), (torch.randn(4, 3),))]
    [1, 3]

    Args:
        module: what is called.
        inputs: of the call; the floating ones are differentiated.
        parameters: all of the module's where none are given.
    """
    inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
    outputs = pytree.tree_leaves(module(*inputs))
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    wanted = [*(parameters or module.parameters()), *(x for x in inputs if x.requires_grad)]
    gradients = torch.autograd.grad(outputs, wanted, directions, allow_unused=True, materialize_grads=True)
    return [y.detach() for y in outputs], list(gradients)


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference of entries, relative to the largest entry of the same tensor, over all tensors.

    >>> relative_error([torch.tensor([1.0, 4.5])], [torch.tensor([1.0, 4.0])])
    0.125
    """
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in wanted]:
        return math.inf
    differences = [float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)]
    sizes = [float(tensor.abs().max()) for tensor in wanted]
    errors = [d / size if size else math.inf for d, size in zip(differences, sizes, strict=True) if d != 0]
    return worst(errors)


def worst(errors: Sequence[float]) -> float:
    """The largest, NaN being infinitely large.

    >>> worst([]), worst([0.1, math.nan])
    (0.0, inf)
    """
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def seconds(run: Callable[[], Any], times: int = 3, enough: float = 2.0) -> float:
    """The shortest of several runs, which what else the machine does disturbs least; no more once they took enough.

    >>> seconds(lambda: None) < 1
    True
    """
    taken: list[float] = []
    while len(taken) < times and sum(taken) < enough:
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def _converged(report: eq.nn.Report) -> bool:
    solves = [report.status, report.adjoint.status]
    return all(status is not None and bool((status == eq.Status.CONVERGED).all()) for status in solves)


def _products(report: eq.nn.Report) -> int:
    return 0 if report.adjoint.steps is None else int(report.adjoint.steps.max())
