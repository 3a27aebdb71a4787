"""How the packages are layered: reads every import of the source, at load, inside functions and for types alike.

Usage: python tests/imports.py    prints the folders by level, their entries, circles and totals
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engines", "calib_data", "qdq")
AT_TOP = {"__init__.py", "__main__.py", "README.md", "py.typed", "demo_data"}  # of a package, beside its folders

Graph = Mapping[str, set[str]]


@dataclass(frozen=True, kw_only=True)
class Import:
    """One name that a file imports, dotted; `at_load` where loading the file is enough."""

    name: str
    at_load: bool


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> Iterator[Import]:
    """Everything that a file imports."""

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            at_load = False
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            at_load = False
        if isinstance(node, ast.Import):
            yield from (Import(name=alias.name, at_load=at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (Import(name=f"{node.module}.{alias.name}", at_load=at_load) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_load)

    return visit(ast.parse(path.read_text(encoding="utf-8")), True)


def file_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Module -> modules of the project that it imports, for types too."""
    known = modules(root)
    graph = {}
    for module, path in known.items():
        names = {i.name if i.name in known else i.name.rpartition(".")[0] for i in imports(path)}
        graph[module] = (names & known.keys()) - {module}
    return graph


def folder(module: str) -> str:
    """The folder that a module counts to: `qdq.model` for all below it; a package without folders by its name."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] != "calib_data" else parts[0]


def folder_graph(files: Graph) -> dict[str, set[str]]:
    """Folder -> folders that it imports.

    A package's own `__init__` is a table of names, and `__main__` a call, not a layer.
    """
    graph: dict[str, set[str]] = {}
    for module, used in files.items():
        if module.endswith(".__main__"):
            continue
        if "." in module or module == "calib_data":
            mine = graph.setdefault(folder(module), set())
            mine |= {folder(m) for m in used if "." in m or m == "calib_data"} - {folder(module)}
    return graph


def circle(graph: Graph) -> list[str]:
    """The names of one circle, [] where there is none."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def levels(graph: Graph) -> dict[str, int]:
    """Folder -> 1 where it imports nothing of the project, else one more than the highest that it imports."""
    found: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        found[name] = 1 + max((found[used] for used in graph[name]), default=0)
    return found


def entries(root: Path = ROOT) -> dict[str, int]:
    """Folder -> files and folders in it, without `__init__.py` and what else stands at the top of a package."""
    return {
        str(path.relative_to(root)): sum(
            1 for e in path.iterdir() if e.name not in AT_TOP and e.name != "__pycache__" and not e.name.startswith(".")
        )
        for package in PACKAGES
        for path in (root / package, *sorted((root / package).rglob("*")))
        if path.is_dir() and path.name not in ("__pycache__", "demo_data")
    }


def lines(root: Path = ROOT) -> dict[str, int]:
    """Module -> lines of its file."""
    return {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in modules(root).items()}


def main() -> None:
    """Print the layers."""
    files = file_graph()
    graph = folder_graph(files)
    if found := circle(graph) or circle(files):
        print("circle:", " -> ".join(found))
        return
    for name, level in sorted(levels(graph).items(), key=lambda pair: (pair[1], pair[0])):
        print(f"{level:3} {name:18} {' '.join(sorted(graph[name]))}")
    count, longest = lines(), max(lines().items(), key=lambda pair: pair[1])
    print(f"{max(levels(graph).values())} levels of folders, 0 circles, {sum(map(len, graph.values()))} arrows")
    print(f"most entries in a folder: {max(entries().values())}; longest file: {longest[0]}, {longest[1]} lines")
    print(f"{len(count)} files, {sum(count.values())} lines")


if __name__ == "__main__":
    main()
