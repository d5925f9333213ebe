"""Which values of a network are the stages of an equilibrium."""

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.universal.program import Program, Ref, Step, described, references, substitute

# Functions that mix entries by weights, or entries with entries: a stage ends there as it does at a module.
MIXING = {
    F.bilinear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.embedding,
    F.linear,
    F.multi_head_attention_forward,
    F.scaled_dot_product_attention,
    operator.matmul,
    torch.addbmm,
    torch.addmm,
    torch.baddbmm,
    torch.bmm,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.einsum,
    torch.matmul,
    torch.mm,
    torch.mv,
    torch.tensordot,
}
MIXING_METHODS = {"addbmm", "addmm", "baddbmm", "bmm", "matmul", "mm", "mv"}

# What is made by these takes sizes from its argument and no values.
LIKE = {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "type_as"}
LIKE_FUNCTIONS = {torch.empty_like, torch.full_like, torch.ones_like, torch.zeros_like}


@dataclass(frozen=True)
class Stages:
    """The stages of a program.

    Attributes:
        program: with all that neither a stage nor the output needs left out.
        names: the name of each stage, by that of the step whose value it is, in order of depth.
        reads: the stages that each stage reads, by its name.
        shapes: of the stages on the example.
    """

    program: Program
    names: dict[str, str]
    reads: dict[str, tuple[str, ...]]
    shapes: dict[str, torch.Size]

    @property
    def depth(self) -> int:
        """The length of the longest chain of stages: so many evaluations after any start nothing changes any more."""
        depths: dict[str, int] = {}
        for name, read in self.reads.items():
            depths[name] = 1 + max((depths[other] for other in read), default=0)
        return max(depths.values())


def find_stages(program: Program, values: dict[str, Any], network: nn.Module) -> Stages:
    """Divide a program into stages; `values` is what its steps yield on the example."""
    program, values = _flat_output(program, values)
    fed, made = _dependence(program, values)
    if not any(name in fed and _floating(values[name]) for name in references(program.output)):
        raise ValueError(
            f"embed cannot take {described(network, '')} since it returns no floating tensor that depends on its "
            "inputs: let it return the activations that its answer is read off."
        )
    program = _live(program)
    ends = _ends(program, values, made)
    _refuse_outputs(program, ends, network)
    names = _names(program, ends, _sources(program, values))
    reads = {names[name]: tuple(names[other] for other in found) for name, found in _read(program, ends).items()}
    return Stages(program, names, reads, {names[name]: values[name].shape for name in names})


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _flat_output(program: Program, values: dict[str, Any]) -> tuple[Program, dict[str, Any]]:
    """The program with a step for each tensor of an output that comes as a tuple or dict."""
    steps, values = list(program.steps), dict(values)

    def taken(name: str) -> Any:
        value = values[name]
        if isinstance(value, Tensor) or not isinstance(value, (tuple, list, dict)):
            return Ref(name)

        def part(key: Any) -> Any:
            where = next(step.where for step in steps if step.name == name)
            step = Step(f"{name}[{key!r}]", "function", operator.getitem, (Ref(name), key), where=where)
            steps.append(step)
            values[step.name] = value[key]
            return taken(step.name)

        if isinstance(value, dict):
            return {key: part(key) for key in value}
        parts = [part(k) for k in range(len(value))]
        if isinstance(value, list):
            return parts
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)

    output = substitute(program.output, taken)
    return Program(tuple(steps), output), values


def _weighty(step: Step) -> bool:
    if step.kind == "method":
        return step.target in MIXING_METHODS
    return step.kind == "module" or (step.kind == "function" and step.target in MIXING)


