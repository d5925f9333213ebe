"""The house as a law: which room may import which, what the library needs, how long a file may be."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"

# The rooms of the library: a module imports its own room and those that stand above it. A new room takes its line here.
ROOMS = [
    "tree",
    "transforms",
    "steady",
    "precision",
    "norms",
    "status",
    "options",
    "solution",
    "problem",
    "linear",
    "solvers",
    "loop",
    "adjoints",
    "functional",
    "solve",
    "fixed_point",
    "root",
    "argmin",
    "nn",
    "universal",
    "diagnostics",
    "diagnosis",
    "testing",
]

# Modules of the library that may import one third-party package more than torch, which an extra then installs.
OPTIONAL: dict[str, set[str]] = {
    "equilibria.diagnosis.picture": {"matplotlib"},
    "equilibria.diagnostics.plots": {"matplotlib"},
    "equilibria.nn.integration": {"torchdiffeq"},
}

# Modules longer than 300 lines, each with the reason why it is not two.
LONG: dict[str, str] = {}

MODULES = sorted(SOURCE.rglob("*.py"))
LIBRARY = [path for path in MODULES if path.relative_to(SOURCE).parts[0] == "equilibria"]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Full names of the modules that a tree imports; `from a import b` means a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its room; write the full name."
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module


TREES = {name_of(path): ast.parse(path.read_text()) for path in MODULES}
IMPORTS = {name: sorted(set(imports(tree, set(TREES)))) for name, tree in TREES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [name for name in map(name_of, LIBRARY) if name != "equilibria"])
def test_a_module_imports_only_its_own_room_and_those_above(module: str):
    assert room_of(module) in ROOMS, f"{module} is in no room: add it to the list at the top of this test."
    for imported in IMPORTS[module]:
        if imported.split(".")[0] != "equilibria":
            continue
        if imported == "equilibria":
            assert room_of(module) == "testing", f"{module} imports the whole library, which stands below it."
            continue
        above = ROOMS.index(room_of(imported)) <= ROOMS.index(room_of(module))
        assert above, f"{module} imports {imported}, whose room stands below its own."


def test_no_modules_import_each_other_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle of imports: {' -> '.join((*path, module))}"
        if module not in done:
            for imported in IMPORTS[module]:
                if imported in IMPORTS:
                    visit(imported, (*path, module))
            done.add(module)

    for module in IMPORTS:
        visit(module, ())


@pytest.mark.parametrize("module", [name_of(path) for path in LIBRARY])
def test_the_library_needs_torch_and_nothing_else(module: str):
    allowed = sys.stdlib_module_names | {"torch", "equilibria"} | OPTIONAL.get(module, set())
    for imported in IMPORTS[module]:
        assert imported.split(".")[0] in allowed, f"{module} imports {imported}."


@pytest.mark.parametrize("module", [name for name in sorted(TREES) if name.startswith("onelayer")])
def test_only_the_room_for_transformers_needs_it(module: str):
    if module.split(".")[1:2] == ["hf"]:
        return
    for imported in IMPORTS[module]:
        assert imported.split(".")[0] not in {"transformers", "accelerate"}, f"{module} imports {imported}."
        assert not imported.startswith("onelayer.hf"), f"{module} imports {imported}, and with it transformers."


@pytest.mark.parametrize("module", sorted(TREES))
def test_no_import_of_our_own_hides_in_a_function(module: str):
    for function in ast.walk(TREES[module]):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for imported in imports(function, set(TREES)):
                own = imported.split(".")[0] in {"equilibria", "onelayer"}
                assert not own, f"{module} imports {imported} in a function, which can hide a circle."


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_is_long(path: Path):
    lines = len(path.read_text().splitlines())
    assert lines <= 300 or name_of(path) in LONG, f"{name_of(path)} has {lines} lines: split it or list why not."


def test_lists_at_the_top_name_only_what_exists():
    assert set(OPTIONAL) <= set(TREES)
    assert set(LONG) <= set(TREES)


def test_the_library_imports_and_solves_without_the_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [line for extra in project["optional-dependencies"].values() for line in extra]
    names = {re.split(r"[\[<>=~! ]", line)[0].replace("-", "_") for line in requirements} - {"equilibria"}
    assert {"numpy", "matplotlib", "scipy"} <= names
    program = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {names!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import torch
import equilibria as eq

solution = eq.fixed_point(torch.cos, torch.ones(2, 3, dtype=torch.float64))
assert bool(solution.converged.all())
assert "numpy" not in sys.modules
assert "onelayer" not in sys.modules
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
