"""A batch of quadratic programs at once, beside an interior-point solver that takes them one by one.

python benchmarks/quadratic.py
"""

import argparse
import statistics
import time

import clarabel
import numpy as np
import torch
from scipy import sparse

import equilibria as eq


def draw(n: int, equalities: int, inequalities: int, batch: int, seed: int) -> list[torch.Tensor]:
    """Feasible, strictly convex programs: P, q, A, b, G, h."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=g, dtype=torch.float64)

    factor, inside, A, G = normal(n, n), normal(n), normal(equalities, n), normal(inequalities, n)
    P = factor @ factor.mT / n + 0.01 * torch.eye(n, dtype=torch.float64)
    b, h = ((M @ inside[..., None])[..., 0] for M in (A, G))
    return [P, normal(n), A, b, G, h + torch.rand(batch, inequalities, generator=g, dtype=torch.float64)]


def one_by_one(problem: list[torch.Tensor]) -> np.ndarray:
    """Solutions by Clarabel, to 1e-10."""
    options = clarabel.DefaultSettings()
    options.verbose = False
    options.tol_gap_abs = options.tol_gap_rel = options.tol_feas = 1e-10
    found = []
    for P, q, A, b, G, h in zip(*(part.detach().numpy() for part in problem), strict=True):
        cones = [clarabel.ZeroConeT(len(b)), clarabel.NonnegativeConeT(len(h))]
        rows, right = sparse.csc_matrix(np.vstack([A, G])), np.concatenate([b, h])
        found.append(clarabel.DefaultSolver(sparse.csc_matrix(np.triu(P)), q, rows, right, cones, options).solve().x)
    return np.array(found)


def main() -> None:
    """Medians over paired rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    layer = eq.nn.QPLayer(on_failure="raise")
    print("   n    p    m | forward  backward  one by one | apart, at most | evaluations")
    for n, p, m in ((2, 0, 4), (10, 3, 15), (30, 8, 40), (100, 20, 120)):
        times: list[tuple[float, float, float]] = []
        apart, steps = 0.0, 0
        for seed in range(options.rounds):
            problem = [part.requires_grad_() for part in draw(n, p, m, options.batch, seed)]
            start = time.perf_counter()
            solution = layer.solve(*problem)
            forward = time.perf_counter()
            solution.value.sum().backward()
            backward = time.perf_counter()
            wanted = one_by_one(problem)
            times.append((forward - start, backward - forward, time.perf_counter() - backward))
            apart = max(apart, float(np.abs(solution.value.detach().numpy() - wanted).max()))
            steps = max(steps, int(solution.steps.max()))
        a, b, c = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        print(f"{n:4d} {p:4d} {m:4d} | {a:4.0f} ms {b:6.0f} ms {c:8.0f} ms | {apart:14.1e} | {steps:11d}", flush=True)


if __name__ == "__main__":
    main()
