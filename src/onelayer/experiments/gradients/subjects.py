"""Cells whose spectral radius at the equilibrium is what was asked for, with exact gradients there, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import equilibria as eq
from onelayer.errors import UsageError
from onelayer.models.configuration import ModelConfig
from onelayer.models.transformer import TransformerBlock
from onelayer.models.window import window

Cell = Callable[[Tensor], Tensor]

NORMAL, NON_NORMAL, TRANSFORMER = "tanh, random", "tanh, non-normal", "Transformer block"
DETOUR = 3.0  # size of what stands above the diagonal of the non-normal matrix, in units of its radius
RESIDUAL = 1e-11  # of what is called the equilibrium
LARGEST = 100.0  # number that a cell is tried with


@dataclass(frozen=True)
class Family:
    """A cell up to one number, by which the radius at its equilibrium is set.

    Attributes:
        cell: from that number, the cell, a function of the state alone.
        z0: start of a solve, `(1, ...)`.
        parameters, inputs: that it captures and that gradients are taken for.
        shift: zeros like the state, which the cell adds to what it returns: the gradient for it is the adjoint state
            u = (I - J^T)^-1 v itself.
    """

    cell: Callable[[float], Cell]
    z0: Tensor
    parameters: list[Tensor]
    inputs: list[Tensor]
    shift: Tensor


@dataclass(frozen=True)
class Subject:
    """A cell with a given radius at its equilibrium, and what is exactly so there.

    Attributes:
        cell: a function of the state, `(1, ...)`.
        family: it is of.
        v: gradient of the loss at the equilibrium.
        radius, norm, condition: spectral radius and 2-norm of the Jacobian J, and condition number of I - J.
        exact: gradients by name of their group, flat.
    """

    cell: Cell
    family: Family
    v: Tensor
    radius: float
    norm: float
    condition: float
    exact: dict[str, Tensor]


def tanh_family(width: int, normal: bool, seed: int, device: str = "cpu") -> Family:
    """`tanh(s W z + x)`, with entries of W drawn alone, or with a W of real eigenvalues far from normal.

    >>> family = tanh_family(8, normal=True, seed=0)
    >>> family.cell(0.5)(family.z0).shape
    torch.Size([1, 8])

    Args:
        width: entries of the state.
        normal: whether W is of the first kind.
        seed: of W and x.
        device: of the tensors.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    matrix = draw(width, width) / math.sqrt(width)
    x = 0.3 * draw(1, width)
    if not normal:
        basis = torch.linalg.qr(draw(width, width)).Q
        own = torch.linspace(-1, 1, width, dtype=torch.float64)
        matrix = basis @ (torch.diag(own) + DETOUR * matrix.triu(1)) @ basis.T
    weight, x = (tensor.to(device).requires_grad_() for tensor in (matrix, x))
    shift = torch.zeros_like(x, requires_grad=True)

    def cell(scale: float) -> Cell:
        return lambda z: torch.tanh(scale * z @ weight.T + x) + shift

    return Family(cell, torch.zeros_like(x), [weight], [x], shift)


