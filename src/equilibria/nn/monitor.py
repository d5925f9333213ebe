"""Reports of every implicit layer inside a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from equilibria.solution import AdjointReport, Solution
from equilibria.transforms import in_front, peel


@dataclass(frozen=True)
class Report:
    """One call of one implicit layer.

    Attributes:
        name: of the layer in the model, as `named_modules` gives it; "" for the model itself.
        status, steps, residual, evaluations: of the forward solve, as in `eq.Solution`; under `torch.vmap` with the
            mapped axes in front.
        adjoint: of the backward solve, filled in when backward runs, also after the `with` block has ended.
    """

    name: str
    status: Tensor
    steps: Tensor
    residual: Tensor
    evaluations: int
    adjoint: AdjointReport


_open: list[tuple[nn.Module, list[Report]]] = []


@contextmanager
def monitor(model: nn.Module) -> Iterator[list[Report]]:
    """Collect a report of each call of each implicit layer inside `model`, in the order of the calls.

    >>> model = nn.Sequential(nn.Linear(3, 4), eq.DEQ(Cell(4)))
    >>> with eq.monitor(model) as reports:
    ...     model(torch.zeros(2, 3)).sum().backward()
    >>> [(report.name, report.adjoint.status is not None) for report in reports]
    [('1', True)]

    Args:
        model: a module that is or holds implicit layers, nested in others or not.

    Returns:
        A context that gives the list, which fills as the model runs. Reports hold numbers alone, no graph.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"monitor takes an nn.Module that holds implicit layers, not {type(model).__name__}.")
    entry: tuple[nn.Module, list[Report]] = (model, [])
    _open.append(entry)
    try:
        yield entry[1]
    finally:
        _open[:] = [other for other in _open if other is not entry]


def record(layer: nn.Module, solution: Solution) -> None:
    """Tell every open monitor whose model holds `layer` about a solve."""
    for model, reports in _open:
        for name, module in model.named_modules():
            if module is layer:
                # Plain data: what transforms wrap cannot be looked at once they are over.
                status, steps, residual = (
                    peel(tensor, in_front) for tensor in (solution.status, solution.steps, solution.residual)
                )
                report = Report(name, status, steps, residual, solution.evaluations, solution.adjoint)
                reports.append(report)