def _dependence(program: Program, values: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The values that inputs have a say in, and those of them behind a module or a mixing function."""
    fed: set[str] = set()
    made: set[str] = set()
    for step in program:
        like = step.target in (LIKE if step.kind == "method" else LIKE_FUNCTIONS) if step.kind != "input" else False
        holds = isinstance(values[step.name], (Tensor, tuple, list, dict)) and not isinstance(
            values[step.name], torch.Size
        )
        if not holds or like:
            continue
        if step.kind == "input" or any(name in fed for name in step.reads):
            fed.add(step.name)
            if _weighty(step) or any(name in made for name in step.reads):
                made.add(step.name)
    return fed, made


def _ends(program: Program, values: dict[str, Any], made: set[str]) -> set[str]:
    """The steps whose values are stages."""
    results = set(references(program.output))
    sources = _sources(program, values)
    users = {step.name: [other for other in program if step.name in other.reads] for step in program}

    def parted(step: Step) -> bool:
        # One layer's state out of those that an nn.LSTM returns together: the part is what has the batch in front.
        return step.name in sources and all(other.target is operator.getitem for other in users[step.name])

    ends: set[str] = set()
    owners: dict[str, set[str]] = {step.name: set() for step in program}
    for step in reversed(program.steps):
        name = step.name
        closes = (_weighty(step) or name in sources) and not parted(step)
        inside = name in made and (closes or len(owners[name]) > 1)
        if _floating(values[name]) and (name in results or inside):
            ends.add(name)
        for read in step.reads:
            owners[read] |= {name} if name in ends else owners[name]
    return ends


def _sources(program: Program, values: dict[str, Any]) -> dict[str, tuple[Step, str]]:
    """For what is taken out of the tuple of a module or mixing function: that step, and the items in brackets."""
    sources: dict[str, tuple[Step, str]] = {}
    by_name = {step.name: step for step in program}
    for step in program:
        if step.target is not operator.getitem or not isinstance(step.args[0], Ref):
            continue
        before = by_name[step.args[0].name]
        if before.name in sources:
            source, items = sources[before.name]
        elif _weighty(before) and not isinstance(values[before.name], Tensor):
            source, items = before, ""
        else:
            continue
        sources[step.name] = source, f"{items}[{step.args[1]!r}]"
    return sources


def _live(program: Program) -> Program:
    needed = set(references(program.output))
    steps = []
    for step in reversed(program.steps):
        if step.name in needed:
            needed |= set(step.reads)
            steps.append(step)
    return replace(program, steps=tuple(reversed(steps)))


def _read(program: Program, ends: set[str]) -> dict[str, list[str]]:
    """The stages behind each stage with no other between, both as steps."""
    behind: dict[str, list[str]] = {}
    for step in program:
        found = [end for name in step.reads for end in ([name] if name in ends else behind[name])]
        behind[step.name] = list(dict.fromkeys(found))
    return {step.name: behind[step.name] for step in program if step.name in ends}


def _refuse_outputs(program: Program, ends: set[str], network: nn.Module) -> None:
    by_name = {step.name: step for step in program}
    waiting = [name for name in references(program.output) if name not in ends]
    while waiting:
        step = by_name[waiting.pop()]
        if step.kind == "input":
            raise ValueError(
                f"embed cannot take {described(network, '')} since an output that is no floating tensor is computed "
                "from an input, while outputs are read off the state alone: leave that output out."
            )
        waiting += [name for name in step.reads if name not in ends]


def _names(program: Program, ends: set[str], sources: dict[str, tuple[Step, str]]) -> dict[str, str]:
    names: dict[str, str] = {}
    for step in program:
        if step.name not in ends:
            continue
        if step.kind == "module":
            name = step.where or "network"
        elif step.kind == "input":
            name = step.name
        elif step.name in sources:
            source, items = sources[step.name]
            name = (source.where or "network") + items
        else:
            kind = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", "operation")
            name = f"{step.where}.{kind}".removeprefix(".")
        times = 1 + sum(other.partition("@")[0] == name for other in names.values())
        names[step.name] = name if times == 1 else f"{name}@{times}"
    return names
