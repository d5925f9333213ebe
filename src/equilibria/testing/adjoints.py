"""The conformance check of adjoints."""

from equilibria.adjoints import Adjoint
from equilibria.testing import adjoint_company as company
from equilibria.testing import adjoint_gradients as gradients
from equilibria.testing.adjoint_gradients import Taken
from equilibria.testing.laws import Law, expect, hold, is_a_frozen_dataclass_of_its_options, refuses_meaningless_options


def is_a_frozen_dataclass(taken: Taken) -> None:
    is_a_frozen_dataclass_of_its_options(taken.adjoint)


def refuses_options_without_meaning(taken: Taken) -> None:
    refuses_meaningless_options(taken.adjoint)


def has_attach(taken: Taken) -> None:
    expect(
        not isinstance(taken.adjoint, type) and callable(getattr(taken.adjoint, "attach", None)),
        "an adjoint is an instance with the method attach, as eq.Implicit() is.",
    )


LAWS: tuple[Law[Taken], ...] = (
    is_a_frozen_dataclass,
    refuses_options_without_meaning,
    gradients.leaves_the_value_to_the_solver,
    gradients.keeps_the_sign_of_zero,
    gradients.agrees_with_a_dense_solve,
    gradients.passes_gradcheck,
    gradients.reaches_captured_tensors,
    gradients.is_linear_in_the_incoming_gradient,
    gradients.keeps_its_accuracy_at_every_scale_of_the_loss,
    gradients.gives_the_same_gradient_twice,
    gradients.treats_a_sample_alike_in_any_company,
    gradients.gives_samples_of_nan_no_gradient,
    gradients.keeps_the_gradient_of_samples_that_ran_out_of_steps,
    company.gives_second_derivatives_or_refuses_them,
    company.serves_a_layer_that_is_used_twice,
    company.leaves_frozen_parameters_and_no_grad_alone,
    company.fires_hooks_of_parameters_once,
    company.counts_every_call,
    company.reports_truly_or_nothing,
    company.tells_a_backward_solve_that_fails,
    company.works_under_autocast,
    company.works_under_checkpoints,
    company.leaves_inputs_and_settings_alone,
    company.takes_empty_batches_and_empty_states,
    company.differentiates_compiled_functions,
    company.leaves_no_reference_cycles,
)


def check_adjoint(adjoint: Adjoint, *, exact: bool = True) -> None:
    """Run an adjoint through the laws that every adjoint of the library keeps.

    >>> eq.testing.check_adjoint(eq.Implicit())
    >>> eq.testing.check_adjoint(eq.Phantom(steps=3), exact=False)

    Its gradients are compared with dense solves, with finite differences and with plain back-propagation through the
    iteration, on small problems from a random generator of the check's own; in a few seconds.

    Args:
        adjoint: an instance, with the options to check.
        exact: its gradient is that of the equilibrium; False for approximations, from which all but that is asked.

    Raises:
        AssertionError: a law is broken; the message has a line for each, with what was seen, where, and what to do.
    """
    hold("check_adjoint", adjoint, Taken(adjoint, exact), (has_attach,))
    hold("check_adjoint", adjoint, Taken(adjoint, exact), LAWS)
