"""The options of a build with TensorRT: their names in the real API, what is refused, and what a build is given."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import engine_graphs as graphs
import pytest
from fake_tensorrt import INSPECTED, VERSIONS, fake_tensorrt, names
from places import SHARED

from engines.backends import plugins, trt
from engines.backends.compiler import ShapeRange
from engines.backends.doctor import InstalledGpu
from engines.backends.tensorrt_options import (
    CHOICES,
    FLAGS,
    NUMBERS,
    POOLS,
    REFUSED,
    TACTIC_SOURCES,
    VERSIONS as HELD,
    TensorRtOptions,
    release,
)
from engines.core.errors import BuildError, EngineError

EVERYTHING: dict[str, Any] = {
    "profiles": [
        {"x": "1x16x8x8"},
        {"x": ["4x16x8x8", "8x16x8x8", "16x16x8x8"]},
        {"x": "17x16x8x8:32x16x8x8:32x16x8x8"},
    ],
    "memory_pool_limits": {"workspace": "4GiB", "TACTIC_SHARED_MEMORY": 49152},
    "builder_optimization_level": 4,
    "max_num_tactics": 50,
    "avg_timing_iterations": 16,
    "max_aux_streams": 0,
    "tiling_optimization_level": "fast",
    "l2_limit_for_tiling": "2MiB",
    "hardware_compatibility_level": "same_compute_capability",
    "tactic_sources": ["JIT_CONVOLUTIONS"],
    "flags": ["version_compatible", "EXCLUDE_LEAN_RUNTIME", "WEIGHT_STREAMING", "EDITABLE_TIMING_CACHE"],
    "weight_streaming_budget_v2": "auto",
}


def every_name() -> set[str]:
    """Dotted names of the API that options can use."""
    found = {f"IBuilderConfig.{name}" for name in (*NUMBERS, *CHOICES, "l2_limit_for_tiling", "plugins_to_serialize")}
    found |= {f"{kind}.{member}" for kind, members in CHOICES.values() for member in members}
    found |= {f"BuilderFlag.{flag}" for flag in FLAGS} | {f"MemoryPoolType.{pool}" for pool in POOLS}
    return found | {f"TacticSource.{source}" for source in TACTIC_SOURCES} | {"ICudaEngine.weight_streaming_budget_v2"}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_is_one_of_the_api_from_the_version_on_that_is_said(version: str) -> None:
    api = names(version)
    for name in every_name():
        kind, _, member = name.partition(".")
        first, gone = HELD.get(name, ((10, 0), None))
        held = first <= release(version) and (gone is None or release(version) < gone)
        assert (member in api[kind]) is held, (version, name)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_lists_are_those_of_the_folder_beside_this_one(version: str) -> None:
    held = SHARED / f"tensorrt_api/tensorrt-{version}.json"
    if not held.is_file():
        pytest.skip(f"{held} is not here: the lists in tests/ stand for it")
    assert json.loads(held.read_text())["names"] == names(version)


def test_every_refused_name_is_one_of_the_api_and_has_a_reason() -> None:
    api = names(VERSIONS[0])
    known = {*api["IBuilderConfig"], *api["BuilderFlag"], *api["MemoryPoolType"]}
    assert set(REFUSED) <= known and all(len(reason) > 20 for reason in REFUSED.values())


def test_names_use_what_they_say() -> None:
    found = set(TensorRtOptions.from_mapping(EVERYTHING).names())
    assert found <= every_name()
    assert {"IBuilderConfig.max_num_tactics", "TilingOptimizationLevel.FAST", "MemoryPoolType.WORKSPACE"} <= found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"builder_optimisation_level": 3},
            "no option 'builder_optimisation_level'.*mean 'builder_optimization_level'",
        ),
        ({"builder_optimization_level": 6}, "builder_optimization_level is 6: it must be a whole number from 0 to 5"),
        ({"max_num_tactics": "many"}, "max_num_tactics is 'many': it must be a whole number"),
        ({"version_compatible": True}, r"version_compatible is a flag: write flags: \[VERSION_COMPATIBLE\]"),
        ({"workspace": "4G"}, "workspace is a memory pool: write memory_pool_limits: {WORKSPACE: 4GiB}"),
        ({"refit": True}, "refit is refused: refit is not offered: TensorRT folds quantized weights with their scales"),
        ({"flags": ["REFIT_IDENTICAL"]}, "REFIT_IDENTICAL is refused.*zero points cannot be refitted"),
        ({"flags": ["STRIP_PLAN"]}, "STRIP_PLAN is refused"),
        ({"flags": ["int8"]}, "INT8 is refused: the Q/DQ nodes and the types of the model say all precision"),
        ({"int8_calibrator": "x"}, "int8_calibrator is refused"),
        ({"DLA_core": 0}, "DLA_core is refused: DLA is no compiler here"),
        ({"dla_core": 0}, "dla_core is refused: DLA is no compiler here"),
        ({"memory_pool_limits": {"DLA_LOCAL_DRAM": 1}}, "DLA_LOCAL_DRAM is refused: DLA"),
        ({"runtime_platform": "WINDOWS_AMD64"}, "runtime_platform is refused: .*build it there"),
        ({"profiling_verbosity": "NONE"}, "refused: the engine is always built with DETAILED"),
        ({"flags": ["SPARSE"]}, "flags has 'SPARSE'; there are .*Did you mean 'SPARSE_WEIGHTS'"),
        ({"tiling_optimization_level": "most"}, "tiling_optimization_level has 'most'; there are NONE, FAST"),
        (
            {"memory_pool_limits": {"WORKSPACE": "much"}},
            "memory_pool_limits: WORKSPACE is 'much': it must be bytes, or a size",
        ),
        ({"memory_pool_limits": {"WORKSPACE": "1e30G"}}, "it must be bytes, or a size"),
        ({"l2_limit_for_tiling": 1 << 63}, "l2_limit_for_tiling is 9223372036854775808: it must be"),
        ({"max_aux_streams": 1 << 31}, "max_aux_streams is 2147483648: it must be"),
        ({"flags": [1]}, r"flags is \[1\]: it must be"),
        ({1: 2}, "no option '1'"),
        ({"profiles": [{"x": ["-1x3"]}]}, "no range"),
        ({"profiles": [{"x": [1, 3]}]}, "A shape is a text such as 1x3x224x224"),
        ({"profiles": [{"x": "4x3:1x3:8x3"}]}, r"profiles\[0\] has x: .*no range.*[^.]\.$"),
        ({"profiles": [{"x": "1x3"}, {"x": ["1x3", "2x3"]}]}, r"profiles\[1\] has x: .*one shape such as 1x3x224x224"),
        ({"profiles": {"x": "1x3"}}, "profiles is .*: it must be a list"),
        ({"plugins": [{"path": "a.so", "sha": "1"}]}, "it must be a mapping without the key sha"),
        ({"plugins": [{"sha256": "1"}]}, "it must be a mapping with the key path"),
        ({"flags": ["EXCLUDE_LEAN_RUNTIME"]}, "VERSION_COMPATIBLE engines only"),
        ({"plugins": [{"path": "a.so", "serialize": True}]}, "VERSION_COMPATIBLE engines only"),
        ({"weight_streaming_budget_v2": "auto"}, r"flags: \[WEIGHT_STREAMING\]"),
        ({"flags": ["DISABLE_TIMING_CACHE"], "timing_cache": "t"}, "contradict"),
        (["builder_optimization_level"], "a mapping is needed"),
    ],
)
def test_what_is_refused_says_what_to_do(values: object, message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        TensorRtOptions.from_mapping(values)
    assert str(caught.value).startswith("The recipe's tensorrt options: ") and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("values", "version", "message"),
    [
        ({"max_num_tactics": 9}, "10.3", "TensorRT 10.3 has no IBuilderConfig.max_num_tactics .10.4 and later have it"),
        ({"tiling_optimization_level": "FULL"}, "10.3.0.26", "10.8 and later have it"),
        (
            {"hardware_compatibility_level": "SAME_COMPUTE_CAPABILITY"},
            "10.3",
            "HardwareCompatibilityLevel.SAME_COMPUTE",
        ),
        ({"flags": ["EDITABLE_TIMING_CACHE"]}, "10.3", "BuilderFlag.EDITABLE_TIMING_CACHE"),
        ({"build_route": "-knob=1"}, "10.16.1.11", "11.1 and later have it"),
        ({"build_route": "-knob=1"}, "11.0.0.114", "11.1 and later have it"),
        ({"tactic_sources": ["CUDNN"]}, "11", "TacticSource.CUDNN .11.0 removed it"),
    ],
)
def test_a_name_that_a_version_lacks_is_refused(values: dict[str, Any], version: str, message: str) -> None:
    options = TensorRtOptions.from_mapping(values)
    with pytest.raises(EngineError, match=f"{message}.*build with a version that has it"):
        options.require(version)
    options.require("10.16" if "build_route" not in values else "11")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """A `tensorrt` of one version, and a GPU for it."""
    module = fake_tensorrt(getattr(request, "param", VERSIONS[1]))
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(trt, "gpus", lambda: [InstalledGpu(name="L4", target="sm89", memory_bytes=24 << 30)])
    monkeypatch.setattr(plugins, "_LOADED", set())
    return module


@pytest.mark.parametrize("fake", VERSIONS, indirect=True)
def test_a_build_is_given_everything(fake: Any) -> None:
    options = TensorRtOptions.from_mapping(EVERYTHING)
    trt.build(graphs.conv(batch="N"), options=options)
    seen = fake.seen
    fixed, ranged = ((1, 16, 8, 8),) * 3, ((4, 16, 8, 8), (8, 16, 8, 8), (16, 16, 8, 8))
    last = ((17, 16, 8, 8), (32, 16, 8, 8), (32, 16, 8, 8))
    assert seen.profiles == [{"x": fixed}, {"x": ranged}, {"x": last}]
    assert seen.pools == {"WORKSPACE": 4 << 30, "TACTIC_SHARED_MEMORY": 48 << 10}
    assert seen.flags == ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "WEIGHT_STREAMING", "EDITABLE_TIMING_CACHE"]
    assert seen.sources == 1 << int(fake.TacticSource.JIT_CONVOLUTIONS)
    assert {name: seen.config[name] for name in NUMBERS if name in EVERYTHING} == {
        "builder_optimization_level": 4,
        "max_num_tactics": 50,
        "avg_timing_iterations": 16,
        "max_aux_streams": 0,
    }
    assert seen.config["l2_limit_for_tiling"] == 2 << 20
    assert seen.config["tiling_optimization_level"] is fake.TilingOptimizationLevel.FAST
    level = fake.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    assert seen.config["hardware_compatibility_level"] is level and "build_route" not in seen.config


@pytest.mark.parametrize("fake", VERSIONS, indirect=True)
def test_without_options_nothing_but_the_verbosity_is_set(fake: Any) -> None:
    trt.build(graphs.conv(batch="N"), shapes={"x": ShapeRange.fixed((2, 16, 8, 8))})
    assert set(fake.seen.config) == {"profiling_verbosity"} and not fake.seen.flags and not fake.seen.pools
    assert fake.seen.profiles == [{"x": ((2, 16, 8, 8),) * 3}] and fake.seen.cache is None


def test_inputs_that_a_profile_leaves_out_have_the_shapes_of_the_samples(fake: Any) -> None:
    values = [graphs.value(name, ["N", 4]) for name in ("x", "y")]
    node = graphs.helper.make_node("Add", ["x", "y"], ["z"], name="add")
    model = graphs.model([node], values, [graphs.value("z", ["N", 4])])
    shapes = {name: ShapeRange.fixed((2, 4)) for name in ("x", "y")}
    trt.build(model, shapes=shapes, options=TensorRtOptions(profiles=({"x": "8x4"}, {})))
    assert fake.seen.profiles == [{"x": ((8, 4),) * 3, "y": ((2, 4),) * 3}, {"x": ((2, 4),) * 3, "y": ((2, 4),) * 3}]
    with pytest.raises(BuildError, match="No input is named z"):
        trt.build(model, shapes=shapes, options=TensorRtOptions(profiles=({"x": "8x4"}, {"z": "8x4"})))


def test_the_versions_names_are_asked_of_the_module_that_builds(fake: Any) -> None:
    with pytest.raises(EngineError, match=r"TensorRT 11\.4\.0\.106 has no TacticSource\.CUBLAS"):
        trt.build(graphs.conv(), options=TensorRtOptions(tactic_sources=("CUBLAS",)))


@pytest.mark.parametrize(
    ("refused", "options", "message"),
    [
        ("max_num_tactics", {"max_num_tactics": 9}, "TensorRT refuses max_num_tactics = 9 and keeps what it was"),
        (
            "WORKSPACE",
            {"memory_pool_limits": {"WORKSPACE": 4}},
            "TensorRT refuses 4 bytes for the memory pool WORKSPACE",
        ),
        ("sources", {"tactic_sources": ["JIT_CONVOLUTIONS"]}, "refuses the tactic sources JIT_CONVOLUTIONS"),
    ],
)
def test_what_tensorrt_refuses_without_a_word_is_an_error(
    fake: Any, refused: str, options: dict[str, Any], message: str
) -> None:
    fake.seen.refused.add(refused)
    with pytest.raises(BuildError, match=message):
        trt.build(graphs.conv(), options=TensorRtOptions.from_mapping(options))


class TestTheTimingCache:
    def test_is_written_and_read_again(self, fake: Any, tmp_path: Path) -> None:
        options = TensorRtOptions(timing_cache=str(tmp_path / "t.cache"))
        trt.build(graphs.conv(), options=options)
        assert fake.seen.cache == (b"", False) and (tmp_path / "t.cache").read_bytes() == b"+timed"
        trt.build(graphs.conv(), options=TensorRtOptions(timing_cache=options.timing_cache, ignore_mismatch=True))
        assert fake.seen.cache == (b"+timed", True) and (tmp_path / "t.cache").read_bytes() == b"+timed+timed"

    def test_of_another_device_is_refused_and_kept(self, fake: Any, tmp_path: Path) -> None:
        (tmp_path / "t.cache").write_bytes(b"of another")
        fake.seen.refused.add("cache")
        with pytest.raises(EngineError, match=r"does not take the timing cache .*t\.cache: .*another GPU or version"):
            trt.build(graphs.conv(), options=TensorRtOptions(timing_cache=str(tmp_path / "t.cache")))
        assert (tmp_path / "t.cache").read_bytes() == b"of another"

    def test_that_cannot_be_read_is_said(self, fake: Any, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match="Cannot read the timing cache"):
            trt.build(graphs.conv(), options=TensorRtOptions(timing_cache=str(tmp_path)))


class TestPlugins:
    def test_are_loaded_once_before_the_model_is_parsed(self, fake: Any, tmp_path: Path) -> None:
        (tmp_path / "p.so").write_bytes(b"code")
        sha = hashlib.sha256(b"code").hexdigest()
        plain = TensorRtOptions.from_mapping({"plugins": [str(tmp_path / "p.so")]})
        held = TensorRtOptions.from_mapping({"plugins": [{"path": str(tmp_path / "p.so"), "sha256": sha.upper()}]})
        for options in (plain, held):
            trt.build(graphs.conv(), options=options)
        assert fake.seen.libraries == [str((tmp_path / "p.so").resolve())]
        assert "plugins_to_serialize" not in fake.seen.config
        assert json.loads(str(plain.recorded()["plugins"])) == [{"file": "p.so", "sha256": sha}]

    def test_with_another_hash_are_refused_and_not_loaded(self, fake: Any, tmp_path: Path) -> None:
        (tmp_path / "p.so").write_bytes(b"other code")
        options = TensorRtOptions.from_mapping({"plugins": [{"path": str(tmp_path / "p.so"), "sha256": "ab" * 32}]})
        with pytest.raises(EngineError, match=r"p\.so has the sha256 .*and the recipe asks for abab.*not loaded"):
            trt.build(graphs.conv(), options=options)
        assert not fake.seen.libraries

    def test_that_are_missing_or_refused_are_one_error(self, fake: Any, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match=r"Cannot read .*absent\.so"):
            trt.build(graphs.conv(), options=TensorRtOptions(plugins=(str(tmp_path / "absent.so"),)))
        (tmp_path / "p.so").write_bytes(b"code")
        fake.seen.refused.add("library")
        with pytest.raises(EngineError, match="TensorRT does not load the plugin library"):
            trt.build(graphs.conv(), options=TensorRtOptions(plugins=(str(tmp_path / "p.so"),)))

    def test_go_into_the_engine_where_that_is_asked_for(self, fake: Any, tmp_path: Path) -> None:
        (tmp_path / "p.so").write_bytes(b"code")
        entry = {"path": str(tmp_path / "p.so"), "serialize": True}
        trt.build(
            graphs.conv(), options=TensorRtOptions.from_mapping({"plugins": [entry], "flags": ["VERSION_COMPATIBLE"]})
        )
        assert fake.seen.config["plugins_to_serialize"] == [str((tmp_path / "p.so").resolve())]


def test_the_layer_table_is_that_of_the_first_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    later = [{**INSPECTED, "Name": f"conv [profile {k}]"} for k in (1, 2, 10)]
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(layers=[INSPECTED, *later]))
    monkeypatch.setattr(trt, "gpus", lambda: [InstalledGpu(name="L4", target="sm89", memory_bytes=24 << 30)])
    assert [layer.name for layer in trt.build(graphs.conv()).table.layers] == ["conv"]


def test_a_manifest_holds_plain_values_without_folders() -> None:
    options = TensorRtOptions.from_mapping({**EVERYTHING, "timing_cache": "/home/somebody/t.cache"})
    held = options.recorded()
    assert held["timing_cache"] == "t.cache" and held["builder_optimization_level"] == 4
    assert json.loads(str(held["profiles"]))[1] == {"x": "4x16x8x8:8x16x8x8:16x16x8x8"}
    assert json.loads(str(held["flags"]))[0] == "VERSION_COMPATIBLE" and held["weight_streaming_budget_v2"] == "auto"
    assert "build_route" not in held and "ignore_mismatch" not in held
    assert TensorRtOptions().recorded() == {} and not TensorRtOptions() and options
