"""What the solves behind drawn text took, and how they ended."""

from __future__ import annotations

from dataclasses import dataclass, field

import equilibria as eq


@dataclass
class Report:
    """What drawing took, and how well the equilibria behind it were found.

    Attributes:
        prompts: number of texts that are continued side by side.
        drawn: tokens drawn so far for each of them.
        reading: evaluations of the block to read the prompts, and the windows that took the place of full ones.
        evaluations: for each other token, evaluations of the block until its solve stopped, the mean over the prompts;
            the layers, for models without equilibrium.
        solves: solves so far, counting one for each prompt.
        residual: the largest relative residual of a state that was used; 0 for models without equilibrium.
        at_cap: solves that ended without meeting the tolerance.
        not_finite: solves that met NaN or infinity, and draws of which a logit was one.
        cache_bytes: bytes kept from one token to the next.
    """

    prompts: int
    drawn: int = 0
    reading: int = 0
    evaluations: list[float] = field(default_factory=list)
    solves: int = 0
    residual: float = 0.0
    at_cap: int = 0
    not_finite: int = 0
    cache_bytes: int = 0

    @property
    def evaluations_per_token(self) -> float | None:
        """Mean evaluations of the block for a token after the first; `None` before there is one."""
        return sum(self.evaluations) / len(self.evaluations) if self.evaluations else None

    def complaint(self) -> str | None:
        """What went wrong, in one sentence; `None` where nothing did.

        >>> Report(prompts=1, solves=10, at_cap=2, residual=0.02).complaint()
        '2 of 10 solves ended without meeting the tolerance, at a relative residual of up to 2.0e-02: allow more \
evaluations, or take what was drawn as that of a network of fixed depth.'
        """
        parts = []
        if self.not_finite:
            parts.append(f"{self.not_finite} solves or logits were NaN or infinite")
        if self.at_cap:
            parts.append(
                f"{self.at_cap} of {self.solves} solves ended without meeting the tolerance, at a relative residual of "
                f"up to {self.residual:.1e}"
            )
        if not parts:
            return None
        remedy = (
            "allow more evaluations, or take what was drawn as that of a network of fixed depth"
            if not self.not_finite
            else "look for NaN in the weights, and do not trust what was drawn"
        )
        return f"{', and '.join(parts)}: {remedy}."

    def describe(self, seconds: float) -> str:
        """The report in a few lines.

        >>> print(Report(prompts=1, drawn=3, reading=9, evaluations=[7, 8], cache_bytes=2048).describe(0.5))
        tokens           3 for each of 1 prompt, 6.0 a second
        evaluations      7.5 a token, 9 to read what came before
        residual         0.0e+00 at most, 0 of 0 solves at the cap
        cache            2.0 KiB

        Args:
            seconds: that drawing took, with the reading of the prompts.
        """
        each = "none" if self.evaluations_per_token is None else f"{self.evaluations_per_token:.1f}"
        return "\n".join(
            (
                f"tokens           {self.drawn} for each of {self.prompts} prompt{'' if self.prompts == 1 else 's'}, "
                f"{self.drawn * self.prompts / seconds:.1f} a second",
                f"evaluations      {each} a token, {self.reading} to read what came before",
                f"residual         {self.residual:.1e} at most, {self.at_cap} of {self.solves} solves at the cap",
                f"cache            {self.cache_bytes / 1024:,.1f} KiB",
            )
        )

    def add(self, solution: eq.Solution | None, layers: int, reading: bool) -> None:
        """Counts one call of the model, which read windows anew or else one more token of each."""
        steps, evaluations = float(layers), layers
        if solution is not None:
            # A few numbers at once: what is worked out on tensors of one entry takes longer than what it tells of.
            ends = list(zip(solution.status.tolist(), solution.residual.tolist(), strict=True))
            steps, evaluations = sum(solution.steps.tolist()) / max(len(ends), 1), solution.evaluations
            self.solves += self.prompts
            self.residual = max([self.residual, *(size for end, size in ends if end != eq.Status.NONFINITE)])
            self.at_cap += sum(end not in (eq.Status.CONVERGED, eq.Status.NONFINITE) for end, _ in ends)
            self.not_finite += sum(end == eq.Status.NONFINITE for end, _ in ends)
        if reading:
            self.reading += evaluations
        else:
            self.evaluations.append(steps)
