"""The numbers at the head of a report, and what they say about the run."""

from __future__ import annotations

from dataclasses import dataclass

from onelayer.report.html import Tile
from onelayer.report.record import CAP_LIMIT, Record, by_allowed_evaluations


@dataclass(frozen=True)
class Check:
    """One thing an equilibrium model should be: what was asked for, what was measured, whether it holds."""

    asked: str
    measured: str
    holds: bool


def is_equilibrium_model(record: Record) -> bool:
    """Whether the model solves for an equilibrium at all; the explicit ones have no residual."""
    model = record.config.get("model")
    depth = model.get("depth") if isinstance(model, dict) else None
    return depth not in ("tied", "untied") and _residual(record) is not None


def tiles(record: Record) -> list[Tile]:
    """The headline numbers, those that the run has.

    >>> tiles(Record("run", {}, [{"step": 1, "tokens": 4096}], [], {}, []))
    [Tile(name='Tokens read', value='4,096', more='1 step')]
    """
    found: list[Tile] = []
    bits = _bits(record)
    bar = record.number("ngrams", "2")
    if bits is not None:
        where = "on validation" if record.number("bits_per_byte") is not None else "at the last validation"
        found.append(Tile("Bits per byte", f"{bits:.3f}", where))
    if bar is not None:
        difference = "" if bits is None else f"{abs(bar - bits):.3f} {'above' if bar > bits else 'below'} this run"
        found.append(Tile("Byte model of order 2", f"{bar:.3f}", difference))
    if is_equilibrium_model(record):
        found += _solve_tiles(record)
    total, own = record.number("parameters", "total"), record.number("parameters", "without_embeddings")
    if total is not None:
        found.append(Tile("Parameters", count(total), "" if own is None else f"{count(own)} without embeddings"))
    tokens = _first(record.number("tokens"), record.last(record.train, "tokens"))
    if tokens is not None:
        steps = record.last(record.train, "step")
        more = "" if steps is None else f"{steps:,.0f} step{'' if steps == 1 else 's'}"
        found.append(Tile("Tokens read", count(tokens), more))
    seconds = _first(record.number("seconds"), record.last(record.train, "seconds"))
    if seconds is not None:
        speed = "" if tokens is None or seconds <= 0 else f"{count(tokens / seconds)} tokens a second"
        found.append(Tile("Time", duration(seconds), speed))
    peak = _first(record.number("peak_memory_bytes"), record.last(record.train, "peak_memory_bytes"))
    if peak is not None:
        found.append(Tile("Peak memory", memory(peak)))
    return found


def _solve_tiles(record: Record) -> list[Tile]:
    found: list[Tile] = []
    forward, backward = _evaluations(record), record.recent("evaluations_backward")
    if forward is not None:
        p95 = record.number("evaluations", "p95")
        found.append(Tile("Evaluations forward", f"{forward:.1f}", "" if p95 is None else f"95% within {p95:.0f}"))
    if backward is not None:
        found.append(Tile("Evaluations backward", f"{backward:.1f}", "in training"))
    residual = _residual(record)
    if residual is not None:
        p95 = record.number("residual_p95")
        found.append(Tile("Relative residual", f"{residual:.2g}", "" if p95 is None else f"95% below {p95:.2g}"))
    share = _share_at_cap(record)
    if share is not None:
        found.append(Tile("Solves at the cap", f"{100 * share:.1f}%", _cap_words(record)))
    return found


def verdict(record: Record) -> tuple[bool, str] | None:
    """Whether what was trained may be called an equilibrium, and why; `None` for models that solve nothing."""
    if not is_equilibrium_model(record):
        return None
    shares = {"on validation": _share_at_cap(record), "at the end of training": record.recent("share_at_cap")}
    known = {where: share for where, share in shares.items() if share is not None}
    if not known:
        return None
    measured = " and ".join(f"{100 * share:.1f}% {where}" for where, share in known.items())
    if max(known.values()) <= CAP_LIMIT:
        return True, f"Solves that hit their cap: {measured}. Above 5% it would be a K-step network and no equilibrium."
    # The K is the cap of where it was hit most: training and validation may have different ones.
    worst = max(known, key=lambda where: known[where])
    cap = record.setting("model", "eval_max_steps" if worst == "on validation" else "max_steps")
    steps = "" if cap is None else f" K is {cap:.0f}."
    return False, f"Solves that hit their cap: {measured}. So this is a K-step network, not an equilibrium.{steps}"


def checks(record: Record) -> list[Check]:
    """What a trained equilibrium is asked to be, against what was measured; only what the run has measured.

    >>> checks(Record("run", {}, [], [], {"bits_per_byte": 2.3, "ngrams": {"2": 2.6}}, []))[0].holds
    True
    """
    found: list[Check] = []
    bits, bar = record.number("bits_per_byte"), record.number("ngrams", "2")
    if bits is not None and bar is not None:
        asked = f"Fewer bits per byte than the byte model of order 2, {bar:.3f}"
        found.append(Check(asked, f"{bits:.3f}", bits < bar))
    if not is_equilibrium_model(record):
        return found
    residual, share, mean = (
        record.number("residual"),
        record.number("share_at_cap"),
        record.number("evaluations", "mean"),
    )
    if residual is not None:
        found.append(Check("A relative residual below 0.01 on validation", f"{residual:.2g}", residual < 1e-2))
    if share is not None:
        found.append(Check("Less than 5% of the solves at the cap", f"{100 * share:.1f}%", share < CAP_LIMIT))
    if mean is not None:
        found.append(Check("At least 6 evaluations in the mean", f"{mean:.1f}", mean >= 6))
    # A solve allowed one evaluation returns its start, unchanged; the block has been applied once after two.
    once = dict(zip(*by_allowed_evaluations(record, "bits_per_byte"), strict=True)).get(2)
    if bits is not None and once is not None:
        asked = "The block applied once, instead of solved, at least 0.2 bits per byte worse"
        found.append(Check(asked, f"{once - bits:+.3f}", once - bits >= 0.2))
    return found


def count(value: float) -> str:
    """A count in three figures or so.

    >>> count(999), count(4096), count(262_144), count(3_686_400)
    ('999', '4,096', '262 k', '3.69 M')
    """
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size and value >= 1e4:
            scaled = value / size
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A time in the units one would say it in.

    >>> duration(42), duration(312), duration(9000)
    ('42 s', '5 min 12 s', '2 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def memory(size: float) -> str:
    """Bytes in MiB or GiB.

    >>> memory(700 * 2**20), memory(3.5 * 2**30)
    ('700 MiB', '3.50 GiB')
    """
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _bits(record: Record) -> float | None:
    return _first(record.number("bits_per_byte"), record.last(record.validation, "bits_per_byte"))


def _evaluations(record: Record) -> float | None:
    return _first(record.number("evaluations", "mean"), record.last(record.validation, "evaluations_forward"))


def _residual(record: Record) -> float | None:
    return _first(record.number("residual"), record.last(record.validation, "residual"), record.recent("residual"))


def _share_at_cap(record: Record) -> float | None:
    return _first(record.number("share_at_cap"), record.last(record.validation, "share_at_cap"))


def _cap_words(record: Record) -> str:
    cap = record.setting("model", "eval_max_steps")
    return "" if cap is None else f"which is {cap:.0f} evaluations"
