"""Imports go one way, and what a user imports first is light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import calib_data
import engines
import qdq

FOLDERS = {package.__name__: Path(package.__file__ or "").parent for package in (qdq, engines, calib_data)}
FILES = [(name, path) for name, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))]

# Only these modules of qdq may import the two other packages: they join the three. All others know ONNX and numbers.
JOINING = {"build", "deploy", "explain", "options", "pipeline", "pricing", "terminal", "workers"}
JOINING |= {"tap"}  # the types that ONNX Runtime lacks
JOINING |= {"cli", "cli_calibrate", "cli_compare", "cli_lint", "cli_tune", "comparison", "scoring"}

# The foundation knows nothing above it, and nothing below the top knows the top.
LOWEST: dict[str, set[str]] = {
    "errors": set(),
    "formats": {"errors"},
    "external": {"errors"},
    "graph": {"errors", "external", "proto"},
    "metrics": {"errors"},
    "proto": set(),
    "scheme": {"errors", "formats"},
}
TOP = {"build", "comparison", "deploy", "explain", "options", "pipeline", "pricing", "scoring", "workers"}
TOP |= {"cli", "cli_calibrate", "cli_compare", "cli_lint", "cli_tune"}

# What may not be imported when a module is loaded, only inside the functions that need it.
RUNTIMES = {"onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "torch"}


def imported(path: Path, *, at_load: bool) -> set[str]:
    """Dotted names that a file imports; `at_load` leaves out those inside functions and under TYPE_CHECKING."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize(("package", "path"), FILES, ids=[f"{n}/{p.name}" for n, p in FILES])
def test_packages_import_in_one_direction(package: str, path: Path) -> None:
    roots = {name.partition(".")[0] for name in imported(path, at_load=False)}
    if package != "qdq":
        assert not roots & (FOLDERS.keys() - {package})
    elif path.stem not in JOINING:
        assert not roots & {"engines", "calib_data"}


@pytest.mark.parametrize(("package", "path"), FILES, ids=[f"{n}/{p.name}" for n, p in FILES])
def test_no_module_loads_a_runtime_at_import(package: str, path: Path) -> None:
    assert not {name.partition(".")[0] for name in imported(path, at_load=True)} & RUNTIMES


def test_modules_of_qdq_stand_in_layers() -> None:
    uses: dict[str, set[str]] = {}
    for path in sorted(FOLDERS["qdq"].rglob("*.py")):
        module = path.relative_to(FOLDERS["qdq"]).parts[0].removesuffix(".py")
        names = [name.split(".") for name in imported(path, at_load=True)]
        uses.setdefault(module, set()).update(parts[1] for parts in names if parts[0] == "qdq")
        uses[module].discard(module)
    tuple(TopologicalSorter(uses).static_order())  # raises CycleError
    for low, allowed in LOWEST.items():
        assert uses[low] <= allowed, low
    for module in uses.keys() - TOP:
        assert not uses[module] & TOP, module


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_qdq_is_light() -> None:
    loaded = set(run("import qdq, sys; print(*sys.modules)").split())
    assert not loaded & (RUNTIMES | {"numpy", "onnx", "click", "rich"})


def test_help_is_light() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from qdq.cli import main;"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0; print(*sys.modules)"
    )
    assert not set(run(code).split()) & (RUNTIMES | {"numpy", "onnx", "rich"})


def test_every_public_name_exists_and_is_documented() -> None:
    assert sorted(qdq.__all__) == qdq.__all__
    for name in qdq.__all__:
        assert getattr(qdq, name).__doc__
    assert set(dir(qdq)) == set(qdq.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qdq.quantise
