"""What a user asks of TensorRT's builder and runtime, by the names of their API, and which versions have each name.

recipe's `tensorrt:` -> `TensorRtOptions`, free of contradictions -> `require` of a version -> `configure` a build.
What is not asked for stays as TensorRT has it. Must not import a runtime, nor set a precision: the model carries it.

Sources: the Python API of 10.16.1.11 and 11.4.0.106; NvInfer.h of 10.0 to 11.1 for the versions; release notes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from msgspec import Meta, field
from msgspec.structs import force_setattr

from engines.backends.compiler import ShapeRange
from engines.backends.plugins import PluginLibrary
from engines.core.documents import DocumentError, Part, byte_count, check_fields
from engines.core.errors import BuildError, EngineError, did_you_mean

# Attributes of IBuilderConfig that are set as they are given, and those that take a member of an enumeration.
NUMBERS = ("builder_optimization_level", "max_num_tactics", "avg_timing_iterations", "max_aux_streams", "build_route")
CHOICES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "hardware_compatibility_level": (
        "HardwareCompatibilityLevel",
        ("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"),
    ),
    "tiling_optimization_level": ("TilingOptimizationLevel", ("NONE", "FAST", "MODERATE", "FULL")),
}
POOLS = ("WORKSPACE", "TACTIC_DRAM", "TACTIC_SHARED_MEMORY")
TACTIC_SOURCES = ("CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
FLAGS = (
    "VERSION_COMPATIBLE",
    "EXCLUDE_LEAN_RUNTIME",
    "WEIGHT_STREAMING",
    "DISABLE_TIMING_CACHE",
    "EDITABLE_TIMING_CACHE",
    "ERROR_ON_TIMING_CACHE_MISS",
    "DISABLE_COMPILATION_CACHE",
    "SPARSE_WEIGHTS",
)

# Names that not every version from 10.0 on has -> the first that has them, and the first that no longer has.
VERSIONS: Mapping[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "ICudaEngine.weight_streaming_budget_v2": ((10, 1), None),
    "IBuilderConfig.max_num_tactics": ((10, 4), None),
    "IBuilderConfig.tiling_optimization_level": ((10, 8), None),
    "IBuilderConfig.l2_limit_for_tiling": ((10, 8), None),
    "BuilderFlag.EDITABLE_TIMING_CACHE": ((10, 8), None),
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": ((10, 9), None),
    "IBuilderConfig.build_route": ((11, 1), None),
    "TacticSource.CUBLAS": ((10, 0), (11, 0)),
    "TacticSource.CUBLAS_LT": ((10, 0), (11, 0)),
    "TacticSource.CUDNN": ((10, 0), (11, 0)),
}

DLA = (
    "DLA is no compiler here: it takes no Q/DQ model of this form (UINT8 or INT8 tensors in formats of its own, static "
    "shapes), TensorRT 11.0 to 11.3 have none, and 11.4 has it on Jetson AGX Orin and Windows on ARM alone. Take "
    "--compiler tensorrt for the GPU of that device."
)
"""Source: TensorRT release notes and documentation of 11.3 and 11.4, DLA layer restrictions."""

_PRECISION = "the Q/DQ nodes and the types of the model say all precision, and TensorRT 11 has no such option"
_REFIT = (
    "refit is not offered: TensorRT folds quantized weights with their scales into its kernels, zero points cannot be "
    "refitted, and scales that it merged because they were equal fail when they are refitted to others. Build a new "
    "engine from the new Q/DQ model; a timing cache makes that fast"
)
_AUDIT = "the engine is always built with DETAILED, which the audit of its layers reads"
# Names of the API that are refused -> why.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL", "STRIP_PLAN", "WEIGHTLESS"), _REFIT),
    **dict.fromkeys(("FP16", "BF16", "INT8", "FP8", "INT4", "FP4"), _PRECISION),
    **dict.fromkeys(("OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"), _PRECISION),
    **dict.fromkeys(("int8_calibrator", "quantization_flags", "set_calibration_profile"), _PRECISION),
    **dict.fromkeys(("DLA_core", "default_device_type", "set_device_type", "GPU_FALLBACK"), DLA.rstrip(".")),
    **dict.fromkeys(("DLA_MANAGED_SRAM", "DLA_LOCAL_DRAM", "DLA_GLOBAL_DRAM"), DLA.rstrip(".")),
    "engine_capability": "only STANDARD engines are built: SAFETY and DLA_STANDALONE are for other runtimes",
    "profiling_verbosity": _AUDIT,
    "runtime_platform": "an engine for another system does not load here, so its layers cannot be read: build it there",
    "remote_auto_tuning_config": "it is for engines of the safety runtime only",
    "algorithm_selector": "TensorRT 11 has none; EDITABLE_TIMING_CACHE took its place",
}

_MOST_COUNT, _MOST_BYTES = (1 << 31) - 1, (1 << 62)  # of an int32 and an int64 of the API
Size = Annotated[int, Meta(ge=1, le=_MOST_BYTES)] | str
Count = Annotated[int, Meta(ge=1, le=_MOST_COUNT)]


class TensorRtOptions(Part, frozen=True, kw_only=True):
    """Options of a build with TensorRT. Sizes are bytes, or texts such as 4GiB; None leaves TensorRT's default.

    Attributes:
        profiles: optimization profiles: input -> its shape, or its smallest, usual and largest. Inputs that one leaves
            out have the shapes of the samples, or of `--shape`.
        timing_cache: file of measured kernels: read if it exists, then written.
        ignore_mismatch: take a timing cache of another device.
        memory_pool_limits: pool -> most memory.
        builder_optimization_level: 0 takes the first kernel that works, 3 is TensorRT's default, 5 tries most.
        max_num_tactics: kernels tried for each layer, at most.
        avg_timing_iterations: runs that each kernel's time is the mean of.
        max_aux_streams: streams beside the main one.
        tiling_optimization_level: how hard it looks for tilings that stay in the L2 cache.
        l2_limit_for_tiling: most L2 cache for them.
        build_route: TensorRT's text of compiler knobs.
        hardware_compatibility_level: other GPUs that the engine is to run on.
        tactic_sources: libraries that kernels may come from; empty leaves the default.
        flags: of BuilderFlag.
        plugins: libraries, as paths or with the sha256 that they must have.
        weight_streaming_budget_v2: device memory for weights when the engine runs, or 'auto'; only with the flag
            WEIGHT_STREAMING.
    """

    profiles: tuple[dict[str, str | tuple[str, ...]], ...] = ()
    timing_cache: str = ""
    ignore_mismatch: bool = False
    memory_pool_limits: dict[str, Size] = field(default_factory=dict)
    builder_optimization_level: Annotated[int, Meta(ge=0, le=5)] | None = None
    max_num_tactics: Count | None = None
    avg_timing_iterations: Count | None = None
    max_aux_streams: Annotated[int, Meta(ge=0, le=_MOST_COUNT)] | None = None
    tiling_optimization_level: str | None = None
    l2_limit_for_tiling: Size | None = None
    build_route: str | None = None
    hardware_compatibility_level: str | None = None
    tactic_sources: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    plugins: tuple[str | PluginLibrary, ...] = ()
    weight_streaming_budget_v2: Size | None = None

    @classmethod
    def from_mapping(cls, values: object) -> Self:
        """The options of plain values, as YAML holds them.

        Raises:
            EngineError: an unknown name, whose nearest is said; a name that is refused, with the reason; a value of
                another type; options that contradict each other.
        """
        if not isinstance(values, Mapping):
            raise _wrong(f"they are {values!r}, and a mapping is needed, such as {{builder_optimization_level: 4}}.")
        for key in map(str, values):
            if key in cls.__struct_fields__:
                continue
            if reason := next((why for name, why in REFUSED.items() if name.upper() == key.upper()), ""):
                raise _wrong(f"{key} is refused: {reason}.")
            if key.upper() in FLAGS:
                raise _wrong(f"{key} is a flag: write flags: [{key.upper()}].")
            if key.upper() in POOLS:
                raise _wrong(f"{key} is a memory pool: write memory_pool_limits: {{{key.upper()}: 4GiB}}.")
            known = ", ".join(cls.__struct_fields__)
            hint = did_you_mean(key, cls.__struct_fields__)
            raise _wrong(f"TensorRT's builder has no option {key!r}; there are {known}.{hint}")
        return cls(**{str(key): value for key, value in values.items()})

    def __post_init__(self) -> None:
        """Refuses what is of another type, unknown or contradictory; names of enumerations may be in small letters."""
        try:
            check_fields(self)
        except DocumentError as error:
            form = " A shape is a text such as 1x3x224x224." if str(error).startswith("profiles is [") else ""
            raise _wrong(f"{error}.{form}") from None
        for name, (_, members) in CHOICES.items():
            if (value := getattr(self, name)) is not None:
                force_setattr(self, name, _member(value, members, name))
        force_setattr(self, "flags", tuple(dict.fromkeys(_member(f, FLAGS, "flags") for f in self.flags)))
        sources = (_member(s, TACTIC_SOURCES, "tactic_sources") for s in self.tactic_sources)
        force_setattr(self, "tactic_sources", tuple(dict.fromkeys(sources)))
        pools = {_member(name, POOLS, "memory_pool_limits"): size for name, size in self.memory_pool_limits.items()}
        force_setattr(self, "memory_pool_limits", pools)
        _ = self.ranges, self.pools, self.l2_limit, self.weight_streaming_budget
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if "EXCLUDE_LEAN_RUNTIME" in self.flags and "VERSION_COMPATIBLE" not in self.flags:
            raise _wrong("EXCLUDE_LEAN_RUNTIME says something of VERSION_COMPATIBLE engines only: add that flag.")
        if any(library.serialize for library in self.libraries) and "VERSION_COMPATIBLE" not in self.flags:
            raise _wrong(
                "a plugin library goes into VERSION_COMPATIBLE engines only: add that flag, or drop serialize."
            )
        if self.weight_streaming_budget_v2 is not None and "WEIGHT_STREAMING" not in self.flags:
            raise _wrong(
                "weight_streaming_budget_v2 needs an engine that streams its weights: flags: [WEIGHT_STREAMING]."
            )
        if "DISABLE_TIMING_CACHE" in self.flags and self.timing_cache:
            raise _wrong("DISABLE_TIMING_CACHE and timing_cache contradict each other: drop one.")

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return self != type(self)()

    @property
    def ranges(self) -> tuple[dict[str, ShapeRange], ...]:
        """The optimization profiles: input -> shapes.

        Raises:
            EngineError: a text is no shape, or shapes are no range.
        """
        return tuple(
            {name: _range(number, name, shapes) for name, shapes in profile.items()}
            for number, profile in enumerate(self.profiles)
        )

    @property
    def pools(self) -> dict[str, int]:
        """Bytes by the name of the memory pool."""
        return {name: _bytes(size, f"memory_pool_limits: {name}") for name, size in self.memory_pool_limits.items()}

    @property
    def l2_limit(self) -> int | None:
        """Bytes of the L2 cache for tilings."""
        size = self.l2_limit_for_tiling
        return None if size is None else _bytes(size, "l2_limit_for_tiling")

    @property
    def weight_streaming_budget(self) -> int | None:
        """Bytes of device memory for weights; -1 leaves it to TensorRT; None where weights are not streamed."""
        size = self.weight_streaming_budget_v2
        return None if size is None else -1 if size == "auto" else _bytes(size, "weight_streaming_budget_v2")

    @property
    def libraries(self) -> tuple[PluginLibrary, ...]:
        """The plugin libraries."""
        return tuple(PluginLibrary(path=p) if isinstance(p, str) else p for p in self.plugins)

    def names(self) -> Iterator[str]:
        """Names of the API that these options use: 'IBuilderConfig.max_num_tactics', 'BuilderFlag.SPARSE_WEIGHTS'."""
        for name in (*NUMBERS, *CHOICES, "l2_limit_for_tiling"):
            if getattr(self, name) is not None:
                yield f"IBuilderConfig.{name}"
        for name, (enumeration, _) in CHOICES.items():
            if (value := getattr(self, name)) is not None:
                yield f"{enumeration}.{value}"
        yield from (f"BuilderFlag.{flag}" for flag in self.flags)
        yield from (f"MemoryPoolType.{pool}" for pool in self.memory_pool_limits)
        yield from (f"TacticSource.{source}" for source in self.tactic_sources)
        if self.weight_streaming_budget_v2 is not None:
            yield "ICudaEngine.weight_streaming_budget_v2"

    def require(self, version: str) -> None:
        """Refuses what a version of TensorRT lacks; '11' is the newest of that major version.

        Raises:
            EngineError: names it, the versions that have it, and what to do.
        """
        ours = release(version)
        for name in self.names():
            first, gone = VERSIONS.get(name, ((10, 0), None))
            if ours < first or (gone and ours >= gone):
                has = f"{_text(first)} and later have it" if ours < first else f"{_text(gone or first)} removed it"
                short = name.partition(".")[2]
                raise _wrong(
                    f"TensorRT {version} has no {name} ({has}). Leave {short} out, or build with a version that has it."
                )

    def configure(self, trt: Any, config: Any) -> None:
        """Sets all but profiles and timing cache on an `IBuilderConfig`.

        Raises:
            EngineError: this version lacks a name.
            BuildError: TensorRT refuses a value.
        """
        self.require(trt.__version__)
        for name in NUMBERS:
            _set(config, name, getattr(self, name))
        for name, (enumeration, _) in CHOICES.items():
            if (value := getattr(self, name)) is not None:
                _set(config, name, getattr(getattr(trt, enumeration), value))
        _set(config, "l2_limit_for_tiling", self.l2_limit)
        for name, size in self.pools.items():
            pool = getattr(trt.MemoryPoolType, name)
            config.set_memory_pool_limit(pool, size)
            if (held := config.get_memory_pool_limit(pool)) != size:
                raise BuildError(f"TensorRT refuses {size} bytes for the memory pool {name} and keeps {held}.")
        if self.tactic_sources:
            wanted = sum(1 << int(getattr(trt.TacticSource, source)) for source in self.tactic_sources)
            if not config.set_tactic_sources(wanted):
                raise BuildError(f"TensorRT refuses the tactic sources {', '.join(self.tactic_sources)}.")
        for flag in self.flags:
            config.set_flag(getattr(trt.BuilderFlag, flag))
        if serialized := [str(Path(x.path).resolve()) for x in self.libraries if x.serialize]:
            config.plugins_to_serialize = serialized

    def recorded(self) -> dict[str, str | int | float | bool]:
        """What a manifest holds of the options: plain values, file names without their folders, hashes of libraries.

        Raises:
            EngineError: a plugin library cannot be read.
        """
        plain: dict[str, Any] = {n: v for n in self.__struct_fields__ if (v := getattr(self, n)) not in (None, "", ())}
        plain = {n: v for n, v in plain.items() if v is not False and v != {}}
        if self.timing_cache:
            plain["timing_cache"] = Path(self.timing_cache).name
        if self.profiles:
            plain["profiles"] = [{n: str(r) for n, r in profile.items()} for profile in self.ranges]
        if self.plugins:
            plain["plugins"] = [{"file": Path(x.path).name, "sha256": x.found()} for x in self.libraries]
        return {n: v if isinstance(v, str | int | float) else json.dumps(v) for n, v in plain.items()}


def release(version: str) -> tuple[int, int]:
    """Major and minor of a version; the newest minor where it names none.

    >>> release("10.16.1.11"), release("11") > (11, 4)
    ((10, 16), True)
    """
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(found[1]), int(found[2] or 10**6)) if found else (0, 0)


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _wrong(text: str) -> EngineError:
    return EngineError(f"The recipe's tensorrt options: {text}")


def _member(value: str, members: tuple[str, ...], name: str) -> str:
    """The member of an enumeration, in capitals."""
    if (found := value.upper()) in members:
        return found
    if reason := REFUSED.get(found):
        raise _wrong(f"{name}: {found} is refused: {reason}.")
    raise _wrong(f"{name} has {value!r}; there are {', '.join(members)}.{did_you_mean(found, members)}")


def _range(number: int, name: str, shapes: str | tuple[str, ...]) -> ShapeRange:
    text = shapes if isinstance(shapes, str) else ":".join(shapes)
    try:
        return ShapeRange.parse(text)
    except ValueError:
        said = "one shape such as 1x3x224x224, or [smallest, usual, largest]"
    except BuildError as error:
        raise _wrong(f"profiles[{number}] has {name}: {error}") from None
    raise _wrong(f"profiles[{number}] has {name}: {list(shapes) if text != shapes else text!r}, and needs {said}.")


def _bytes(size: int | str, name: str) -> int:
    try:
        count = size if isinstance(size, int) else byte_count(size)
        if count <= _MOST_BYTES:
            return count
    except ValueError:
        pass
    raise _wrong(f"{name} is {size!r}: it must be bytes, or a size such as 512MiB or 4GiB.")


def _set(config: Any, name: str, value: Any) -> None:
    """Sets an attribute, if there is a value; TensorRT keeps the old one where it refuses it."""
    if value is None:
        return
    setattr(config, name, value)
    if (held := getattr(config, name)) != value:
        raise BuildError(f"TensorRT refuses {name} = {value} and keeps {held}.")
