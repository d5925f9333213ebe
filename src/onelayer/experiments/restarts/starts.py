"""Where solves start: at random in training, at many places at test, and which of their answers to take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import equilibria as eq
from onelayer.models.language_model import IGNORED, LanguageModel, Output
from onelayer.models.window import Memory

ROUNDS, STRETCH = 2, 4  # of a noisy path: how often noise is added, and the evaluations before each time


class RandomStarts(nn.Module):
    """A model as it is called in training, its solves starting at random states or at the end of a noisy path.

    The gradient is that of the equilibrium the solve then finds, whatever was before it.

    >>> model = LanguageModel(ModelConfig(vocabulary=5, width=32, heads=2))    # doctest: +SKIP
    >>> RandomStarts(model)(tokens, targets).solution.converged.all()          # doctest: +SKIP
    tensor(True)

    Args:
        model: of an equilibrium.
        noise: added to each entry of the state on the way, twice, each time after a few steps of the solver; `None`
            for no such path.

    Source: random starts after Anil et al., "Path Independent Equilibrium Models Can Better Exploit Test-Time
    Computation", 2022 (arXiv:2211.09961); with noise after Huang, Geng and Kolter, "Equilibrium Reasoners", 2026
    (arXiv:2605.21488), who add it at every step and differentiate through the last of them, which is not done here.
    """

    def __init__(self, model: LanguageModel, noise: float | None = None) -> None:
        super().__init__()
        self.model, self.noise = model, noise

    def forward(
        self, tokens: Tensor, targets: Tensor, memory: Memory | None = None, unrolled: int | None = None
    ) -> Output:
        """The losses; the arguments are those of the model."""
        if unrolled is not None:
            return self.model(tokens, targets, memory=memory, unrolled=unrolled)
        # The block normalises last, so these are of the size of the states it returns.
        z = torch.randn(*tokens.shape, self.model.depth.block.state_width, device=tokens.device)
        if self.noise is not None:
            with torch.no_grad():
                for _ in range(ROUNDS):
                    z = self.model(tokens, start=z, max_steps=STRETCH).state
                    z = z + self.noise * torch.randn_like(z)
        return self.model(tokens, targets, memory=memory, start=z)


def random_states(seed: int, count: int, like: Tensor, width: int) -> Tensor:
    """States to start at, `(count, batch, time, width)`, the same for every model of the same width.

    >>> random_states(0, 2, torch.zeros(3, 16), 8).shape
    torch.Size([2, 3, 16, 8])

    Args:
        seed: that says which.
        count: starts for each sample.
        like: tokens `(batch, time)`.
        width: of a state.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *like.shape, width, generator=generator).to(like.device)


@dataclass(frozen=True)
class Answers:
    """What a model answers from several starts.

    Attributes:
        cells: the answers, int64 `(samples, starts, time)`; a cell that was not asked for holds `IGNORED`.
        right: bool `(samples, starts)`, every cell that was asked for.
        residual: relative, of the state that the answer is read off, `(samples, starts)`; 0 where nothing is solved.
        converged: bool likewise.
        steps: evaluations, float64 likewise.
        solutions: the solves, a start each; empty where nothing is solved.
    """

    cells: Tensor
    right: Tensor
    residual: Tensor
    converged: Tensor
    steps: Tensor
    solutions: tuple[eq.Solution, ...]


@torch.no_grad()
def answers(
    model: LanguageModel, tokens: Tensor, targets: Tensor, starts: Tensor | None = None, max_steps: int | None = None
) -> Answers:
    """What a model answers from each of some starts; from its own, once, where none are given.

    Args:
        model: in evaluation mode.
        tokens, targets: int64 `(samples, time)`; the first token of the vocabulary stands for a blank, and is never
            the answer.
        starts: `(starts, samples, time, width)`.
        max_steps: evaluations allowed; `None` for the configuration's.
    """
    outputs = [
        model(tokens, start=start, max_steps=max_steps) for start in ([None] if starts is None else starts.unbind())
    ]
    cells = torch.stack([output.logits[..., 1:].argmax(-1) + 1 for output in outputs], 1).cpu()
    wanted = targets.cpu().unsqueeze(1)
    cells = torch.where(wanted == IGNORED, IGNORED, cells)
    solutions = tuple(output.solution for output in outputs if output.solution is not None)
    if not solutions:
        nothing = torch.zeros(cells.shape[:2])
        return Answers(cells, (cells == wanted).all(2), nothing, nothing == 0, nothing.double(), ())
    residual, converged, steps = (
        torch.stack([getattr(solution, name) for solution in solutions], 1).cpu()
        for name in ("residual", "converged", "steps")
    )
    return Answers(cells, (cells == wanted).all(2), residual, converged, steps.double(), solutions)


def solved(found: Answers, count: int) -> dict[str, float]:
    """Share of the samples that are right where each has so many starts, by how one of the answers is chosen.

    All starts are used, in groups of that many; the share is the mean over the groups.

    Args:
        found: answers from a multiple of so many starts.
        count: starts of a group.

    Returns:
        `"residual"` takes the answer with the smallest one, `"steps"` that of the solve with the fewest evaluations,
        `"vote"` the one that most starts gave, and of several such the one with the smallest residual; `"any"` knows
        the right one where some start found it, and is a bound.
    """
    shares: dict[str, list[float]] = {"residual": [], "steps": [], "vote": [], "any": []}
    for group in torch.arange(found.right.shape[1]).split(count):
        right, residual, steps = found.right[:, group], found.residual[:, group], found.steps[:, group]
        cells = found.cells[:, group]
        votes = (cells[:, :, None] == cells[:, None]).all(3).sum(2)
        fewest, most = steps == steps.amin(1, keepdim=True), votes == votes.amax(1, keepdim=True)
        for name, allowed in (("residual", None), ("steps", fewest), ("vote", most)):
            criterion = residual if allowed is None else torch.where(allowed, residual, torch.inf)
            best = criterion.argmin(1, keepdim=True)
            shares[name].append(float(right.gather(1, best).double().mean()))
        shares["any"].append(float(right.any(1).double().mean()))
    return {name: statistics.fmean(values) for name, values in shares.items()}


def agreement(found: Answers) -> dict[str, float]:
    """Whether answers depend on the start: `"pairs"` of starts that agree, and `"samples"` where all do, as shares.

    Args:
        found: answers from two starts at least.
    """
    same = (found.cells[:, :, None] == found.cells[:, None]).all(3)
    count = same.shape[1]
    pairs = (same.sum((1, 2)) - count) / (count * (count - 1))
    return {"pairs": float(pairs.double().mean()), "samples": float(same.all(2).all(1).double().mean())}


def area(signal: Sequence[float] | Tensor, right: Sequence[bool] | Tensor) -> float | None:
    """Area under the curve of a signal: how often it is larger for a right answer than for a wrong one, ties half.

    >>> area([0.9, 0.4, 0.5], [True, False, True]), area([0.1], [True])
    (1.0, None)

    Args:
        signal: a number an answer.
        right: whether it is.

    Returns:
        Between 0 and 1; `None` where all are right or none is.
    """
    signal, right = torch.as_tensor(signal).double().flatten(), torch.as_tensor(right).flatten()
    ours, others = signal[right], signal[~right]
    if not len(ours) or not len(others):
        return None
    gaps = ours[:, None] - others
    return float((gaps > 0).double().mean() + (gaps == 0).double().mean() / 2)
