"""The conformance kit: all parts of the library pass, and every law refuses a part that breaks it."""

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import broken_parts as broken
import pytest
import torch
from torch import nn

import equilibria as eq
from equilibria.testing import adjoint_company, adjoint_gradients, adjoints, cell_conduct, cell_layer, cells, solvers
from equilibria.testing import solver_conduct as conduct
from equilibria.testing import solver_problems as problems
from equilibria.testing.adjoint_gradients import Taken
from equilibria.testing.cell_conduct import Called
from equilibria.testing.laws import hold, title
from equilibria.testing.solver_problems import Tried

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(autouse=True)
def _quiet():
    """A check warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for theirs in ("The .grad attribute", ".*deprecated"):  # of torch's compiler, which it silences by default
            warnings.filterwarnings("ignore", message=theirs)
        yield


# Ours pass.

PARTS = {
    eq.fixed_point: [
        eq.Picard(),
        eq.Picard(0.5),
        eq.Anderson(),
        eq.Anderson(history=2),
        eq.Broyden(),
        eq.Newton(),
        eq.Newton(eq.Dense()),
    ],
    eq.root: [eq.Anderson(), eq.Broyden(), eq.Newton(), eq.Newton(eq.Dense()), eq.GradientDescent(0.5)],
    eq.argmin: [eq.LBFGS(), eq.GradientDescent(0.7), eq.Newton()],
}
EXACT = [
    eq.Implicit(),
    eq.Implicit(eq.GMRES()),
    eq.Implicit(eq.BiCGSTAB()),
    eq.Implicit(eq.Dense()),
    eq.Implicit(eq.Picard()),
    eq.Implicit(eq.Anderson()),
    eq.Implicit(order=2),
    eq.Unrolled(),
    eq.Unrolled(checkpoint=True),
]
APPROXIMATE = [eq.Neumann(4), eq.Phantom(3), eq.Phantom(2, relaxation=0.5), eq.OneStep()]


SOLVED = [(entry, solver) for entry, parts in PARTS.items() for solver in parts]


@pytest.mark.parametrize(("entry", "solver"), SOLVED, ids=[f"{entry.__name__}-{solver}" for entry, solver in SOLVED])
def test_every_solver_of_ours_conforms(entry, solver):
    state = torch.get_rng_state()
    eq.testing.check_solver(solver, entry=entry)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("adjoint", EXACT + APPROXIMATE, ids=str)
def test_every_adjoint_of_ours_conforms(adjoint):
    state = torch.get_rng_state()
    eq.testing.check_adjoint(adjoint, exact=adjoint in EXACT)
    assert torch.equal(torch.get_rng_state(), state)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, z, x):
        return 0.3 * self.block(z + x)


class Pair(nn.Module):
    """A state of two leaves, of a start of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = broken.Fine()

    def initial_state(self, x):
        return {"h": torch.zeros_like(x), "c": x.new_zeros(len(x), 2)}

    def forward(self, z, x):
        return {"h": self.cell(z["h"], x + 0.1 * z["c"].mean(dim=1, keepdim=True)), "c": 0.2 * z["c"] + z["h"][:, :2]}


