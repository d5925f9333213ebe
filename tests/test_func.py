"""The law of company, for torch.func: every transform of a solve is that of the iteration unrolled to convergence."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from maps import STRUCTURES, Cell, join, leaves, matrix, normal, split, tanh_map, width
from torch import Tensor, func, nn

import equilibria as eq

DOUBLE = torch.float64
EXACT = eq.Implicit(rtol=1e-13)
TIGHT = {"rtol": 1e-13, "atol": 0.0, "adjoint": EXACT}
B, N = 2, 3

Solve = Callable[..., Tensor]


def f(z: Tensor, w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ w + x)


def g(z: Tensor, w: Tensor, x: Tensor) -> Tensor:
    return z - f(z, w, x)


ZEROS = torch.zeros(B, N, dtype=DOUBLE)


def fixed_point(w: Tensor, x: Tensor, z0: Tensor = ZEROS) -> Tensor:
    return eq.fixed_point(f, z0, w, x, **TIGHT).value


def root(w: Tensor, x: Tensor, z0: Tensor = ZEROS) -> Tensor:
    return eq.root(g, z0, w, x, atol=1e-13, adjoint=EXACT).value


def unrolled(w: Tensor, x: Tensor, z0: Tensor = ZEROS) -> Tensor:
    z = z0
    for _ in range(60):
        z = f(z, w, x)
    return z


def loss(solve: Solve) -> Solve:
    def scalar(*inputs: Tensor) -> Tensor:
        z = solve(*inputs)
        return (z**3).sum() + z.sum()

    return scalar


def assert_same(a: Any, b: Any, tolerance: float = 1e-8) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.shape == y.shape
        assert torch.isfinite(x).all()
        assert (x - y).abs().max() < tolerance


W, X = matrix(N, 0, 0.5), normal(B, N, seed=1)
TW, TX = normal(N, N, seed=2), normal(B, N, seed=3)
WS = torch.stack([matrix(N, seed, 0.5) for seed in range(4)])
XS, ZS = normal(4, B, N, seed=5), normal(4, B, N, seed=6)
BOTH = (0, 1)


def first(solve: Solve) -> Solve:
    return lambda *inputs: solve(*inputs)[0].sum()


def ordinary_second_derivatives_of_vmap(s: Solve) -> Any:
    w, x = W.clone().requires_grad_(), XS.clone().requires_grad_()
    z = func.vmap(s, in_dims=(None, 0))(w, x)
    gradients = torch.autograd.grad((z**3).sum(), (w, x), create_graph=True)
    return torch.autograd.grad(sum((gradient**2).sum() for gradient in gradients), (w, x))


def tangent(s: Solve) -> Any:
    with fwAD.dual_level():
        return tuple(fwAD.unpack_dual(s(fwAD.make_dual(W, TW), fwAD.make_dual(X, TX))))


def gradient_of_tangent(s: Solve) -> Any:
    x = X.clone().requires_grad_()
    with fwAD.dual_level():
        return torch.autograd.grad(fwAD.unpack_dual(loss(s)(W, fwAD.make_dual(x, TX))).tangent, x)


def tangent_of_gradient(s: Solve) -> Any:
    w = W.clone().requires_grad_()
    with fwAD.dual_level():
        (gradient,) = torch.autograd.grad(loss(s)(fwAD.make_dual(w, TW), X), w, create_graph=True)
        return fwAD.unpack_dual(gradient).tangent.detach()


TRANSFORMS: dict[str, Callable[[Solve], Any]] = {
    "grad": lambda s: func.grad(loss(s), BOTH)(W, X),
    "grad_and_value": lambda s: func.grad_and_value(loss(s))(W, X),
    "vjp": lambda s: func.vjp(s, W, X)[1](TX),
    "jvp": lambda s: func.jvp(s, (W, X), (TW, TX)),
    "jvp of one input": lambda s: func.jvp(lambda x: s(W, x), (X,), (TX,)),
    "jacrev": lambda s: func.jacrev(s, BOTH)(W, X),
    "jacrev in chunks": lambda s: func.jacrev(s, BOTH, chunk_size=2)(W, X),
    "jacfwd": lambda s: func.jacfwd(s, BOTH)(W, X),
    # Second derivatives, in all modes, and third ones.
    "forward over reverse": lambda s: func.hessian(loss(s), BOTH)(W, X),
    "reverse over reverse": lambda s: func.jacrev(func.jacrev(loss(s), BOTH), BOTH)(W, X),
    "reverse over forward": lambda s: func.jacrev(func.jacfwd(loss(s), BOTH), BOTH)(W, X),
    "forward over forward": lambda s: func.jacfwd(func.jacfwd(loss(s), BOTH), BOTH)(W, X),
    "hessian-vector product": lambda s: func.jvp(func.grad(loss(s)), (W, X), (TW, TX)),
    "third, forward": lambda s: func.jacfwd(func.jacfwd(func.jacfwd(lambda x: first(s)(W, x))))(X),
    "third, reverse": lambda s: func.jacrev(func.jacrev(func.jacrev(lambda x: first(s)(W, x))))(X),
    "third, mixed": lambda s: func.jacfwd(func.jacrev(func.jacfwd(lambda x: first(s)(W, x))))(X),
    "grad of hessian": lambda s: func.grad(lambda w: func.hessian(loss(s), 1)(w, X).square().sum())(W),
    # Mapped over each input, and over several.
    "vmap of weights": lambda s: func.vmap(s, in_dims=(0, None))(WS, X),
    "vmap of inputs": lambda s: func.vmap(s, in_dims=(None, 0))(W, XS),
    "vmap of starts": lambda s: func.vmap(s, in_dims=(None, None, 0))(W, X, ZS),
    "vmap of all": lambda s: func.vmap(s)(WS, XS, ZS),
    "in_dims": lambda s: func.vmap(s, in_dims=(1, 2, -2))(WS.movedim(0, 1), XS.movedim(0, 2), ZS.movedim(0, 1)),
    "out_dims": lambda s: func.vmap(s, in_dims=(None, 0), out_dims=2)(W, XS),
    "vmap in chunks": lambda s: func.vmap(s, in_dims=(None, 0), chunk_size=3)(W, XS),
    "nested vmap": lambda s: func.vmap(func.vmap(s, in_dims=(None, 0)), in_dims=(0, None))(WS, XS),
    "nested vmap of one input": lambda s: func.vmap(func.vmap(lambda x: s(W, x)))(XS.expand(2, 4, B, N)),
    "triple vmap": lambda s: func.vmap(func.vmap(func.vmap(s, (None, 0)), (0, None)), (None, 1))(WS, XS[:, None]),
    # Compositions of both.
    "grad of vmap": lambda s: func.grad(lambda *a: func.vmap(loss(s), (None, 0))(*a).sum(), BOTH)(W, XS),
    "vmap of grad": lambda s: func.vmap(func.grad(loss(s), BOTH), in_dims=(None, 0))(W, XS),
    "jvp of vmap": lambda s: func.jvp(func.vmap(s, in_dims=(None, 0)), (W, XS), (TW, ZS)),
    "vmap of jvp": lambda s: func.vmap(lambda x, t: func.jvp(lambda x: s(W, x), (x,), (t,)))(XS, ZS),
    "vmap of vjp": lambda s: func.vmap(func.vjp(s, W, X)[1])(XS),
    "vmap of hessian": lambda s: func.vmap(func.hessian(loss(s)), in_dims=(None, 0))(W, XS),
    "jacrev of vmap": lambda s: func.jacrev(func.vmap(s, in_dims=(0, None)))(WS, X),
    "grad of vmap of grad": lambda s: func.grad(
        lambda w: func.vmap(func.grad(loss(s), 1), in_dims=(None, 0))(w, XS).square().sum()
    )(W),
    "vmap of grad of vmap": lambda s: func.vmap(
        func.grad(lambda w, x: func.vmap(loss(s), in_dims=(None, 0))(w, x).sum()), in_dims=(0, None)
    )(WS, XS),
    # With derivatives outside torch.func.
    "ordinary second derivatives of vmap": ordinary_second_derivatives_of_vmap,
    "forward mode": tangent,
    "reverse over forward mode": gradient_of_tangent,
    "forward mode over reverse": tangent_of_gradient,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformed_equilibrium_is_the_transformed_iteration(name: str):
    assert_same(TRANSFORMS[name](fixed_point), TRANSFORMS[name](unrolled))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformed_root_is_the_transformed_iteration(name: str):
    assert_same(TRANSFORMS[name](root), TRANSFORMS[name](unrolled))


CORE = ["grad", "jvp", "jacrev", "jacfwd", "forward over reverse", "vmap of all", "vmap of grad"]


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize(
    "options",
    [
        {"solver": eq.Picard()},
        {"solver": eq.Broyden()},
        {"solver": eq.Newton(eq.Dense(), linear_rtol=1e-8)},
        {"adjoint": eq.Implicit(solver=eq.Picard(), rtol=1e-13)},
        {"adjoint": eq.Implicit(solver=eq.Dense(), rtol=1e-13)},
        {"adjoint": eq.Implicit(solver=eq.BiCGSTAB(), rtol=1e-13)},
        {"batch_dims": 0},
        {"batch_dims": 2, "norm": eq.max_norm},
    ],
    ids=lambda options: " ".join(getattr(value, "__name__", str(value)) for value in options.values()),
)
def test_every_solver_and_batch(name: str, options: dict[str, Any]):
    def solve(w: Tensor, x: Tensor, z0: Tensor = ZEROS) -> Tensor:
        return eq.fixed_point(f, z0, w, x, **{**TIGHT, **options}).value

    if options.get("batch_dims") == 2:  # every entry a sample: the map must not couple them
        w, x = W[0], X

        def entrywise(z: Tensor, w: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(z * w + x)

        def solve(x: Tensor) -> Tensor:
            return eq.fixed_point(entrywise, ZEROS, w, x, **{**TIGHT, **options}).value

        def plain(x: Tensor) -> Tensor:
            z = ZEROS
            for _ in range(60):
                z = entrywise(z, w, x)
            return z

        assert_same(func.vmap(func.jacrev(solve))(XS), func.vmap(func.jacrev(plain))(XS))
        assert_same(func.hessian(loss(solve))(x), func.hessian(loss(plain))(x))
        return
    assert_same(TRANSFORMS[name](solve), TRANSFORMS[name](unrolled))


@pytest.mark.parametrize("batch_dims", [0, 1, 2])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_states_of_every_structure(structure: str, batch_dims: int):
    n, batch = width(structure), (2, 3)[:batch_dims]
    w, xs = matrix(n, 0, 0.4), normal(4, *batch, n, seed=1)
    function, zeros = tanh_map(structure, batch_dims), split(torch.zeros(*batch, n, dtype=DOUBLE), structure)

    def solve(w: Tensor, x: Tensor) -> Tensor:
        # The arguments in a structure of their own, with what is no tensor among them.
        def call(z: Any, arguments: dict[str, Any], scale: float) -> Any:
            return function(z, arguments["w"], arguments["x"][0] * scale)

        sol = eq.fixed_point(call, zeros, {"w": w, "x": [x, "text"]}, 1.0, batch_dims=batch_dims, **TIGHT)
        return join(sol.value, batch_dims)

    def plain(w: Tensor, x: Tensor) -> Tensor:
        z = torch.zeros(*batch, n, dtype=DOUBLE)
        for _ in range(60):
            z = torch.tanh(z @ w + x)
        return z

    for transform in (
        lambda s: func.jacrev(s, BOTH)(w, xs[0]),
        lambda s: func.jvp(s, (w, xs[0]), (w, xs[1])),
        lambda s: func.vmap(func.grad(loss(s), BOTH), in_dims=(None, 0))(w, xs),
        lambda s: func.jvp(func.grad(loss(s), BOTH), (w, xs[0]), (w, xs[1])),
    ):
        assert_same(transform(solve), transform(plain))


def test_the_minimum_of_an_objective_and_one_on_a_line():
    def objective(z: Tensor, a: Tensor) -> Tensor:
        return ((z - a) ** 2).sum(dim=1) + 0.1 * (z**4).sum(dim=1)

    def solve(a: Tensor) -> Tensor:
        return eq.argmin(objective, ZEROS, a, atol=1e-12).value

    def plain(a: Tensor) -> Tensor:
        z = ZEROS
        for _ in range(80):  # Newton's method on the entries, which are apart
            z = z - (2 * (z - a) + 0.4 * z**3) / (2 + 1.2 * z**2)
        return z

    for transform in (
        lambda s: func.vmap(s)(XS),
        lambda s: func.hessian(loss(s))(X),
        lambda s: func.vmap(func.grad(loss(s)))(XS),
    ):
        assert_same(transform(solve), transform(plain))

    def on_a_line(b: Tensor, a: Tensor) -> Tensor:
        equality = torch.ones(1, N, dtype=DOUBLE), b
        square = lambda z, a: ((z - a) ** 2).sum(dim=1)  # noqa: E731
        return eq.argmin(square, ZEROS, a, atol=1e-12, equality=equality).value

    def projected(b: Tensor, a: Tensor) -> Tensor:
        return a + (b - a.sum(dim=1, keepdim=True)) / N

    b = normal(4, 1, seed=7)
    assert_same(func.vmap(func.jacrev(on_a_line))(b, XS), func.vmap(func.jacrev(projected))(b, XS))


# Modules.


class Unrolled(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(60):
            z = self.cell(z, x, **keywords)
        return z


class Buffered(Cell):
    """A cell with a buffer, a tied parameter and a keyword."""

    def __init__(self, n: int) -> None:
        super().__init__(n, norm=0.5)
        self.register_buffer("shift", normal(n, seed=9))
        self.tied = nn.Linear(n, n, dtype=DOUBLE)
        self.tied.weight, self.tied.bias = self.linear.weight, self.linear.bias

    def forward(self, z: Tensor, x: Tensor, gain: Any = 1.0) -> Tensor:
        return torch.tanh(0.5 * (self.linear(z) + self.tied(self.tied(z))) * gain + x + self.shift)


def models() -> tuple[nn.Module, nn.Module]:
    cell = Buffered(N)
    return eq.DEQ(cell, rtol=1e-13, adjoint=EXACT), Unrolled(cell)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def gradient_of_a_module(model: nn.Module) -> Any:
    def scalar(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return func.functional_call(model, p, (x,)).square().sum()

    return func.grad(scalar, BOTH)(parameters(model), X)


def gradients_of_each_sample(model: nn.Module) -> Any:
    def scalar(p: dict[str, Tensor], x: Tensor, gain: Tensor) -> Tensor:
        return func.functional_call(model, p, (x[None],), {"gain": gain}).square().sum()

    gains = torch.tensor([0.5, 0.9], dtype=DOUBLE)
    return func.vmap(func.grad(scalar, (0, 1, 2)), in_dims=(None, 0, 0))(parameters(model), X, gains)


def ensemble(model: nn.Module) -> Any:
    stacked = {name: torch.stack([p, 0.5 * p]) for name, p in parameters(model).items()}
    return func.vmap(lambda p, x: func.functional_call(model, p, (x,)), in_dims=(0, None))(stacked, X)


def hessian_of_a_module(model: nn.Module) -> Any:
    return func.hessian(lambda p: func.functional_call(model, p, (X,)).square().sum())(parameters(model))


def buffers_and_parameters(model: nn.Module) -> Any:
    tensors = {**parameters(model), **dict(model.named_buffers())}
    return func.grad(lambda t: func.functional_call(model, t, (X,)).square().sum())(tensors)


def parameters_outside(model: nn.Module) -> Any:
    z = func.vmap(lambda x: model(x[None]))(X)
    return torch.autograd.grad(z.square().sum(), list(model.parameters()))


def with_a_module_held_twice(model: nn.Module) -> Any:
    model = copy.deepcopy(model)
    model.cell.same = model.cell.linear
    before = list(model.parameters())
    gradients = func.vmap(func.grad(lambda x: model(x[None]).square().sum()))(X)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    return gradients


def inside_a_larger_model(model: nn.Module) -> Any:
    linears = [nn.Linear(N, N, dtype=DOUBLE) for _ in range(2)]
    with torch.no_grad():
        for seed, linear in enumerate(linears):
            linear.weight.copy_(matrix(N, seed, 0.5))
            linear.bias.zero_()
    whole = nn.Sequential(linears[0], model, linears[1])

    def scalar(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return func.functional_call(whole, p, (x[None],)).square().sum()

    return func.vmap(func.grad(scalar), in_dims=(None, 0))(parameters(whole), X)


@pytest.mark.parametrize(
    "transform",
    [
        gradient_of_a_module,
        gradients_of_each_sample,
        ensemble,
        hessian_of_a_module,
        buffers_and_parameters,
        parameters_outside,
        with_a_module_held_twice,
        inside_a_larger_model,
    ],
)
def test_a_layer_under_transforms(transform: Callable[[nn.Module], Any]):
    layer, reference = models()
    assert_same(transform(layer), transform(reference))


def test_gradients_of_each_sample_are_those_of_it_alone():
    layer, _ = models()

    def scalar(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return func.functional_call(layer, p, (x[None],)).square().sum()

    each = func.vmap(func.grad(scalar), in_dims=(None, 0))(parameters(layer), X)
    for i, x in enumerate(X):
        alone = copy.deepcopy(layer)
        alone(x[None]).square().sum().backward()
        for name, parameter in alone.named_parameters():
            assert_same(each[name][i], parameter.grad)


class Nested(nn.Module):
    """A cell with an equilibrium of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.outer = Cell(N, norm=0.4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.outer(z, 0.3 * self.inner(z + x))


def test_a_layer_inside_a_layer():
    inner, plain_inner = models()
    layer, reference = eq.DEQ(Nested(inner), rtol=1e-12, adjoint=EXACT), Unrolled(Nested(plain_inner))
    assert_same(gradient_of_a_module(layer), gradient_of_a_module(reference))
    x = X[:, None]
    for transform in (
        lambda m: func.vmap(func.grad(lambda x: m(x).square().sum()))(x),
        lambda m: func.jvp(m, (X,), (TX,)),
    ):
        assert_same(transform(layer), transform(reference))


# What a solve says about itself.


def test_the_solution_is_told_for_each_entry_of_a_mapped_axis():
    # Entries that converge at different speeds, and one that cannot.
    slopes = torch.tensor([0.1, 0.9, 1.5], dtype=DOUBLE)

    def solve(a: Tensor) -> eq.Solution:
        return eq.fixed_point(
            lambda z, a: a * z + 1, ZEROS, a, solver=eq.Picard(), max_steps=30, rtol=1e-6, on_failure="ignore"
        )

    def told(a: Tensor) -> tuple[Tensor, ...]:
        sol = solve(a)
        assert sol.evaluations == 30
        return sol.value, sol.status, sol.steps, sol.residual, sol.converged

    mapped = func.vmap(told)(slopes)
    for i, a in enumerate(slopes):
        sol = solve(a)
        for all_of_them, one in zip(
            mapped, (sol.value, sol.status, sol.steps, sol.residual, sol.converged), strict=True
        ):
            assert torch.equal(all_of_them[i], one)
    assert mapped[1].tolist() == [[0, 0], [1, 1], [1, 1]]


def test_failures_follow_the_policy_under_every_transform():
    def solve(x: Tensor, on_failure: str) -> Tensor:
        return eq.fixed_point(f, ZEROS, W, x, max_steps=2, on_failure=on_failure).value.sum()

    for transform in (func.grad, func.vmap, func.jacfwd):
        x = XS if transform is func.vmap else X
        with pytest.raises(eq.SolveError, match=r"solve: .* raise max_steps"):
            transform(lambda x: solve(x, "raise"))(x)
        with pytest.warns(eq.ConvergenceWarning, match="raise max_steps"):
            transform(lambda x: solve(x, "warn"))(x)
        transform(lambda x: solve(x, "ignore"))(x)


def test_failures_of_the_backward_solve_are_told():
    adjoint = eq.Implicit(solver=eq.Picard(), rtol=1e-10, max_steps=2)

    def solve(x: Tensor) -> Tensor:
        return eq.fixed_point(f, ZEROS, W, x, adjoint=adjoint).value.sum()

    for transform in (func.grad, func.jacfwd):
        with pytest.raises(eq.SolveError, match="backward solve"):
            transform(solve)(X)


@pytest.mark.parametrize("poison", [torch.nan, 1e300])
def test_a_sample_that_meets_nan_adds_nothing_to_derivatives(poison: float):
    def cubic(z: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return 0.1 * (z @ w) ** 3 + x

    def scalar(w: Tensor, x: Tensor) -> Tensor:
        sol = eq.fixed_point(cubic, torch.zeros_like(x), w, x, on_failure="ignore", **TIGHT)
        return sol.value.nan_to_num(0, 0, 0).sum()

    x = normal(3, N, seed=0) * 0.3
    bad = x.clone()
    bad[1] = poison
    good = x[[0, 2]]
    gradients, expected = func.grad(scalar, BOTH)(W, bad), func.grad(scalar, BOTH)(W, good)
    assert_same(gradients[0], expected[0])
    assert_same(gradients[1][[0, 2]], expected[1])
    assert not gradients[1][1].any()
    _, t = func.jvp(lambda w: scalar(w, bad), (W,), (TW,))
    assert_same(t, func.jvp(lambda w: scalar(w, good), (W,), (TW,))[1])
    mapped = func.vmap(func.grad(scalar, BOTH), in_dims=(None, 0))(W, torch.stack([bad, x]))
    assert_same(mapped[0][0], expected[0])


def test_aux_state_and_reports():
    def call(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return f(z, W, x), (z * x).sum(dim=1)

    def scalar(x: Tensor) -> tuple[Tensor, Tensor]:
        sol = eq.fixed_point(call, ZEROS, x, has_aux=True, **TIGHT)
        again = eq.fixed_point(call, ZEROS, x, has_aux=True, state=sol.state, **TIGHT)
        assert again.evaluations <= 2  # and the one that reads aux
        return sol.value.sum() + again.value.sum(), sol.aux

    gradients, aux = func.vmap(func.grad(scalar, has_aux=True))(XS)
    z = func.vmap(lambda x: unrolled(W, x))(XS)
    assert_same(aux, (z * XS).sum(dim=2))
    assert_same(gradients, 2 * func.vmap(func.grad(lambda x: unrolled(W, x).sum()))(XS))
    # What is told by the side is plain data with the mapped axes in front.
    layer, _ = models()
    with eq.monitor(layer) as reports:
        func.vmap(func.grad(lambda x: layer(x).sum()))(XS)
    (report,) = reports
    assert report.status.shape == report.residual.shape == (4, B)
    assert report.adjoint.status is not None
    assert report.adjoint.status.shape == (4, B)


def test_a_callback_sees_plain_states_with_mapped_axes_in_front():
    seen = []

    def solve(x: Tensor) -> Tensor:
        return eq.fixed_point(f, ZEROS, W, x, callback=lambda it: seen.append(it.value.shape)).value

    func.vmap(solve)(XS)
    assert set(seen) == {torch.Size((4, B, N))}


def test_the_start_has_no_derivative():
    z0 = normal(B, N, seed=4)
    assert not func.grad(lambda z0: fixed_point(W, X, z0).sum())(z0).any()
    assert not func.jacfwd(lambda z0: fixed_point(W, X, z0))(z0).any()


def test_empty_axes_and_batches():
    assert func.vmap(lambda x: fixed_point(W, x))(XS[:0]).shape == (0, B, N)
    empty = torch.zeros(0, N, dtype=DOUBLE)
    assert func.grad(lambda x: fixed_point(W, x, empty).sum())(empty).shape == (0, N)


def test_precision_and_autocast():
    x, w = X.float(), W.float()

    def scalar(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sol = eq.fixed_point(f, torch.zeros(B, N), w, x)
        return sol.value.sum()

    gradients = func.grad(scalar)(x)
    assert gradients.dtype == torch.float32
    assert (gradients - func.grad(lambda x: unrolled(W, x).sum())(X)).abs().max() < 0.05


# What cannot work says so.


def captured_weights(w: Tensor) -> Tensor:
    return eq.fixed_point(lambda z, x: f(z, w, x), ZEROS, X).value.sum()


def made_inside(x: Tensor) -> Tensor:
    shift = torch.ones(N, dtype=DOUBLE)
    return eq.fixed_point(lambda z, x: f(z, W, x + shift), ZEROS, x).value.sum()


@pytest.mark.parametrize(
    "refused",
    [
        lambda: func.grad(captured_weights)(W),
        lambda: func.vmap(captured_weights)(WS),
        lambda: func.jvp(captured_weights, (W,), (TW,)),
        lambda: func.vmap(func.grad(captured_weights))(WS),
        lambda: func.grad(lambda x: captured_weights(W.clone() * x.sum()))(X),
        # Captured by the inner solve at another level than the one it is differentiated at.
        lambda: func.jvp(lambda w: func.grad(lambda x: captured_weights(w) * x.sum())(X), (W,), (TW,)),
        lambda: func.vmap(func.grad(made_inside))(XS),
        lambda: func.hessian(made_inside)(X),
    ],
)
def test_captured_tensors_of_a_transform_are_refused(refused: Callable[[], Any]):
    with pytest.raises(ValueError, match=r"f captures a tensor .* pass it in \*args"):
        refused()


def test_captured_tensors_that_require_grad_are_refused_and_others_are_constants():
    w = W.clone().requires_grad_()

    def scalar(x: Tensor) -> Tensor:
        return eq.fixed_point(lambda z, x: f(z, w, x), ZEROS, x, **TIGHT).value.sum()

    with pytest.raises(ValueError, match="captures"):
        func.grad(scalar)(X)
    with pytest.raises(ValueError, match="captures"), fwAD.dual_level():
        scalar(fwAD.make_dual(X, TX))
    with torch.no_grad():  # nobody can ask for its gradient
        assert_same(func.grad(scalar)(X), func.grad(lambda x: unrolled(W, x).sum())(X))
    w = W
    assert_same(func.grad(scalar)(X), func.grad(lambda x: unrolled(W, x).sum())(X))


@pytest.mark.parametrize("adjoint", [eq.Phantom(2), eq.OneStep(), eq.Neumann(3), eq.Unrolled()], ids=str)
def test_adjoints_without_rules_map_but_are_not_differentiated(adjoint: Any):
    def scalar(x: Tensor) -> Tensor:
        return eq.fixed_point(f, ZEROS, W, x, **{**TIGHT, "adjoint": adjoint}).value.sum()

    for transform in (func.grad, func.jacfwd):
        with pytest.raises(NotImplementedError, match=r"has no derivatives .* use adjoint=eq.Implicit\(\)"):
            transform(scalar)(X)
    assert_same(func.vmap(scalar)(XS), func.vmap(lambda x: unrolled(W, x).sum())(XS))


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(NotImplementedError, match=r"use torch\.func\.jvp for linearize"):
        func.linearize(lambda x: fixed_point(W, x), X)


def test_errors_name_shapes_as_one_entry_sees_them():
    with pytest.raises(ValueError, match=r"f must return the shape of the state, \(2, 3\), but returned \(2, 2\)"):
        func.vmap(lambda x: eq.fixed_point(lambda z, x: (z + x)[:, :2], ZEROS, x).value)(XS)
    with pytest.raises(ValueError, match="f draws random numbers"):
        func.vmap(lambda x: eq.fixed_point(lambda z, x: f(nn.functional.dropout(z), W, x), ZEROS, x).value)(XS)


def test_inputs_of_a_transform_stay_as_they_are():
    w, x = W.clone(), XS.clone()
    func.vmap(func.grad(loss(fixed_point), BOTH), in_dims=(None, 0))(w, x)
    assert torch.equal(w, W)
    assert torch.equal(x, XS)
