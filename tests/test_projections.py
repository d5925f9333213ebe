"""Projections: nearest, idempotent, with right gradients, in company."""

import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import equilibria as eq
from equilibria.nn import (
    AffineProjection,
    BoxProjection,
    L1BallProjection,
    SecondOrderConeProjection,
    SimplexProjection,
)

DOUBLE = torch.float64
N = 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def affine(m: int, n: int, seed: int, rank: int | None = None) -> AffineProjection:
    rank = min(m, n) if rank is None else rank
    A = normal(m, rank, seed=seed) @ normal(rank, n, seed=seed + 1)
    return AffineProjection(A, A @ normal(n, seed=seed + 2))


# From a size and a seed to a projection.
MAKERS: dict[str, Callable[[int, int], nn.Module]] = {
    "simplex": lambda n, seed: SimplexProjection(0.5 + seed % 3),
    "ball": lambda n, seed: L1BallProjection(0.5 + seed % 3),
    "box": lambda n, seed: BoxProjection(-normal(n, seed=seed).abs(), 0.3),
    "cone": lambda n, seed: SecondOrderConeProjection(),
    "affine": lambda n, seed: affine(max(n // 2, 1), n, seed),
    "dependent": lambda n, seed: affine(n + 1, n, seed, rank=max(n // 3, 1)),
}
everyone = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
shapes = st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(0, 999), st.sampled_from([0.1, 1.0, 30.0]))


def violation(project: nn.Module, z: Tensor) -> Tensor:
    """How far the constraints are from being met, by their definition."""
    if isinstance(project, SimplexProjection):
        return torch.maximum((z.sum(-1) - project.radius).abs(), (-z).amax(-1).relu())
    if isinstance(project, L1BallProjection):
        return (z.abs().sum(-1) - project.radius).relu()
    if isinstance(project, BoxProjection):
        return torch.maximum(project.low - z, z - project.high).relu().amax(-1)
    if isinstance(project, SecondOrderConeProjection):
        return (z[..., 1:].norm(dim=-1) - z[..., 0]).relu()
    assert isinstance(project, AffineProjection)
    return (z @ project.A.T - project.b).abs().amax(-1)


@everyone
@settings(max_examples=25)
@given(case=shapes)
def test_it_is_feasible_idempotent_and_nearest(make, case):
    batch, n, seed, scale = case
    project, x = make(n, seed), scale * normal(batch, n, seed=seed)
    z = project(x)
    assert (violation(project, z) <= 1e-10 * (1 + scale)).all()
    torch.testing.assert_close(project(z), z, rtol=1e-10, atol=1e-10)
    # Other points of the set, near and far: x - z makes no acute angle with the way to any of them.
    for other in range(6):
        y = project(z + 10.0 ** (2 - other) * normal(batch, n, seed=seed + 7 + other))
        assert (((x - z) * (y - z)).sum(-1) <= 1e-10 * (1 + scale) * 1e3).all()
        assert ((x - z).norm(dim=-1) <= (x - y).norm(dim=-1) + 1e-10).all()


CONSTRAINTS = {
    "simplex": [{"type": "eq", "fun": lambda z: z.sum() - 1.5}, {"type": "ineq", "fun": lambda z: z}],
    "ball": [{"type": "ineq", "fun": lambda z: 1.5 - abs(z).sum()}],
    "cone": [{"type": "ineq", "fun": lambda z: z[0] - (z[1:] @ z[1:]) ** 0.5}],
}


@pytest.mark.parametrize("seed", [1, 4, 7])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_general_solver_finds_the_same_point(name, seed):
    x = normal(4, seed=seed)
    found = scipy.optimize.minimize(
        lambda z: ((z - x.numpy()) ** 2).sum(),
        x.numpy() + 0.1,
        constraints=CONSTRAINTS[name],
        method="SLSQP",
        tol=1e-12,
    )
    z = MAKERS[name](4, 1)(x)
    torch.testing.assert_close(z, torch.from_numpy(found.x), rtol=0, atol=1e-4)
    assert (z - x).square().sum() <= found.fun + 1e-6


@everyone
@settings(max_examples=6)
@given(n=st.integers(1, 6), seed=st.integers(0, 999))
def test_first_and_second_derivatives_are_those_of_finite_differences(make, n, seed):
    project, x = make(n, seed), normal(2, n, seed=seed).mul(2).requires_grad_()
    assert gradcheck(project, (x,))
    assert gradgradcheck(project, (x,))


def with_parameters(make: Callable[..., nn.Module], *values: Tensor):
    """A function of the input and of the values that the projection is made of."""
    return lambda x, *values: make(*values)(x), (normal(3, 4, seed=5).mul(2), *values)


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (SimplexProjection, (torch.tensor(1.3, dtype=DOUBLE),)),
        (SimplexProjection, (torch.tensor([0.4, 1.0, 9.0], dtype=DOUBLE),)),
        (L1BallProjection, (torch.tensor([0.4, 1.0, 99.0], dtype=DOUBLE),)),
        (BoxProjection, (-normal(4).abs(), normal(3, 1).abs())),
        (AffineProjection, (normal(2, 4, seed=1), normal(2, seed=2))),
        (AffineProjection, (normal(3, 2, 4, seed=1), normal(2, seed=2))),
        (AffineProjection, (normal(2, 4, seed=1), normal(3, 2, seed=2))),
    ],
)
def test_gradients_flow_into_what_the_set_is_made_of(make, values):
    function, inputs = with_parameters(make, *values)
    inputs = tuple(value.clone().requires_grad_() for value in inputs)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_gradients_into_dependent_rows_are_those_along_changes_that_keep_the_rank():
    x, left = normal(3, 4, seed=3), normal(3, 2, seed=4)

    def project(right: Tensor, b: Tensor) -> Tensor:
        return AffineProjection(left @ right, left @ b)(x)

    assert gradcheck(project, (normal(2, 4, seed=5).requires_grad_(), normal(2, seed=6).requires_grad_()))


KINKS = {
    "cone at its tip": (SecondOrderConeProjection(), [0.0, 0, 0]),
    "cone on its axis": (SecondOrderConeProjection(), [1.0, 0, 0]),
    "cone below its tip": (SecondOrderConeProjection(), [-1.0, 0, 0]),
    "cone at its boundary": (SecondOrderConeProjection(), [5.0, 3, 4]),
    "cone at its polar": (SecondOrderConeProjection(), [-5.0, 3, 4]),
    "ties": (SimplexProjection(), [2.0, 2, 2]),
    "at the threshold": (SimplexProjection(), [1.0, 0, 0]),
    "a simplex of one point": (SimplexProjection(nn.Parameter(torch.zeros(()))), [1.0, 2, 2]),
    "a ball of one point": (L1BallProjection(nn.Parameter(torch.zeros(()))), [0.0, 0, 0]),
    "ball at its boundary": (L1BallProjection(), [0.5, -0.5, 0]),
    "box of one point": (BoxProjection(nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))), [0.0, 1, 2]),
}