def example(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def joint() -> eq.DEQ:
    return eq.DEQ(broken.Normalising(), batch_dims=0, max_steps=100)


class Through(nn.Module):
    """A cell that passes through a part which changes from call to call, outside of a solve."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.linear, self.part = nn.Linear(5, 5), part

    def forward(self, z, x):
        return torch.tanh(0.4 * self.part(self.linear(z)) + x)


GOOD_CELLS: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "linear": (broken.Fine, (4, 5)),
    "two batch dimensions": (lambda: eq.DEQ(broken.Fine(), batch_dims=2), (4, 3, 5)),
    "a layer with Newton": (lambda: eq.DEQ(broken.Fine(), solver=eq.Newton(), max_steps=60), (4, 5)),
    "attention": (Attention, (3, 6, 8)),
    "several leaves": (Pair, (4, 5)),
    "a function": (lambda: lambda z, x: torch.tanh(0.3 * z.roll(1, dims=1) + x), (4, 5)),
    "BatchNorm as one joint problem": (joint, (4, 5)),
    "variational dropout": (lambda: Through(eq.nn.VariationalDropout(0.3)), (4, 5)),
    "spectral normalisation": (lambda: Through(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))), (4, 5)),
}


@pytest.mark.parametrize("name", GOOD_CELLS)
def test_good_cells_conform(name):
    make, shape = GOOD_CELLS[name]
    eq.testing.check_cell(make(), example(*shape))


# Every law refuses what breaks it.

BROKEN_SOLVERS = [
    (solvers.is_a_frozen_dataclass, broken.Thawed()),
    (solvers.is_a_frozen_dataclass, broken.Silent()),
    (solvers.is_a_frozen_dataclass, broken.Unpicklable(lambda k: 1 / k)),
    (solvers.refuses_options_without_meaning, broken.Unchecked()),
    (problems.converges_for_every_structure, broken.Still()),
    (problems.converges_for_every_structure, broken.Lax()),
    (problems.converges_at_every_size, broken.Narrowed()),
    (problems.converges_on_linear_maps, broken.Clamped()),
    (problems.converges_in_float32, broken.OnAGrid()),
    (problems.ends_in_half_precision, broken.Crawling()),
    (problems.proposes_in_the_dtype_and_on_the_device_of_the_state, broken.Single()),
    (problems.never_claims_what_has_no_solution, broken.LaxAbsolute()),
    (problems.makes_nan_the_status_of_its_sample, broken.Spreading()),
    (problems.makes_nan_the_status_of_its_sample, broken.Alarmed()),
    (problems.gives_true_residuals_at_every_cap, broken.Overwriting()),
    (conduct.counts_every_call, broken.Peeking()),
    (conduct.treats_a_sample_alike_alone_and_in_any_order, broken.Coupled()),
    (conduct.treats_a_sample_alike_alone_and_in_any_order, broken.LedByTheFirst()),
    (conduct.treats_a_sample_alike_beside_one_of_nan, broken.Spreading()),
    (conduct.treats_a_sample_alike_beside_one_that_never_converges, broken.Coupled()),
    (conduct.leaves_inputs_and_settings_alone, broken.Rolling()),
    (conduct.leaves_inputs_and_settings_alone, broken.Seeding()),
    (conduct.leaves_inputs_and_settings_alone, broken.Setting()),
    (conduct.leaves_inputs_and_settings_alone, broken.Meddling()),
    (conduct.takes_the_same_steps_each_time, broken.Moody()),
    (conduct.resumes_without_writing_into_the_memory_of_before, broken.Consuming()),
    (conduct.takes_empty_batches_and_empty_states, broken.Peaked()),
    (conduct.has_solutions_that_pass_gradcheck, broken.Lax()),
    (conduct.is_unrolled_rightly_or_refuses_to_be, broken.Detaching()),
    (conduct.solves_compiled_functions, broken.Twice()),
    (conduct.leaves_no_reference_cycles, broken.Hoarding()),
    (conduct.leaves_no_reference_cycles, broken.Circular()),
]
BROKEN_ADJOINTS = [
    (adjoints.is_a_frozen_dataclass, broken.ThawedAdjoint()),
    (adjoints.refuses_options_without_meaning, broken.UncheckedAdjoint()),
    (adjoint_gradients.leaves_the_value_to_the_solver, broken.ReturningImage()),
    (adjoint_gradients.keeps_the_sign_of_zero, broken.AddingZero()),
    (adjoint_gradients.agrees_with_a_dense_solve, broken.Shrinking()),
    (adjoint_gradients.passes_gradcheck, broken.Shrinking()),
    (adjoint_gradients.reaches_captured_tensors, broken.ArgumentsAlone()),
    (adjoint_gradients.is_linear_in_the_incoming_gradient, broken.Clipping()),
    (adjoint_gradients.keeps_its_accuracy_at_every_scale_of_the_loss, broken.AbsoluteTolerance()),
    (adjoint_gradients.gives_the_same_gradient_twice, broken.Decaying()),
    (adjoint_gradients.treats_a_sample_alike_in_any_company, broken.Centring()),
    (adjoint_gradients.gives_samples_of_nan_no_gradient, broken.Naive()),
    (adjoint_gradients.keeps_the_gradient_of_samples_that_ran_out_of_steps, broken.DroppingUnconverged()),
    (adjoint_company.gives_second_derivatives_or_refuses_them, broken.Naive()),
    (adjoint_company.serves_a_layer_that_is_used_twice, broken.Stale()),
    (adjoint_company.leaves_frozen_parameters_and_no_grad_alone, broken.AlwaysAGraph()),
    (adjoint_company.fires_hooks_of_parameters_once, broken.BackwardInBackward()),
    (adjoint_company.counts_every_call, broken.Uncounted()),
    (adjoint_company.reports_truly_or_nothing, broken.FlatReport()),
    (adjoint_company.reports_truly_or_nothing, broken.EarlyReport()),
    (adjoint_company.tells_a_backward_solve_that_fails, broken.AlwaysConverged()),
    (adjoint_company.tells_a_backward_solve_that_fails, broken.Mute()),
    (adjoint_company.works_under_autocast, broken.OneDtype()),
    (adjoint_company.works_under_checkpoints, broken.Caching()),
    (adjoint_company.leaves_inputs_and_settings_alone, broken.SeedingAdjoint()),
    (adjoint_company.leaves_inputs_and_settings_alone, broken.OverwritingGradient()),
    (adjoint_company.takes_empty_batches_and_empty_states, broken.PeakedAdjoint()),
    (adjoint_company.differentiates_compiled_functions, broken.TwiceAdjoint()),
    (adjoint_company.leaves_no_reference_cycles, broken.CircularAdjoint()),
]
BROKEN_CELLS = [
    (cell_conduct.returns_the_form_of_its_state, broken.Widening),
    (cell_conduct.returns_the_form_of_its_state, broken.Upcasting),
    (cell_conduct.gives_one_answer, broken.Dropping),
    (cell_conduct.gives_one_answer, broken.Noisy),
    (cell_conduct.leaves_state_inputs_and_settings_alone, broken.Drawing),
    (cell_conduct.leaves_state_inputs_and_settings_alone, broken.WritingState),
    (cell_conduct.leaves_state_inputs_and_settings_alone, broken.WritingInput),
    (cell_conduct.keeps_samples_apart, broken.Normalising),
    (cell_conduct.keeps_samples_apart, broken.Averaging),
    (cell_conduct.registers_its_tensors, broken.Loose),
    (cell_conduct.survives_copies, broken.HoldingALambda),
    (cell_layer.has_an_equilibrium_that_is_found, broken.Expanding),
    (cell_layer.has_the_gradient_of_unrolling, broken.SinglePrecision),
    (cell_layer.passes_gradients_to_every_parameter, broken.Remembering),
    (cell_layer.runs_under_autocast, broken.Blending),
    (cell_layer.runs_compiled, broken.ShyOfCompilers),
    (cell_layer.takes_one_sample_and_none, broken.FourAtATime),
]


TRIED = Tried(broken.Alarmed(), eq.fixed_point)


def names(pairs) -> list[str]:
    return [f"{law.__name__}-{getattr(part, '__name__', type(part).__name__)}" for law, part in pairs]


@pytest.mark.parametrize(("law", "solver"), BROKEN_SOLVERS, ids=names(BROKEN_SOLVERS))
def test_laws_of_solvers_refuse_what_breaks_them(law, solver):
    with pytest.raises(AssertionError, match=title(law)):
        hold("check_solver", solver, Tried(solver, eq.fixed_point), [law])
    broken.Hoarding.kept.clear()


@pytest.mark.parametrize(("law", "adjoint"), BROKEN_ADJOINTS, ids=names(BROKEN_ADJOINTS))
def test_laws_of_adjoints_refuse_what_breaks_them(law, adjoint):
    with pytest.raises(AssertionError, match=title(law)):
        hold("check_adjoint", adjoint, Taken(adjoint, exact=True), [law])
    broken.Caching.cache.clear()


@pytest.mark.parametrize(("law", "cell"), BROKEN_CELLS, ids=names(BROKEN_CELLS))
def test_laws_of_cells_refuse_what_breaks_them(law, cell):
    layer = eq.DEQ(cell(), on_failure="ignore")
    with pytest.raises(AssertionError, match=title(law)):
        hold("check_cell", layer.cell, Called(layer, (example(4, 5),)), [law])


@pytest.mark.parametrize(
    ("laws", "pairs"),
    [(solvers.LAWS, BROKEN_SOLVERS), (adjoints.LAWS, BROKEN_ADJOINTS), (cells.FIRST + cells.LAWS, BROKEN_CELLS)],
    ids=["solvers", "adjoints", "cells"],
)
def test_every_law_has_something_that_breaks_it(laws, pairs):
    assert set(laws) == {law for law, _ in pairs}
    assert len(set(laws)) == len(laws)


def test_what_broken_adjoints_differ_from_in_one_thing_passes():
    eq.testing.check_adjoint(broken.Right())


# The checks themselves.


def test_a_check_tells_all_laws_that_are_broken_and_what_to_do():
    with pytest.raises(AssertionError) as caught:
        eq.testing.check_solver(broken.Coupled())
    message = str(caught.value)
    assert message.startswith("check_solver(Coupled()): 3 of 23 laws are broken.\n- ")
    assert len(message.splitlines()) == 4
    assert "alone" in message
    assert "let each sample's step depend on that sample alone" in message


def test_what_a_part_raises_comes_with_the_error():
    with pytest.raises(AssertionError, match="FloatingPointError: a number is not finite") as caught:
        hold("check_solver", broken.Alarmed(), TRIED, [problems.makes_nan_the_status_of_its_sample])
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert {type(error) for error in caught.value.__cause__.exceptions} == {FloatingPointError}


@pytest.mark.parametrize("nothing", ["anderson", eq.Anderson, object()], ids=["a name", "a class", "an object"])
def test_what_is_no_part_is_told_so_and_no_more(nothing):
    with pytest.raises(AssertionError, match="1 of 1 laws is broken"):
        eq.testing.check_solver(nothing)
    with pytest.raises(AssertionError, match="1 of 1 laws is broken"):
        eq.testing.check_adjoint(nothing)


def test_a_random_cell_is_told_by_the_name_of_its_layer_and_no_more():
    with pytest.raises(AssertionError, match=r"1 of 2 laws is broken[\s\S]*Dropout 'dropout'"):
        eq.testing.check_cell(broken.Dropping(), example(4, 5))


def test_a_cell_that_couples_samples_is_told_by_the_name_of_its_layer():
    with pytest.raises(AssertionError, match="BatchNorm1d 'norm' in training"):
        eq.testing.check_cell(broken.Normalising(), example(4, 5))


def test_a_cell_without_an_equilibrium_is_told_its_spectral_radius():
    with pytest.raises(AssertionError, match=r"MAX_STEPS after 40 evaluations.*spectral radius 2\.00"):
        eq.testing.check_cell(broken.Expanding(), example(4, 5))


def test_an_example_of_one_sample_is_not_enough():
    with pytest.raises(AssertionError, match="give two or more"):
        eq.testing.check_cell(broken.Fine(), example(1, 5))


def test_a_cell_is_left_as_it_was():
    cell = broken.Normalising()
    before = {name: tensor.clone() for name, tensor in cell.state_dict().items()}
    layer = eq.DEQ(cell, batch_dims=0, max_steps=100)
    eq.testing.check_cell(layer, example(4, 5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in cell.state_dict().items())
    assert all(parameter.grad is None for parameter in cell.parameters())
    assert layer.on_failure == "warn"


def test_checks_leave_the_global_generator_alone():
    cell = broken.Dropping()
    state = torch.get_rng_state()
    eq.testing.check_cell(lambda z, x: 0.5 * torch.cos(z + x), example(4, 5))
    with pytest.raises(AssertionError):
        eq.testing.check_cell(cell, example(4, 5))
    for solver in (broken.Seeding(), broken.Rolling()):
        with pytest.raises(AssertionError):
            hold("check_solver", solver, Tried(solver, eq.fixed_point), [conduct.leaves_inputs_and_settings_alone])
    assert torch.equal(torch.get_rng_state(), state)


# The page about parts of one's own.


def test_the_page_on_extending_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / "extending.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    (tmp_path / "page_on_extending.py").write_text("\n\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    with torch.random.fork_rng():
        page = importlib.import_module("page_on_extending")
    for part in (page.Aitken, page.Averaged, page.MinimalResidual):
        assert len(inspect.getsource(part).splitlines()) < 40
    monkeypatch.delitem(sys.modules, "page_on_extending")
