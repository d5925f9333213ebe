"""Layers one after the other against the one that they are fused to, a layer against its steps, and what embedded
networks ask of solvers and adjoints."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import join, matrix, normal, split, width
from test_solvers import chain
from torch import Tensor, nn

import equilibria as eq
from equilibria.universal import fuse, unfold

DOUBLE = torch.float64
EXACT = {"rtol": 1e-12, "max_steps": 300, "adjoint": eq.Implicit(rtol=1e-13, max_steps=300)}


def flat(x) -> Tensor:
    return join(x, 1)


class Part(nn.Module):
    """tanh(A z + B x) on a state of any structure, contracting; of any input."""

    def __init__(self, inputs: int, structure: str, n: int, seed: int) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(matrix(n, seed, 0.6)), nn.Parameter(normal(inputs, n, seed=seed + 1))
        self.structure = structure

    def initial_state(self, x, *_):
        rows = flat(x)
        return split(rows.new_zeros(rows.shape[0], len(self.A)), self.structure)

    def forward(self, z, x, shift=0.0, gain=1.0):
        return split(torch.tanh(flat(z) @ self.A + gain * flat(x) @ self.B + shift), self.structure)


class WithoutStart(Part):
    initial_state = None  # pyright: ignore[reportAssignmentType]


class Read(nn.Module):
    """A readout with parameters: all leaves, to another width."""

    def __init__(self, n: int, out: int, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(n, out, seed=seed))

    def forward(self, z):
        return torch.sin(flat(z) @ self.weight)


SOLVERS = {
    "picard": eq.Picard(),
    "relaxed": eq.Picard(0.7),
    "anderson": eq.Anderson(),
    "anderson3": eq.Anderson(history=3),
    "broyden": eq.Broyden(),
    "newton": eq.Newton(),
}
PART = st.tuples(
    st.sampled_from(["tensor", "tuple", "dict", "nested", "plain"]),
    st.integers(1, 5),
    st.sampled_from([None, 1, 3, flat]),
)


def layers(parts, solvers, inputs: int, **options) -> list[eq.DEQ]:
    """Layers that fit one behind the other; "plain" has no start of its own and a state like its input."""
    made = []
    for k, ((structure, n, readout), solver) in enumerate(zip(parts, solvers, strict=True)):
        plain = structure == "plain"
        if plain and k and parts[k - 1][0] != "plain" and made[-1].readout is None:
            made[-1].readout = flat
        n = inputs if plain else n if structure == "tensor" else width(structure)
        cell = (WithoutStart if plain else Part)(inputs, "tensor" if plain else structure, n, seed=31 * k)
        if isinstance(readout, int):
            inputs, readout = readout, Read(n, readout, seed=31 * k + 5)
        else:
            inputs = n
        made.append(eq.DEQ(cell, solver=SOLVERS[solver], readout=readout, **(EXACT | options)))
    return made


def stack(deqs, *inputs, **keywords):
    value = deqs[0](*inputs, **keywords)
    for deq in deqs[1:]:
        value = deq(value)
    return value


def tensors(deqs) -> list[Tensor]:
    return [p for deq in deqs for p in deq.parameters()]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), nest=st.sampled_from(["flat", "left", "right"]))
def test_value_and_gradients_are_those_of_the_stack(data, batch, nest):
    parts = data.draw(st.lists(PART, min_size=1, max_size=4))
    same = data.draw(st.booleans())
    some = st.sampled_from(sorted(SOLVERS))
    solvers = [data.draw(some)] * len(parts) if same else [data.draw(some) for _ in parts]
    deqs = layers(parts, solvers, inputs=3)
    if nest == "left":
        fused = fuse(fuse(*deqs[:-1]), deqs[-1]) if len(deqs) > 1 else fuse(fuse(*deqs))
    else:
        fused = fuse(*deqs) if nest == "flat" else fuse(deqs[0], *([fuse(*deqs[1:])] if deqs[1:] else []))
    x = normal(batch, 3, seed=2).requires_grad_()
    shift = normal(batch, len(deqs[0].cell.A), seed=3).requires_grad_()
    want, got = stack(deqs, x, shift, gain=0.5), fused(x, shift, gain=0.5)
    assert fused.solve(x, shift, gain=0.5).converged.all()
    wanted, gotten = (torch.utils._pytree.tree_leaves(t) for t in (want, got))
    torch.testing.assert_close(gotten, wanted, rtol=1e-8, atol=1e-8)
    assert torch.utils._pytree.tree_structure(got) == torch.utils._pytree.tree_structure(want)
    v = [normal(*leaf.shape, seed=4) for leaf in wanted]
    of = [x, shift, *tensors(deqs)]
    assert {id(p) for p in fused.parameters()} == {id(p) for p in tensors(deqs)}
    wants = torch.autograd.grad(wanted, of, v, allow_unused=True)
    grads = torch.autograd.grad(gotten, of, v, allow_unused=True)
    for grad, wished in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad, wished, rtol=1e-8, atol=1e-8 * max(1.0, float(wished.abs().max())))


def two(**options) -> list[eq.DEQ]:
    return layers([("dict", 0, 4), ("tensor", 2, None)], ["anderson"] * 2, inputs=3, **options)


def test_the_state_is_a_tuple_of_states_and_the_step_that_of_theorem_2():
    deqs = two()
    fused = fuse(*deqs)
    assert list(fused.cell.deqs) == deqs
    x = normal(5, 3, seed=0)
    w1, w2 = {"h": normal(5, 3, seed=1), "c": normal(5, 2, 1, seed=2)}, normal(5, 2, seed=3)
    image = fused.cell((w1, w2), x)
    assert torch.equal(flat(image[0]), flat(deqs[0].cell(w1, x)))
    assert torch.equal(image[1], deqs[1].cell(w2, deqs[0].readout(w1)))
    value = fused.solve(x).value
    assert [type(state) for state in value] == [dict, Tensor]
    assert torch.equal(fused(x), fused.solve(x).value[1])


def test_what_comes_between_may_be_any_structure():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.B = nn.Parameter(matrix(3, 0, 0.5)), nn.Parameter(matrix(2, 1, 0.5))

        def forward(self, z, x):  # starts from zeros like its input, a pair
            return torch.tanh(z[0] @ self.A + x[0]), torch.cos(z[1] @ self.B + x[1])

    first = eq.DEQ(Part(4, "tensor", 5, seed=0), readout=lambda z: (z[:, :3], z[:, 3:]), **EXACT)
    second = eq.DEQ(Both(), **EXACT)
    x = normal(2, 4, seed=9)
    for got, want in zip(fuse(first, second)(x), second(first(x)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_layer_may_come_twice():
    (deq,) = layers([("tensor", 3, None)], ["anderson"], inputs=3)
    x = normal(2, 3, seed=1)
    fused = fuse(deq, deq)
    torch.testing.assert_close(fused(x), deq(deq(x)), rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(fused(x).sum(), [deq.cell.A, deq.cell.B])
    torch.testing.assert_close(grads, torch.autograd.grad(deq(deq(x)).sum(), [deq.cell.A, deq.cell.B]))
    assert len(list(fused.parameters())) == 2


def test_it_is_monitored_pickled_copied_saved_and_loaded_as_any_layer():
    deqs = two()
    fused = fuse(*deqs)
    x = normal(4, 3, seed=0)
    with eq.monitor(nn.Sequential(fused)) as reports:
        fused(x).sum().backward()
    assert [(report.name, report.status.tolist()) for report in reports] == [("0", [0] * 4)]
    assert (reports[0].adjoint.status == 0).all()
    for twin in (pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
        assert torch.equal(twin(x), fused(x))
        with torch.no_grad():  # its readout is its own
            twin.cell.deqs[1].cell.A.zero_()
        assert not torch.equal(twin(x), fused(x))
    names = {f"cell.deqs.{k}.{name}" for k, deq in enumerate(deqs) for name in deq.state_dict()}
    assert set(fused.state_dict()) == names
    other = fuse(*two())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), fused(x))
    assert "readout=that of the last layer" in repr(fused)


def test_transforms_see_the_parameters_of_all_parts():
    deqs = two()
    fused, x = fuse(*deqs), normal(4, 3, seed=0)
    parameters = {name: p.detach() for name, p in fused.named_parameters()}
    got = torch.func.grad(lambda p: torch.func.functional_call(fused, p, (x,)).sum())(parameters)
    fused(x).sum().backward()
    for name, p in fused.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-9, atol=1e-9)


def test_options_are_those_that_the_parts_share_or_the_strictest():
    def made(**options):
        return eq.DEQ(Part(3, "tensor", 3, seed=0), **options)

    fused = fuse(made(), made())
    assert (fused.solver, fused.rtol, fused.atol, fused.on_failure) == (eq.Anderson(), None, None, "warn")
    assert (fused.max_steps, fused.eval_max_steps) == (80, None)
    assert fused.adjoint == eq.Implicit(max_steps=200)
    fused = fuse(
        made(solver=eq.Broyden(), rtol=1e-3, atol=1e-9, eval_max_steps=7, on_failure="ignore"),
        made(solver=eq.Broyden(), rtol=1e-5, adjoint=eq.Implicit(rtol=1e-4, order=2), on_failure="raise"),
        made(solver=eq.Broyden(), max_steps=5, adjoint=eq.Implicit(eq.Picard(), rtol=1e-6, max_steps=3)),
    )
    assert (fused.solver, fused.rtol, fused.atol, fused.on_failure) == (eq.Broyden(), 1e-5, 1e-9, "raise")
    assert (fused.max_steps, fused.eval_max_steps) == (85, 52)
    assert fused.adjoint == eq.Implicit(rtol=1e-6, max_steps=203, order=2)
    assert fuse(made(solver=eq.Picard()), made(solver=eq.Picard(0.5))).solver == eq.Anderson()
    for adjoint in (eq.OneStep(), eq.Phantom(3), eq.Neumann(3)):
        # They would not reach the first part.
        assert fuse(made(adjoint=adjoint), made(adjoint=adjoint)).adjoint == eq.Implicit()
        assert fuse(made(adjoint=adjoint)).adjoint == adjoint
    assert fuse(made(adjoint=eq.Unrolled()), made(adjoint=eq.Unrolled())).adjoint == eq.Unrolled()
    assert fuse(made(adjoint=eq.Unrolled()), made()).adjoint == eq.Implicit()
    norm = {"norm": eq.max_norm, "batch_dims": 0}
    assert (fuse(made(**norm), made(**norm)).norm, fuse(made(**norm)).batch_dims) == (eq.max_norm, 0)


def test_tolerances_of_zero_are_kept_where_all_have_them():
    exact = {"solver": eq.Picard(), "rtol": 0.0, "atol": 0.0, "adjoint": eq.Implicit(eq.Picard(), 0.0, 9)}
    a, b = (eq.DEQ(Part(3, "tensor", 3, seed=k), **exact) for k in range(2))
    fused = fuse(a, b)
    assert (fused.solver, fused.rtol, fused.atol) == (eq.Picard(), 0.0, 0.0)
    assert fused.adjoint == eq.Implicit(eq.Picard(), 0.0, 18)
    mixed = fuse(a, eq.DEQ(Part(3, "tensor", 3, seed=2), rtol=1e-7))
    assert (mixed.solver, mixed.rtol, mixed.atol) == (eq.Anderson(), 1e-7, None)
    assert mixed.adjoint == eq.Implicit(max_steps=109)


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ("()", TypeError, "at least one"),
        ("(nn.Linear(2, 2),)", TypeError, "not Linear .*eq.universal.embed"),
        ("(eq.DEQ, )", TypeError, "not type"),
        (
            "(eq.DEQ(Part(3, 'tensor', 3, 0)), eq.DEQ(Part(3, 'tensor', 3, 0), norm=eq.max_norm))",
            ValueError,
            "max_norm",
        ),
        ("(eq.DEQ(Part(3, 'tensor', 3, 0)), eq.DEQ(Part(3, 'tensor', 3, 0), batch_dims=2))", ValueError, "1, 2"),
    ],
)
def test_what_cannot_be_fused_is_refused_in_words(parts, error, words):
    with pytest.raises(error, match=words):
        fuse(*eval(parts))


def test_a_part_that_is_no_module_keeps_its_gradient():
    w = matrix(3, 5, 0.5).requires_grad_()
    with pytest.warns(UserWarning, match=r"no nn.Module"):
        closure = eq.DEQ(lambda z, x: torch.tanh(z @ w + x), **EXACT)
    (deq,) = layers([("tensor", 3, None)], ["anderson"], inputs=3)
    x = normal(2, 3, seed=1)
    got = torch.autograd.grad(fuse(closure, deq)(x).sum(), w)
    torch.testing.assert_close(got, torch.autograd.grad(deq(closure(x)).sum(), w), rtol=1e-9, atol=1e-9)


def test_a_sample_is_solved_as_alone_beside_one_of_nan():
    fused = fuse(*two(on_failure="ignore"))
    x = normal(3, 3, seed=0)
    x[1] = torch.nan
    sol = fused.solve(x)
    assert sol.status.tolist() == [0, eq.Status.NONFINITE, 0]
    alone = fused.solve(x[[0, 2]])
    torch.testing.assert_close(sol.value[1][[0, 2]], alone.value[1], rtol=1e-12, atol=1e-12)
    assert sol.steps[[0, 2]].tolist() == alone.steps.tolist()


class Normalised(Part):
    """With statistics of the batch, or a mask."""

    def __init__(self, inputs: int, n: int, seed: int, inside: nn.Module) -> None:
        super().__init__(inputs, "tensor", n, seed)
        self.inside = inside

    def forward(self, z, x):
        return torch.tanh(z @ self.A + 0.3 * self.inside(x @ self.B + 0.1 * z))


def test_batchnorm_in_training_is_one_joint_problem_and_its_statistics_move_once():
    made = [eq.DEQ(Normalised(3, 3, k, nn.BatchNorm1d(3, dtype=DOUBLE)), **EXACT) for k in range(2)]
    twins = copy.deepcopy(made)
    x = normal(6, 3, seed=0)
    fused = fuse(*made)
    torch.testing.assert_close(fused(x), stack(twins, x), rtol=1e-9, atol=1e-9)
    for deq, twin in zip(made, twins, strict=True):
        assert deq.cell.inside.num_batches_tracked == 1
        torch.testing.assert_close(deq.cell.inside.running_mean, twin.cell.inside.running_mean)
    modes = [fuse(*made).training, fuse(*(deq.eval() for deq in made)).training]
    assert modes == [True, False]
    assert not any(part.training for part in fuse(*made).modules())
    assert not any(part.training for part in unfold(made[0], 2).modules())


def test_masks_hold_through_a_solve_and_stock_dropout_between_parts_is_refused():
    dropout = eq.nn.VariationalDropout(0.5)
    deq = eq.DEQ(Normalised(3, 3, 0, dropout), **EXACT)
    read = nn.Sequential(nn.Dropout(0.5))
    x = normal(4, 3, seed=0)
    assert fuse(deq, deq).solve(x).converged.all()
    with pytest.raises(ValueError, match=r"Dropout 'deqs.0.readout.0'"):
        fuse(eq.DEQ(Part(3, "tensor", 3, 0), readout=read), deq)(x)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_contractions_take_about_the_maximum_of_their_evaluations_and_networks_the_sum(parts):
    deqs = layers([("tensor", 6, None)] * parts, ["picard"] * parts, inputs=6)
    x, counts = normal(4, 6, seed=0), []
    value = x
    for deq in deqs:
        sol = deq.solve(value)
        value = sol.value.detach()
        counts.append(sol.evaluations)
    joint = fuse(*deqs).solve(x).evaluations
    assert max(counts) <= joint <= 1.3 * max(counts) + 5 * parts
    assert joint < 0.8 * sum(counts)
    # What travels a layer a step takes as long together as one after the other.
    chains = [embedded(3, 4, 1.0, seed=k) for k in range(parts)]
    joint = fuse(*(deq for deq, _ in chains))
    assert joint.solve(normal(2, 4, seed=1)).evaluations == 3 * parts + 1


# Steps as layers.


def steps_by_hand(deq, steps, w, *inputs, **keywords):
    z = deq.cell.initial_state(*inputs)
    for _ in range(steps):
        image = deq.cell(z, *inputs, **keywords)
        z = torch.utils._pytree.tree_map(lambda a, b: (1 - w) * a + w * b, z, image)
    return deq.readout(z) if deq.readout is not None else z


@settings(derandomize=True, max_examples=25, deadline=None)
@given(part=PART, solver=st.sampled_from(["picard", "relaxed", "broyden"]), steps=st.integers(1, 6), many=st.booleans())
def test_an_unfolded_layer_is_its_steps_and_gradients_are_theirs(part, solver, steps, many):
    if part[0] == "plain":
        part = ("tensor", *part[1:])
    deqs = layers([part, ("tuple", 0, 2)][: 1 + many], [solver] * (1 + many), inputs=3)
    deq = fuse(*deqs) if many else deqs[0]
    network = unfold(deq, steps)
    x = normal(2, 3, seed=1).requires_grad_()
    w = 0.7 if solver == "relaxed" else 1.0
    got, want = network(x, gain=0.5), steps_by_hand(deq, steps, w, x, gain=0.5)
    torch.testing.assert_close(flat(got), flat(want), rtol=1e-13, atol=1e-14)
    of = [x, *deq.parameters()]
    wants = torch.autograd.grad(flat(want).sum(), of, allow_unused=True)
    torch.testing.assert_close(torch.autograd.grad(flat(got).sum(), of, allow_unused=True), wants)
    errors = [(flat(unfold(deq, k)(x)) - flat(deq(x))).abs().max().item() for k in (1, 20, 150)]
    assert errors[2] < 1e-9
    assert errors[1] <= max(errors[0], 1e-9)


@pytest.mark.parametrize("kind", ["one", "fused", "embedded", "with statistics"])
@pytest.mark.parametrize("training", [False, True])
def test_an_unfolded_layer_is_exported(kind, training):
    if kind == "embedded":
        deq, _ = embedded(5, 3, 3.0, seed=0)
    elif kind == "with statistics":
        deq = eq.DEQ(Normalised(3, 3, 0, nn.BatchNorm1d(3, dtype=DOUBLE)), **EXACT)
        training = False
    else:
        deq = fuse(*two()) if kind == "fused" else two()[0]
    network = unfold(deq.train(training), 6)
    x = normal(4, 3, seed=0)
    program = torch.export.export(network, (x,), dynamic_shapes={"inputs": ({0: torch.export.Dim("batch")},)})
    for batch in (x, normal(7, 3, seed=1)):
        torch.testing.assert_close(program.module()(batch), network(batch), rtol=1e-14, atol=1e-15)


def test_the_parameters_are_shared_under_the_names_of_the_layer():
    deq = two()[0]
    network = unfold(deq, 3)
    assert [(name, id(p)) for name, p in network.named_parameters()] == [
        (name, id(p)) for name, p in deq.named_parameters()
    ]
    network.load_state_dict(deq.state_dict())
    assert torch.equal(pickle.loads(pickle.dumps(network))(normal(2, 3, seed=0)), network(normal(2, 3, seed=0)))
    assert unfold(deq.eval(), 1).training is False


@pytest.mark.parametrize("kind", ["statistics", "masks"])
def test_what_holds_still_in_a_solve_holds_still_through_the_steps(kind):
    inside = nn.BatchNorm1d(3, dtype=DOUBLE) if kind == "statistics" else eq.nn.VariationalDropout(0.5)
    deq = eq.DEQ(Normalised(3, 3, 0, inside), **EXACT)
    network = unfold(copy.deepcopy(deq), 100)
    x = normal(4, 3, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        want = deq(x)
        torch.manual_seed(0)
        got = network(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for one, other in zip(network.buffers(), deq.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_steps_keep_the_dtype_of_the_state():
    class Half(nn.Module):
        def forward(self, z, x):
            return (0.5 * z + x).bfloat16()

    deq = eq.DEQ(Half())
    x = normal(2, 3, seed=0).float()
    got = unfold(deq, 20)(x)
    assert got.dtype == deq(x).dtype == torch.float32
    torch.testing.assert_close(got, deq(x), rtol=2e-2, atol=1e-2)


def test_what_cannot_be_unfolded_is_refused():
    with pytest.raises(TypeError, match="not Linear"):
        unfold(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match="at least 1"):
        unfold(two()[0], 0)


# What embedded networks ask.


class Stages(nn.Module):
    """The stack of activations of tanh layers, all updated at once."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def initial_state(self, x):
        return tuple(torch.zeros_like(x) for _ in self.weights)

    def forward(self, z, x):
        return tuple(torch.tanh(h @ w) for h, w in zip((x, *z), self.weights, strict=False))