@pytest.mark.parametrize(("project", "point"), KINKS.values(), ids=KINKS)
def test_at_a_kink_the_jacobian_is_a_projection_between_nothing_and_all(project, point):
    x = torch.tensor(point, dtype=DOUBLE)
    jacobian = torch.autograd.functional.jacobian(project, x)
    torch.testing.assert_close(jacobian, jacobian.T)
    values = torch.linalg.eigvalsh(jacobian)
    assert (values >= -1e-12).all()
    assert (values <= 1 + 1e-12).all()
    for parameter in project.parameters():
        (gradient,) = torch.autograd.grad(project(x).square().sum(), [parameter])
        assert gradient.isfinite().all()


def test_a_box_of_one_point_moves_with_its_bounds():
    c = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    BoxProjection(c, c)(torch.tensor([0.0, 5.0, 2.0], dtype=DOUBLE)).sum().backward()
    torch.testing.assert_close(c.grad, torch.ones(3, dtype=DOUBLE))


COMPANIONS: dict[str, Callable[[], nn.Module]] = {
    "simplex": lambda: SimplexProjection(nn.Parameter(torch.tensor(1.5))),
    "ball": lambda: L1BallProjection(nn.Parameter(torch.tensor(1.5))),
    "box": lambda: BoxProjection(nn.Parameter(torch.tensor(-0.5)), torch.full((N,), 0.5)),
    "cone": SecondOrderConeProjection,
    "affine": lambda: AffineProjection(nn.Parameter(normal(2, N).float()), torch.ones(2)),
}
companions = pytest.mark.parametrize("make", COMPANIONS.values(), ids=COMPANIONS)


