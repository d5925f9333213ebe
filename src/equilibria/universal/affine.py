"""A chain of linear and elementwise layers as one matrix and one activation: the theorem to the letter."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.precision import autocast_dtype
from equilibria.universal.mode import Mode
from equilibria.universal.program import Ref, Step, described
from equilibria.universal.propagation import propagate
from equilibria.universal.tracing import trace

ELEMENTWISE = (
    nn.CELU,
    nn.Dropout,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
# fmt: off
ELEMENTWISE_NAMES = {
    "abs", "arctan", "asinh", "atan", "celu", "cos", "elu", "erf", "exp", "gelu", "hardshrink", "hardsigmoid",
    "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "relu", "relu6", "relu_", "selu", "sigmoid", "silu",
    "sin", "softplus", "softshrink", "softsign", "square", "tanh", "tanhshrink", "threshold",
}
# fmt: on


class Affine(nn.Module):
    """The map z -> sigma(W_z z + W_x x + b) of a chain, on all its activations side by side.

    Attributes:
        network: the original.
        stages: one for each linear layer with the elementwise layers behind it; bears the name of the linear layer.
        widths: entries of each stage for one sample.
        reads: the stage that each stage reads.
        depth: the number of stages.
    """

    samples_apart = True

    def __init__(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.network = network
        program = trace(network, inputs)
        self._mode = Mode(network, inputs, program)
        program, values = propagate(program, network, inputs)
        self._blocks = _chain(program.steps, program.output, values, network)
        names: list[str] = []
        for first, _ in self._blocks:
            name = (first.where or "network") if _linear(first, network) else "input"
            times = 1 + sum(other.partition("@")[0] == name for other in names)
            names.append(name if times == 1 else f"{name}@{times}")
        self.stages = tuple(names)
        self.widths = {
            name: values[first.name].flatten(1).shape[1] for name, (first, _) in zip(names, self._blocks, strict=True)
        }
        self.reads = {name: tuple(names[k - 1 : k] if k else ()) for k, name in enumerate(names)}
        self.depth = len(names)

    @property
    def W_z(self) -> Tensor:
        """The weights between stages, (n, n): stage k + 1 reads stage k, so that all but the sub-diagonal is zero."""
        weights = self._weights()
        total = sum(self.widths.values())
        rows, start = [weights[0].new_zeros(len(weights[0]), total)], 0
        for weight in weights[1:]:
            left, right = weight.new_zeros(len(weight), start), total - start - weight.shape[1]
            rows.append(torch.cat((left, weight, weight.new_zeros(len(weight), right)), dim=1))
            start += weight.shape[1]
        return torch.cat(rows)

    @property
    def W_x(self) -> Tensor:
        """The weights of the input, (n, entries of one input): the first layer's, above zeros."""
        weight = self._weights()[0]
        rest = sum(self.widths.values()) - len(weight)
        return torch.cat((weight, weight.new_zeros(rest, weight.shape[1])))

    @property
    def b(self) -> Tensor:
        """The biases of all stages, (n,)."""
        biases = []
        for (first, _), weight in zip(self._blocks, self._weights(), strict=True):
            bias = self._layer(first).bias if _linear(first, self.network) else None
            biases.append(weight.new_zeros(len(weight)) if bias is None else bias)
        return torch.cat(biases)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """One application of the whole map; `state` is (batch, n)."""
        self._mode.check(self.network)
        return self.activation(F.linear(state, self.W_z) + F.linear(x.flatten(1), self.W_x, self.b))

    def activation(self, state: Tensor) -> Tensor:
        """The sigma of the map: the elementwise layers of each stage on its own block."""
        parts = list(state.split(list(self.widths.values()), dim=1))
        for k, (_, layers) in enumerate(self._blocks):
            for step in layers:
                part = parts[k]
                parts[k] = step.run(self.network, (), lambda _, part=part: part)
        return torch.cat(parts, dim=1)

    def initial_state(self, x: Tensor) -> Tensor:
        """Zeros, of shape (batch, n)."""
        weight = self._weights()[0]
        off = autocast_dtype(x.device) is None
        dtype = weight.dtype if off else torch.promote_types(weight.dtype, torch.float32)
        return torch.zeros(len(x), sum(self.widths.values()), dtype=dtype, device=x.device)

    def readout(self, state: Tensor) -> Tensor:
        """What the network returns: the last block."""
        return state[:, state.shape[1] - self.widths[self.stages[-1]] :]

    def _layer(self, step: Step) -> Any:
        return self.network.get_submodule(step.target)

    def _weights(self) -> list[Tensor]:
        like = next((p for p in self.network.parameters()), torch.empty(0))
        return [
            self._layer(first).weight
            if _linear(first, self.network)
            else torch.eye(self.widths[name], dtype=like.dtype, device=like.device)
            for name, (first, _) in zip(self.stages, self._blocks, strict=True)
        ]

    def extra_repr(self) -> str:
        return f"{len(self.stages)} stages of {sum(self.widths.values())} entries together"


def _chain(
    steps: tuple[Step, ...], output: Any, values: dict[str, Any], network: nn.Module
) -> list[tuple[Step, list[Step]]]:
    """The stages of a chain: what each begins with, and its elementwise layers."""
    blocks: list[tuple[Step, list[Step]]] = []
    last = steps[0]
    for step in steps[1:]:
        if step.reads != [last.name]:
            raise _refusal(step, network, "reads more than the layer before it, or is not read by the next")
        if _flattens(step, network) and not blocks:
            last = step
            continue
        if values[step.name].ndim != 2:
            raise _refusal(step, network, f"yields the shape {tuple(values[step.name].shape)}, not (batch, width)")
        if _linear(step, network):
            part = network.get_submodule(step.target)
            if part._forward_pre_hooks or part._forward_hooks:
                raise _refusal(step, network, "has hooks that compute something beside its weights")
            blocks.append((step, []))
        elif _elementwise(step, network):
            if not blocks:
                blocks.append((last, []))
            blocks[-1][1].append(step)
        else:
            raise _refusal(step, network, "is neither linear nor elementwise")
        last = step
    if not blocks or output != Ref(last.name):
        raise _refusal(last, network, "is not the one layer whose activation is returned")
    return blocks


def _refusal(step: Step, network: nn.Module, reason: str) -> ValueError:
    name = getattr(step.target, "__name__", step.target)
    what = described(network, step.where) if step.kind == "module" else f"'{name}' in {described(network, step.where)}"
    return ValueError(
        f"embed with form='affine' takes a chain of nn.Linear and elementwise layers, and {what} {reason}: take "
        "form='stacked'."
    )


def _linear(step: Step, network: nn.Module) -> bool:
    return step.kind == "module" and isinstance(network.get_submodule(step.target), nn.Linear)


def _flattens(step: Step, network: nn.Module) -> bool:
    if step.kind == "module":
        part = network.get_submodule(step.target)
        return isinstance(part, nn.Flatten) and (part.start_dim, part.end_dim) == (1, -1)
    return (step.target is torch.flatten or step.target == "flatten") and step.args[1:] == (1,) and not step.kwargs


def _elementwise(step: Step, network: nn.Module) -> bool:
    if step.kind == "module":
        return isinstance(network.get_submodule(step.target), ELEMENTWISE)
    if step.kind == "method":
        return step.target in ELEMENTWISE_NAMES
    name = getattr(step.target, "__name__", "")
    return name in ELEMENTWISE_NAMES and step.target in (getattr(torch, name, None), getattr(F, name, None))
