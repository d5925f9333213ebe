"""The conformance check of solvers."""

from equilibria.fixed_point import fixed_point
from equilibria.solvers import Solver
from equilibria.testing import solver_conduct as conduct
from equilibria.testing import solver_problems as problems
from equilibria.testing.cases import Entry
from equilibria.testing.laws import Law, expect, hold, is_a_frozen_dataclass_of_its_options, refuses_meaningless_options
from equilibria.testing.solver_problems import Tried


def is_a_frozen_dataclass(tried: Tried) -> None:
    is_a_frozen_dataclass_of_its_options(tried.solver)


def refuses_options_without_meaning(tried: Tried) -> None:
    refuses_meaningless_options(tried.solver)


def has_init_and_step(tried: Tried) -> None:
    expect(
        not isinstance(tried.solver, type)
        and all(callable(getattr(tried.solver, name, None)) for name in ("init", "step")),
        "a solver is an instance with the methods init and step, as eq.Anderson() is.",
    )


LAWS: tuple[Law[Tried], ...] = (
    is_a_frozen_dataclass,
    refuses_options_without_meaning,
    problems.converges_for_every_structure,
    problems.converges_at_every_size,
    problems.converges_on_linear_maps,
    problems.converges_in_float32,
    problems.ends_in_half_precision,
    problems.proposes_in_the_dtype_and_on_the_device_of_the_state,
    problems.never_claims_what_has_no_solution,
    problems.makes_nan_the_status_of_its_sample,
    problems.gives_true_residuals_at_every_cap,
    conduct.counts_every_call,
    conduct.treats_a_sample_alike_alone_and_in_any_order,
    conduct.treats_a_sample_alike_beside_one_of_nan,
    conduct.treats_a_sample_alike_beside_one_that_never_converges,
    conduct.leaves_inputs_and_settings_alone,
    conduct.takes_the_same_steps_each_time,
    conduct.resumes_without_writing_into_the_memory_of_before,
    conduct.takes_empty_batches_and_empty_states,
    conduct.has_solutions_that_pass_gradcheck,
    conduct.is_unrolled_rightly_or_refuses_to_be,
    conduct.solves_compiled_functions,
    conduct.leaves_no_reference_cycles,
)


def check_solver(solver: Solver, *, entry: Entry = fixed_point) -> None:
    """Run a solver through the laws that every solver of the library keeps.

    >>> eq.testing.check_solver(eq.Picard())

    It solves some hundred small problems in a few seconds: contracting maps, linear and not, in states of every
    structure and dtype, alone, in batches and beside samples that fail. Cases come from a random generator of its own.
    A solver for maps of a special kind alone breaks the laws of convergence, and no others.

    Args:
        solver: an instance, with the options to check.
        entry: `eq.fixed_point`, `eq.root` or `eq.argmin`: what the solver is for.

    Raises:
        AssertionError: a law is broken; the message has a line for each, with what was seen, where, and what to do.
    """
    laws = (has_init_and_step,)
    hold("check_solver", solver, Tried(solver, entry), laws)
    hold("check_solver", solver, Tried(solver, entry), LAWS)
