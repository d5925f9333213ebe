"""An equilibrium layer, cut to an explicit network."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from equilibria.nn.deq import DEQ, start
from equilibria.options import check_integer
from equilibria.solvers import Picard
from equilibria.steady import steady


class Unfolded(nn.Module):
    """The steps of plain iteration as a network; made by `unfold`.

    >>> print(eq.universal.unfold(eq.DEQ(Cell(2), solver=eq.Picard(0.5)), steps=3))
    Unfolded(
      steps=3, relaxation=0.5
      (cell): Cell(
        (linear): Linear(in_features=2, out_features=2, bias=True)
      )
    )
    """

    def __init__(self, deq: DEQ, steps: int) -> None:
        super().__init__()
        self.cell = deq.cell
        self.readout = deq.readout
        self.steps = steps
        self.relaxation = deq.solver.relaxation if isinstance(deq.solver, Picard) else 1.0
        self.training = deq.training

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """What the layer returns, after so many steps; the arguments are those of the layer."""
        z = start(self.cell, inputs)
        if self.training:
            with steady(self.cell) as cell:
                z = self._iterate(cell, z, inputs, keywords)
        else:
            z = self._iterate(self.cell, z, inputs, keywords)
        return z if self.readout is None else self.readout(z)

    def _iterate(self, cell: Any, z: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        for _ in range(self.steps):
            z = pytree.tree_map(self._step, z, cell(z, *inputs, **keywords))
        return z

    def _step(self, z: Tensor, image: Tensor) -> Tensor:
        image = image.to(z.dtype)  # a cell may compute in a lower dtype than that of its state
        return image if self.relaxation == 1 else torch.lerp(z, image, self.relaxation)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, relaxation={self.relaxation}"


def unfold(deq: DEQ, steps: int) -> nn.Module:
    """The explicit weight-tied network that an equilibrium layer is the limit of: equal layers, then the readout.

    >>> layer = eq.DEQ(Cell(8), rtol=1e-6)
    >>> x = torch.randn(4, 8)
    >>> [bool((eq.universal.unfold(layer, steps)(x) - layer(x)).abs().max() < 1e-4) for steps in (1, 100)]
    [False, True]

    Each step is z <- (1 - w) z + w cell(z, x), from the start of the layer, with w the relaxation of its solver where
    that is `eq.Picard`, else 1. Where these steps converge they converge to the output of the layer as `steps` grows;
    on an embedded network of L stages that is after L steps exactly. Gradients are those of back-propagation through
    the steps, at a memory that grows with them.

    It holds no loop that depends on data, so that `torch.export.export` takes it, where it takes the cell. Modules are
    shared with the layer, and the `state_dict` has the layer's names. In training, buffers of the cell and masks of
    `eq.nn.VariationalDropout` stay as they are through the steps, as they do in a solve; export in `eval()`.

    Args:
        deq: the layer; a fused or embedded one too.
        steps: evaluations of the cell, at least 1.

    Raises:
        TypeError, ValueError: `deq` is no DEQ, or `steps` no integer of at least 1.

    Source: Bai, Kolter and Koltun (2019), section 3.1: a weight-tied network of infinite depth.
    """
    if not isinstance(deq, DEQ):
        raise TypeError(f"unfold takes a layer eq.DEQ, not {type(deq).__name__}.")
    check_integer("steps", steps, 1)
    return Unfolded(deq, steps)
