"""The two solves that every derivative consists of, with rules for all transforms.

An equilibrium z = f(z, a) has the tangent dz = J dz + f_a da and the gradient f_a^T u with u = v + J^T u. Both are the
solution of a linear equation with J or J^T, which depends on its right-hand side, on z and on a; and the derivatives of
such a solution are again solutions of such equations. So two functions, each of which uses the second in its rules,
have derivatives of every order in every mode.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equilibria.adjoints import Implicit
from equilibria.functional.setting import Setting
from equilibria.problem import Linearization
from equilibria.status import Status
from equilibria.transforms import beside_tangents

Tensors = tuple[Tensor, ...]


class Equilibrium(torch.autograd.Function):
    """The solution from a start, (batch, n), and the tensors among the arguments; its status, steps and error."""

    @staticmethod
    def forward(setting: Setting, z0: Tensor, *leaves: Tensor) -> Any:
        equation = setting.equation(None, tuple(leaf.detach() for leaf in leaves))
        layout = equation.layout
        outcome = setting.search(equation, z0.detach().reshape(layout.batch, z0.shape[-1]))
        setting.tally.evaluations = outcome.evaluations
        setting.failures.tell("solve", outcome.status, outcome.error)
        per_sample = (outcome.status, outcome.steps, outcome.error)
        return outcome.z.reshape(z0.shape), *(t.reshape(z0.shape[:-1]) for t in per_sample)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.setting, _, *leaves = inputs
        z, status, steps, error = output
        ctx.mark_non_differentiable(status, steps, error)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, status, *leaves)
        ctx.save_for_forward(z, status, *leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        z, status, *rest = ctx.saved_tensors
        setting, leaves, v = ctx.setting, tuple(rest), grads[0]
        needed = [i for i, need in enumerate(ctx.needs_input_grad[2:]) if need]
        if v is None or not needed:
            return (None,) * (2 + len(leaves))
        bad = status == Status.NONFINITE
        u = Linear.apply(setting, True, v, z, bad, *leaves)
        function, primals = _of(needed, leaves, lambda leaves: setting.image(z, bad, leaves))
        setting.report.evaluations += 1
        return None, None, *_spread(torch.func.vjp(function, *primals)[1](u), needed, len(leaves))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        setting = ctx.setting
        moved = [i for i, tangent in enumerate(tangents[2:]) if tangent is not None]
        with beside_tangents(ctx.saved_tensors) as (z, status, *rest):
            leaves = tuple(rest)
            if not moved:
                return torch.zeros_like(z), None, None, None
            bad = status == Status.NONFINITE
            function, primals = _of(moved, leaves, lambda leaves: setting.image(z, bad, leaves))
            b = _push(function, primals, tuple(tangents[2 + i] for i in moved))
            setting.report.evaluations += 1
            return Linear.apply(setting, False, b, z, bad, *leaves), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        setting, z0, *leaves = args
        setting = setting.mapped(info.batch_size, tuple(in_dims[2:]))
        return Equilibrium.apply(setting, _front(z0, in_dims[1], info.batch_size), *leaves), (0, 0, 0, 0)


class Linear(torch.autograd.Function):
    """The solution of x = b + J x, or of x = b + J^T x, for J = df/dz at z; zero for samples that are `bad`."""

    @staticmethod
    def forward(setting: Setting, transposed: bool, b: Tensor, z: Tensor, bad: Tensor, *leaves: Tensor) -> Any:
        if not isinstance(setting.adjoint, Implicit):
            raise NotImplementedError(
                f"{type(setting.adjoint).__name__} has no derivatives under torch.func and in forward mode: use "
                "adjoint=eq.Implicit() there, which has them of every order."
            )
        equation = setting.equation(bad, tuple(leaf.detach() for leaf in leaves))
        batch, n = equation.layout.batch, z.shape[-1]
        jacobian = Linearization(equation.apply, z.reshape(batch, n))
        setting.report.evaluations += 1
        x = setting.adjoint.solve_linear(
            jacobian.transposed_product if transposed else jacobian.product,
            b.detach().reshape(batch, n),
            bad.reshape(batch),
            equation,
            setting.failures,
            setting.report,
        )
        return x.reshape(b.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.setting, ctx.transposed, _, z, bad, *leaves = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, z, bad, *leaves)
        ctx.save_for_forward(output, z, bad, *leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, z, bad, *rest = ctx.saved_tensors
        setting, point, v = ctx.setting, (z, *rest), grads[0]
        if v is None:
            return (None,) * (4 + len(point))
        w = Linear.apply(setting, not ctx.transposed, v, z, bad, *rest)
        needed = [i for i, need in enumerate((ctx.needs_input_grad[3], *ctx.needs_input_grad[5:])) if need]
        if not needed:
            return None, None, w, *(None,) * (1 + len(point))
        # The gradient of w J x, or of x J w, as that of the product from the left, which takes no forward mode.
        left, right = (x, w) if ctx.transposed else (w, x)
        function, primals = _of(needed, point, lambda point: _transposed_product(setting, left, bad, point))
        slope_of_z, *slopes = _spread(torch.func.vjp(function, *primals)[1](right), needed, len(point))
        return None, None, w, slope_of_z, None, *slopes

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        setting, transposed, b = ctx.setting, ctx.transposed, tangents[2]
        tangents = (tangents[3], *tangents[5:])
        moved = [i for i, tangent in enumerate(tangents) if tangent is not None]
        with beside_tangents(ctx.saved_tensors) as (x, z, bad, *rest):
            b = torch.zeros_like(x) if b is None else b
            if moved:
                product = _transposed_product if transposed else _product
                function, primals = _of(moved, (z, *rest), lambda point: product(setting, x, bad, point))
                b = b + _push(function, primals, tuple(tangents[i] for i in moved))
            return Linear.apply(setting, transposed, b, z, bad, *rest)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        setting, transposed, b, z, bad, *leaves = args
        front = [_front(t, dim, info.batch_size) for t, dim in zip((b, z, bad), in_dims[2:5], strict=True)]
        return Linear.apply(setting.mapped(info.batch_size, tuple(in_dims[5:])), transposed, *front, *leaves), 0


def _product(setting: Setting, x: Tensor, bad: Tensor, point: Tensors) -> Tensor:
    """J x at a point (z, *leaves)."""
    return _push(lambda z: setting.image(z, bad, point[1:]), point[:1], (x,))


def _transposed_product(setting: Setting, x: Tensor, bad: Tensor, point: Tensors) -> Tensor:
    """J^T x at a point (z, *leaves)."""
    return torch.func.vjp(lambda z: setting.image(z, bad, point[1:]), point[0])[1](x)[0]


def _push(function: Callable[..., Tensor], primals: Tensors, tangents: Tensors) -> Tensor:
    """The directional derivative, by differentiating the gradient, which is linear in its vector.

    Not all operations have a forward mode; and where the user has opened a level of it, there is no second one.
    """
    image = function(*primals)

    def pull(v: Tensor) -> Any:
        return torch.func.vjp(function, *primals)[1](v)

    return torch.func.vjp(pull, torch.zeros_like(image))[1](tangents)[0]


def _of(
    chosen: list[int], tensors: Tensors, function: Callable[[Tensors], Tensor]
) -> tuple[Callable[..., Tensor], Tensors]:
    """A function of some of its tensors, the others held; and what these are now."""

    def partial(*some: Tensor) -> Tensor:
        every = list(tensors)
        for i, tensor in zip(chosen, some, strict=True):
            every[i] = tensor
        return function(tuple(every))

    return partial, tuple(tensors[i] for i in chosen)


def _spread(values: Any, chosen: list[int], count: int) -> list[Tensor | None]:
    """Values at their places among `count`, None at the others."""
    places: list[Tensor | None] = [None] * count
    for i, value in zip(chosen, values, strict=True):
        places[i] = value
    return places


def _front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