def transformer_family(width: int, context: int, seed: int, device: str = "cpu") -> Family:
    """The block of the language model on random text; s divides what enters, and multiplies both branches.

    >>> family = transformer_family(8, 4, seed=0)
    >>> family.cell(1.0)(family.z0).shape
    torch.Size([1, 4, 8])

    Args:
        width: entries of a token's state, in two heads.
        context: tokens.
        seed: of weights and text.
        device: of the tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = TransformerBlock(ModelConfig(width=width, heads=2, context=context)).double().to(device)
    x = torch.randn(1, context, width, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    shift = torch.zeros_like(x, requires_grad=True)
    frame = block.place(window(context, x.device), x.dtype)

    def cell(scale: float) -> Cell:
        def call(z: Tensor) -> Tensor:
            entered = x / scale
            read, mixed, expand, contract = (prepared := block.prepare(entered)).matrices
            prepared = prepared._replace(matrices=(read, scale * mixed, expand, scale * contract))
            return block(z, entered, block.context(entered, frame, prepared)) + shift

        return call

    return Family(cell, torch.zeros_like(x), list(block.parameters()), [x], shift)


def subject(family: Family, radius: float, seed: int) -> Subject:
    """The cell of a family whose radius at the equilibrium is the one wanted, to a hundredth of its distance from 1.

    >>> round(subject(tanh_family(8, normal=True, seed=0), 0.9, seed=0).radius, 2)
    0.9

    Args:
        family: of cells.
        radius: wanted, between 0 and 1.
        seed: of the loss.

    Raises:
        UsageError: there is no such cell, or none that bisection finds.
    """
    low, high = 0.0, 2.0**-4
    while (found := _radius(family, high)) < radius:
        low, high = high, 1.5 * high
        if high > LARGEST:
            raise UsageError(f"No cell of this family has a spectral radius of {radius:g}: take a smaller one.")
    scale = high
    while abs(found - radius) > 1e-2 * (1 - radius):
        scale = (low + high) / 2
        if not low < scale < high:
            raise UsageError(f"The radius of this family leaps over {radius:g}: take another one, or another seed.")
        found = _radius(family, scale)
        low, high = (scale, high) if found < radius else (low, scale)
    cell = family.cell(scale)
    z = _equilibrium(family, cell)
    if z is None:
        raise UsageError(f"No equilibrium of radius {radius:g} was found to rounding: take another seed.")
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.device)
    jacobian, exact = exact_gradients(cell, z, v, groups(family))
    eye = torch.eye(len(jacobian), dtype=jacobian.dtype, device=jacobian.device)
    norm, condition = float(torch.linalg.matrix_norm(jacobian, 2)), float(torch.linalg.cond(eye - jacobian))
    return Subject(cell, family, v, found, norm, condition, exact)


def groups(family: Family) -> dict[str, list[Tensor]]:
    """The tensors that gradients are taken for, by what they are."""
    return {"parameters": family.parameters, "inputs": family.inputs, "adjoint state": [family.shift]}


def exact_gradients(
    cell: Cell, z: Tensor, v: Tensor, tensors: dict[str, list[Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The Jacobian of a cell at its equilibrium, and gradients of a loss there by a dense solve with its transpose.

    >>> a = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    >>> z = torch.tensor([[0.4501836112948736]], dtype=torch.float64)
    >>> exact_gradients(lambda z: a * torch.cos(z), z, torch.ones_like(z), {"a": [a]})[1]["a"]
    tensor([0.7395], dtype=torch.float64)

    Args:
        cell: a function of the state.
        z: the equilibrium, `(1, ...)`.
        v: gradient of the loss there.
        tensors: groups to differentiate for, by name.

    Returns:
        J `(n, n)`, and a flat gradient for each group.
    """
    leaf = z.detach().requires_grad_()
    image = cell(leaf)
    rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0].flatten() for entry in image.flatten()]
    jacobian = torch.stack(rows)
    eye = torch.eye(len(rows), dtype=z.dtype, device=z.device)
    u = torch.linalg.solve(eye - jacobian.T, v.flatten()).view_as(image)
    return jacobian, flat_gradients(image, tensors, u)


def flat_gradients(value: Tensor, groups: dict[str, list[Tensor]], v: Tensor) -> dict[str, Tensor]:
    """Gradients of `value`, pulled back from `v`, those of each group of tensors one after the other in one.

    >>> a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    >>> flat_gradients(3 * a.sum() + b.sum(), {"both": [a, b]}, torch.ones(()))
    {'both': tensor([3., 3., 1., 1., 1.])}
    """
    tensors = [tensor for own in groups.values() for tensor in own]
    found = torch.autograd.grad(value, tensors, v, allow_unused=True, materialize_grads=True)
    flat = iter(gradient.flatten() for gradient in found)
    return {name: torch.cat([next(flat) for _ in own]) for name, own in groups.items()}


def _equilibrium(family: Family, cell: Cell) -> Tensor | None:
    with torch.no_grad():
        found = eq.fixed_point(cell, family.z0, rtol=1e-14, max_steps=200, on_failure="ignore")
    return found.value if float(found.residual.max()) <= RESIDUAL else None


def _radius(family: Family, scale: float) -> float:
    """Infinite where no equilibrium is found, as beyond the radii that are asked for."""
    cell = family.cell(scale)
    z = _equilibrium(family, cell)
    if z is None:
        return math.inf
    return float(eq.diagnostics.spectral_radius(cell, z, rtol=1e-8, max_steps=z.numel()))
