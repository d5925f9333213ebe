"""The page of `onelayer prove`: what is claimed, what was measured, pictures of it, and what it does not say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import torch

from onelayer.proofs.limits import Reach
from onelayer.proofs.measure import GRADIENT_BOUND, VALUE_BOUND, Embedding, Fusion
from onelayer.proofs.record import Record
from onelayer.report import html
from onelayer.report.html import Tile
from onelayer.report.numbers import duration

try:
    from onelayer.proofs.figures import draw
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "matplotlib":
        raise

    def draw(record: Record) -> dict[str, str] | None:
        return None


SOURCE = "Bai, Kolter and Koltun (2019), Deep equilibrium models, appendix C"

CLAIM_A = (
    "Any deep network is one equilibrium layer. Put the activations of all its L stages into one state, and update "
    "them all at once, each from the activations before it. Whatever the state was, after one update the first stage "
    "is right, after two the second, after L all of them, and one more changes nothing: the equilibrium is the "
    f"network's own activations. No contraction is needed. ({SOURCE}, theorem 3.)"
)
CLAIM_C = (
    "Equilibrium layers one after the other are one equilibrium layer: the states are put side by side and updated at "
    "once, each layer reading the present state of the one before, Γ([w1; w2]; x) = [f1(w1, x); f2(w2, w1)]. The "
    f"equilibrium of the one is that of the others. ({SOURCE}, theorem 2.) Layers that converge step by step do so "
    "together, in about as many evaluations as the slowest one needs and not as all in a row. An embedded network in "
    "front passes on nothing right before its last update, so there the counts about add up."
)
LIMITS = (
    "Widths add up. The state of the one layer holds the activations of all layers side by side, so at equal width the "
    "theorems promise nothing.",
    "Representable is not trainable. The weights here were drawn at random, or found by training the network itself; "
    "nothing says that training an equilibrium layer would find such weights, and gradients that stop after a few "
    "steps reach no further back than these.",
    "It costs more. An embedded network of L stages computes every stage in each of about L updates, forward and "
    "backward: on the order of L squared where the network itself needs L, as the column of ratios shows.",
    "An evaluation of fused layers is one of every layer in it. Fewer in a row do not mean less work in all, but that "
    "all layers can work at the same time.",
)

# Title and caption of each figure in its section; a caption must be true whatever the seed.
_CAPTIONS_A = {
    "blocks": (
        "The one weight matrix",
        "Every entry of W_z, the matrix of the theorem's literal form z = s(W_z z + W_x x + b), for a perceptron of 6 "
        "layers: blue positive, orange negative, the darker the larger. All weights stand in blocks right below the "
        "diagonal, each layer reads the one before it, and everything else is exactly zero. So the matrix is "
        "nilpotent, and plain iteration ends. The first layer reads x, through W_x, and has no block.",
    ),
    "filling": (
        "Activations fill in layer by layer",
        "A perceptron of 16 layers, its state begun at random. A row is an update of all activations at once, a column "
        "a layer; the darker, the larger the error relative to the activation, and blank is equal to the last bit. The "
        "staircase is the theorem: after t updates t layers are right, for good.",
    ),
    "film": (
        "What the classifier sees, filling in",
        "The first channel of every stage of the digits classifier, for one digit that training did not see. From left "
        "to right the updates, from a state of noise; from top to bottom the stages, finer before the pooling and "
        "coarser after it. Framed pictures are those of the network itself, to the last bit: one row more with each "
        "update.",
    ),
}
_CAPTIONS_C = {
    "convergence": (
        "Joint against stacked",
        "The worst sample's relative residual against all evaluations so far. Dashed: each layer starts when the one "
        "before it has converged, so their evaluations add up. Full: all layers start together, each chasing the one "
        "before it, and the joint solve ends soon after the slowest layer alone would. Each of its evaluations "
        "evaluates every layer.",
    ),
}
_CAPTIONS_LIMITS = {
    "reach": (
        "How far truncated gradients reach",
        "An embedded perceptron of 12 layers. Row k: the gradient of eq.Phantom(k), back-propagation through k updates "
        "from the equilibrium; column: a layer's weight; dark is the true gradient in full, blank is exactly nothing. "
        "The first row is the one-step gradient of Jacobian-free back-propagation: it trains the last layer alone.",
    ),
}


def page(record: Record) -> str:
    """The whole page.

    >>> "One layer is all you need" in page(Record())
    True
    """
    drawings = draw(record)
    missing = "The pictures are missing because matplotlib is not installed: install it and prove again."
    shown = drawings or {}
    parts = [
        f"<header>\n<p>{escape(f'onelayer · prove · seed {record.seed}')}</p>\n<h1>One layer is all you need</h1>\n"
        "<p>Two theorems on equilibrium layers, executed on this machine in float64.</p>\n</header>",
        f'<p class="verdict{"" if record.holds else " bad"}">{escape(verdict(record))}</p>',
        html.tiles(_tiles(record)),
        f'<p class="note">{missing}</p>' if drawings is None else "",
        "<h2>Any network is one equilibrium layer</h2>",
        f"<p>{escape(CLAIM_A)}</p>",
        _table(EMBEDDING_COLUMNS, [embedding_cells(row) for row in record.embeddings], record.embeddings),
        _under_embeddings(record),
        html.figures(_CAPTIONS_A, shown, wide=frozenset({"film"})),
        "<h2>Many equilibrium layers are one</h2>",
        f"<p>{escape(CLAIM_C)}</p>",
        _table(FUSION_COLUMNS, [fusion_cells(row) for row in record.fusions], record.fusions),
        html.figures(_CAPTIONS_C, shown, wide=frozenset({"convergence"})),
        "<h2>What the theorems do not say</h2>",
        "" if record.reach is None else f"<p>{escape(reach_sentence(record.reach))}</p>",
        "<ul>\n" + "\n".join(f"<li>{escape(limit)}</li>" for limit in LIMITS) + "\n</ul>",
        html.figures(_CAPTIONS_LIMITS, shown),
        f"<h2>Again</h2>\n<pre>{escape(record.command)}</pre>\n"
        f'<p class="after">{escape(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads.")} '
        "All numbers are in proof.json beside this page.</p>",
    ]
    return html.document("One layer is all you need", parts)


def verdict(record: Record) -> str:
    """Whether everything held, in a sentence.

    >>> verdict(Record())
    'Both claims held on everything that was measured.'
    """
    if record.holds:
        return "Both claims held on everything that was measured."
    return f"Not everything held: {'; '.join(record.broken)}."


def reach_sentence(reach: Reach) -> str:
    """How far truncated gradients reach, in a sentence."""
    layers = len(reach.shares)
    last = "Phantom(k) exactly the last k, and no other" if reach.holds else "Phantom(k) NOT exactly the last k"
    return f"On an embedded network of {layers} layers the one-step gradient reaches {reach.one_step} of them; {last}."


EMBEDDING_COLUMNS = (
    *("network", "stages", "evaluations", "products back", "error of value", "error of gradient", "state / widest"),
    *("its time", "embedded", "ratio"),
)
FUSION_COLUMNS = (
    *("stack", "state", "evaluations in a row", "sum", "largest", "joint", "error of value", "error of gradient"),
    *("its time", "fused"),
)


def embedding_cells(row: Embedding) -> list[str]:
    """A row of the table of claim A, under `EMBEDDING_COLUMNS`."""
    return [
        *(row.name, f"{row.stages}", f"{row.evaluations}", f"{row.products}"),
        *(short(row.errors.value), short(row.errors.gradient), f"{row.state:,} / {row.widest:,}"),
        *(milliseconds(row.seconds), milliseconds(row.seconds_embedded), f"{row.seconds_embedded / row.seconds:.0f}"),
    ]


def fusion_cells(row: Fusion) -> list[str]:
    """A row of the table of claim C, under `FUSION_COLUMNS`."""
    return [
        *(row.name, " + ".join(map(str, row.widths)), " + ".join(map(str, row.evaluations))),
        *(f"{sum(row.evaluations)}", f"{max(row.evaluations)}", f"{row.joint_evaluations}"),
        *(short(row.errors.value), short(row.errors.gradient)),
        *(milliseconds(row.seconds), milliseconds(row.joint_seconds)),
    ]


def short(error: float) -> str:
    """An error in one digit.

    >>> short(3.2e-16), short(0.0)
    ('3e-16', '0')
    """
    return f"{error:.0e}" if error else "0"


def milliseconds(seconds: float) -> str:
    """A short time.

    >>> milliseconds(0.0123), milliseconds(0.3)
    ('12.3 ms', '300 ms')
    """
    return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1}f} ms"


def _tiles(record: Record) -> Iterable[Tile]:
    rows = [*record.embeddings, *record.fusions]
    if rows:
        value, gradient = max(row.errors.value for row in rows), max(row.errors.gradient for row in rows)
        yield Tile("Largest error of a value", short(value), f"at most {VALUE_BOUND:.0e} allowed")
        yield Tile("Largest error of a gradient", short(gradient), f"at most {GRADIENT_BOUND:.0e} allowed")
    if record.embeddings:
        yield Tile(
            "Networks embedded", str(len(record.embeddings)), f"up to {max(r.stages for r in record.embeddings)} stages"
        )
    if record.fusions:
        yield Tile(
            "Stacks fused", str(len(record.fusions)), f"of up to {max(len(r.widths) for r in record.fusions)} layers"
        )
    if record.reach is not None:
        reached = f"{record.reach.one_step} of {len(record.reach.shares)}"
        yield Tile("Layers that a one-step gradient reaches", reached, "of an embedded network")
    yield Tile("Time", duration(record.seconds))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], holds: Sequence[Embedding | Fusion]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = [
        "<tr>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + f'<td class="{"yes" if of.holds else "no"}">{"✓ holds" if of.holds else "✗ does not hold"}</td></tr>'
        for row, of in zip(rows, holds, strict=True)
    ]
    return (
        f'<div class="scroll"><table class="dense"><thead><tr>{head}<th></th></tr></thead><tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def _under_embeddings(record: Record) -> str:
    """What the columns mean, and what a trained network's score became."""
    if not record.embeddings:
        return ""
    scores = [
        f"{row.name}: {row.scores[0]:.1%} right of what training did not see, and embedded {row.scores[1]:.1%}."
        for row in record.embeddings
        if row.scores is not None
    ]
    told = (
        "Errors are the largest differences of an entry from the network's own, relative to the largest entry of the "
        "same tensor, over the output and over the gradients of every parameter and floating input, at batches of 1 "
        "and 32. Evaluations of the function, at most stages + 1, and products with its transposed Jacobian are "
        "counted, not derived. State and widest are entries of a sample. Times are of a forward and backward at "
        "a batch of 32."
    )
    return f'<p class="after">{escape(" ".join([told, *scores]))}</p>'
