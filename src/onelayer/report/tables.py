"""What was measured on a text, as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from onelayer.quality import Quality
from onelayer.report.record import CAP_LIMIT


def lines(found: Quality) -> str:
    """One measurement, a figure a line.

    >>> print(lines(Quality(64, 9.5, 3e-3, 0.0, 2.185, 4.55, 100, 100)))
    bits per byte    2.185
    perplexity       4.550 a token, 100 tokens of 1.00 bytes
    residual         3.0e-03 median
    evaluations      9.5 on average, 64 allowed
    solves at cap    0.0%
    """
    shown = [
        f"bits per byte    {found.bits_per_byte:.3f}",
        f"perplexity       {found.perplexity:.3f} a token, {found.tokens:,} tokens of "
        f"{found.bytes / found.tokens:.2f} bytes",
    ]
    if found.evaluations is not None:
        shown += [
            f"residual         {found.residual:.1e} median",
            f"evaluations      {found.evaluations:.1f} on average, {found.max_steps} allowed",
            f"solves at cap    {found.share_at_cap:.1%}",
        ]
    return "\n".join(shown)


def table(found: Sequence[Quality]) -> str:
    """Several measurements of an equilibrium model, a row each.

    >>> print(table([Quality(4, 4.0, 0.1, 1.0, 2.5, 5.66, 100, 100)]))
     allowed  evaluations  residual   at cap  bits/byte  perplexity
           4          4.0   1.0e-01   100.0%      2.500       5.660
    """
    rows = [
        f"{row.max_steps:8}  {row.evaluations:11.1f}  {row.residual:8.1e}  {row.share_at_cap:7.1%}  "
        f"{row.bits_per_byte:9.3f}  {row.perplexity:10.3f}"
        for row in found
    ]
    return "\n".join([" allowed  evaluations  residual   at cap  bits/byte  perplexity", *rows])


def cap_note(found: Sequence[Quality]) -> str | None:
    """Which measurements are not of an equilibrium, in a sentence; `None` where all are.

    >>> cap_note([Quality(4, 4.0, 0.1, 1.0, 2.5, 5.66, 100, 100), Quality(64, 9.5, 3e-3, 0.0, 2.2, 4.5, 100, 100)])
    'At 4 allowed evaluations more than 5% of the solves hit the cap: that is a K-step network, not an equilibrium.'
    """
    cut = [str(row.max_steps) for row in found if row.share_at_cap is not None and row.share_at_cap > CAP_LIMIT]
    if not cut:
        return None
    which = cut[0] if len(cut) == 1 else f"{', '.join(cut[:-1])} and {cut[-1]}"
    return (
        f"At {which} allowed evaluations more than {CAP_LIMIT:.0%} of the solves hit the cap: that is a K-step "
        "network, not an equilibrium."
    )
