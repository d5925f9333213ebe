"""How far embedded networks are from the networks themselves.

    python benchmarks/embedded.py

Float64; every kind of network of the tests at depths of about 2, 8, 24 and 64 stages, each with batches of 1, 4 and 32.
The largest error of any output, and of the gradient of any parameter or floating input, relative to the largest entry
of that tensor; the stages, the longest chain of them, and the evaluations that the deepest network takes forward.
"""

import sys
from pathlib import Path

import torch

import equilibria as eq

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from embedding import errors
from networks import NETWORKS

DEPTHS, BATCHES = (2, 8, 24, 64), (1, 4, 32)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    print("| network | stages | longest chain | evaluations | error in value | error in gradient |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, build in NETWORKS.items():
        torch.manual_seed(0)
        found, stages, chains, steps = [(0.0, 0.0)], [], [], 0
        for depth in DEPTHS:
            network, inputs = build(depth)
            layer = eq.universal.embed(network, inputs(2))
            stages.append(len(layer.cell.stages))
            chains.append(layer.cell.depth)
            for batch in BATCHES:
                example = inputs(batch)
                found.append(errors(network, layer, example))
                with torch.no_grad():
                    steps = layer.solve(*example).evaluations
        value, gradient = (max(numbers) for numbers in zip(*found, strict=True))
        span = f"{stages[0]} to {stages[-1]}"
        print(f"| {kind} | {span} | {chains[0]} to {chains[-1]} | {steps} | {value:.1e} | {gradient:.1e} |", flush=True)


if __name__ == "__main__":
    main()
