"""Peak memory of one training step against the number of solver steps.

    python benchmarks/memory.py

With `Implicit` it does not depend on how many steps the solver takes, its fixed history aside; with `Unrolled` it grows
with each. The tolerance is zero and the cell contracts slowly, so that every step allowed is taken.
"""

import argparse

import torch
from torch import Tensor, nn

import equilibria as eq
from onelayer.experiments.peak import peak_bytes


class Cell(nn.Module):
    """tanh(W z + x), with a W of norm below 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.99 * torch.linalg.qr(torch.randn(width, width)).Q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 30, 100])
    options = parser.parse_args()
    state = options.batch * options.width * 4 / 2**20
    print(f"peak memory of a training step, MiB (one state is {state:.2f} MiB; batch {options.batch}, seed 0)")
    print(f"{'solver':<12}{'adjoint':<24}" + "".join(f"{steps:>6} steps" for steps in options.steps))
    rows = [
        (eq.Picard(), eq.Implicit()),
        (eq.Anderson(), eq.Implicit()),
        (eq.Picard(), eq.Phantom(steps=3)),
        (eq.Picard(), eq.OneStep()),
        (eq.Picard(), eq.Unrolled()),
        (eq.Picard(), eq.Unrolled(checkpoint=True)),
        (eq.Anderson(), eq.Unrolled()),
    ]
    for solver, adjoint in rows:
        cells = []
        for steps in options.steps:
            torch.manual_seed(0)
            layer = eq.DEQ(
                Cell(options.width), solver, adjoint, rtol=0.0, atol=0.0, max_steps=steps, on_failure="ignore"
            )
            x = 0.01 * torch.randn(options.batch, options.width)
            with eq.monitor(layer) as reports:
                layer(x).square().mean().backward()  # gradients exist from here on, as in every step but the first
            if reports[0].evaluations != steps:
                raise RuntimeError(f"The solve took {reports[0].evaluations} steps where {steps} were meant.")
            cells.append(peak_bytes(lambda layer=layer, x=x: layer(x).square().mean().backward()) / 2**20)
        name = type(adjoint).__name__ + (" (checkpoint)" if adjoint == eq.Unrolled(checkpoint=True) else "")
        print(f"{type(solver).__name__:<12}{name:<24}" + "".join(f"{cell:>12.1f}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
