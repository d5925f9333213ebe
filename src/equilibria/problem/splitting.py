"""An equation taken apart into a linear part and an activation, for solvers that take them in turns."""

from typing import Protocol

from torch import Tensor


class Splitting(Protocol):
    """The equation z = activation(W z + b), where I - W is strongly monotone and the activation a proximal operator.

    It says that 0 lies in (I - W) z - b + G(z), where activation = (I + G)^{-1}; splitting methods take steps along
    one of the two parts at a time.

    Attributes:
        size: no less than the norm of I - W.
        preactivation: (batch, n), W z + b where the equation was evaluated last.
    """

    size: float
    preactivation: Tensor

    def resolvent(self, v: Tensor, step: float) -> Tensor:
        """The x with x + step ((I - W) x - b) = v, an implicit step along the linear part."""
        ...

    def proximal(self, v: Tensor, step: Tensor | float) -> Tensor:
        """The z in v - step G(z), an implicit step along the activation; step is a number, or (batch, 1)."""
        ...
