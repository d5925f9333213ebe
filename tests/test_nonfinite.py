"""A sample whose function or derivative is not finite leaves no NaN where samples meet: in what they share."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import normal
from torch import Tensor

import equilibria as eq

DOUBLE = torch.float64
ADJOINTS = {
    "implicit": eq.Implicit(),
    "implicit-2": eq.Implicit(order=2),
    "neumann": eq.Neumann(60),
    "phantom": eq.Phantom(60),
    "onestep": eq.OneStep(),
    "unrolled": eq.Unrolled(),
}

# Each is infinite, or NaN, where x is the number beside it; w is shared by all samples.
SHARED = {
    "quotient": (lambda z, w, x: w / x, 0.0),
    "quotient, function": (lambda z, w, x: torch.div(w, x), 0.0),
    "quotient, method": (lambda z, w, x: w.div(x), 0.0),
    "quotient of a row": (lambda z, w, x: (w * z) / x, 0.0),
    "power": (lambda z, w, x: x**w, -1.0),
    "power, function": (lambda z, w, x: torch.pow(x, w), -1.0),
    "negative power": (lambda z, w, x: x ** (-w), 0.0),
    "base": (lambda z, w, x: (1 + w) ** x, torch.inf),
    "cosine over": (lambda z, w, x: torch.cos(w) / x.square(), 0.0),
    "addcdiv": (lambda z, w, x: torch.addcdiv(z, w, x), 0.0),
    "xlogy": (lambda z, w, x: torch.xlogy(w, x), -1.0),
    "times reciprocal": (lambda z, w, x: w * x.reciprocal(), 0.0),
    "times root": (lambda z, w, x: w * (x - 1e-3 * z.square()).sqrt(), -1.0),
    "matrix": (lambda z, w, x: x.log() @ w.diag(), -1.0),
}


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(SHARED)),
    adjoint=st.sampled_from(sorted(ADJOINTS)),
    rows=st.lists(st.booleans(), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_what_samples_share_gets_the_gradient_of_the_good_ones(name, adjoint, rows, seed):
    part, value = SHARED[name]

    def f(z: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return 0.3 * torch.tanh(z) + 0.1 * part(z, w, x)

    good = torch.tensor(rows)
    x = normal(len(rows), 3, seed=seed).abs() + 0.5
    broken = x.clone()
    broken[~good, 1] = value
    v = normal(len(rows), 3, seed=seed + 1)
    w = normal(3, seed=seed + 2).abs() + 0.5

    def gradients(x: Tensor, v: Tensor) -> tuple[eq.Solution, Tensor, Tensor]:
        x, shared = x.clone().requires_grad_(), w.clone().requires_grad_()
        options = {"solver": eq.Picard(), "adjoint": ADJOINTS[adjoint], "on_failure": "ignore", "rtol": 1e-12}
        sol = eq.fixed_point(lambda z: f(z, shared, x), torch.ones_like(x), **options)
        return sol, *torch.autograd.grad(sol.value, (shared, x), v, allow_unused=True)

    sol, got_w, got_x = gradients(broken, v)
    _, want_w, want_x = gradients(x[good], v[good])
    assert ((sol.status == eq.Status.NONFINITE) == ~good).all()
    torch.testing.assert_close(got_w, want_w, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got_x[good], want_x, rtol=1e-10, atol=1e-12)
    assert (got_x[~good] == 0).all()
