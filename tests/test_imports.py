"""Imports go one way, folders stay small, and what a user imports first is light."""

from __future__ import annotations

import os
import subprocess
import sys

import imports as layers
import pytest

import qdq

FILES = layers.modules()
GRAPH = layers.file_graph()
FOLDERS = layers.folder_graph(GRAPH)

# The folders of qdq in the order of the pipeline: each imports only those before it.
PIPELINE = (
    "core",
    "model",
    "passes",
    "plan",
    "measure",
    "solve",
    "assemble",
    "build",
    "tune",
    "lint",
    "frontend",
    "deploy",
    "cli",
)

# The parts of engines that a folder of qdq may import: what is left out imports `engines.core` alone, or nothing.
ENGINES = {
    "plan": {"core", "backends"},
    "assemble": {"core", "backends"},
    "build": {"core", "backends", "cost", "timing", "verify"},
    "lint": {"core", "backends"},
    "deploy": {"core", "backends", "cost", "verify"},
    "cli": {"core", "backends", "cost", "timing", "verify"},
}

# What may not be imported when a module is loaded, only inside the functions that need it.
RUNTIMES = {"onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "torch"}


def test_no_circles_for_types_either() -> None:
    assert layers.circle(GRAPH) == []
    assert layers.circle(FOLDERS) == []


def test_a_circle_is_found() -> None:
    assert layers.circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})


def test_at_most_eleven_levels_of_folders() -> None:
    assert max(layers.levels(FOLDERS).values()) <= 11


def test_packages_import_in_one_direction() -> None:
    for module, used in GRAPH.items():
        package = module.partition(".")[0]
        if package != "qdq":
            assert {m.partition(".")[0] for m in used} <= {package}, module


def test_the_folders_of_qdq_stand_in_the_order_of_the_pipeline() -> None:
    assert {name.partition(".")[2] for name in FOLDERS if name.startswith("qdq.")} == set(PIPELINE)
    for place, name in enumerate(PIPELINE):
        used = {f.partition(".")[2] for f in FOLDERS[f"qdq.{name}"] if f.startswith("qdq.")}
        assert used <= set(PIPELINE[:place]), name
        engines = {f.partition(".")[2] for f in FOLDERS[f"qdq.{name}"] if f.startswith("engines.")}
        assert engines <= ENGINES.get(name, {"core"}), name
    assert FOLDERS["qdq.lint"] <= {"engines.backends", "engines.core", "qdq.core", "qdq.model"}


def test_folders_and_files_stay_small() -> None:
    count = layers.entries()
    assert count["qdq"] <= 13
    assert {name: n for name, n in count.items() if n > 12 and name != "qdq"} == {}
    assert {name: n for name, n in layers.lines().items() if n > 400} == {}


@pytest.mark.parametrize("module", FILES)
def test_no_module_loads_a_runtime_at_import(module: str) -> None:
    assert not {i.name.partition(".")[0] for i in layers.imports(FILES[module]) if i.at_load} & RUNTIMES


@pytest.mark.parametrize("module", [m for m, path in FILES.items() if path.name == "__init__.py"])
def test_a_folder_says_what_it_is(module: str) -> None:
    text = FILES[module].read_text(encoding="utf-8")
    assert text.startswith('"""') and (module.count(".") != 1 or "ust not" in text or "annot" in text), module


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
        "import sys; from click.testing import CliRunner; from qdq.cli.main import main;"
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