@companions
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_stays_alone(make, bad):
    project, shift = make(), torch.zeros(N, requires_grad=True)
    x = 2 * normal(3, N).float()
    reference = project(x[[0, 2]] + shift)
    wanted = torch.autograd.grad(reference.square().sum(), [shift, *project.parameters()])
    x[1, 2] = bad
    z = project(x + shift)
    torch.testing.assert_close(z[[0, 2]], reference)
    if not (isinstance(project, BoxProjection) and bad == math.inf):  # a box holds what is infinite
        assert z[1].isnan().any()
        loss = z.square().sum()
        found = torch.autograd.grad(loss, list(project.parameters()), retain_graph=True) if len(wanted) > 1 else ()
        for gradient, right in zip(found, wanted[1:], strict=True):
            torch.testing.assert_close(gradient, right + box_row(project, x))
        assert torch.autograd.grad(loss, shift)[0].isfinite().all()


def box_row(project: nn.Module, x: Tensor) -> Tensor | float:
    """What the finite entries of the bad row add, where entries are on their own."""
    if not isinstance(project, BoxProjection):
        return 0.0
    return 2 * float(torch.as_tensor(project.low).detach()) * (x[1] < project.low).sum()


def test_a_masked_entry_of_a_simplex_is_zero():
    x = torch.tensor([[0.2, -math.inf, 0.4]], dtype=DOUBLE, requires_grad=True)
    z = SimplexProjection()(x)
    torch.testing.assert_close(z, torch.tensor([[0.4, 0.0, 0.6]], dtype=DOUBLE))
    (gradient,) = torch.autograd.grad(z.square().sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[-0.2, 0.0, 0.2]], dtype=DOUBLE))


@companions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_single(make, dtype):
    project, x = make(), (3 * normal(4, N)).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        z = project(x)
    assert z.dtype == dtype
    assert torch.equal(z, project(x.float()).to(dtype))


@companions
def test_transforms_and_compilation_agree_with_plain_calls(make):
    project, x = make(), 2 * normal(4, N).float()
    torch.testing.assert_close(torch.vmap(project)(x), project(x))
    reference = torch.stack([torch.autograd.functional.jacobian(project, row) for row in x])
    torch.testing.assert_close(torch.vmap(torch.func.jacrev(project))(x), reference)
    torch.testing.assert_close(torch.vmap(torch.func.jacfwd(project))(x), reference)
    compiled = torch.compile(project, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.functional.jacobian(compiled, x[0]), reference[0])


@companions
def test_it_is_saved_loaded_copied_and_mutates_nothing(make):
    project, x = make(), 2 * normal(4, N).float()
    before, z = x.clone(), project(x)
    assert torch.equal(x, before)
    assert type(project).__name__ in repr(project)
    for other in (copy.deepcopy(project), pickle.loads(pickle.dumps(project))):
        assert torch.equal(other(x), z)
    fresh = make()
    fresh.load_state_dict(project.state_dict())
    assert torch.equal(fresh(x), z)
    assert project(x[:0]).shape == (0, N)
    assert torch.equal(project(x.view(2, 2, N)), z.view(2, 2, N))


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("name", ["simplex", "ball", "box", "cone", "affine"])
def test_extreme_entries_neither_overflow_nor_vanish(name, scale):
    x = 2 * normal(3, N)
    makers = {
        "simplex": lambda s: SimplexProjection(s),
        "ball": lambda s: L1BallProjection(s),
        "box": lambda s: BoxProjection(-s, s / 2),
        "cone": lambda s: SecondOrderConeProjection(),
        "affine": lambda s: AffineProjection(normal(2, N).float(), s * torch.ones(2)),
    }
    wide = (x * scale).float().requires_grad_()
    z = makers[name](scale)(wide)
    wanted = makers[name](1.0)(x)
    torch.testing.assert_close(z.double() / scale, wanted, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(z.sum(), wide)
    (right,) = torch.autograd.grad(makers[name](1.0)(x.requires_grad_()).sum(), x)
    torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=1e-4)


def test_a_simplex_far_from_its_input_holds_its_largest_entries():
    x = torch.tensor([[1e30, -1e30, 1e30], [3e38, -3e38, 0.0]])
    torch.testing.assert_close(SimplexProjection()(x), torch.tensor([[0.5, 0.0, 0.5], [1.0, 0.0, 0.0]]))


