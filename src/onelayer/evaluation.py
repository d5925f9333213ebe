"""What a trained model does on the validation text, and whether it is the equilibrium it claims to be."""

from __future__ import annotations

import resource
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from onelayer.corpora.ngrams import baselines
from onelayer.corpora.prepared import Corpus
from onelayer.generation import decode, generate
from onelayer.models.language_model import LanguageModel
from onelayer.presets import RunConfig
from onelayer.quality import Quality, Windows, score, spread

PROMPT = "def "


def evaluate(
    model: LanguageModel, config: RunConfig, corpus: Corpus, tokens: int, seconds: float, peak_memory: int
) -> dict[str, Any]:
    """The whole evaluation that ends a run, in the form of `evaluation.json`.

    >>> evaluate(model, config, corpus, 0, 0.0, 0)["bits_per_byte"]             # doctest: +SKIP
    2.31

    Args:
        model: trained.
        config: of its run.
        corpus: its text.
        tokens: that it was trained on, counted as often as they were seen.
        seconds: that its training took.
        peak_memory: bytes that it took.

    Returns:
        A dictionary that JSON can hold; figures of the equilibrium are `None` for models without one.
    """
    windows = spread(corpus.validation, config.model.context, config.training.evaluation_windows)
    lengths = corpus.tokenizer.lengths
    (full,) = score(model, config, windows, lengths)
    total, without_embeddings = model.parameter_counts()
    prompt = corpus.tokenizer.encode(PROMPT.encode())[: config.model.context].tolist()
    # How many solves hit the cap is said of the validation text.
    drawn = generate(model, [prompt], config.training.sample_bytes, on_failure="ignore")
    text = "".join(decode(corpus.tokenizer.decode(tokens[:1]) for tokens in drawn))
    return {
        "bits_per_byte": full.bits_per_byte,
        "perplexity": full.perplexity,
        "residual": full.residual,
        "residual_p95": full.residual_p95,
        "share_at_cap": full.share_at_cap,
        "evaluations": None if full.histogram is None else _evaluations(full),
        "by_allowed_evaluations": by_allowed_evaluations(model, config, windows, lengths),
        "ngrams": baselines(corpus),
        "parameters": {"total": total, "without_embeddings": without_embeddings},
        "tokens": tokens,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory,
        "sample": {"prompt": PROMPT, "text": text},
    }


def by_allowed_evaluations(
    model: LanguageModel, config: RunConfig, windows: Windows, lengths: npt.NDArray[np.int64]
) -> list[dict[str, Any]] | None:
    """Bits per byte and median residual when each solve may evaluate the block 1, 2, 3, 4, 6, 8, 12, ... times.

    The first evaluation measures the start, so that 1 is the model before its block was ever applied, and 2 is the
    block applied once.

    >>> by_allowed_evaluations(model, config, windows, lengths)[0]              # doctest: +SKIP
    {'max_steps': 1, 'bits_per_byte': 8.3, 'residual': 1.0}
    """
    if not model.is_equilibrium:
        return None
    most = config.model.eval_max_steps
    allowed = sorted({1, 2, most} | {n for k in range(1, 30) for n in (2**k, 3 * 2 ** (k - 1)) if n < most})
    rows = []
    for max_steps in allowed:
        (found,) = score(model, config, windows, lengths, (max_steps,))
        rows.append({"max_steps": max_steps, "bits_per_byte": found.bits_per_byte, "residual": found.residual})
        if found.share_at_cap == 0:  # more would change nothing
            break
    return rows


def _evaluations(found: Quality) -> dict[str, Any]:
    histogram = {str(count): number for count, number in (found.histogram or {}).items()}
    return {"mean": found.evaluations, "p95": found.evaluations_p95, "histogram": histogram}


def peak_memory_bytes(device: str) -> int:
    """Most memory that this process has held: on the device, or resident where the device is the CPU.

    >>> peak_memory_bytes("cpu") > 1_000_000
    True
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
