"""A TensorRT build as a command line of trtexec or of Polygraphy: each option of `TensorRtOptions` under their names.

`Job` -> `trtexec`, `convert`, `compare` -> arguments; what a tool has no option for is said by `Command.lacking`.

Sources: samples/common/sampleOptions.cpp of NVIDIA/TensorRT (10.0 to 10.16, 11.1); `polygraphy convert --help` and
`polygraphy run --help` of 0.53.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from engines.backends.compiler import ShapeRange
from engines.backends.profile import Profile
from engines.backends.tensorrt_options import CHOICES, TACTIC_SOURCES, VERSIONS, TensorRtOptions, release

Shapes = Mapping[str, ShapeRange]

# BuilderFlag -> what it is called; a flag that a tool has no option for is absent.
TRTEXEC_FLAGS: Mapping[str, str] = {
    "VERSION_COMPATIBLE": "--versionCompatible",
    "EXCLUDE_LEAN_RUNTIME": "--excludeLeanRuntime",
    "WEIGHT_STREAMING": "--allowWeightStreaming",
    "DISABLE_TIMING_CACHE": "--noBuilderCache",
    "ERROR_ON_TIMING_CACHE_MISS": "--errorOnTimingCacheMiss",
    "DISABLE_COMPILATION_CACHE": "--noCompilationCache",
    "SPARSE_WEIGHTS": "--sparsity=enable",
}
POLYGRAPHY_FLAGS: Mapping[str, str] = {
    "VERSION_COMPATIBLE": "--version-compatible",
    "EXCLUDE_LEAN_RUNTIME": "--exclude-lean-runtime",
    "WEIGHT_STREAMING": "--weight-streaming",
    "ERROR_ON_TIMING_CACHE_MISS": "--error-on-timing-cache-miss",
    "DISABLE_COMPILATION_CACHE": "--disable-compilation-cache",
    "SPARSE_WEIGHTS": "--sparse-weights",
}
_TRTEXEC_NUMBERS = {
    "builder_optimization_level": "--builderOptimizationLevel",
    "max_num_tactics": "--maxTactics",
    "avg_timing_iterations": "--avgTiming",
    "max_aux_streams": "--maxAuxStreams",
    "build_route": "--setBuildRoute",
}
_TRTEXEC_LEVELS = {
    "NONE": "none",
    "AMPERE_PLUS": "ampere+",
    "SAME_COMPUTE_CAPABILITY": "sameComputeCapability",
}
_TRTEXEC_POOLS = {"WORKSPACE": "workspace", "TACTIC_SHARED_MEMORY": "tacticSharedMem"}
_POLYGRAPHY_NUMBERS = {
    "builder_optimization_level": "--builder-optimization-level",
    "max_aux_streams": "--max-aux-streams",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One engine to build.

    Attributes:
        model: path of the Q/DQ model, as a command line takes it.
        engine: path of the engine.
        options: of the build; its timing cache is a path as a command line takes it.
        profiles: shapes of the dynamic inputs, one mapping for each optimization profile; none where all are fixed.
        profile: the version of TensorRT.
    """

    model: str
    engine: str
    options: TensorRtOptions
    profiles: Sequence[Shapes]
    profile: Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command line, and what was asked for that the tool has no option for."""

    arguments: tuple[str, ...]
    lacking: tuple[str, ...] = ()


def trtexec(job: Job) -> Command:
    """Builds and times an engine; the layers go to <engine>.layers.json, their times to <engine>.times.json."""
    options, shapes = job.options, list(_trtexec_shapes(job.profiles))
    found = [f"--onnx={job.model}", f"--saveEngine={job.engine}", *job.profile.trtexec, *shapes]
    if options.timing_cache:
        found.append(f"--timingCacheFile={options.timing_cache}")
    for name, option in _TRTEXEC_NUMBERS.items():
        if (value := getattr(options, name)) is not None:
            found.append(f"{option}={value}")
    if (level := options.hardware_compatibility_level) is not None:
        found.append(f"--hardwareCompatibilityLevel={_TRTEXEC_LEVELS[level]}")
    if (tiling := options.tiling_optimization_level) is not None:
        found.append(f"--tilingOptimizationLevel={CHOICES['tiling_optimization_level'][1].index(tiling)}")
    if options.l2_limit is not None:
        found.append(f"--l2LimitForTiling={options.l2_limit}")
    if pools := {_TRTEXEC_POOLS[n]: size for n, size in options.pools.items() if n in _TRTEXEC_POOLS}:
        found.append("--memPoolSize=" + ",".join(f"{n}:{_mebibytes(size)}" for n, size in pools.items()))
    if options.tactic_sources:
        there = [s for s in TACTIC_SOURCES if _exists(f"TacticSource.{s}", job.profile.version)]
        signed = ("+" + s if s in options.tactic_sources else "-" + s for s in there)
        found.append(f"--tacticSources={','.join(signed)}")
    found += [TRTEXEC_FLAGS[flag] for flag in options.flags if flag in TRTEXEC_FLAGS]
    if (budget := options.weight_streaming_budget) is not None:
        found.append(f"--weightStreamingBudget={'-1' if budget < 0 else f'{budget}B'}")
    for library in options.libraries:
        found.append(f"--{'dynamicPlugins' if library.serialize else 'staticPlugins'}={library.path}")
        found += [f"--setPluginsToSerialize={library.path}"] * library.serialize
    found += ["--profilingVerbosity=detailed", f"--exportLayerInfo={job.engine}.layers.json"]
    found.append(f"--exportProfile={job.engine}.times.json")
    return Command(arguments=("trtexec", *found), lacking=tuple(_lacking_of_trtexec(job)))


def convert(job: Job) -> Command:
    """Builds an engine with Polygraphy."""
    options = job.options
    found = [
        job.model,
        "--convert-to",
        "trt",
        "--strongly-typed",
        "-o",
        job.engine,
        "--profiling-verbosity",
        "detailed",
    ]
    for shapes in job.profiles:
        for kind in ("min", "opt", "max"):
            found += [f"--trt-{kind}-shapes", *(_shape(name, getattr(s, kind)) for name, s in shapes.items())]
    if options.timing_cache:
        found += ["--load-timing-cache", options.timing_cache, "--save-timing-cache", options.timing_cache]
    for name, option in _POLYGRAPHY_NUMBERS.items():
        if (value := getattr(options, name)) is not None:
            found += [option, str(value)]
    for name in CHOICES:
        if (choice := getattr(options, name)) is not None:
            found += [f"--{name.replace('_', '-')}", choice.lower()]
    if options.pools:
        found += ["--pool-limit", *(f"{name.lower()}:{size}" for name, size in options.pools.items())]
    if options.tactic_sources:
        found += ["--tactic-sources", *(source.lower() for source in options.tactic_sources)]
    found += [POLYGRAPHY_FLAGS[flag] for flag in options.flags if flag in POLYGRAPHY_FLAGS]
    return Command(
        arguments=("polygraphy", "convert", *found, *_plugins(options)), lacking=tuple(_lacking_of_convert(options))
    )


def compare(job: Job, *, inputs: str, outputs: str, cosine: float, snr_db: float) -> tuple[Command, Command]:
    """The Q/DQ model in ONNX Runtime on random inputs, then the engine on the same, held to two measures.

    Args:
        job: what was built.
        inputs: file for the inputs.
        outputs: file for what ONNX Runtime gives.
        cosine: least cosine similarity of each output.
        snr_db: least ratio of signal to noise of each output, in dB.
    """
    usual = [_shape(name, s.opt) for name, s in (job.profiles[0] if job.profiles else {}).items()]
    sized = ["--input-shapes", *usual] if usual else []
    kept = ["--save-inputs", inputs, "--save-outputs", outputs]
    reference = ("polygraphy", "run", job.model, "--onnxrt", "--seed", "1", *sized, *kept)
    engine = ["polygraphy", "run", job.engine, "--model-type", "engine", "--trt"]
    engine += ["--load-inputs", inputs, "--load-outputs", outputs, "--compare", "cosine_similarity", "snr"]
    engine += ["--cosine-similarity-threshold", f"{cosine:g}", "--snr-threshold", f"{snr_db:g}"]
    if (budget := job.options.weight_streaming_budget) is not None:
        engine += [f"--weight-streaming-budget={budget}"]
    return Command(arguments=reference), Command(arguments=(*engine, *_plugins(job.options)))


def _plugins(options: TensorRtOptions) -> list[str]:
    return ["--plugins", *(library.path for library in options.libraries)] if options.plugins else []


def _trtexec_shapes(profiles: Sequence[Shapes]) -> Iterator[str]:
    """The shapes of each profile, directly behind its number where there are several."""
    for number, shapes in enumerate(profiles):
        if len(profiles) > 1:
            yield f"--profile={number}"
        for kind in ("min", "opt", "max"):
            text = ",".join(f"{name}:{'x'.join(map(str, getattr(s, kind)))}" for name, s in shapes.items())
            yield f"--{kind}Shapes={text}"


def _lacking_of_trtexec(job: Job) -> Iterator[str]:
    options = job.options
    yield from (f"flags: {flag}" for flag in options.flags if flag not in TRTEXEC_FLAGS)
    yield from (f"memory_pool_limits: {pool}" for pool in options.pools if pool not in _TRTEXEC_POOLS)
    if options.ignore_mismatch:
        yield "ignore_mismatch"
    if names := {name for shapes in job.profiles for name in shapes if set(name) & set(",'")}:
        yield f"the shape of an input whose name has a comma or a quote ({', '.join(sorted(names))})"


def _lacking_of_convert(options: TensorRtOptions) -> Iterator[str]:
    for name in ("max_num_tactics", "avg_timing_iterations", "l2_limit_for_tiling", "build_route"):
        if getattr(options, name) is not None:
            yield name
    yield from (f"flags: {flag}" for flag in options.flags if flag not in POLYGRAPHY_FLAGS)
    if options.ignore_mismatch:
        yield "ignore_mismatch"
    yield from (f"plugins: serialize of {library.path}" for library in options.libraries if library.serialize)


def _exists(name: str, version: str) -> bool:
    first, gone = VERSIONS.get(name, ((0, 0), None))
    return first <= release(version) and (gone is None or release(version) < gone)


def _shape(name: str, shape: Sequence[int]) -> str:
    return f"{name}:[{','.join(map(str, shape))}]"


def _mebibytes(size: int) -> str:
    """Bytes as a decimal number of MiB, exactly."""
    return f"{size / (1 << 20):.20f}".rstrip("0").rstrip(".")
