"""What the rows of `onelayer compare memory` say: tables, claims and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onelayer.experiments.arms import EQUILIBRIUM
from onelayer.experiments.experiment import FAILED, Claim, Drawing, Row, Table
from onelayer.experiments.learning import cost_table, is_cut_off, score_table
from onelayer.experiments.memory.training_step import EVALUATION, GRADIENTS, GRAPH, PRODUCT, quartiles
from onelayer.experiments.plots import curves
from onelayer.experiments.statistics import measured

DEPTH, TRAINED = "depth", "trained"  # the tasks
IMPLICIT, EXPLICIT, TIED, CHECKPOINTED = "Implicit", "explicit", "tied", "tied, checkpointed"
PRODUCTS = 12  # with the transposed Jacobian: what the tolerance of the training needs, or so
FIXED = f"{IMPLICIT}, {PRODUCTS} products"  # at any depth, so that evaluations are all that changes
WORKING = "as trained"  # the setting

FROM = 8  # evaluations from which on memory is to be flat: the seventh fills Anderson's history of six differences
FLAT = 0.02
BELOW = 0.60
WITHIN = 2.0


def claims(rows: Sequence[Row], reference: int) -> list[Claim]:
    """Whether memory is flat and low, and time within twice the explicit network's.

    Args:
        rows: of the experiment.
        reference: layers of the explicit network.
    """
    found = []
    fixed, held = (_held(rows, arm) for arm in (FIXED, IMPLICIT))
    if len(fixed) > 1:
        rise = max(fixed.values()) / min(fixed.values()) - 1
        asked = (
            f"With {FIXED} backward, peak memory is flat in effective depth, within {FLAT:.0%} from {min(fixed)} to "
            f"{max(fixed)} evaluations"
        )
        told = f"{_range(fixed)} MiB, {rise:.1%} apart"
        if held:
            told += f"; {_range(held)} where the backward solve takes as many products as its tolerance needs"
        found.append(Claim(asked, told, rise <= FLAT))
    name = f"the {reference}-layer explicit network of the same width"
    explicit = [point["bytes"] for point in _points(rows, EXPLICIT) if point["depth"] == reference]
    if held and explicit:
        share = 1 - max(held.values()) / explicit[0]
        asked = f"Implicit, to its tolerance: at least {BELOW:.0%} less peak memory than {name}, at any such depth"
        told = f"{share:.1%} less: {mebibytes(max(held.values()))} MiB against {mebibytes(explicit[0])}"
        found.append(Claim(asked, told, share >= BELOW))
    trained = _trained(rows)
    if trained:
        shares = [1 - row["settings"][WORKING]["bytes"] / row["reference"]["bytes"] for row in trained]
        asked = f"At least {BELOW:.0%} less once trained, at the tolerances of the training, for each seed"
        found.append(Claim(asked, f"{min(shares):.1%} to {max(shares):.1%} less", min(shares) >= BELOW))
        low, middle, high = quartiles(_pooled(trained, WORKING))
        asked = f"Once trained, a training step takes at most {WITHIN:g} times that of {name}"
        found.append(Claim(asked, f"{middle:.2f} times, quartiles {low:.2f} to {high:.2f}", middle <= WITHIN))
        shares = [row["forward"]["at_cap"] for row in trained]
        told = f"{statistics.fmean(shares):.1%} in training"
        found.append(Claim("At most 5% of the solves at the cap", told, not is_cut_off(trained)))
    return found


def tables(rows: Sequence[Row], arms: Sequence[str], reference: int) -> list[Table]:
    """By effective depth, what holds the memory, and the trained equilibria.

    Args:
        rows: of the experiment.
        arms: in the order in which they are told.
        reference: layers of the explicit network.
    """
    step = f"a training step of the {reference}-layer explicit network"
    found = [
        _by_depth(
            rows,
            arms,
            "Peak memory of a training step, MiB, by effective depth",
            lambda point: mebibytes(point["bytes"]),
            "Layers, or evaluations of the block that a solve takes: the tolerance is zero, so that it takes all. N of "
            "them stand for N - 1 applications, since the last one measures the residual. What tensors hold at once "
            "beside weights and their gradients, which are there before; an explicit network has those of N blocks.",
        ),
        _by_depth(
            rows,
            arms,
            f"Time, in units of {step}",
            lambda point: "{1:.2f} [{0:.2f}, {2:.2f}]".format(*quartiles(point["ratios"])),
            f"Median and quartiles of the ratios of paired steps, each beside {step}; processor time.",
        ),
        _by_depth(
            rows,
            arms,
            "Calls of the block, and passes of a gradient through one",
            lambda point: f"{point['forward']} / {point['backward']}",
            "In a whole step. A pass is a product with the transposed Jacobian, or goes on to the weights.",
        ),
        _holding(rows, reference),
    ]
    trained = _trained(rows)
    if trained:
        found += [
            _settings(trained, step),
            _parts(trained, reference),
            score_table(trained, [EQUILIBRIUM], EQUILIBRIUM),
        ]
        found.append(cost_table(trained, [EQUILIBRIUM]))
    return [table for table in found if table.rows]


def drawings(rows: Sequence[Row], arms: Sequence[str]) -> dict[str, Drawing]:
    """Memory and time against effective depth.

    Args:
        rows: of the experiment.
        arms: at most as many as there are looks.
    """
    views: Mapping[str, tuple[str, Callable[[Row], float], str, str]] = {
        "memory": (
            "Peak memory against effective depth",
            lambda point: point["bytes"] / 2**20,
            "peak memory, MiB",
            "With an implicit gradient it is flat as soon as the history of the solver is full. A tied network holds "
            "what the explicit one does.",
        ),
        "time": (
            "Time against effective depth",
            lambda point: quartiles(point["ratios"])[1],
            "in units of the explicit network",
            "Medians of paired ratios. The curves of one slope pay for evaluations alone, those of a steeper one for "
            "a backward pass through each.",
        ),
    }
    found = {}
    for name, (title, value, label, caption) in views.items():
        figure = curves(
            rows,
            [DEPTH],
            arms,
            lambda row, value=value: [(_depth(point), value(point)) for point in row["points"]],
            ("layers or evaluations", label),
            ("x", "y"),
        )
        if figure is not None:
            found[name] = Drawing(title, caption, figure)
    return found


def mebibytes(size: float) -> str:
    """Bytes in MiB, to a tenth.

    >>> mebibytes(3 * 2**19)
    '1.5'
    """
    return f"{size / 2**20:.1f}"


def _held(rows: Sequence[Row], arm: str) -> dict[int, int]:
    """Bytes by evaluations, once the history of the solver is full."""
    return {p["evaluations"]: p["bytes"] for p in _points(rows, arm) if p["evaluations"] >= FROM}


def _range(held: Mapping[int, int]) -> str:
    return f"{mebibytes(min(held.values()))} to {mebibytes(max(held.values()))}"


def _depth(point: Row) -> int:
    return point.get("evaluations", point["depth"])


def _points(rows: Sequence[Row], arm: str) -> list[Row]:
    return [point for row in measured(rows, DEPTH, arm) if FAILED not in row for point in row["points"]]


def _trained(rows: Sequence[Row]) -> list[Row]:
    return [row for row in measured(rows, TRAINED) if FAILED not in row]


def _pooled(trained: Sequence[Row], setting: str) -> list[float]:
    return [ratio for row in trained for ratio in row["settings"][setting]["ratios"]]


def _by_depth(rows: Sequence[Row], arms: Sequence[str], title: str, cell: Callable[[Row], str], note: str) -> Table:
    depths = sorted({point["depth"] for arm in arms for point in _points(rows, arm)})
    told, early = [], []
    for arm in arms:
        cells = {point["depth"]: cell(point) for point in _points(rows, arm)}
        if cells:
            told.append([arm, *(cells.get(depth, "") for depth in depths)])
        early += [
            f"{arm}: {_depth(point)} for {point['depth']}"
            for point in _points(rows, arm)
            if _depth(point) < point["depth"]
        ]
    if early:
        note += f" Solves that met the rounding of float32 before, and ended: {'; '.join(early)}."
    return Table(title, ("arm", *map(str, depths)), told, note)


def _holding(rows: Sequence[Row], reference: int) -> Table:
    """Differences between arms at the depth of the explicit network, each of which leaves out one thing."""

    def held(arm: str, depth: int = reference) -> float | None:
        return next((point["bytes"] for point in _points(rows, arm) if point["depth"] == depth), None)

    def apart(more: float | None, less: float | None) -> str | None:
        return None if more is None or less is None else mebibytes(more - less)

    plain = f"{IMPLICIT}, plain iteration "
    lines = [
        ("all of it", apart(held(IMPLICIT), 0), f"{IMPLICIT} at {reference} evaluations"),
        ("graph of one block", apart(held(TIED, 2), held(TIED, 1)), "tied, 2 applications less 1; it is held twice"),
        ("history of Anderson", apart(held(IMPLICIT), held(f"{plain}forward")), "less plain iteration forward"),
        ("basis of GMRES", apart(held(IMPLICIT), held(f"{plain}backward")), "less plain iteration backward"),
        ("the solve backward", apart(held(IMPLICIT), held("OneStep")), "less OneStep, with its second graph"),
    ]
    told = [[name, size, how] for name, size, how in lines if size is not None]
    return Table("What holds the memory of Implicit", ("part", "MiB", "measured as"), told)


_COLUMNS = (
    *("setting", "time, median [quartiles]", "evaluations", "products", "calls", "passes", "at cap", "backward"),
    *("peak memory, MiB", "less than explicit"),
)


def _settings(trained: Sequence[Row], step: str) -> Table:
    told = []
    for name in trained[0]["settings"]:
        found = [row["settings"][name] for row in trained]

        def mean(what: str, found: Sequence[Mapping[str, Any]] = found) -> float:
            return statistics.fmean(one[what] for one in found)

        low, middle, high = quartiles(_pooled(trained, name))
        less = 1 - mean("bytes") / statistics.fmean(row["reference"]["bytes"] for row in trained)
        told.append(
            [
                *(name, f"{middle:.2f} [{low:.2f}, {high:.2f}]", f"{mean('steps'):.1f}", f"{mean('products'):.1f}"),
                *(f"{mean('forward'):.1f}", f"{mean('backward'):.1f}", f"{mean('at_cap'):.1%}"),
                f"{mean('backward_at_cap'):.1%}",
                *(mebibytes(mean("bytes")), f"{less:.1%}"),
            ]
        )
    note = (
        f"In units of {step} on the same windows, which training has not read; all rounds of all seeds. "
        "Evaluations and products are of a sample, calls and passes of the batch, whose last sample decides."
    )
    return Table("A training step of the trained equilibria", _COLUMNS, told, note)


def _parts(trained: Sequence[Row], reference: int) -> Table:
    """What the calls of a step add up to, so that what is left is the work of the solvers and the ends of the model."""
    one = {name: statistics.fmean(row["parts"][name] for row in trained) for name in trained[0]["parts"]}
    counts = [row["settings"][WORKING] for row in trained]
    evaluations = statistics.fmean(count["evaluations"] for count in counts)
    products = statistics.fmean(count["backward"] for count in counts) - 1
    times = {EVALUATION: evaluations, GRAPH: 2.0, PRODUCT: products, GRADIENTS: 1.0}
    told = [[name, f"{one[name]:.4f}", f"{n:.1f}", f"{n * one[name]:.3f}"] for name, n in times.items()]
    whole = quartiles(_pooled(trained, WORKING))[1]
    rest = whole - sum(n * one[name] for name, n in times.items())
    told += [["solvers, embedding, logits", "", "", f"{rest:.3f}"], ["a step", "", "", f"{whole:.3f}"]]
    anew = products * one[GRAPH]
    note = (
        f"In units of a step of the {reference}-layer explicit network. Products share one graph: with a graph made "
        f"anew for each, a step would take {whole + anew:.2f}."
    )
    return Table("Where the time goes, as trained", ("call", "one of them", "number", "all"), told, note)
