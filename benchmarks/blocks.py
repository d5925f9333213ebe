"""Which block f(z, x) to train: candidates of equal size under the same trainer.

    python benchmarks/blocks.py --steps 300

prints, for each block, validation bits per byte, evaluations until the tolerance is met, residual, share of the solves
that never met it, bits per byte when the block is applied only once, and seconds of training. What was chosen and why
is in docs/log.md; what became an option of the model is in benchmarks/options.py.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from onelayer import corpora
from onelayer.learner import Learner, make_optimizer, update
from onelayer.models.language_model import LanguageModel
from onelayer.models.transformer import Context, TransformerBlock
from onelayer.parallel import Processes
from onelayer.presets import changed, preset
from onelayer.quality import score, spread

ALONE = Processes(torch.device("cpu"))


class NormalisedUpdate(TransformerBlock):
    """Both branches side by side on z + x, no identity path, the sum with x normalised."""

    def forward(self, z: Tensor, x: Tensor, context: Context) -> Tensor:
        u = self.attention_norm(z + x)
        return self.output_norm(x + self._attention(u, context) + self._feed_forward(u, context))


class PreNorm(TransformerBlock):
    """The usual pre-norm residual block on z + x, whose equilibrium is where its branches cancel: kept as a warning."""

    def forward(self, z: Tensor, x: Tensor, context: Context) -> Tensor:
        u = z + x
        u = u + self._attention(self.attention_norm(u), context)
        return u + self._feed_forward(self.output_norm(u), context)


BLOCKS = (TransformerBlock, NormalisedUpdate, PreNorm)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare blocks under the same trainer.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[preset("small").training.learning_rate])
    parser.add_argument("--only", nargs="+", default=[block.__name__ for block in BLOCKS], metavar="BLOCK")
    parser.add_argument("--unrolled-steps", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _compare(options, corpora.prepare(None, Path(folder, "tokens")))


def _compare(options: argparse.Namespace, corpus: corpora.Corpus) -> None:
    print(f"{options.steps} steps, {torch.get_num_threads()} threads, {corpus.describe()}")
    columns = ("parameters", "rate", "bits/byte", "evaluations", "residual", "at cap", "once", "seconds")
    print(f"{'':20}" + "".join(f"{column:>13}" for column in columns))
    for block in (block for block in BLOCKS if block.__name__ in options.only):
        for rate in options.learning_rate:
            values = {"steps": options.steps, "learning_rate": rate, "unrolled_steps": options.unrolled_steps}
            config = changed(preset("small"), values)
            torch.manual_seed(config.training.seed)
            model = LanguageModel(config.model, block)
            learning = Learner(config, ALONE, model, model, make_optimizer(model, config.training))
            began = time.perf_counter()
            for step in range(options.steps):
                update(learning, corpus, step)
            seconds = time.perf_counter() - began
            windows = spread(corpus.validation, config.model.context, 128)
            once, found = score(model, config, windows, corpus.tokenizer.lengths, (2, config.model.eval_max_steps))
            row = (
                f"{model.parameter_counts()[0]:,}",
                f"{rate:g}",
                f"{found.bits_per_byte:.3f}",
                f"{found.evaluations:.1f}",
                f"{found.residual:.1e}",
                f"{found.share_at_cap:.0%}",
                f"{once.bits_per_byte:.3f}",
                f"{seconds:.0f}",
            )
            print(f"{block.__name__:20}" + "".join(f"{value:>13}" for value in row), flush=True)


if __name__ == "__main__":
    main()
