"""What can be wrong with a cell, in words, and what to do about it."""

from dataclasses import dataclass
from enum import Enum


class Cause(Enum):
    """A known way in which a cell has no equilibrium that can be found or differentiated.

    Each value is what is wrong, what to do, and whether something has to be changed.
    """

    FAILS = ("The cell cannot be called with this example", "mend the cell, or the example, until it can", True)
    STRUCTURE = (
        "The cell does not return a state like the one that it is given",
        "return the structure, the shapes and the dtype of z; or start from a z0 like what it returns",
        True,
    )
    INPUT_NOT_FINITE = ("The example has NaN or infinity", "clean the data, or leave these samples out", True)
    NOT_FINITE = (
        "The cell returns NaN or infinity for finite inputs",
        "look for divisions, logarithms, roots and exponentials; compute in a wider dtype",
        True,
    )
    RANDOM = (
        "The cell draws random numbers, so that it is another function at each evaluation",
        "take eq.nn.VariationalDropout, call eval(), or draw outside and pass it in",
        True,
    )
    STATEFUL = (
        "The cell answers differently when it is called again at the same point",
        "move counters, caches and whatever else it remembers out of its forward",
        True,
    )
    IN_PLACE = ("The cell changes its arguments in place", "write z + ... for z += ..., and likewise elsewhere", True)
    COUPLED = (
        "The samples of a batch depend on each other",
        "normalise within each sample (LayerNorm, GroupNorm), or solve the batch as one problem with batch_dims=0",
        True,
    )
    IGNORES_STATE = (
        "The cell does not depend on its state: one evaluation is the answer",
        "call it as an ordinary layer, or let z enter",
        True,
    )
    IGNORES_INPUT = (
        "The cell does not depend on its inputs: every sample has the same equilibrium",
        "let x enter at every evaluation, by adding a linear map of it",
        True,
    )
    DETACHED = (
        "Autograd does not see how the cell depends on its state",
        "take detach(), no_grad(), item() and numpy() out of its forward",
        True,
    )
    WRONG_DERIVATIVE = (
        "The derivative that autograd gives is not that of the cell",
        "take out rounding, argmax and straight-through estimates, or parts that are detached",
        True,
    )
    NO_EQUILIBRIUM = (
        "No solver found an equilibrium, and it is likely that there is none near",
        "bound the state (tanh, a normalisation at the end), bound the weights (eq.nn.spectral_norm), or take an "
        "eq.nn.MonotoneDEQ, which always has one",
        True,
    )
    BELOW_ROUNDING = (
        "The tolerance asked for is finer than the rounding of the dtype that the cell computes in",
        "loosen rtol, or compute the cell in a wider dtype",
        True,
    )
    NOT_ENOUGH_STEPS = (
        "The layer's own solver stops before it has converged, where more evaluations would do",
        "raise max_steps, or loosen rtol",
        True,
    )
    OWN_SOLVER = (
        "The layer's own solver does not find the equilibrium that others find",
        "take the solver that does, see the table",
        True,
    )
    RESIDUAL = (
        "The cell is nearly the identity plus something: its equilibrium is where the something vanishes",
        "leave the residual path out, or normalise after the sum (post-norm)",
        True,
    )
    OSCILLATES = (
        "The cell overshoots: its Jacobian has an eigenvalue at or below -1, and plain iteration swings to and fro",
        "lower the relaxation (0.2 to 0.5), and bound the weights by eq.nn.spectral_norm or eq.nn.jacobian_penalty",
        True,
    )
    EXPANDS = (
        "The cell expands at its equilibrium: plain iteration moves away from it",
        "bound the weights (eq.nn.spectral_norm), train with eq.nn.jacobian_penalty, or take an eq.nn.MonotoneDEQ; "
        "until then eq.Newton() or eq.Broyden() may find it",
        True,
    )
    SINGULAR = (
        "The Jacobian has an eigenvalue next to 1: the equilibrium hardly resists change, and gradients explode",
        "keep the spectral radius away from 1 (eq.nn.spectral_norm, eq.nn.jacobian_penalty), and solve to a finer rtol",
        True,
    )
    SEVERAL = (
        "Different starts lead to different equilibria",
        "fix the start; or, where the answer must not depend on it, bound the weights (eq.nn.spectral_norm) or take an "
        "eq.nn.MonotoneDEQ",
        True,
    )
    NON_NORMAL = (
        "Errors grow before they shrink: the Jacobian's norm is far above its spectral radius",
        "nothing, if solves converge; else a smaller step (relaxation) or eq.nn.jacobian_penalty",
        False,
    )
    SLOW = (
        "The spectral radius is close to 1: plain iteration takes hundreds of evaluations",
        "take eq.Anderson() or eq.Broyden(), or train with eq.nn.jacobian_penalty",
        False,
    )
    LOOSE_GRADIENT = (
        "At this tolerance the gradient is off by more than a tenth",
        "solve to a finer rtol, or give eq.Implicit(rtol=...) a finer one",
        True,
    )

    @property
    def meaning(self) -> str:
        """What is wrong, a clause."""
        return self.value[0]

    @property
    def remedy(self) -> str:
        """What to do, a clause."""
        return self.value[1]

    @property
    def needs_change(self) -> bool:
        """False for what is only worth knowing."""
        return self.value[2]


@dataclass(frozen=True)
class Finding:
    """Something that `eq.doctor` found.

    Attributes:
        cause: what it is.
        detail: what was measured or where it is, a clause; may be empty.
        samples: of the example that it concerns; empty for all.
    """

    cause: Cause
    detail: str = ""
    samples: tuple[int, ...] = ()

    def __str__(self) -> str:
        some = ""
        if self.samples:
            listed = ", ".join(map(str, self.samples[:5])) + (", ..." if len(self.samples) > 5 else "")
            some = f" (sample{'s' if len(self.samples) > 1 else ''} {listed})"
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.cause.meaning}{some}{detail}. To do: {self.cause.remedy}."
