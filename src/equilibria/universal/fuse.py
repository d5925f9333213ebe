"""Equilibrium layers one after the other, as one."""

from typing import Any, TypeVar, cast

from torch import nn

from equilibria.adjoints import Adjoint, Implicit, Neumann, OneStep, Phantom
from equilibria.nn.deq import DEQ, start
from equilibria.solvers import Anderson
from equilibria.status import ON_FAILURE

Part = TypeVar("Part")


class FusedCell(nn.Module):
    """Cells one after the other, each but the first fed what the layer before makes of its present state.

    >>> fused = eq.universal.fuse(eq.DEQ(Cell(4)), eq.DEQ(Cell(4)))
    >>> x = torch.randn(3, 4)
    >>> w1, w2 = fused.cell.initial_state(x)
    >>> f1, f2 = (deq.cell for deq in fused.cell.deqs)
    >>> images = fused.cell((w1, w2), x)
    >>> torch.equal(images[0], f1(w1, x)), torch.equal(images[1], f2(w2, w1))
    (True, True)

    The state is the tuple of the layers' states; the inputs of a call are those of the first.

    Source: Bai, Kolter and Koltun (2019), theorem 2.
    """

    def __init__(self, deqs: tuple[DEQ, ...]) -> None:
        super().__init__()
        self.deqs = nn.ModuleList(deqs)

    def forward(self, z: tuple[Any, ...], *inputs: Any, **keywords: Any) -> tuple[Any, ...]:
        """The images of all the states at once."""
        images = []
        for deq, state in zip(self._layers(), z, strict=True):
            images.append(deq.cell(state, *inputs, **keywords))
            inputs, keywords = (_read(deq, state),), {}
        return tuple(images)

    def initial_state(self, *inputs: Any) -> tuple[Any, ...]:
        """The start of each layer, on what the one before makes of its own start."""
        states = []
        for deq in self._layers():
            states.append(start(deq.cell, inputs))
            inputs = (_read(deq, states[-1]),)
        return tuple(states)

    def _layers(self) -> list[DEQ]:
        return cast(list[DEQ], list(self.deqs))


class _LastReadout:
    """What a call returns: what the last layer makes of its state. No module, so that nothing is registered twice."""

    def __init__(self, last: DEQ) -> None:
        self.last = last

    def __call__(self, z: tuple[Any, ...]) -> Any:
        return _read(self.last, z[-1])

    def __repr__(self) -> str:
        return "that of the last layer"


def fuse(*deqs: DEQ) -> DEQ:
    """Equilibrium layers, applied one after the other, as a single one: Gamma([w1; w2]; x) = [f1(w1, x); f2(w2, w1)].

    >>> first, second = eq.DEQ(Cell(8), rtol=1e-6), eq.DEQ(Cell(8), rtol=1e-6)
    >>> fused = eq.universal.fuse(first, second)
    >>> x = torch.randn(4, 8)
    >>> torch.allclose(fused(x), second(first(x)), atol=1e-4)
    True

    All states are solved for together, in about as many evaluations as the slowest layer needs alone; each evaluation
    evaluates every cell. Between layers their readouts are applied, at every evaluation. Modules are shared: the
    parameters are those of the layers, under `cell.deqs`.

    Options are those of the layers where they agree, else the solver is `eq.Anderson()`, the adjoint `eq.Implicit()`.
    Tolerances are the strictest of those given, the policy for failures is the strictest, limits of steps and of
    products add up. Two things do not carry over. Tolerances of exactly zero, with which plain iteration goes on until
    nothing moves, are kept only where all layers have them. And `OneStep`, `Phantom` and `Neumann` reach a fixed number
    of steps back, which would leave earlier layers with less gradient than the stack gives them, or none: `Implicit`
    stands in their place. Each can be set on the layer that is returned.

    The options of the layers are read once; their readouts and `train()` or `eval()` are followed. A random readout
    cannot be part of an equilibrium: `eq.nn.VariationalDropout` works, stock dropout in training is refused.

    Args:
        deqs: the layers, first to last, of any widths and state structures, with readouts or without; fused and
            embedded ones too.

    Returns:
        A DEQ that takes the inputs of the first and returns what the last returns; `deq.cell.deqs` are the layers.

    Raises:
        TypeError: what is not a DEQ, or nothing at all.
        ValueError: the layers differ in `norm` or `batch_dims`, so that they would mean different things by converged.

    Source: Bai, Kolter and Koltun (2019), theorem 2.
    """
    if not deqs:
        raise TypeError("fuse takes at least one eq.DEQ: fuse(first, second).")
    for deq in deqs:
        if not isinstance(deq, DEQ):
            hint = " (a plain network becomes one by eq.universal.embed)" if isinstance(deq, nn.Module) else ""
            raise TypeError(f"fuse takes layers eq.DEQ, not {type(deq).__name__}{hint}.")
    for name in ("norm", "batch_dims"):
        values = [getattr(deq, name) for deq in deqs]
        if _shared(values) is None:
            told = ", ".join(str(getattr(value, "__name__", value)) for value in values)
            raise ValueError(f"Fused layers must agree in {name}, and these have {told}: set it to the same on each.")
    solver = _shared([deq.solver for deq in deqs]) or Anderson()
    rtol, atol = _tolerances([(deq.rtol, deq.atol) for deq in deqs])
    in_eval = [deq.max_steps if deq.eval_max_steps is None else deq.eval_max_steps for deq in deqs]
    cell = FusedCell(deqs)
    fused = DEQ(
        cell,
        solver=solver,
        adjoint=_adjoint([deq.adjoint for deq in deqs]),
        rtol=rtol,
        atol=atol,
        max_steps=sum(deq.max_steps for deq in deqs),
        eval_max_steps=None if all(deq.eval_max_steps is None for deq in deqs) else sum(in_eval),
        norm=deqs[0].norm,
        on_failure=min((deq.on_failure for deq in deqs), key=ON_FAILURE.index),
        batch_dims=deqs[0].batch_dims,
        readout=_LastReadout(deqs[-1]),
    )
    # A new module is in training, whatever those inside of it are.
    fused.training = cell.training = cell.deqs.training = any(deq.training for deq in deqs)
    return fused


def _read(deq: DEQ, state: Any) -> Any:
    return state if deq.readout is None else deq.readout(state)


def _shared(values: list[Part]) -> Part | None:
    """The one value that all are, or None."""
    return values[0] if all(value == values[0] for value in values) else None


def _tolerances(pairs: list[tuple[float | None, float | None]]) -> tuple[float | None, float | None]:
    """The strictest relative and absolute tolerance, pairs that are exactly zero left out unless all are."""
    loose = [(rtol, atol) for rtol, atol in pairs if rtol != 0 or atol] or pairs
    rtols, atols = ([value for value in values if value is not None] for values in zip(*loose, strict=True))
    return min(rtols, default=None), min(atols, default=None)


def _adjoint(adjoints: list[Adjoint]) -> Adjoint:
    if len(adjoints) == 1:
        return adjoints[0]
    known = [adjoint for adjoint in adjoints if isinstance(adjoint, Implicit)]
    if len(known) == len(adjoints):
        solver = _shared([adjoint.solver for adjoint in known])
        rtol, _ = _tolerances([(adjoint.rtol, None) for adjoint in known])
        return Implicit(
            solver,
            rtol,
            max_steps=sum(adjoint.max_steps for adjoint in known),
            order=max(adjoint.order for adjoint in known),
        )
    shared = _shared(adjoints)
    return Implicit() if shared is None or isinstance(shared, OneStep | Phantom | Neumann) else shared
