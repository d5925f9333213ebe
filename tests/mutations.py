"""Breaks the library on purpose, one line at a time, and looks whether the tests of the law notice.

    python tests/mutations.py              all of them, some minutes
    python tests/mutations.py Batch        those of one law

Each mutation names a file, what stands there, what is put in its place, and the tests that must then fail. Ends with
the number of mutations that survived.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """`old`, which stands once in `file`, becomes `new`; of `tests`, at least one must then fail."""

    law: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    # Honesty.
    Mutation(
        "Honesty",
        "loop.py",
        "final_error = torch.where(active, best_error, final_error)",
        "final_error = torch.where(active, error, final_error)",
        "tests/test_honesty.py -k residual_is_that_of_the_returned_value",
    ),
    Mutation(
        "Honesty",
        "loop.py",
        "failure = torch.where(finite, Status.STALLED, Status.NONFINITE)",
        "failure = torch.where(finite, Status.STALLED, Status.MAX_STEPS)",
        "tests/test_honesty.py -k nan",
    ),
    Mutation(
        "Honesty",
        "loop.py",
        "stalled = (since >= STALL_WINDOW) & (best_error <= problem.floor)",
        "stalled = since >= STALL_WINDOW",
        "tests/test_honesty.py -k stalled",
    ),
    Mutation(
        "Honesty",
        "adjoints/implicit.py",
        'failures.tell("backward solve", told_status, torch.where(usable, found.residual, 0))',
        "pass",
        "tests/test_honesty.py -k backward",
    ),
    Mutation(
        "Honesty",
        "adjoints/implicit.py",
        "coupled = claimed & (error > 10 * noise.clamp(min=rtol))",
        "coupled = claimed & (error < 0)",
        "tests/test_purity.py -k couples",
    ),
    Mutation(
        "Honesty",
        "status.py",
        "if (what, cause) not in self.told:",
        "if True:",
        "tests/test_honesty.py -k warnings",
    ),
    Mutation(
        "Honesty",
        "norms.py",
        "return torch.maximum(torch.linalg.vector_norm(flat, dim=1, dtype=dtype), least) * flat.shape[1] ** -0.5",
        "return torch.linalg.vector_norm(flat, dim=1, dtype=dtype) * flat.shape[1] ** -0.5",
        "tests/test_norms.py",
    ),
    # Batch.
    Mutation(
        "Batch",
        "loop.py",
        "z = problem.round(proposal if stopped is None else torch.where(stopped[:, None], settled, proposal))",
        "z = problem.round(proposal)",
        "tests/test_batch.py",
    ),
    Mutation(
        "Batch",
        "solvers/safeguard.py",
        "trip = ~plainly & (since >= patience)",
        "trip = ~plainly & (since >= patience).any()",
        "tests/test_batch.py",
    ),
    Mutation(
        "Batch",
        "solvers/newton.py",
        "length = torch.where(accepted, 1, memory.length / 2)",
        "length = torch.where(accepted.all(), torch.ones_like(memory.length), memory.length / 2)",
        "tests/test_batch.py tests/test_roots.py",
    ),
    Mutation(
        "Batch",
        "linear/gmres.py",
        "room = max_steps - 1 - steps",
        "room = max_steps - 1 - products + 0 * steps",
        "tests/test_linear.py -k others_need",
    ),
    # Gradient.
    Mutation(
        "Gradient",
        "adjoints/implicit.py",
        "u = torch.where(solvable[:, None], found.x * scale[:, None], v)\n        return u if",
        "u = torch.where(solvable[:, None], found.x, v)\n        return u if",
        "tests/test_gradients.py -k scale",
    ),
    Mutation(
        "Gradient",
        "adjoints/implicit.py",
        "for _ in range(order):",
        "for _ in range(1):",
        "tests/test_gradients.py -k second_derivatives_of_implicit",
    ),
    Mutation(
        "Gradient",
        "adjoints/phantom.py",
        "    if torch.is_grad_enabled():\n        raise RuntimeError(REFUSAL)\n",
        "",
        "tests/test_gradients.py -k second_derivatives_of_first_order",
    ),
    Mutation(
        "Gradient",
        "adjoints/attachment.py",
        "return torch.full_like(delta, -0.0)",
        "return delta.clone()",
        "tests/test_gradients.py -k bit_for_bit",
    ),
    Mutation(
        "Gradient",
        "adjoints/attachment.py",
        "with hooks, _Expanding():",
        "with hooks:",
        "tests/test_nonfinite.py",
    ),
    Mutation(
        "Gradient",
        "adjoints/attachment.py",
        "return z + _Zero.apply(delta, z, pull)",
        "return z + _Zero.apply(delta.detach().requires_grad_(), z, pull)",
        "tests/test_gradients.py -k gradcheck_for_every",
    ),
    # Closures.
    Mutation(
        "Closures",
        "functional/solve.py",
        "_refuse_captures(probe, peel(z0, first))",
        "pass",
        "tests/test_func.py -k capture",
    ),
    # Options.
    Mutation(
        "Options",
        "options.py",
        "    if value < minimum:\n",
        "    if value < minimum - 10:\n",
        "tests/test_options.py",
    ),
    # Purity.
    Mutation(
        "Purity",
        "steady.py",
        "trial = _copied(self._start)",
        "trial = list(self._start)",
        "tests/test_purity.py -k statistics",
    ),
    Mutation(
        "Purity",
        "steady.py",
        "        _put(trial)\n",
        "",
        "tests/test_purity.py -k statistics",
    ),
    Mutation(
        "Purity",
        "steady.py",
        "        self._draws = 0\n        try",
        "        try",
        "tests/test_purity.py -k dropout",
    ),
    Mutation(
        "Purity",
        "steady.py",
        "self._seed = _new_seed(torch.Generator().set_state(torch.get_rng_state()))",
        "self._seed = _new_seed(torch.default_generator)",
        "tests/test_purity.py -k dropout",
    ),
    Mutation(
        "Purity",
        "steady.py",
        "    held.settle()\n",
        "",
        "tests/test_purity.py",
    ),
    Mutation(
        "Purity",
        "problem/equation.py",
        "if watch is not None and watch.moved():",
        "if False:",
        "tests/test_purity.py -k random",
    ),
    Mutation(
        "Purity",
        "solve.py",
        "z = z.clone()",
        "z = z.view_as(z)",
        "tests/test_company.py tests/test_options.py -k in_place",
    ),
    # Company.
    Mutation(
        "Company",
        "precision.py",
        "return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=not torch.is_grad_enabled())",
        "return nullcontext()",
        "tests/test_company_precision.py -k autocast",
    ),
    Mutation(
        "Company",
        "solve.py",
        "return torch.compiler.disable(entry)",
        "return entry",
        "tests/test_company_compile.py -k two_graphs",
    ),
    Mutation(
        "Company",
        "status.py",
        "torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, group=self.process_group)",
        "pass",
        "tests/test_company_ranks.py",
    ),
    # Memory.
    Mutation(
        "Memory",
        "adjoints/implicit.py",
        "        with torch.no_grad():\n            outcome = solve(problem)\n        z, bad",
        "        outcome = solve(problem)\n        z, bad",
        "tests/test_cost.py -k memory",
    ),
    Mutation(
        "Memory",
        "adjoints/attachment.py",
        "        ctx.pull = pull\n",
        "        ctx.pull = pull\n        ctx.self = ctx\n",
        "tests/test_company.py -k reference_counting",
    ),
    # Speed, as counts.
    Mutation(
        "Speed",
        "loop.py",
        "first = False",
        "first = problem.evaluate(z) is None",
        "tests/test_honesty.py -k callback",
    ),
]


def survives(mutation: Mutation) -> bool:
    """Whether the tests pass although the library is broken."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src", f"{folder}/src", ignore=shutil.ignore_patterns("__pycache__"))
        path = Path(folder, "src", "equilibria", mutation.file)
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        environment = os.environ | {
            "PYTHONPATH": f"{folder}/src",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        # In a process group of ranks that no longer agree all wait for each other: that is noticed by the time limit.
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(mutation.tests)]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return False
        assert done.returncode in (0, 1), f"{mutation} could not be tried:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.returncode == 0


def main(laws: list[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if not laws or mutation.law in laws]
    survivors = 0
    for mutation in chosen:
        lives = survives(mutation)
        survivors += lives
        first = mutation.old.strip().splitlines()[0]
        print(f"{'SURVIVED' if lives else 'noticed':8}  {mutation.law:8}  {mutation.file}: {first}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations were noticed.")
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
