"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import equilibria as eq

SOURCE = Path(__file__).parents[1] / "src"
MODULES = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(SOURCE.rglob("*.py"))
    if path.name != "__main__.py"
]


class Cell(nn.Module):
    """The cell that examples pass to a layer, as the example of `eq.DEQ` defines it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.linear(z) + x)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # what an example writes lands here
    # What a reader of the library has at hand; the rest of an example's names are those of its module.
    globals_ = {"eq": eq, "torch": torch, "nn": nn, "Cell": Cell, "Path": Path}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        failed, _ = doctest.testmod(importlib.import_module(name), extraglobs=globals_, optionflags=flags)
    assert failed == 0