def last(z):
    return z[-1]


def embedded(length: int, n: int, scale: float, seed: int):
    """A network as a layer, exact both ways; and the network."""
    cell = Stages([scale * torch.linalg.qr(matrix(n, 50 * seed + k, 1.0)).Q for k in range(length)])
    adjoint = eq.Implicit(eq.Picard(), 0.0, length + 2)
    deq = eq.DEQ(cell, eq.Picard(), adjoint, rtol=0.0, atol=0.0, max_steps=length + 1, readout=last, on_failure="raise")

    def network(x):
        for w in cell.weights:
            x = torch.tanh(x @ w)
        return x

    return deq, network


@pytest.mark.parametrize("lengths", [(1,), (2, 5), (8, 3, 6)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_fused_networks_are_the_network_to_the_last_digits(lengths, scale):
    parts = [embedded(length, 4, scale, seed=k) for k, length in enumerate(lengths)]
    fused = fuse(*(deq for deq, _ in parts))
    x = normal(3, 4, seed=0).requires_grad_()
    want = x
    for _, network in parts:
        want = network(want)
    got = fused(x)
    assert torch.equal(got, want)
    of = [x, *fused.parameters()]
    for grad, wished in zip(torch.autograd.grad(got.sum(), of), torch.autograd.grad(want.sum(), of), strict=True):
        torch.testing.assert_close(grad, wished, rtol=1e-10, atol=0)


SHIPPED = {
    "Picard": eq.Picard(),
    "Anderson": eq.Anderson(),
    "Anderson(20)": eq.Anderson(history=20),
    "Broyden": eq.Broyden(),
    "Broyden(100)": eq.Broyden(history=100),
    "Newton": eq.Newton(),
    "Newton(Dense)": eq.Newton(eq.Dense()),
}


@pytest.mark.parametrize("kind", ["tanh", "linear"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("length", [4, 8, 24])
def test_every_solver_solves_an_embedded_network_or_says_that_it_did_not(length, scale, kind):
    for seed in range(2):
        f, zeros, truth = chain(length, 3, scale, seed=10 * seed, linear=kind == "linear")
        for name, solver in SHIPPED.items():
            newton = isinstance(solver, eq.Newton)
            room = (13 if length == 24 else 30) if newton else 400
            sol = eq.fixed_point(f, zeros, solver=solver, rtol=1e-8, max_steps=room, on_failure="ignore")
            error = (sol.value - truth).norm(dim=1) / truth.norm(dim=1)
            with torch.no_grad():
                left = (f(sol.value) - sol.value).norm(dim=1) / f(sol.value).norm(dim=1)
            torch.testing.assert_close(sol.residual, left, rtol=1e-9, atol=0)
            assert (left[sol.converged] <= 1e-8 * (1 + 1e-6)).all(), name
            assert (error[sol.converged] < 1e-6).all(), (name, error)
            assert newton or sol.converged.all(), (name, sol.status)
            # A residual is all that was asked for, and it permits what the layers amplify it to; to rounding.
            permitted = left * sum(scale**k for k in range(length)) * f(sol.value).norm(dim=1) / truth.norm(dim=1)
            assert (error <= permitted + 1e-12).all(), (name, error, permitted)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("length", [4, 12])
def test_the_same_holds_of_networks_with_biases_where_no_activation_waits_at_zero(length, scale):
    modules = []
    for k in range(length):
        linear = nn.Linear(3, 3, dtype=DOUBLE)
        linear.weight.data = scale * torch.linalg.qr(matrix(3, k, 1.0)).Q
        linear.bias.data = normal(3, seed=k)
        modules += [linear, nn.Tanh()]
    network, x = nn.Sequential(*modules), normal(3, 3, seed=0)
    layer, truth = eq.universal.embed(network, x), network(x)
    layer.rtol, layer.atol, layer.on_failure = 1e-8, 0.0, "ignore"
    for name, solver in SHIPPED.items():
        newton = isinstance(solver, eq.Newton)
        layer.solver, layer.max_steps = solver, 20 if newton else 400
        with torch.no_grad():
            sol = layer.solve(x)
        error = (layer.readout(sol.value) - truth).norm(dim=1) / truth.norm(dim=1)
        assert (error[sol.converged] < 1e-6).all(), (name, error)
        assert newton or sol.converged.all(), (name, sol.status)
        wrong = error > 1e-3
        assert (sol.status[wrong] == eq.Status.MAX_STEPS).all(), name


@pytest.mark.parametrize("reach", [1, 2, 5, 8])
def test_the_gradient_of_a_few_steps_reaches_as_many_layers_of_a_network(reach):
    length = 8
    deq, network = embedded(length, 4, 1.0, seed=0)
    x = normal(3, 4, seed=0)
    exact = torch.autograd.grad(network(x).square().sum(), list(deq.cell.weights))
    adjoints = [eq.Phantom(reach), eq.Neumann(reach), *([eq.OneStep()] if reach == 1 else [])]
    for adjoint in adjoints:
        deq.adjoint = adjoint
        got = torch.autograd.grad(deq(x).square().sum(), list(deq.cell.weights), materialize_grads=True)
        reached = [k for k, grad in enumerate(got) if grad.abs().max() > 0]
        assert reached == list(range(length - reach, length)), adjoint
        for k in reached:
            torch.testing.assert_close(got[k], exact[k], rtol=1e-12, atol=1e-15)


def test_a_fused_layer_differentiated_by_one_step_trains_its_last_part_alone():
    deqs = two(adjoint=eq.OneStep())
    fused, x = fuse(*deqs), normal(4, 3, seed=0)
    fused.adjoint = eq.OneStep()
    fused(x).sum().backward()
    assert deqs[1].cell.A.grad is not None
    assert all(p.grad is None or not p.grad.any() for p in deqs[0].cell.parameters())


def test_embedded_networks_and_ordinary_layers_mix():
    first, second = (
        nn.Sequential(nn.Linear(a, 6), nn.Tanh(), nn.Linear(6, b)).double() for a, b in ((5, 3), (2, 4))
    )  # fmt: skip
    for k, p in enumerate((*first.parameters(), *second.parameters())):
        p.data.copy_(normal(*p.shape, seed=k) / 2)
    x = normal(4, 5, seed=0).requires_grad_()
    deqs = [
        eq.universal.embed(first, x.detach(), form="affine"),
        eq.DEQ(Part(3, "dict", 5, seed=1), readout=Read(5, 2, seed=2), **EXACT),
        eq.universal.embed(second, normal(2, 2, seed=0)),
    ]
    fused = fuse(*deqs)
    assert (fused.solver, fused.rtol) == (eq.Anderson(), 1e-12)
    want, got = second(deqs[1](first(x))), fused(x)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    assert {id(p) for p in fused.parameters()} == {id(p) for p in tensors([first, deqs[1], second])}
    of = [x, *fused.parameters()]
    wanted, found = (torch.autograd.grad(value.sin().sum(), of) for value in (want, got))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    for deq in (deqs[0], fused):
        torch.testing.assert_close(unfold(deq, 80)(x), deq(x), rtol=1e-9, atol=1e-9)
        network = unfold(deq, 5)
        program = torch.export.export(network, (x.detach(),))
        torch.testing.assert_close(program.module()(x), network(x), rtol=1e-13, atol=1e-14)


def test_widths_add_up():
    lengths, n = (3, 5), 4
    fused = fuse(*(embedded(length, n, 1.0, seed=length)[0] for length in lengths))
    state = fused.solve(normal(2, n, seed=0)).value
    assert flat(state).shape == (2, n * sum(lengths))
