"""A recipe's `tensorrt` and `runtime_cache`: from the file to the compiler, the manifest and the one who asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import engine_graphs as graphs
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from fake_tensorrt import fake_tensorrt

from calib_data import Samples
from engines.backends import plugins, trt
from engines.backends.backend import Running
from engines.backends.doctor import InstalledGpu
from engines.core.errors import EngineError
from qdq.build.engine import compiled, require_profiles
from qdq.build.keys.recipe_file import read_recipe
from qdq.build.recipe import Recipe, RecipeFile
from qdq.cli.main import main
from qdq.core.errors import InputError
from qdq.measure.inference.inputs import as_samples
from qdq.model.storage import load

RECIPE = """
compiler: tensorrt
tensorrt:
  profiles:
  - {x: 1x16x8x8}
  - {x: [2x16x8x8, 8x16x8x8, 32x16x8x8]}
  memory_pool_limits: {WORKSPACE: 1GiB}
  builder_optimization_level: 5
  flags: [WEIGHT_STREAMING]
  weight_streaming_budget_v2: auto
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A `tensorrt`, a GPU, a model of any batch and a recipe, in the folder of the test."""
    module = fake_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(trt, "gpus", lambda: [InstalledGpu(name="L4", target="sm89", memory_bytes=24 << 30)])
    monkeypatch.setattr(plugins, "_LOADED", set())
    monkeypatch.chdir(tmp_path)
    onnx.save(graphs.conv(batch="N"), "m.onnx")
    Path("recipe.yaml").write_text(RECIPE)
    return module


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def test_build_takes_everything_from_the_recipe_and_the_manifest_holds_it(fake: Any) -> None:
    done = run("build", "m.onnx", "-o", "m.engine", "--recipe", "recipe.yaml", "--timing-cache", "t.cache")
    assert done.exit_code == 0, done.output
    assert "the layers are those of the first of 2 optimization profiles" in " ".join(done.stderr.split())
    assert [profile["x"][1][0] for profile in fake.seen.profiles] == [1, 8]
    assert fake.seen.config["builder_optimization_level"] == 5 and fake.seen.pools == {"WORKSPACE": 1 << 30}
    assert Path("t.cache").read_bytes() == b"+timed"
    options = json.loads(Path("m.engine.manifest.json").read_text())["options"]
    held = {key: value for key, value in options.items() if key.startswith("tensorrt.")}
    profiles = held.pop("tensorrt.profiles")
    assert json.loads(profiles) == [{"x": "1x16x8x8"}, {"x": "2x16x8x8:8x16x8x8:32x16x8x8"}]
    assert held == {
        "tensorrt.memory_pool_limits": '{"WORKSPACE": "1GiB"}',
        "tensorrt.builder_optimization_level": 5,
        "tensorrt.flags": '["WEIGHT_STREAMING"]',
        "tensorrt.weight_streaming_budget_v2": "auto",
        "tensorrt.timing_cache": "t.cache",
    }
    assert options["shape.x"] == "1x16x8x8"  # of the profile that the layer table is of
    found = compiled(Path("m.engine"))
    assert found.shapes["x"].max == (1, 16, 8, 8) and found.model == Path("m.onnx").absolute()


def test_the_other_compiler_says_that_it_takes_none(fake: Any) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    shape = ("--shape", "x:1x16x8x8")
    given = ("--recipe", "recipe.yaml", "--compiler", "rtx", "--target", "sm89")
    done = run("build", "m.onnx", "-o", "m.engine", *given, *shape)
    assert done.exit_code == 0 and "TensorRT-RTX takes no `tensorrt` options" in " ".join(done.stderr.split())
    assert "tensorrt." not in Path("m.engine.manifest.json").read_text()
    cache = run("build", "m.onnx", "-o", "m.engine", "--target", "sm89", *shape, "--timing-cache", "t.cache")
    assert cache.exit_code == 0 and "its own timing cache does nothing" in " ".join(cache.stderr.split())
    assert not Path("t.cache").exists() and not fake.seen.config
    silent = run("build", "m.onnx", "-o", "m.engine", "--target", "sm89", *shape)
    assert silent.exit_code == 0 and "tensorrt" not in silent.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensorrt: {builder_level: 3}", "Did you mean 'builder_optimization_level'?"),
        ("tensorrt: [1]", "a mapping is needed"),
        ("tensorrt: {flags: [REFIT]}", "REFIT is refused: refit is not offered"),
        (
            "compiler: tensorrt:10.3\ntensorrt: {max_num_tactics: 3}",
            "TensorRT 10.3 has no IBuilderConfig.max_num_tactics",
        ),
    ],
)
def test_what_is_wrong_in_a_recipe_is_one_paragraph(fake: Any, text: str, message: str) -> None:
    Path("recipe.yaml").write_text(text)
    wrong = run("build", "m.onnx", "-o", "m.engine", "--recipe", "recipe.yaml")
    assert wrong.exit_code == 2 and message in " ".join(wrong.stderr.split()) and not Path("m.engine").exists()


def test_rtx_is_not_asked_for_the_versions_of_tensorrt(tmp_path: Path) -> None:
    options = {"tactic_sources": ["CUDNN"]}
    assert Recipe.from_mapping({"compiler": "rtx", "tensorrt": options}).tensorrt.tactic_sources == ("CUDNN",)
    with pytest.raises(EngineError, match=r"TensorRT 11 has no TacticSource\.CUDNN"):
        Recipe.from_mapping({"compiler": "tensorrt", "tensorrt": options})


def test_what_an_engine_needs_beside_it_comes_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"{RECIPE}  plugins: [p.so]\nruntime_cache: rtx.cache\n")
    asked = Recipe.from_mapping(read_recipe(tmp_path / "r.yaml"))
    found = asked.running
    assert (found.runtime_cache, found.weight_streaming_budget) == (None, -1)
    assert [library.path for library in found.plugins] == ["p.so"]
    runtime, first = asked.option_notes
    assert "`runtime_cache` is for engines of TensorRT-RTX" in runtime and "first of 2 optimization profiles" in first
    rtx = Recipe.from_mapping({"runtime_cache": "rtx.cache"})
    assert rtx.running == Running(runtime_cache=Path("rtx.cache")) and rtx.option_notes == ()
    assert Recipe().running == Running()


def test_the_schema_has_the_options_and_their_bounds() -> None:
    schema = RecipeFile.schema()
    options = schema["$defs"]["TensorRtOptions"]
    assert options["properties"]["builder_optimization_level"]["anyOf"][0] == {
        "type": "integer",
        "minimum": 0,
        "maximum": 5,
    }
    assert options["additionalProperties"] is False and "PluginLibrary" in schema["$defs"]


def samples(*batches: int) -> Samples:
    return as_samples([{"x": np.zeros((n, 16, 8, 8), np.float32)} for n in batches], load("m.onnx"))


def test_samples_that_no_profile_takes_are_refused_before_the_work(fake: Any) -> None:
    recipe = Recipe.from_mapping(read_recipe("recipe.yaml"))
    for batches in ((1,), (1, 32), (2, 8)):
        require_profiles(load("m.onnx"), recipe, {}, samples(*batches))
    with pytest.raises(InputError, match="samples of x 33x16x8x8, and none of the recipe's 2 optimization profiles"):
        require_profiles(load("m.onnx"), recipe, {}, samples(1, 33))
    require_profiles(load("m.onnx"), Recipe(), {}, samples(33))
    np.savez("big.npz", x=np.zeros((33, 16, 8, 8), np.float32))
    Path("data").mkdir()
    Path("big.npz").rename("data/big.npz")
    wrong = run("deploy", "m.onnx", "--data", "data", "--out", "out", "--recipe", "recipe.yaml")
    assert wrong.exit_code == 2 and not Path("out").exists()


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"xx": "1x16x8x8"}, r"Unknown input 'xx'.*'x'"),
        ({"x": "1x16x8"}, r"The shape 1x16x8 of the recipe's tensorrt: profiles\[0\] does not fit input 'x'"),
        ({"x": "1x8x8x8"}, "it needs that rank and those fixed sizes"),
    ],
)
def test_profiles_of_other_inputs_are_refused_without_a_gpu(fake: Any, profile: dict[str, str], message: str) -> None:
    recipe = Recipe.from_mapping({"compiler": "tensorrt", "target": "sm86", "tensorrt": {"profiles": [profile]}})
    with pytest.raises(InputError, match=message):
        require_profiles(load("m.onnx"), recipe, {}, samples(1))
