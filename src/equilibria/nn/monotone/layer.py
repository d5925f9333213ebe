"""The monotone operator equilibrium network as a layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from equilibria.adjoints import Adjoint, Implicit
from equilibria.nn.monitor import record
from equilibria.nn.monotone.activation import Activation, check_activation
from equilibria.nn.monotone.bounds import Sensitivity
from equilibria.nn.monotone.equation import SPLITTINGS, MonotoneEquation, Parts, SplitImplicit
from equilibria.nn.monotone.operators import MonotoneConv2d, MonotoneLinear
from equilibria.norms import Norm, rms_norm
from equilibria.precision import precise
from equilibria.solution import Solution
from equilibria.solve import WarmStart, check_options, solve, uncompiled
from equilibria.solvers import PeacemanRachford, Solver
from equilibria.status import Failures, Status
from equilibria.transforms import transformed
from equilibria.tree import Layout


class MonotoneDEQ(nn.Module):
    """A layer with exactly one equilibrium whatever its weights, z = activation(W z + U x + b).

    >>> layer = eq.nn.MonotoneDEQ(eq.nn.MonotoneLinear(64, 100), activation=nn.Tanh())
    >>> layer(torch.randn(4, 64)).shape
    torch.Size([4, 100])

    I - W is strongly monotone by construction, and the activation a proximal operator; so splitting methods converge
    to the equilibrium from anywhere, forward and backward, and how far it moves with the input has a bound.

    All is computed and returned in the dtype of the weights, in float32 at least, also under autocast. The weights'
    part, W by frequencies and its inverse, is computed once a call.

    Args:
        operator: `MonotoneLinear` or `MonotoneConv2d`.
        activation: entrywise, with slopes in [0, 1] and no parameters: `nn.ReLU()`, `nn.Tanh()`, `nn.Softshrink()`, ...
        solver: `eq.PeacemanRachford()` or `eq.ForwardBackward()`, which are sure to converge, or any other.
        adjoint: None is `eq.Implicit` whose solver is the forward one where that is a splitting method, else its own.
            With second derivatives it is `eq.Implicit(order=2)`.
        rtol, atol, norm: as for `eq.fixed_point`.
        max_steps: evaluations allowed, forward and by the default adjoint.
        on_failure: "raise", "warn" (once per cause for each layer) or "ignore".

    Raises:
        SolveError: a sample failed and `on_failure` is "raise".
        TypeError, ValueError: an option, or an input, makes no sense.

    Source: Winston and Kolter (2020), Monotone operator equilibrium networks.
    """

    def __init__(
        self,
        operator: MonotoneLinear | MonotoneConv2d,
        activation: Callable[[Tensor], Tensor] = nn.ReLU(),  # noqa: B008 (it has no state)
        solver: Solver = PeacemanRachford(),  # noqa: B008 (a frozen dataclass)
        adjoint: Adjoint | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        max_steps: int = 1000,
        norm: Norm = rms_norm,
        on_failure: str = "warn",
    ) -> None:
        super().__init__()
        if not isinstance(operator, (MonotoneLinear, MonotoneConv2d)):
            raise TypeError(
                f"operator must be an eq.nn.MonotoneLinear or an eq.nn.MonotoneConv2d, not {operator!r:.60}."
            )
        check_activation(activation)
        self.operator = operator
        self.activation = activation
        self.solver = solver
        self.adjoint = adjoint
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps
        self.norm = norm
        self.on_failure = on_failure
        self._told: set[tuple[str, Status]] = set()
        self._attaching()

    def forward(self, x: Tensor, z0: Any = None, state: WarmStart | None = None, max_steps: int | None = None) -> Any:
        """The equilibrium for `x`.

        Args:
            x: (batch, in_features), or (batch, in_channels, height, width).
            z0: start, of the structure of the equilibrium; None is zeros.
            state: `Solution.state` of an earlier call on the same shapes, to start from.
            max_steps: evaluations allowed to this call, in place of the layer's.
        """
        return self.solve(x, z0, state, max_steps).value

    @uncompiled
    def solve(
        self, x: Tensor, z0: Any = None, state: WarmStart | None = None, max_steps: int | None = None
    ) -> Solution:
        """The whole `eq.Solution` for `x`; the arguments are those of a call."""
        if transformed():
            raise NotImplementedError(
                "MonotoneDEQ cannot run inside torch.func transforms: call it on a batch, whose first dimension are "
                "samples, and differentiate by torch.autograd."
            )
        adjoint = self._attaching()
        x = self._checked(x)
        with precise(x):
            parts = self._parts(x)
            layout = Layout.of(self.operator.state(torch.zeros_like(parts.bias)), 1)
            start = layout.unpack(torch.zeros_like(parts.bias)) if z0 is None else z0
            steps = self.max_steps if max_steps is None else max_steps
            check_options(self.solver, adjoint, self.rtol, self.atol, steps, self.norm, 1, self.on_failure)
            problem = MonotoneEquation(parts, layout, self.norm, self.rtol, self.atol)
            failures = Failures(self.on_failure, told=self._told)
            solution = solve(problem, start, self.solver, adjoint, steps, failures, state)
        record(self, solution)
        return solution

    def lipschitz(self, readout: Callable[[Any], Tensor] | None = None) -> Tensor:
        """Bounds on how far the equilibrium, or a readout of it, moves with the input, in the Euclidean norm.

        >>> layer = eq.nn.MonotoneDEQ(eq.nn.MonotoneLinear(3, 8))
        >>> bound = layer.lipschitz()
        >>> x = torch.randn(2, 3)
        >>> bool((layer(x)[0] - layer(x)[1]).norm() <= bound * (x[0] - x[1]).norm() + 1e-3)
        True

        With S the symmetric part of I - W, a change d of W z + U x + b moves z by some y with y'S y <= y'd. So y lies
        in a ball around S^{-1} d / 2, in the norm of S.

        Args:
            readout: affine, from the equilibrium of a batch to (batch, classes), such as an `nn.Linear`.

        Returns:
            A float64 scalar, without gradient: |z(x) - z(x')| <= bound |x - x'| for all x and x'. With a readout
            (classes, classes), the bound on the difference of each two of its entries.

        Source: Pabbaraju, Winston and Kolter (2021), Estimating Lipschitz constants of monotone deep equilibrium
        models; their bound, |U| / m, is never smaller than this one.
        """
        sensitivity = Sensitivity(self.operator)
        return sensitivity.of_state() if readout is None else sensitivity.of_differences(readout)

    def certified_radius(self, x: Tensor, readout: Callable[[Any], Tensor]) -> Tensor:
        """How far each input can move, in the Euclidean norm, before another entry of the readout may be the largest.

        >>> layer, readout = eq.nn.MonotoneDEQ(eq.nn.MonotoneLinear(3, 8)), nn.Linear(8, 4)
        >>> layer.certified_radius(torch.randn(2, 3), readout).shape
        torch.Size([2])

        The margin of the largest entry over each other one, less what the residual of the solve leaves unsure of it,
        over the bound of `lipschitz(readout)`.

        Args:
            x: (batch, ...).
            readout: as for `lipschitz`.

        Returns:
            (batch,), float64, without gradient; 0 where nothing is certain, as for a sample whose solve met NaN.
        """
        x = self._checked(x).detach()
        with torch.no_grad(), precise(x):
            solution = self.solve(x)
            wide = self._parts(x.double())
            z = Layout.of(solution.value, 1).pack(solution.value).double()
            residual = wide.image(z) - z
            radius = Sensitivity(self.operator).radius(readout, z, residual, wide.coupling)
        return torch.where(solution.status == Status.NONFINITE, 0, radius)

    def _parts(self, x: Tensor) -> Parts:
        # What is not finite is put back behind the injection, whose weights would else get 0 * nan.
        finite = x.isfinite().flatten(1).all(dim=1)
        bias = self.operator.inject(torch.where(finite.reshape(-1, *(1,) * (x.ndim - 1)), x, 0))
        bias = torch.where(finite[:, None], bias, torch.nan)
        return Parts(self.operator.coupling(x.dtype), bias, Activation(self.activation))

    def _checked(self, x: Tensor) -> Tensor:
        shape = self.operator.input_shape
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError("The input of a MonotoneDEQ must be a floating tensor.")
        if x.ndim != len(shape) + 1 or tuple(x.shape[1:]) != shape:
            raise ValueError(
                f"The input must have the shape (batch, {', '.join(map(str, shape))}), not {tuple(x.shape)}."
            )
        dtype = torch.promote_types(self.operator.U.dtype, torch.float32)
        if torch.promote_types(x.dtype, dtype) != dtype:
            raise TypeError(
                f"The input is in {x.dtype} and the weights in {self.operator.U.dtype}: convert one of them."
            )
        return x.to(dtype)

    def _attaching(self) -> Adjoint:
        splits = isinstance(self.solver, SPLITTINGS)
        adjoint = self.adjoint
        if adjoint is None:
            adjoint = Implicit(self.solver if splits else None, max_steps=self.max_steps)
        check_options(self.solver, adjoint, self.rtol, self.atol, self.max_steps, self.norm, 1, self.on_failure)
        if isinstance(adjoint, Implicit) and isinstance(adjoint.solver, SPLITTINGS):
            if adjoint.order > 1:
                raise ValueError(
                    "Splitting methods solve for first derivatives alone: take eq.Implicit(order=2), without a solver."
                )
            return SplitImplicit(adjoint)
        return adjoint

    def extra_repr(self) -> str:
        norm = getattr(self.norm, "__name__", repr(self.norm))
        activation = "" if isinstance(self.activation, nn.Module) else f"activation={self.activation!r}, "
        return (
            f"{activation}solver={self.solver}, adjoint={self.adjoint}, rtol={self.rtol}, atol={self.atol}, "
            f"max_steps={self.max_steps}, norm={norm}, on_failure={self.on_failure!r}"
        )
