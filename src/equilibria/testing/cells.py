"""The conformance check of cells."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

from equilibria.nn import DEQ
from equilibria.testing import cell_conduct as conduct
from equilibria.testing import cell_layer as layers
from equilibria.testing.cell_conduct import Called
from equilibria.testing.laws import Law, hold

# Without these nothing else means anything.
FIRST: tuple[Law[Called], ...] = (conduct.returns_the_form_of_its_state, conduct.gives_one_answer)
LAWS: tuple[Law[Called], ...] = (
    conduct.leaves_state_inputs_and_settings_alone,
    conduct.keeps_samples_apart,
    conduct.registers_its_tensors,
    conduct.survives_copies,
    layers.has_an_equilibrium_that_is_found,
    layers.has_the_gradient_of_unrolling,
    layers.passes_gradients_to_every_parameter,
    layers.runs_under_autocast,
    layers.runs_compiled,
    layers.takes_one_sample_and_none,
)


def check_cell(cell: Callable[..., Any], *example: Any) -> None:
    """Run a cell through what a layer needs of it.

    >>> eq.testing.check_cell(Cell(8), torch.randn(4, 8))
    >>> eq.testing.check_cell(eq.DEQ(Cell(8), solver=eq.Broyden(), max_steps=60), torch.randn(4, 8))

    The cell itself is left alone: all is done on copies, with `eq.nn.VariationalDropout` asleep in most of them. Give a
    batch of at least two samples, of a size that no other dimension has, since tensors are told to belong to samples by
    their first dimensions.

    Args:
        cell: of a layer; or an `eq.DEQ`, whose cell is then checked with its solver, tolerances and other options. One
            that is meant to couple samples, as BatchNorm in training does, is one joint problem: check it as
            `eq.DEQ(cell, batch_dims=0)`.
        example: the inputs of one call, without the state.

    Raises:
        AssertionError: a law is broken; the message has a line for each, with what was seen and what to do.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a function registers no parameters, which the caller knows
        layer = copy.copy(cell) if isinstance(cell, DEQ) else DEQ(cell)
    layer.on_failure = "ignore"
    called = Called(layer, example)
    hold("check_cell", layer.cell, called, FIRST)
    hold("check_cell", layer.cell, called, LAWS)
