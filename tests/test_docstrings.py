"""Every example in a docstring runs and prints what it says; every public name has one."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import equilibria as eq
import onelayer


class Cell(nn.Module):
    """The cell that docstrings speak of, as that of `eq.DEQ` defines it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.5 * self.linear(z) + x)


MODULES = sorted(
    module.name
    for package in (eq, onelayer)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path, monkeypatch) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {**vars(module), "torch": torch, "nn": nn, "eq": eq, "Cell": Cell}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs=names):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


PUBLIC = [(eq, name) for name in eq.__all__] + [(eq.diagnostics, name) for name in eq.diagnostics.__all__]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda value: getattr(value, "__name__", value))
def test_public_names_have_examples(module: object, name: str) -> None:
    value = getattr(module, name)
    if not callable(value):
        return
    assert value.__doc__
    # Protocols and records of results are described by what returns them.
    described_elsewhere = {"Adjoint", "AdjointReport", "Iterate", "LinearSolution", "LinearSolver", "Solver"}
    if name not in described_elsewhere | {"ConvergenceWarning"}:
        assert ">>> " in value.__doc__, f"{name} has no example"
