"""Whether a network still computes what it was embedded as, now that parts of it may have changed mode."""

from typing import Any

from torch import nn

from equilibria.universal.program import Program, described
from equilibria.universal.propagation import refuse_batch_norms
from equilibria.universal.tracing import differing, trace


class Mode:
    """Which parts of a network trained when it was embedded, and whether that matters."""

    def __init__(self, network: nn.Module, inputs: tuple[Any, ...], program: Program) -> None:
        refuse_batch_norms(network)
        self.traced = self.checked = _mode(network)
        self.differs = _differs(network, inputs, program)

    def check(self, network: nn.Module) -> None:
        """Raise where it computes something else now, or what has no equilibrium."""
        mode = _mode(network)
        if mode == self.checked:
            return
        if mode != self.traced and self.differs is not None:
            raise ValueError(
                f"{described(network, self.differs)} computes other things in train() than in eval(), and was embedded "
                "in the other mode: embed the network anew."
            )
        refuse_batch_norms(network)
        self.checked = mode


def _mode(network: nn.Module) -> tuple[bool, ...]:
    return tuple(part.training for part in network.modules())


def _differs(network: nn.Module, inputs: tuple[Any, ...], program: Program) -> str | None:
    """The module whose own operations, not those of its layers, are others in the other mode; None for none."""
    parts = list(network.modules())
    modes = [part.training for part in parts]
    try:
        for part in parts:
            part.training = not part.training
        return differing(program, trace(network, inputs))
    except ValueError:
        return ""
    finally:
        for part, training in zip(parts, modes, strict=True):
            part.training = training
