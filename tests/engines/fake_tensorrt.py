"""A `tensorrt` module that is not there: its objects have the members of a version's real API, and no other.

It parses a model into its inputs and outputs, keeps what is set on a configuration, and builds a plan of bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx

LISTS = Path(__file__).parent / "backends/tensorrt_api"
VERSIONS = ("10.16.1.11", "11.4.0.106")
INSPECTED = {
    "Name": "conv",
    "LayerType": "Convolution",
    "Inputs": [{"Name": "x", "Format/Datatype": "Int8", "Dimensions": [1, 16, 8, 8]}],
    "Outputs": [{"Name": "y", "Format/Datatype": "Half", "Dimensions": [1, 16, 6, 6]}],
    "TacticName": "imma",
    "Metadata": "[ONNX Layer: conv]",
}


@dataclass
class Seen:
    """What a build was asked for.

    Attributes:
        config: attributes of the configuration.
        flags: names of BuilderFlag.
        pools: name of the pool -> bytes.
        profiles: of each optimization profile, input -> (min, opt, max).
        sources: bits of the tactic sources.
        libraries: plugin libraries that were loaded.
        cache: bytes of the timing cache that was given, and whether it may be of another device.
        refused: names whose values it does not take.
    """

    config: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    pools: dict[str, int] = field(default_factory=dict)
    profiles: list[dict[str, tuple[Any, ...]]] = field(default_factory=list)
    sources: int = 0
    libraries: list[str] = field(default_factory=list)
    cache: tuple[bytes, bool] | None = None
    refused: set[str] = field(default_factory=set)


def names(version: str) -> dict[str, list[str]]:
    """Class -> members, of a version of tensorrt."""
    found: dict[str, list[str]] = json.loads((LISTS / f"tensorrt-{version}.json").read_text())["names"]
    return found


def fake_tensorrt(version: str = VERSIONS[1], layers: list[dict[str, Any]] | None = None) -> Any:
    """The module, with a `Seen` as `seen`."""
    api, seen = names(version), Seen()

    def limited(kind: str) -> type:
        """A base whose objects have the members of a class of the API, and keep what is set."""
        members = frozenset(api[kind])

        class Limited:
            def __setattr__(self, name: str, value: Any) -> None:
                assert name[0] == "_" or name in members, f"tensorrt {version}: {kind} has no {name}"
                object.__setattr__(self, name, value)

            def __init_subclass__(cls) -> None:
                own = {n for n in vars(cls) if n[0] != "_"}
                assert own <= members, f"tensorrt {version}: {kind} has no {own - members}"

        return Limited

    def enumeration(kind: str) -> Any:
        members = [n for n in api[kind] if n not in ("name", "value")]
        return SimpleNamespace(**{n: _Member(i, n) for i, n in enumerate(members)})

    class Profile(limited("IOptimizationProfile")):  # type: ignore[misc]
        def __init__(self) -> None:
            self._shapes: dict[str, tuple[Any, ...]] = {}

        def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
            self._shapes[name] = (low, usual, high)

    class TimingCache(limited("ITimingCache")):  # type: ignore[misc]
        def __init__(self, held: bytes) -> None:
            self._held = held

        def serialize(self) -> bytes:
            return self._held + b"+timed"

    class Config(limited("IBuilderConfig")):  # type: ignore[misc]
        def __init__(self) -> None:
            self._cache: TimingCache | None = None

        def __setattr__(self, name: str, value: Any) -> None:
            if name in seen.refused:
                object.__setattr__(self, name, "what it was")
                return
            super().__setattr__(name, value)
            if name[0] != "_":
                seen.config[name] = value

        def set_flag(self, flag: _Member) -> None:
            seen.flags.append(flag.name)

        def set_memory_pool_limit(self, pool: _Member, size: int) -> None:
            seen.pools[pool.name] = 0 if pool.name in seen.refused else size

        def get_memory_pool_limit(self, pool: _Member) -> int:
            return seen.pools[pool.name]

        def set_tactic_sources(self, bits: int) -> bool:
            seen.sources = bits
            return "sources" not in seen.refused

        def add_optimization_profile(self, profile: Profile) -> int:
            seen.profiles.append(profile._shapes)
            return len(seen.profiles) - 1

        def create_timing_cache(self, held: bytes) -> TimingCache:
            return TimingCache(held)

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            seen.cache, self._cache = (cache._held, ignore_mismatch), cache
            return "cache" not in seen.refused

        def get_timing_cache(self) -> TimingCache | None:
            return self._cache

    class Network:
        def __init__(self) -> None:
            self.inputs: list[Any] = []
            self.outputs: list[Any] = []

        num_inputs = property(lambda self: len(self.inputs))
        num_outputs = property(lambda self: len(self.outputs))

        def get_input(self, index: int) -> Any:
            return self.inputs[index]

        def get_output(self, index: int) -> Any:
            return self.outputs[index]

    class Parser(limited("OnnxParser")):  # type: ignore[misc]
        def __init__(self, network: Network, logger: Any) -> None:
            self._network = network

        def parse(self, data: bytes, path: str | None) -> bool:
            return self._read(onnx.ModelProto.FromString(data))

        def parse_from_file(self, path: str) -> bool:
            return self._read(onnx.load(path))

        def _read(self, model: onnx.ModelProto) -> bool:
            for values, found in (
                (model.graph.input, self._network.inputs),
                (model.graph.output, self._network.outputs),
            ):
                for value in values:
                    shape = tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)
                    found.append(SimpleNamespace(name=value.name, shape=shape, is_shape_tensor=False))
            return True

    class Builder(limited("Builder")):  # type: ignore[misc]
        def __init__(self, logger: Any) -> None:
            pass

        def create_network(self, flags: int) -> Network:
            assert flags == 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes:
            return b"a plan"

    class Inspector(limited("EngineInspector")):  # type: ignore[misc]
        def get_engine_information(self, form: Any) -> str:
            return json.dumps({"Layers": layers or [INSPECTED]})

    class CudaEngine(limited("ICudaEngine")):  # type: ignore[misc]
        device_memory_size_v2 = 512

        def create_engine_inspector(self) -> Inspector:
            return Inspector()

        def get_engine_stat(self, stat: Any) -> int:
            return 2304

    class Runtime(limited("Runtime")):  # type: ignore[misc]
        def __init__(self, logger: Any) -> None:
            pass

        def deserialize_cuda_engine(self, data: bytes) -> CudaEngine | None:
            return CudaEngine() if data == b"a plan" else None

    class Registry(limited("IPluginRegistry")):  # type: ignore[misc]
        def load_library(self, path: str) -> object | None:
            seen.libraries.append(path)
            return None if "library" in seen.refused else object()

    class Plain:
        ERROR = INTERNAL_ERROR = 1

        def __init__(self, level: int = 0) -> None:
            pass

    enumerations = [
        "BuilderFlag",
        "MemoryPoolType",
        "TacticSource",
        "HardwareCompatibilityLevel",
        "TilingOptimizationLevel",
        "ProfilingVerbosity",
        "NetworkDefinitionCreationFlag",
        "LayerInformationFormat",
        "EngineStat",
    ]
    objects: dict[str, Any] = {"Builder": Builder, "OnnxParser": Parser, "Runtime": Runtime, "Logger": Plain}
    objects |= {"ILogger": Plain, "IProgressMonitor": Plain, "get_plugin_registry": Registry}
    assert {*enumerations, *objects} <= set(api)
    module = SimpleNamespace(
        __name__="tensorrt",
        __version__=version,
        seen=seen,
        **objects,
        **{name: enumeration(name) for name in enumerations},
    )
    return module


@dataclass(frozen=True)
class _Member:
    """One value of an enumeration."""

    value: int
    name: str

    def __int__(self) -> int:
        return self.value
