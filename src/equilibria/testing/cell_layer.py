"""Laws of cells: what their equilibrium is as a layer."""

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from equilibria.adjoints import Implicit
from equilibria.diagnostics import spectral_radius
from equilibria.status import ConvergenceWarning, Status
from equilibria.testing.cell_conduct import Called
from equilibria.testing.laws import distance, expect
from equilibria.tree import detached


def _parameters(called: Called) -> dict[str, nn.Parameter]:
    return {name: p for name, p in called.layer.cell.named_parameters() if p.requires_grad} if isinstance(
        called.layer.cell, nn.Module) else {}  # fmt: skip


def _watched(called: Called) -> tuple[Called, list[Tensor]]:
    """The same call with inputs that ask for gradients, and these inputs."""
    inputs = pytree.tree_map(
        lambda leaf: leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
        called.inputs,
    )
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return replace(called, inputs=inputs), leaves


def _loss(tree: Any) -> Tensor:
    total = torch.zeros(())
    for leaf in pytree.tree_leaves(tree):
        flat = leaf.double().flatten()
        total = total + (flat * torch.linspace(-1, 2, flat.numel(), dtype=flat.dtype, device=flat.device)).sum().cpu()
    return total


def _pull(called: Called, value: Any, leaves: list[Tensor]) -> dict[str, Tensor | None]:
    parameters = _parameters(called)
    loss = _loss(value)
    tensors = [*parameters.values(), *leaves]
    if not loss.requires_grad or not tensors:
        return {}
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return dict(zip([*parameters, *(f"input {i}" for i in range(len(leaves)))], found, strict=True))


def has_an_equilibrium_that_is_found(called: Called) -> None:
    called = called.copied()
    with torch.no_grad():
        solution = called.layer.solve(*called.inputs)
    if solution.converged.all():
        return
    radius = _radius(called, solution.value)
    failed = int((~solution.converged).sum())
    causes = sorted({Status(code) for code in solution.status.flatten().tolist() if code != Status.CONVERGED})
    remedies = "; ".join(cause.remedy for cause in causes)
    raise AssertionError(
        f"{failed} of {solution.converged.numel()} samples ended by {', '.join(cause.name for cause in causes)} after "
        f"{solution.evaluations} evaluations, worst residual {float(solution.residual.max()):.1e}, spectral radius "
        f"{radius:.2f} where they ended (plain iteration needs it below 1): scale down what the cell does "
        f"to its state, normalise its output, or take eq.Broyden(); {remedies}."
    )


def has_the_gradient_of_unrolling(called: Called) -> None:
    # What a function captures cannot be converted: it is checked in its own dtype.
    double = isinstance(called.cell, nn.Module)
    tolerance, bound = (1e-10, 1e-4) if double else (1e-5, 1e-2)
    called, leaves = _watched(called.copied(double=double))
    f = called.f  # with the buffers that the solve starts from
    layer = called.layer
    layer.adjoint, layer.rtol, layer.atol = Implicit(), tolerance, tolerance / 100
    layer.max_steps, layer.eval_max_steps = max(300, layer.max_steps), None
    try:
        dtypes = {leaf.dtype for leaf in pytree.tree_leaves(f(called.start, *called.inputs))}
        expect(
            not double or dtypes == {torch.float64},
            f"a copy in float64 returns {', '.join(map(str, dtypes))}: let the cell take dtypes from its state and "
            "parameters.",
        )
        solution = layer.solve(*called.inputs)
        found = _pull(called, solution.value, leaves)
    except (RuntimeError, TypeError) as error:
        raise AssertionError(
            f"a copy in float64 does not run ({type(error).__name__}: {error}): let the cell take dtypes from its "
            "state and parameters, and register its tensors."
        ) from error
    state = detached(solution.value)
    radius = _radius(called, state)
    if not solution.converged.all() or radius > 0.95:
        return  # no equilibrium was found, as another law tells, or plain iteration does not stay there
    for _ in range(50 + math.ceil(math.log(1e-7) / math.log(max(radius, 1e-3)))):
        state = f(state, *called.inputs)
    expected = _pull(called, state, leaves)
    for name, one in found.items():
        other = expected[name]
        if one is None or other is None:
            continue
        off = distance(one, other)
        expect(
            off <= bound,
            f"the implicit gradient of {name} is {off:.1e} away from that of unrolled steps: the cell must be the same "
            "function at each call, without state of its own, and couple no samples.",
        )


def _radius(called: Called, state: Any) -> float:
    """The largest spectral radius of any sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a rough number will do
        radius = spectral_radius(called.cell, state, *detached(called.inputs), batch_dims=called.layer.batch_dims)
    return float(radius.nan_to_num(torch.inf).max()) if radius.numel() else 0.0


def passes_gradients_to_every_parameter(called: Called) -> None:
    other, other_leaves = _watched(called.copied())
    called, leaves = _watched(called.copied())
    with torch.no_grad():  # a cell that remembers what it computes does so first where nothing has a gradient
        called.layer.solve(*called.inputs)
    found = _pull(called, called.layer.solve(*called.inputs).value, leaves)
    plain = _pull(other, other.cell(other.state, *other.inputs), other_leaves)
    lost = [name for name, gradient in plain.items() if gradient is not None and found.get(name) is None]
    expect(
        not lost,
        f"{', '.join(lost)} get a gradient from a call of the cell, but none through the layer: the cell must compute "
        "all that it needs at each call, and keep nothing from one call to the next.",
    )
    wild = [name for name, gradient in found.items() if gradient is not None and not gradient.isfinite().all()]
    expect(not wild, f"the gradients of {', '.join(wild)} are not finite.")


def runs_under_autocast(called: Called) -> None:
    called, leaves = _watched(called.copied())
    kind = pytree.tree_leaves(called.start)[0].device.type
    with torch.autocast(kind, dtype=torch.bfloat16):
        solution = called.layer.solve(*called.inputs)
    finite = [leaf.isfinite().all() for leaf in pytree.tree_leaves(solution.value)]
    finite += [g.isfinite().all() for g in _pull(called, solution.value, leaves).values() if g is not None]
    expect(all(map(bool, finite)), "under autocast to bfloat16 the equilibrium or its gradient is not finite.")


def runs_compiled(called: Called) -> None:
    called = called.copied()
    with torch.no_grad():
        expected = called.copied().cell(called.state, *called.inputs)
        found = torch.compile(called.cell, backend="aot_eager")(called.state, *called.inputs)
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    off = max(distance(one, other) for one, other in pairs)
    expect(off <= 1e-3, f"under torch.compile the cell gives an answer that is {off:.1e} away.")


def takes_one_sample_and_none(called: Called) -> None:
    if called.layer.batch_dims == 0:
        return
    called = called.copied()
    with torch.no_grad():
        whole = called.layer.solve(*called.inputs)
        for count in (1, 0):
            few = called.copied().rows(count)
            solution = few.layer.solve(*few.inputs)
            expect(
                solution.status.shape[0] == count,
                f"a batch of {count} came back as {tuple(solution.status.shape)}: the cell must not know the size of "
                "its batch.",
            )
            if not (solution.converged.all() and whole.converged.all()):
                continue
            pairs = zip(pytree.tree_leaves(solution.value), pytree.tree_leaves(whole.value), strict=True)
            off = max(distance(one, other[:count]) for one, other in pairs)
            expect(off <= 1e-2, f"the first sample alone has another equilibrium, {off:.1e} away, than in the batch.")