def test_a_million_entries_need_no_square():
    x = normal(1_000_000).float()
    for project in (SimplexProjection(10.0), L1BallProjection(10.0)):
        assert abs(project(x).abs().sum() - 10) < 1e-4
    z = SecondOrderConeProjection()(x)
    assert abs(z[1:].norm() / z[0] - 1) < 1e-5
    A = torch.ones(1, x.numel())
    assert abs(AffineProjection(A, torch.zeros(1))(x).double().mean()) < 1e-6


def test_a_set_that_training_has_emptied_gives_nan_and_no_gradient():
    x = normal(2, N).requires_grad_()
    simplex = SimplexProjection(nn.Parameter(torch.ones(2, dtype=DOUBLE)))
    box = BoxProjection(nn.Parameter(torch.zeros(2, 1, dtype=DOUBLE)), 1.0)
    A = nn.Parameter(torch.ones(2, 2, N, dtype=DOUBLE))
    plane = AffineProjection(A, torch.ones(2, dtype=DOUBLE))
    with torch.no_grad():
        simplex.radius[1], box.low[1], A[1, 1] = -1, 2, 2  # pyright: ignore[reportIndexIssue]
    for project in (simplex, box, plane):
        z = project(x)
        assert z[0].isfinite().all()
        assert z[1].isnan().all()
        for gradient in torch.autograd.grad(z.square().sum(), [x, *project.parameters()]):
            assert gradient.isfinite().all()
            assert (gradient[1] == 0).all()


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: SimplexProjection(-1), "radius must be finite and not negative"),
        (lambda: SimplexProjection(torch.tensor(-1.0)), "radius must be finite and not negative"),
        (
            lambda: L1BallProjection("1"),  # pyright: ignore[reportArgumentType]
            "radius must be a number",
        ),
        (lambda: L1BallProjection(torch.tensor(1)), "radius must be a floating tensor"),
        (lambda: BoxProjection(1, 0), "low must be at most high"),
        (lambda: BoxProjection(True, 0), "low must be a number"),
        (lambda: AffineProjection(torch.ones(2, 3), torch.tensor([0.0, 1.0])), "no solution"),
        (lambda: AffineProjection(torch.ones(2, 3), torch.ones(3)), "must be of shapes"),
        (
            lambda: AffineProjection([[1.0]], torch.ones(1)),  # pyright: ignore[reportArgumentType]
            "A must be a floating tensor",
        ),
        (lambda: SimplexProjection()(torch.ones(3, dtype=torch.int64)), "must be a floating tensor"),
        (lambda: SimplexProjection()(torch.ones(3, 0)), "last dimension of at least 1"),
        (lambda: SimplexProjection(torch.ones(2))(torch.ones(3, 2)), "must broadcast"),
        (lambda: BoxProjection(torch.zeros(2), 1)(torch.ones(3)), "low, of shape"),
        (lambda: AffineProjection(torch.ones(1, 3), torch.ones(1))(torch.ones(2, 4)), "must be 3"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(build, error):
    with pytest.raises((TypeError, ValueError), match=error):
        build()


class Descent(nn.Module):
    """Projected gradient descent on |Q z - x|^2 / 2, whose equilibrium is the constrained minimum."""

    def __init__(self, project: nn.Module, Q: Tensor) -> None:
        super().__init__()
        self.project, self.Q = project, nn.Parameter(Q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        step = 1 / torch.linalg.matrix_norm(self.Q.detach(), 2) ** 2
        return self.project(z - step * (z @ self.Q.T - x) @ self.Q)


@pytest.mark.parametrize("name", ["simplex", "ball", "box", "cone", "affine"])
def test_the_equilibrium_of_projected_descent_has_right_gradients(name):
    cell = Descent(MAKERS[name](4, 1), torch.eye(4, dtype=DOUBLE) + 0.2 * normal(4, 4, seed=9))
    layer = eq.DEQ(cell, rtol=1e-13, atol=0.0, max_steps=300, adjoint=eq.Implicit(rtol=1e-12))

    def solve(x: Tensor, Q: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"cell.Q": Q}, (x,))

    assert gradcheck(solve, (normal(2, 4, seed=1).mul(2).requires_grad_(), cell.Q.detach().clone().requires_grad_()))


def test_the_blocks_of_the_page_print_what_it_says():
    page = (Path(__file__).parents[1] / "docs" / "projections.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page.partition("## General cones")[0], re.DOTALL)
    names: dict[str, object] = {}
    for code, wanted in blocks:
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == wanted
    assert len(blocks) == 6
