"""Every TensorRT name that the engines use exists in the versions they are for, read from lists of the public API.

The lists (tensorrt_api/) hold every public class and member of tensorrt 10.16.1.11, 11.4.0.106 and
tensorrt_rtx 1.7.1.116.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from places import ROOT

TENSORRT = ("tensorrt-10.16.1.11", "tensorrt-11.4.0.106")
RTX = ("tensorrt_rtx-1.7.1.116",)
FILES = {
    "engines/backends/compiler.py": (*TENSORRT, *RTX),
    "engines/backends/plugins.py": (*TENSORRT, *RTX),
    "engines/backends/rtx.py": RTX,
    "engines/backends/trt.py": (*TENSORRT, *RTX),  # `inspect` reads the engines of both
    "engines/timing/loaded.py": (*TENSORRT, *RTX),
    "engines/runtime/gpu.py": (*TENSORRT, *RTX),
}
# The class of each variable name; every such variable in these files is one of these objects.
CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "e": "ParserError",
    "tensor": "ITensor",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "cache": "ITimingCache",
    "settings": "IRuntimeConfig",
    "kept": "IRuntimeCache",
    "registry": "IPluginRegistry",
}
# Names of some versions only, which are used behind hasattr -> versions that have them.
GUARDED = {
    name: RTX for name in ("is_stream_capturable", "cuda_graph_strategy", "CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE")
}
GUARDED |= {name: RTX for name in ("create_runtime_cache", "set_runtime_cache", "IRuntimeCache")}


def names(version: str) -> dict[str, list[str]]:
    """Class -> members, of one version."""
    text = (Path(__file__).parent / "tensorrt_api" / f"{version}.json").read_text()
    result: dict[str, list[str]] = json.loads(text)["names"]
    return result


def used(file: str) -> set[tuple[str, str]]:
    """(class or '' for the module, attribute path) of every TensorRT name in a file."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.value, ast.Name):
            variable = node.value.id
            if variable == "trt" and not node.attr.startswith("__"):
                found.add(("", node.attr))
            elif variable in CLASSES:
                found.add((CLASSES[variable], node.attr))
        elif ast.unparse(node.value).startswith("trt.") and isinstance(node.value, ast.Attribute):
            found.add((node.value.attr, node.attr))
    return {(c, a) for c, a in found if not (c == "" and a[0] == "_") and a != "__init__"}


@pytest.mark.parametrize(("file", "version"), [(f, v) for f, versions in FILES.items() for v in versions])
def test_every_name_exists(file: str, version: str) -> None:
    api = names(version)
    missing = [
        f"{owner or 'module'}.{name}"
        for owner, name in sorted(used(file))
        if version in GUARDED.get(owner, GUARDED.get(name, (version,)))
        and name not in (api.get(owner, []) if owner else api)
    ]
    assert not missing


def test_the_reading_finds_the_names() -> None:
    """So that the test above cannot pass by reading nothing."""
    assert {("", "Builder"), ("ProfilingVerbosity", "DETAILED"), ("OnnxParser", "parse_from_file")} <= used(
        "engines/backends/compiler.py"
    )
    assert {("ICudaEngine", "get_engine_stat"), ("IBuilderConfig", "set_timing_cache")} <= used(
        "engines/backends/trt.py"
    )
    assert ("IBuilderConfig", "set_compute_capability") in used("engines/backends/rtx.py")
    assert {("IExecutionContext", "execute_async_v3"), ("IRuntimeConfig", "cuda_graph_strategy")} <= used(
        "engines/timing/loaded.py"
    )
    assert "set_compute_capability" not in names(TENSORRT[0])["IBuilderConfig"]


def test_every_progress_callback_overrides_a_method() -> None:
    tree = ast.parse((ROOT / "engines/backends/compiler.py").read_text())
    (monitor,) = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "Monitor")
    methods = {n.name for n in monitor.body if isinstance(n, ast.FunctionDef)} - {"__init__"}
    for version in (*TENSORRT, *RTX):
        assert methods == set(names(version)["IProgressMonitor"])


def test_no_precision_flag_or_calibrator_is_used() -> None:
    for file in FILES:
        assert not {a for _, a in used(file)} & {
            "BuilderFlag",
            "set_flag",
            "int8_calibrator",
            "set_calibration_profile",
        }


def test_engines_import_nothing_of_qdq() -> None:
    for path in (ROOT / "engines").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {m.split(".")[0] for m in modules} & {"qdq", "calib_data"}, path.name
