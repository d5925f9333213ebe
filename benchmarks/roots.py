"""Evaluations that classical problems take, beside SciPy's solvers.

    python benchmarks/roots.py

Float64, to a root-mean-square residual of 1e-8; four starts around the standard one (eight eccentricities for Kepler's
equation), solved in one batch here and one by one by SciPy; the most evaluations of any sample are shown. A matrix-free
Newton step also takes products with the Jacobian, counted behind the plus. "-" says that the solver reported failure.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

import equilibria as eq

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_roots import PROBLEMS, powell_singular, spread


class CountingGMRES:
    """GMRES that counts the products it makes for the batch."""

    def __init__(self) -> None:
        self.products = 0

    def solve(
        self,
        operator: Callable[[Tensor], Tensor],
        b: Tensor,
        rtol: float,
        level: float,
        max_steps: int,
        agree: Callable[[bool], bool],
    ) -> eq.LinearSolution:
        found = eq.GMRES().solve(operator, b, rtol, level, max_steps, agree)
        self.products += found.products
        return found


def ours(g: Callable[[Tensor], Tensor], start: Tensor, solver: eq.Solver) -> str:
    with torch.no_grad():
        solution = eq.root(g, start, solver=solver, max_steps=400, on_failure="ignore")
    return str(int(solution.steps.max())) if bool(solution.converged.all()) else "-"


def scipys(g: Callable[[Tensor], Tensor], start: Tensor, method: str) -> str:
    most = 0
    for row in range(len(start)):
        calls = 0

        def alone(z: np.ndarray, row: int = row) -> np.ndarray:
            nonlocal calls
            calls += 1
            batch = start.clone()
            batch[row] = torch.from_numpy(np.asarray(z))
            return g(batch)[row].numpy()

        tolerance = 1e-8 * start.shape[1] ** 0.5
        options = {"xtol": 1e-10} if method == "hybr" else {"fatol": tolerance / start.shape[1] ** 0.5, "maxiter": 400}
        try:
            found = scipy.optimize.root(alone, start[row].numpy(), method=method, options=options)
        except (ValueError, FloatingPointError):
            return "-"
        if not found.success or np.linalg.norm(alone(found.x)) > 10 * tolerance:
            return "-"
        most = max(most, calls)
    return str(most)


def main() -> None:
    np.seterr(all="ignore")
    heads = ["Newton, GMRES", "Newton, Dense", "Broyden(200)", "SciPy hybr", "SciPy krylov", "SciPy broyden1"]
    print(f"{'evaluations':<26}" + "".join(f"{head:>16}" for head in heads))
    problems = {**PROBLEMS, "powell singular": (powell_singular, spread([3.0, -1.0, 0.0, 1.0]))}
    for name, (g, start) in problems.items():
        counting = CountingGMRES()
        cells = [f"{ours(g, start, eq.Newton(counting))} + {counting.products}"]
        cells += [ours(g, start, solver) for solver in (eq.Newton(eq.Dense()), eq.Broyden(history=200))]
        cells += [scipys(g, start, method) for method in ("hybr", "krylov", "broyden1")]
        print(f"{name:<26}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
