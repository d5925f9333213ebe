"""The law of options: what makes no sense is an error at once, in a sentence that names it and says what is allowed."""

import inspect
import math
from typing import Any, NamedTuple

import pytest
import torch
from maps import Cell
from torch import nn

import equilibria as eq

X = torch.ones(2, 3)
HALF = lambda z: 0.5 * z + 1  # noqa: E731


def solve(f: Any = HALF, z0: Any = X, *args, **options):
    return eq.fixed_point(f, z0, *args, **options)


def refused(call, kind: type[Exception], *words: str) -> None:
    """The call raises this kind of error in one readable sentence that has all the words."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind
    for word in words:
        assert word in message, message
    assert "\n" not in message
    assert message.endswith((".", "()", "...", ")")), message
    assert 20 < len(message) < 320, message


# Options of the parts, at their construction.

NOT_INTEGERS = [True, 2.0, "3", None, torch.tensor(2)]
TOO_SMALL = [0, -3]


@pytest.mark.parametrize("value", NOT_INTEGERS + TOO_SMALL)
@pytest.mark.parametrize(
    ("part", "name"),
    [
        (lambda v: eq.Anderson(history=v), "history"),
        (lambda v: eq.Phantom(steps=v), "steps"),
        (lambda v: eq.Implicit(max_steps=v), "max_steps"),
        (lambda v: eq.Implicit(order=v), "order"),
        (lambda v: eq.GMRES(restart=v), "restart"),
        (lambda v: solve(max_steps=v), "max_steps"),
        (lambda v: eq.DEQ(Cell(3), max_steps=v), "max_steps"),
        (lambda v: eq.diagnostics.spectral_radius(HALF, X, max_steps=v), "max_steps"),
    ],
)
def test_integers(part, name, value):
    wrong_kind = any(value is v for v in NOT_INTEGERS)
    refused(lambda: part(value), TypeError if wrong_kind else ValueError, name, "integer of at least 1", repr(value))


@pytest.mark.parametrize("value", [0, -0.1, 1.1, math.nan, math.inf, True, "0.5", None])
@pytest.mark.parametrize(
    "part",
    [
        lambda v: eq.Picard(relaxation=v),
        lambda v: eq.Anderson(relaxation=v),
        lambda v: eq.Phantom(2, relaxation=v),
    ],
)
def test_relaxations(part, value):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    refused(lambda: part(value), ValueError if number else TypeError, "relaxation", "(0, 1]", str(value))


@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf, True, "1e-3", torch.tensor(1e-3)])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        (lambda v: eq.Implicit(rtol=v), "rtol"),
        (lambda v: solve(rtol=v), "rtol"),
        (lambda v: solve(atol=v), "atol"),
        (lambda v: eq.DEQ(Cell(3), rtol=v), "rtol"),
        (lambda v: eq.DEQ(Cell(3), atol=v), "atol"),
        (lambda v: eq.diagnostics.spectral_radius(HALF, X, rtol=v), "rtol"),
    ],
)
def test_tolerances(part, name, value):
    number = isinstance(value, float)
    refused(lambda: part(value), ValueError if number else TypeError, name)


def test_an_rtol_of_none_where_a_number_is_needed():
    refused(lambda: eq.diagnostics.spectral_radius(HALF, X, rtol=None), TypeError, "rtol", "number")


@pytest.mark.parametrize("value", ["stop", None, True, 1])
@pytest.mark.parametrize("part", [lambda v: solve(on_failure=v), lambda v: eq.DEQ(Cell(3), on_failure=v)])
def test_on_failure(part, value):
    refused(lambda: part(value), ValueError, "on_failure", "'raise'", "'warn'", "'ignore'", repr(value))


def test_orders_that_do_not_exist():
    refused(lambda: eq.Implicit(order=3), ValueError, "order", "1, 2", "3")


@pytest.mark.parametrize("value", [None, 1, "yes", 0.0])
def test_checkpoint_is_true_or_false(value):
    refused(lambda: eq.Unrolled(checkpoint=value), TypeError, "checkpoint", "True or False", repr(value))


@pytest.mark.parametrize("place", [solve, lambda **options: eq.DEQ(Cell(3), **options)])
def test_parts_are_instances_of_their_kind(place):
    refused(lambda: place(solver=eq.Picard), TypeError, "solver", "instance", "Picard()")
    refused(lambda: place(adjoint=eq.OneStep), TypeError, "adjoint", "instance", "OneStep()")
    refused(lambda: place(solver="anderson"), TypeError, "solver", "eq.Anderson()", "'anderson'")
    refused(lambda: place(solver=None), TypeError, "solver", "eq.Anderson()")
    refused(lambda: place(solver=eq.GMRES()), TypeError, "solver", "init and step", "GMRES")
    refused(lambda: place(adjoint="implicit"), TypeError, "adjoint", "eq.Implicit()", "'implicit'")
    refused(lambda: place(adjoint=eq.Picard()), TypeError, "adjoint", "attach")
    refused(lambda: place(norm="rms"), TypeError, "norm", "'rms'")
    refused(lambda: place(norm=None), TypeError, "norm", "None")


def test_the_solver_of_implicit_is_an_instance_of_either_kind():
    refused(lambda: eq.Implicit(solver=eq.GMRES), TypeError, "solver", "instance", "GMRES()")
    refused(lambda: eq.Implicit(solver=eq.Picard), TypeError, "solver", "instance", "Picard()")
    refused(lambda: eq.Implicit(solver="gmres"), TypeError, "solver", "eq.GMRES() or eq.Picard()")
    refused(lambda: eq.Implicit(solver=eq.OneStep()), TypeError, "solver", "OneStep")


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -1])
@pytest.mark.parametrize("place", [solve, lambda **options: eq.DEQ(Cell(3), **options)])
def test_batch_dims(place, value):
    kind = ValueError if value == -1 and not isinstance(value, bool) else TypeError
    refused(lambda: place(batch_dims=value), kind, "batch_dims", "integer of at least 0")


def test_misspelt_options_are_named():
    for call in (
        lambda: solve(max_step=3),
        lambda: eq.Anderson(histroy=3),
        lambda: eq.Picard(relax=0.5),
        lambda: eq.Implicit(tol=1e-3),
        lambda: eq.DEQ(Cell(3), tol=1e-3),
        lambda: eq.GMRES(restarts=3),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            call()


def test_parts_are_frozen():
    for part in (eq.Picard(), eq.Anderson(), eq.Implicit(), eq.Phantom(2), eq.OneStep(), eq.Unrolled(), eq.GMRES()):
        with pytest.raises(AttributeError):
            part.relaxation = 0.5
        assert part == type(part)(**{k: getattr(part, k) for k in inspect.signature(type(part)).parameters})
        assert hash(part) == hash(part)


def test_the_options_of_a_layer_stay_checked_when_they_are_changed():
    layer = eq.DEQ(Cell(3, dtype=torch.float32))
    layer.max_steps = -3
    refused(lambda: layer(X), ValueError, "max_steps", "-3")
    layer.max_steps, layer.eval_max_steps = 30, 0
    layer.eval()
    refused(lambda: layer(X), ValueError, "max_steps", "0")
    layer.eval_max_steps = None
    refused(lambda: layer(X, max_steps=0), ValueError, "max_steps", "0")
    refused(lambda: layer.solve(X, max_steps=2.5), TypeError, "max_steps", "2.5")
    layer.on_failure = "panic"
    refused(lambda: layer(X), ValueError, "on_failure", "'panic'")


# The function.


@pytest.mark.parametrize("f", [None, 3, torch.ones(2)])
def test_f_is_callable(f):
    refused(lambda: solve(f), TypeError, "f must be callable")


class Pair(NamedTuple):
    h: torch.Tensor
    c: torch.Tensor


@pytest.mark.parametrize(
    ("z0", "f", "words"),
    [
        (X, lambda z: (z, z), ["f must return", "tensor", "tuple"]),
        (X, lambda z: None, ["f must return", "tensor", "NoneType"]),
        (X, lambda z: 1.0, ["f must return", "tensor", "float"]),
        (X, lambda z: [z], ["f must return", "tensor", "list"]),
        ((X, X), lambda z: z[0], ["structure", "tuple of 2", "tensor"]),
        ((X, X), lambda z: (z[0],), ["structure", "tuple of 2", "tuple of 1"]),
        ((X, X), lambda z: [z[0], z[1]], ["structure", "tuple of 2", "list of 2"]),
        ((X, X), lambda z: (z[0], None), ["f must return tensors", "NoneType"]),
        ({"h": X, "c": X}, lambda z: {"h": z["h"]}, ["structure", "'c'", "'h'"]),
        ({"h": X}, lambda z: {"H": z["h"]}, ["structure", "'h'", "'H'"]),
        ({"h": X}, lambda z: (z["h"],), ["structure", "dict", "tuple of 1"]),
        ({"h": (X, X)}, lambda z: {"h": z["h"][0]}, ["structure", "dict"]),
        ({"h": X}, lambda z: {"h": (z["h"], z["h"])}, ["f must return tensors", "tuple"]),
        (Pair(X, X), lambda z: (z.h, z.c), ["structure", "namedtuple of 2", "a tuple of 2"]),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_f_returns_the_structure_of_the_state(z0, f, words, grad):
    with torch.set_grad_enabled(grad):
        refused(lambda: solve(f, z0), TypeError, *words)


@pytest.mark.parametrize("structure", [tuple, list])
def test_named_tuples_and_lists_are_states_too(structure):
    sol = solve(lambda z: Pair(0.5 * z.h + 1, 0.1 * z.c + z.h), Pair(X, X))
    assert isinstance(sol.value, Pair)
    sol = solve(lambda z: structure([0.5 * z[0] + 1, 0.1 * z[1] + z[0]]), structure([X, X]))
    assert type(sol.value) is structure


@pytest.mark.parametrize(
    "f",
    [lambda z: z[:, :2], lambda z: z.sum(dim=1), lambda z: z[None], lambda z: z.T, lambda z: z[:1], lambda z: z.sum()],
)
def test_f_returns_the_shape_of_the_state(f):
    refused(lambda: solve(f), ValueError, "f must return the shape", "(2, 3)")


def test_a_leaf_of_another_shape_is_found_where_it_is():
    refused(
        lambda: solve(lambda z: {"a": z["a"], "b": z["b"][:, :1]}, {"a": X, "b": X}), ValueError, "(2, 3)", "(2, 1)"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.complex64])
def test_f_returns_no_wider_and_no_other_kind_of_number(dtype):
    refused(lambda: solve(lambda z: (0.5 * z + 1).to(dtype)), TypeError, "f returned", str(dtype), "torch.float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_f_may_return_lower_precision(dtype):
    sol = solve(lambda z: (0.5 * z + 1).to(dtype))
    assert sol.value.dtype == torch.float32
    assert sol.converged.all()


def test_half_precisions_do_not_stand_for_each_other():
    refused(lambda: solve(lambda z: z.half(), X.bfloat16()), TypeError, "f returned", "torch.float16", "torch.bfloat16")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("z0", [X, (X, X), {"h": X, "c": X}])
def test_an_f_that_changes_its_state_in_place_is_refused_and_the_start_is_as_it_was(mode, z0):
    def leaf(z):
        return z if isinstance(z, torch.Tensor) else z["h"] if isinstance(z, dict) else z[0]

    def f(z):
        leaf(z).mul_(0.5)
        return z

    with mode():
        refused(lambda: solve(f, z0), ValueError, "f changed its state in place", "z + ...")
    assert torch.equal(leaf(z0), torch.ones(2, 3))


def test_an_f_may_change_what_is_a_copy_of_its_state():
    # Leaves narrower than the widest are handed over as copies.
    z0 = {"h": X, "c": torch.ones(2, 3, dtype=torch.float64)}
    sol = solve(lambda z: {"h": z["h"].mul_(0.5).add_(1), "c": 0.5 * z["c"] + 1}, z0)
    torch.testing.assert_close(sol.value["h"], torch.full((2, 3), 2.0), rtol=1e-3, atol=0)
    assert torch.equal(z0["h"], torch.ones(2, 3))


def test_an_f_that_changes_its_state_late_is_refused_too():
    calls = []

    def f(z):
        calls.append(1)
        return z.mul_(0.5) if len(calls) == 4 else 0.9 * z + 1

    for grad in (False, True):
        calls.clear()
        with torch.set_grad_enabled(grad):
            refused(lambda: solve(f, solver=eq.Picard()), ValueError, "f changed its state in place")


def test_an_f_may_write_into_tensors_of_its_own():
    scratch = torch.empty(2, 3)
    sol = solve(lambda z: torch.mul(z, 0.5, out=scratch).add_(1), solver=eq.Picard())
    torch.testing.assert_close(sol.value, torch.full((2, 3), 2.0), rtol=1e-3, atol=0)
    # Its one buffer, given back each time, does not confuse a solver that remembers images.
    plain, reused = (
        solve(g, rtol=1e-6).steps
        for g in (lambda z: 0.5 * z + 1 + 0.2 * z.sin(), lambda z: scratch.copy_(0.5 * z + 1 + 0.2 * z.sin()))
    )
    assert torch.equal(plain, reused)


@pytest.mark.parametrize("z0", [X, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "f",
    [
        lambda z: 0.5 * z + torch.randn_like(z),
        lambda z: torch.nn.functional.dropout(0.5 * z + 1, 0.5),
        lambda z: 0.5 * torch.nn.functional.dropout(z, 0.5) + 1,
        lambda z: 0.5 * z + 0.1 * torch.rand(z.shape[0], 1).to(z),
    ],
)
def test_an_f_that_draws_random_numbers_is_found(f, grad, z0):
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        refused(lambda: solve(f, z0), ValueError, "f draws random numbers")


def test_drawing_numbers_that_change_nothing_is_no_error():
    sol = solve(lambda z: 0.5 * z + 1 + 0 * torch.randn_like(z))
    assert sol.converged.all()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, generator=generator)
    assert solve(lambda z: 0.5 * z + noise).converged.all()


@pytest.mark.parametrize("dropout", [nn.Dropout(0.1), nn.Dropout1d(0.1), nn.AlphaDropout(0.1)])
def test_dropout_in_a_cell_is_named(dropout):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 3), dropout)

        def forward(self, z, x):
            return 0.1 * self.body(z) + x

    layer = eq.DEQ(Dropping())
    refused(lambda: layer(X), ValueError, type(dropout).__name__, "'body.1'", "eval()")
    layer.eval()
    layer(X)
    layer.train()
    dropout.p = 0.0
    layer(X)


def test_has_aux_needs_a_pair():
    for f in (HALF, lambda z: (z, z, z), lambda z: [z, z], lambda z: (z,)):
        refused(lambda f=f: solve(f, has_aux=True), TypeError, "has_aux", "(state, aux)")
    refused(lambda: solve(lambda z: (z[:1], None), has_aux=True), ValueError, "shape")
    assert solve(lambda z: (HALF(z), None), has_aux=True).aux is None


# The state.


@pytest.mark.parametrize("z0", [torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)])
def test_an_integer_state(z0):
    refused(lambda: solve(z0=z0), TypeError, "z0", str(z0.dtype), "z0.float()")


def test_a_complex_state():
    refused(lambda: solve(z0=torch.ones(2, 3, dtype=torch.complex64)), TypeError, "z0", "torch.complex64")


@pytest.mark.parametrize("z0", [None, 1.0, "z", [X, None], {"h": X, "c": 2.0}, (X, [1])])
def test_leaves_that_are_no_tensors(z0):
    refused(lambda: solve(lambda z: z, z0), TypeError, "leaf of the state z0", "tensor")


@pytest.mark.parametrize("z0", [(), [], {}, ((), {})])
def test_a_state_without_leaves(z0):
    refused(lambda: solve(lambda z: z, z0), ValueError, "z0", "no tensor")


def test_more_batch_dims_than_a_leaf_has():
    refused(lambda: solve(batch_dims=3), ValueError, "batch_dims=3", "(2, 3)", "batch_dims=0")
    refused(lambda: solve(z0=torch.tensor(1.0)), ValueError, "batch_dims=1", "()", "batch_dims=0")
    assert solve(z0=torch.tensor(1.0), batch_dims=0).status.shape == ()
    assert solve(batch_dims=2).status.shape == (2, 3)
    refused(lambda: solve(lambda z: z, {"a": X, "b": torch.ones(2)}, batch_dims=2), ValueError, "batch_dims=2", "(2,)")


def test_leaves_of_different_batches():
    refused(lambda: solve(lambda z: z, (X, torch.ones(3, 3))), ValueError, "leaves", "first 1", "(2,)", "(3,)")


def test_a_norm_of_another_shape():
    refused(lambda: solve(norm=lambda leaf: leaf.norm()), ValueError, "norm", "one number per sample", "(2,)")
    refused(lambda: solve(norm=lambda leaf: leaf.abs()), ValueError, "norm", "(2, 3)")
    refused(lambda: solve(norm=lambda leaf: 1.0), ValueError, "norm", "float")


def test_state_dtype():
    for value in (torch.int32, torch.complex64, "float32", torch.tensor(1.0).dtype.itemsize):
        refused(lambda value=value: solve(state_dtype=value), ValueError, "state_dtype", "torch.float32", repr(value))
    assert solve(state_dtype=torch.float64, z0=X.bfloat16()).value.dtype == torch.float64
    refused(lambda: solve(lambda z: z.float(), state_dtype=torch.bfloat16), TypeError, "torch.float32", "state_dtype")


def test_a_callback_that_cannot_be_called():
    refused(lambda: solve(callback=[]), TypeError, "callback")


def test_a_stale_state():
    old = solve().state
    for z0 in (torch.ones(3, 3), torch.ones(2, 4), X.double(), (X,), {"h": X}):
        f = HALF if isinstance(z0, torch.Tensor) else lambda z: z
        refused(lambda f=f, z0=z0: solve(f, z0, state=old), ValueError, "state", "z0", "(2, 3)")
    refused(lambda: solve(batch_dims=0, state=old), ValueError, "state")
    for wrong in (X, solve(), (X, None)):
        refused(lambda wrong=wrong: solve(state=wrong), TypeError, "state", "sol.state", type(wrong).__name__)
    assert solve(state=old).evaluations == 1


# The layer.


def test_a_layer_of_a_class():
    refused(lambda: eq.DEQ(Cell), TypeError, "cell", "instance", "Cell(...)")
    refused(lambda: eq.DEQ(None), TypeError, "cell", "callable")


def test_other_options_of_a_layer():
    refused(lambda: eq.DEQ(Cell(3), eval_max_steps=0), ValueError, "eval_max_steps", "1")
    refused(lambda: eq.DEQ(Cell(3), eval_max_steps=2.5), TypeError, "eval_max_steps")
    refused(lambda: eq.DEQ(Cell(3), readout="last"), TypeError, "readout")


def test_a_layer_of_a_closure_says_once_that_its_parameters_are_not_registered():
    with pytest.warns(UserWarning, match="not registered") as caught:
        layer = eq.DEQ(lambda z, x: 0.5 * z + x)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    layer(X)


def test_inputs_that_a_start_cannot_be_read_off():
    layer = eq.DEQ(Cell(3, dtype=torch.float32))
    for inputs in ((torch.ones(2, 3, dtype=torch.int64),), (None,), ("text",), ()):
        refused(lambda inputs=inputs: layer(*inputs), TypeError, "start", "first input", "initial_state", "z0=")

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 3)

        def initial_state(self, tokens):
            return torch.zeros(*tokens.shape, 3)

        def forward(self, z, tokens):
            return 0.5 * z + self.embedding(tokens)

    assert eq.DEQ(Tokens())(torch.tensor([0, 3, 4])).shape == (3, 3)


def test_monitor_takes_a_module():
    def enter():
        with eq.monitor([eq.DEQ(Cell(3))]):
            pass

    refused(enter, TypeError, "monitor", "nn.Module", "list")


def test_spectral_radius_takes_what_fixed_point_takes():
    radius = eq.diagnostics.spectral_radius
    refused(lambda: radius(None, X), TypeError, "f must be callable")
    refused(lambda: radius(HALF, torch.ones(2, 3, dtype=torch.int64)), TypeError, "torch.int64")
    refused(lambda: radius(HALF, X, batch_dims=3), ValueError, "batch_dims=3")
    refused(lambda: radius(lambda z: z[:, :2], X), ValueError, "shape")


def test_messages_speak_of_the_users_own_tensors():
    # The state of a batch of two by four entries is never called a buffer of (2, 4).
    with pytest.raises(ValueError, match=r"\(2, 1, 3\)") as caught:
        solve(lambda z: (z[0], z[1][..., :1]), (torch.zeros(2, 1), torch.zeros(2, 1, 3)))
    assert "(2, 4)" not in str(caught.value)
