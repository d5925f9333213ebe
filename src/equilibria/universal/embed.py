"""A network as the equilibrium of one function of all its activations."""

import math
import warnings
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from equilibria.adjoints import Implicit
from equilibria.nn import DEQ
from equilibria.options import check_choice
from equilibria.precision import autocast_dtype
from equilibria.solvers import Picard
from equilibria.universal.affine import Affine
from equilibria.universal.mode import Mode
from equilibria.universal.program import references, substitute
from equilibria.universal.propagation import propagate
from equilibria.universal.stages import Stages, find_stages
from equilibria.universal.tracing import trace

FORMS = ("stacked", "affine")


def embed(network: nn.Module, example_input: Any, form: str = "stacked") -> DEQ:
    """A network of any depth as one equilibrium layer, whose state is the stack of all its activations.

    >>> network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> layer = eq.universal.embed(network, torch.randn(4, 3))
    >>> layer.cell.stages
    ('0', '1', '2')
    >>> x = torch.randn(5, 3)
    >>> torch.allclose(layer(x), network(x))
    True

    One function computes every activation anew from those of the stage before it, all at once. The activations of the
    network are its only equilibrium. Plain iteration finds them from any start, exactly, after as many evaluations as
    the longest chain has stages, and takes one more to see it; the gradient is found in the same way. So what takes the
    network L stages takes the layer about L^2, forward as backward.

    The layer is called as the network is, and shares its parameters. Where all activations have the batch in front and
    no sample has a say in another's, samples are solved for one by one (`batch_dims=1`); else the batch is one
    problem (`batch_dims=0`). Activations that are infinite have no residual: samples that meet one are `NONFINITE`.

    Args:
        network: can be traced by `torch.fx`; modules of `torch.nn` are one stage each.
        example_input: one input, or a tuple of them. Later ones may differ in size as far as the network allows.
            Inputs that hold no tensor, and arguments left to their defaults, stay what they are in the example.
        form: "stacked"; or "affine", the theorem's own form for a chain of linear and elementwise layers: the state is
            one tensor, and the cell has the `W_z`, `W_x` and `b` of z = sigma(W_z z + W_x x + b).

    Returns:
        A `DEQ`. Its `cell` has the `network`, the names of its `stages` in order of depth, the `widths` of their
        activations (entries per sample, on the example), and what each of them `reads`.

    Raises:
        ValueError: what has no equilibrium or cannot be traced, naming the module: branches that depend on data, random
            layers and BatchNorm in training, changes in place that others see.

    Source: Bai, Kolter and Koltun (2019), Deep equilibrium models, theorem 3 and appendix C.
    """
    check_choice("form", form, FORMS)
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be an nn.Module, not {type(network).__name__}.")
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    cell = Affine(network, inputs) if form == "affine" else Stacked(network, inputs)
    steps = len(cell.stages) + 2
    return DEQ(
        cell,
        solver=Picard(),
        adjoint=Implicit(solver=Picard(), rtol=0.0, max_steps=steps),
        rtol=0.0,
        atol=0.0,
        max_steps=steps,
        batch_dims=1 if cell.samples_apart else 0,
        readout=cell.readout,
    )


