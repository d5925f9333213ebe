"""How good an adjoint's gradient is."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from equilibria.adjoints import Adjoint, Implicit
from equilibria.fixed_point import fixed_point
from equilibria.linear import Dense
from equilibria.norms import Norm, rms_norm
from equilibria.options import check_callable, check_integer
from equilibria.problem import rounding_level
from equilibria.solution import Solution
from equilibria.solvers import Anderson, Solver
from equilibria.status import ConvergenceWarning, Status
from equilibria.tree import Layout, detached

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class GradientQuality:
    """Gradients of an adjoint against the exact ones, tensor by tensor.

    Attributes:
        names: of the tensors, in the order of the rows below; then "all" for all of them together.
        cosine: float64 tensor, (len(names),), of the angle between gradient and exact gradient; NaN where one is zero.
        relative_error: float64 tensor, (len(names),), |gradient - exact| / |exact|; 0 where both are zero.
        dense: the exact adjoint equation was solved by a dense factorisation, and not iteratively.
        solution: of the solve that was differentiated, without gradient; its `adjoint` is the report of backward.
    """

    names: tuple[str, ...]
    cosine: Tensor
    relative_error: Tensor
    dense: bool
    solution: Solution


def gradient_quality(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    adjoint: Adjoint,
    parameters: Mapping[str, Tensor] | Iterable[Tensor],
    loss: Loss | None = None,
    solver: Solver = Anderson(),  # noqa: B008 (a frozen dataclass)
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 100,
    norm: Norm = rms_norm,
    batch_dims: int = 1,
    max_size: int = 512,
) -> GradientQuality:
    """Compare the gradient that an adjoint gives, at the tolerance of training, with the exact one.

    >>> a = torch.tensor([[0.5]], requires_grad=True)
    >>> quality = eq.diagnostics.gradient_quality(
    ...     lambda z: a * torch.cos(z), torch.zeros(1, 1), adjoint=eq.OneStep(), parameters={"a": a})
    >>> quality.cosine[0], quality.relative_error[0]  # the right direction, too long by 1 / 0.8213
    (tensor(1..., dtype=torch.float64), tensor(0.217..., dtype=torch.float64))

    The exact gradient goes on from where the solve under test ended to the rounding of the dtype that `f` computes in,
    and takes the implicit function theorem there: by a dense factorisation in the dtype of the state (whose Jacobian is
    itself no more accurate than that) up to `max_size` entries a sample, by `eq.Implicit` to rounding beyond. So the
    error holds what the forward tolerance costs as well as what the adjoint leaves out.

    Args:
        f, z0, args: as for `eq.fixed_point`.
        adjoint: whose gradient to judge.
        parameters: the tensors to differentiate for, by name or in order, for example
            `dict(cell.named_parameters())`: those that `f` captures, or among `args`.
        loss: from the equilibrium to one scalar; None is a sum with fixed random weights, the same for each sample.
        solver, rtol, atol, max_steps, norm, batch_dims: of the solve, as for `eq.fixed_point`. It may fail: gradients
            of truncated solves are worth judging; see `solution.status`.
        max_size: largest size of a sample's state for the dense factorisation.

    Returns:
        `GradientQuality`; NaN where the exact gradient could not be had.

    Warns:
        ConvergenceWarning: the exact solve, forward or backward, did not converge for some sample.
    """
    check_integer("batch_dims", batch_dims, 0)
    check_integer("max_size", max_size, 0)
    layout = Layout.of(z0, batch_dims)
    tensors = _named(parameters)
    measure = _projection(layout) if loss is None else check_callable("loss", loss)

    with torch.enable_grad():
        tested = fixed_point(
            f,
            z0,
            *args,
            solver=solver,
            adjoint=adjoint,
            rtol=rtol,
            atol=atol,
            max_steps=max_steps,
            norm=norm,
            batch_dims=batch_dims,
            on_failure="ignore",
        )
        gradients = _gradients(measure, tested, tensors)
    dense = sum(layout.sizes) <= max_size
    level = max(rounding_level(leaf.dtype) for leaf in pytree.tree_leaves(tested.value))
    with torch.enable_grad():
        solved = fixed_point(
            f,
            detached(tested.value),
            *args,
            solver=solver,
            adjoint=_exact(dense, max_size, level),
            rtol=level,
            atol=level / 100,
            max_steps=max(max_steps, 500),
            norm=norm,
            batch_dims=batch_dims,
            on_failure="ignore",
        )
        exact = _gradients(measure, solved, tensors)
    unsolved = ~_sound(solved.status, solved.residual, level)
    singular = ~unsolved & ~_sound(solved.adjoint.status, solved.adjoint.residual, level)
    if bool((unsolved | singular).any()):
        warnings.warn(
            f"gradient_quality: there is no exact gradient to compare with, since of {unsolved.numel()} samples "
            f"{int(unsolved.sum())} reach no equilibrium to rounding and {int(singular.sum())} one whose adjoint "
            "equation is not solved; look at eq.diagnostics.trace of this solve, or take another solver.",
            ConvergenceWarning,
            stacklevel=2,
        )
        exact = [torch.full_like(gradient, torch.nan) for gradient in exact]
    pairs = list(zip(gradients, exact, strict=True))
    pairs.append((torch.cat(gradients), torch.cat(exact)))
    return GradientQuality(
        (*tensors, "all"),
        torch.stack([_cosine(*pair) for pair in pairs]),
        torch.stack([_relative_error(*pair) for pair in pairs]),
        dense,
        Solution(
            detached(tested.value),
            tested.status,
            tested.steps,
            tested.residual,
            tested.evaluations,
            adjoint=tested.adjoint,
        ),
    )


def _exact(dense: bool, max_size: int, level: float) -> Implicit:
    if not dense:
        return Implicit(rtol=level, max_steps=1000)
    # A factorisation is as accurate as it can be; what is refused is a system so singular that half the digits go.
    return Implicit(solver=Dense(max_size=max_size), rtol=level**0.5)


def _sound(status: Tensor | None, residual: Tensor | None, level: float) -> Tensor:
    """Samples solved as far as rounding lets them; all of them where no gradient came in to solve for."""
    if status is None or residual is None:
        return torch.tensor(True)
    return (status == Status.CONVERGED) | (status == Status.STALLED) | (residual <= 10 * level)


def _named(parameters: Mapping[str, Tensor] | Iterable[Tensor]) -> dict[str, Tensor]:
    if isinstance(parameters, Tensor):
        raise TypeError("parameters must be several tensors, by name or in order: write [tensor] for a single one.")
    if isinstance(parameters, Mapping):
        named = {str(name): tensor for name, tensor in parameters.items()}
    else:
        named = {str(k): tensor for k, tensor in enumerate(parameters)}
    if not named:
        raise ValueError("parameters is empty: give the tensors whose gradient is to be judged.")
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            raise ValueError(f"parameters: {name!r} must be a tensor that requires grad: call requires_grad_() on it.")
    return named


def _projection(layout: Layout) -> Loss:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(sum(layout.sizes), generator=generator, dtype=torch.float64)
    return lambda value: (layout.pack(value) * weights.to(layout.device, layout.dtype)).sum()


def _gradients(loss: Loss, solution: Solution, tensors: dict[str, Tensor]) -> list[Tensor]:
    """One flat float64 gradient for each tensor, zero where the loss does not depend on it."""
    scalar = loss(solution.value)
    if not isinstance(scalar, Tensor) or scalar.numel() != 1:
        got = tuple(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__
        raise ValueError(f"loss must return one scalar for the whole batch, not {got}: sum or average it.")
    if not scalar.requires_grad:
        raise ValueError("The loss depends on no tensor that requires grad: are these the parameters that f uses?")
    gradients = torch.autograd.grad(scalar, list(tensors.values()), allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, tensors.values(), strict=True)]
    return [gradient.detach().double().flatten() for gradient in filled]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return (torch.dot(a, b) / norms).clamp(-1, 1)


def _relative_error(gradient: Tensor, exact: Tensor) -> Tensor:
    difference = torch.linalg.vector_norm(gradient - exact)
    return torch.where(difference == 0, difference, difference / torch.linalg.vector_norm(exact))
