"""Products with the transposed Jacobian that each way to the exact gradient needs, and the error that is left.

    python benchmarks/adjoints.py

The map is linear, z = A z + x, with a random A of the radius named, so that the exact gradient is known: u solves
(I - A^T) u = v. Ten samples, float64, relative tolerance 1e-8, seed 0; the most products of any sample are shown, and
the largest relative error of u. "-" says that the solve reported failure within 400 products.
"""

import torch
from torch import Tensor

import equilibria as eq

SIZE, BATCH, RTOL, PRODUCTS = 40, 10, 1e-8, 400


def matrices() -> dict[str, Tensor]:
    """Jacobians of several kinds, (SIZE, SIZE)."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    radius = torch.linalg.eigvals(random).abs().max()
    symmetric = (random + random.T) / torch.linalg.eigvalsh(random + random.T).abs().max()
    shift = torch.diag(torch.rand(SIZE - 1, generator=generator, dtype=torch.float64) + 1, -1)
    return {
        "radius 0.5": 0.5 * random / radius,
        "radius 0.9": 0.9 * random / radius,
        "radius 0.99": 0.99 * random / radius,
        "radius 0.99, symmetric": 0.99 * symmetric,
        "expanding, radius 3": 3 * random / radius,
        "nilpotent, index 40": shift,
    }


def main() -> None:
    adjoints = {
        "GMRES, then Picard (default)": eq.Implicit(rtol=RTOL, max_steps=PRODUCTS),
        "GMRES(20)": eq.Implicit(solver=eq.GMRES(), rtol=RTOL, max_steps=PRODUCTS),
        "GMRES(40)": eq.Implicit(solver=eq.GMRES(restart=40), rtol=RTOL, max_steps=PRODUCTS),
        "BiCGSTAB": eq.Implicit(solver=eq.BiCGSTAB(), rtol=RTOL, max_steps=PRODUCTS),
        "Dense": eq.Implicit(solver=eq.Dense(), rtol=RTOL),
        "Picard (recurrent back-prop.)": eq.Implicit(solver=eq.Picard(), rtol=RTOL, max_steps=PRODUCTS),
        "Anderson": eq.Implicit(solver=eq.Anderson(), rtol=RTOL, max_steps=PRODUCTS),
        "Broyden": eq.Implicit(solver=eq.Broyden(), rtol=RTOL, max_steps=PRODUCTS),
        "Neumann, 50 terms": eq.Neumann(50),
    }
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(BATCH, SIZE, generator=generator, dtype=torch.float64)
    kinds = matrices()
    print(f"{'products / relative error':<32}" + "".join(f"{kind:>26}" for kind in kinds))
    for name, adjoint in adjoints.items():
        row = f"{name:<32}"
        for A in kinds.values():
            exact = torch.linalg.solve(torch.eye(SIZE, dtype=A.dtype) - A.T, v.T).T
            x = torch.randn(BATCH, SIZE, generator=generator, dtype=torch.float64, requires_grad=True)
            solution = eq.fixed_point(
                lambda z, x, A=A: z @ A.T + x, torch.zeros_like(v), x, solver=eq.Newton(eq.Dense()), adjoint=adjoint,
                on_failure="ignore",
            )  # fmt: skip
            solution.value.backward(v)
            assert x.grad is not None
            assert solution.adjoint.steps is not None
            error = ((x.grad - exact).norm(dim=1) / exact.norm(dim=1)).max().item()
            failed = solution.adjoint.status is not None and bool((solution.adjoint.status != 0).any())
            row += f"{'-' if failed else int(solution.adjoint.steps.max()):>16} / {error:7.1e}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