class Stacked(nn.Module):
    """All stages of a network, each computed from the stages before it as the state has them.

    Attributes:
        network: the original.
        stages: names, in order of depth.
        widths: entries of each stage for one sample of the example; for the whole batch where samples are not apart.
        reads: the stages that each stage reads.
        depth: the length of the longest chain of stages.
        samples_apart: whether every activation has the batch in front, and samples have no say in each other.
    """

    def __init__(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.network = network
        program = trace(network, inputs)
        self._mode = Mode(network, inputs, program)
        self._constants = pytree.tree_map_only(Tensor, lambda _: None, inputs)
        program, values = propagate(program, network, inputs)
        found: Stages = find_stages(program, values, network)
        self._program = found.program
        self._names = found.names
        self._shapes: dict[Any, dict[str, tuple[torch.Size, torch.dtype, torch.device]]] = {}
        self.stages = tuple(found.names.values())
        self.reads = found.reads
        self.depth = found.depth
        self.samples_apart = self._apart(inputs)
        batch_dims = 1 if self.samples_apart else 0
        self.widths = {name: math.prod(shape[batch_dims:]) for name, shape in found.shapes.items()}

    def forward(self, state: dict[str, Tensor], *inputs: Any) -> dict[str, Tensor]:
        """Every stage, computed from the others as `state` has them."""
        self._check(inputs)
        values: dict[str, Any] = {}

        def read(name: str) -> Any:
            return state[self._names[name]] if name in self._names else values[name]

        for step in self._program:
            values[step.name] = step.run(self.network, inputs, read)
        return {stage: values[name] for name, stage in self._names.items()}

    def initial_state(self, *inputs: Any) -> dict[str, Tensor]:
        """Zeros, in the shapes that the activations have for these inputs."""
        self._check(inputs)
        shapes = self._forms(inputs)
        return {
            stage: torch.zeros(shape, dtype=dtype, device=device) for stage, (shape, dtype, device) in shapes.items()
        }

    def readout(self, state: dict[str, Tensor]) -> Any:
        """What the network returns, read off the stages."""
        values: dict[str, Any] = {name: state[stage] for name, stage in self._names.items()}
        needed = set(references(self._program.output)) - set(values)
        steps = []
        for step in reversed(self._program.steps):
            if step.name in needed:
                steps.append(step)
                needed |= set(step.reads) - set(values)
        for step in reversed(steps):
            values[step.name] = step.run(self.network, (), values.__getitem__)
        return substitute(self._program.output, values.__getitem__)

    def _forms(self, inputs: tuple[Any, ...]) -> dict[str, tuple[torch.Size, torch.dtype, torch.device]]:
        leaves, spec = pytree.tree_flatten(inputs)
        kinds = [(repr(t.shape), t.dtype, t.device) if isinstance(t, Tensor) else repr(t) for t in leaves]
        own = {(p.dtype, p.device) for p in self.network.parameters()}
        autocast = _autocast(leaves)
        key = (tuple(kinds), repr(spec), frozenset(own), autocast, self._mode.checked)
        if key not in self._shapes:
            if len(self._shapes) >= 64:
                self._shapes.clear()
            _, values = propagate(self._program, self.network, inputs)
            # Under autocast a state in half precision would round more than the products do.
            wide = torch.float32 if autocast else torch.float16
            self._shapes[key] = {
                stage: (values[name].shape, torch.promote_types(values[name].dtype, wide), values[name].device)
                for name, stage in self._names.items()
            }
        return self._shapes[key]

    def _check(self, inputs: tuple[Any, ...]) -> None:
        constants = pytree.tree_map_only(Tensor, lambda _: None, inputs)
        if constants != self._constants:
            raise ValueError(
                f"The inputs differ from the example's in more than their tensors, {constants} where {self._constants} "
                "was: embed the network anew with an example of this form."
            )
        self._mode.check(self.network)

    @torch.no_grad()
    def _apart(self, inputs: tuple[Any, ...]) -> bool:
        """Whether the batch stands in front of every activation, and samples have no say in each other."""
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
        if not leaves or len(leaves[0]) == 0:
            return False
        batch = len(leaves[0])
        for first_only in (False, True):

            def of(size: int, first_only: bool = first_only) -> tuple[Any, ...]:
                def resized(leaf: Tensor) -> Tensor:
                    if leaf.ndim == 0 or len(leaf) != batch or (first_only and leaf is not leaves[0]):
                        return leaf
                    return leaf.detach()[torch.arange(size, device=leaf.device) % batch]

                return pytree.tree_map_only(Tensor, resized, inputs)

            try:
                forms = {size: self._forms(of(size)) for size in (2, 3, 5)}
            except Exception:
                continue  # sizes that this network does not take: one of its inputs only looks like a batch
            if all(
                shape[:1] == (size,) and shape[1:] == forms[2][name][0][1:]
                for size, form in forms.items()
                for name, (shape, _, _) in form.items()
            ):
                return self._alone(of(2))
        return False

    def _alone(self, inputs: tuple[Any, ...]) -> bool:
        """Whether one of two samples yields the same bits whatever the state of the other is."""
        generator = torch.Generator().manual_seed(0)

        def drawn(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        state = {stage: drawn(*form) for stage, form in self._forms(inputs).items()}
        other = {stage: torch.cat((drawn(t[:1].shape, t.dtype, t.device), t[1:])) for stage, t in state.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a solve inside the network, which knows nothing of such a state
            plain, moved = (self._evaluated(start, inputs) for start in (state, other))
        return all(torch.equal(plain[name][1].nan_to_num(), moved[name][1].nan_to_num()) for name in plain)

    def _evaluated(self, state: dict[str, Tensor], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        buffers = {name: buffer.detach().clone() for name, buffer in self.named_buffers()}
        devices = {value.device for value in state.values() if value.is_cuda}
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)  # masks that stay the same through a solve
            return torch.func.functional_call(self, buffers, (state, *inputs))

    def extra_repr(self) -> str:
        return f"{len(self.stages)} stages, depth {self.depth}"


def _autocast(leaves: list[Any]) -> torch.dtype | None:
    devices = [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]
    return autocast_dtype(devices[0]) if devices else None
