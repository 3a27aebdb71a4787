"""What compiling with TensorRT and with TensorRT-RTX have in common: parse, configure, build, read the errors.

model -> `compile_model(module, ...)` -> `Compiled` (bytes, log lines) -> the backend makes an `Engine`.
Always strongly typed and DETAILED. Must not set a precision: the ONNX graph carries it.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from engines.backends.advice import about_operators, about_text, about_turns
from engines.backends.layers import LayerTable
from engines.core.errors import BuildError
from engines.core.files import write_atomic
from engines.core.load import load_graph

OnProgress = Callable[[float, str], None]

_KEPT = ("LayerType: ", "Total Weights Memory", "Total Activation Memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRange:
    """The smallest, the usual and the largest shape of one input; all of one rank."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuses ranges that no shape fits."""
        same_rank = len(self.min) == len(self.opt) == len(self.max)
        if not same_rank or any(not 0 <= a <= b <= c for a, b, c in zip(self.min, self.opt, self.max, strict=True)):
            raise BuildError(
                f"The shapes min {self.min}, opt {self.opt}, max {self.max} are no range: "
                "they need one rank, and min <= opt <= max in every dimension."
            )

    @classmethod
    def fixed(cls, shape: Sequence[int]) -> ShapeRange:
        """The range that holds one shape."""
        return cls(min=tuple(shape), opt=tuple(shape), max=tuple(shape))

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a shape is in the range."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )

    @classmethod
    def parse(cls, text: str) -> ShapeRange:
        """The range of a text, one shape or the smallest, the usual and the largest.

        >>> ShapeRange.parse("1x3:2x3:4x3").max
        (4, 3)

        Raises:
            ValueError: it is no such text.
            BuildError: the shapes are no range.
        """
        low, *others = (tuple(int(size) for size in part.split("x") if size) for part in text.split(":"))
        usual, high = others or (low, low)
        return cls(min=low, opt=usual, max=high)

    def __str__(self) -> str:
        """The text that `parse` reads; "" for a scalar."""
        shapes = ["x".join(map(str, shape)) for shape in (self.min, self.opt, self.max)]
        return ":".join(shapes[:1] if len(set(shapes)) == 1 else shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A serialized engine and the table of its layers."""

    data: bytes = field(repr=False)
    table: LayerTable

    def save(self, path: Path | str) -> None:
        """Writes the engine, and its table beside it as `<path>.json`; each is complete or absent."""
        path = Path(path)
        write_atomic(path.with_name(path.name + ".json"), self.table.to_json())
        write_atomic(path, self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What the builder gave: the engine's bytes and the log lines about layers and memory."""

    data: bytes
    lines: tuple[str, ...]


def _logger(trt: ModuleType) -> Any:
    """A logger that keeps the lines about layers, and the errors."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message.strip())
            elif any(word in message for word in _KEPT):
                self.lines += [line for line in message.split("\n") if any(word in line for word in _KEPT)]

    return Log()


def _monitor(trt: ModuleType, on_progress: OnProgress) -> Any:
    """A progress monitor: the fraction of the outermost phase, refined by the phases inside it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.done: dict[str, float] = {}
            self.steps: dict[str, int] = {}
            self.reported = 0.0
            self.error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.done[phase_name], self.steps[phase_name] = 0, max(num_steps, 1)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.done[phase_name] = min(step + 1, self.steps[phase_name])
            fraction, width = 0.0, 1.0
            for name in self.done:  # phases nest, so this goes from the outermost inwards
                width /= self.steps[name]
                fraction += self.done[name] * width
            if fraction >= self.reported + 0.01 and self.error is None:
                self.reported = min(fraction, 1.0)
                try:
                    on_progress(self.reported, phase_name)
                except BaseException as error:  # an exception must not cross the compiler's C++ frames
                    self.error = error
            return self.error is None

        def phase_finish(self, phase_name: str) -> None:
            del self.done[phase_name], self.steps[phase_name]

    return Monitor()


def _parse(parser: Any, model: Path | str | onnx.ModelProto, directory: Path | None) -> None:
    """Parses the model, or raises the parser's own errors with the nodes they are about."""
    if isinstance(model, onnx.ModelProto):
        beside = None if directory is None else str(directory / "model.onnx")  # only its folder is looked at
        parsed = parser.parse(model.SerializeToString(), beside)
    else:
        parsed = parser.parse_from_file(str(model))
    if parsed:
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    parts = [f"{_said(e.desc())} (node {e.node_name() or '?'}, {e.node_operator() or '?'})" for e in errors]
    nodes = tuple(dict.fromkeys(e.node_name() for e in errors if e.node_name()))
    advice = about_operators(e.node_operator() for e in errors) or about_text(load_graph(model).graph)
    said = ". ".join(filter(None, ("; ".join(parts or ["no reason given"]), advice)))
    raise BuildError(f"The ONNX parser refused the model: {said}", nodes=nodes)


def _said(description: str) -> str:
    """What the parser says of an operator; that it knows none of the name is "false"."""
    return "it knows no such operator" if description == "false" else description


def _names(text: str, node: str) -> bool:
    """Whether a message holds the name of a node, perhaps with a number of the builder's, and not inside another."""
    return re.search(rf"(?<![\w/]){re.escape(node)}(_\d+)?(?![\w/])", text) is not None


def _profiles(builder: Any, config: Any, network: Any, profiles: Sequence[Mapping[str, ShapeRange]]) -> None:
    """Optimization profiles for the inputs with dynamic dimensions.

    Raises:
        BuildError: an unknown input name, a dynamic input without a range, or a range against a fixed dimension.
    """
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    tensors = {}
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        own = tensor.name.removeprefix("__")  # the parser renames an input that is an output too
        tensors[own if own in outputs else tensor.name] = tensor
    for shapes in profiles:
        if unknown := sorted(set(shapes) - set(tensors)):
            raise BuildError(f"No input is named {', '.join(unknown)}; the model's inputs are {', '.join(tensors)}.")
        for name, given in shapes.items():
            declared = tuple(tensors[name].shape)
            for shape in (given.min, given.opt, given.max):
                if len(shape) != len(declared) or any(d not in (-1, s) for d, s in zip(declared, shape, strict=True)):
                    raise BuildError(f"Shape {shape} does not fit input {name}, declared {declared} (-1 is dynamic).")
        dynamic = {name: tensor for name, tensor in tensors.items() if -1 in tuple(tensor.shape)}
        if lacking := next((name for name in dynamic if name not in shapes), None):
            raise BuildError(
                f"Input {lacking} has dynamic dimensions {tuple(tensors[lacking].shape)} and no shapes were given. "
                f"Give the smallest, usual and largest shape: --shape {lacking}:min:opt:max."
            )
        if not dynamic:
            continue
        profile = builder.create_optimization_profile()
        for name, tensor in dynamic.items():
            set_shape = profile.set_shape_input if tensor.is_shape_tensor else profile.set_shape
            set_shape(tensor.name, shapes[name].min, shapes[name].opt, shapes[name].max)
        config.add_optimization_profile(profile)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep Python's garbage collector from running inside a call of the logger.

    It would free the builder of an earlier build that failed, which waits for a lock of the compiler that the call
    holds: the process stood still (tensorrt_rtx 1.7.1.116).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def compile_model(
    trt: ModuleType,
    model: Path | str | onnx.ModelProto,
    *,
    shapes: Mapping[str, ShapeRange],
    configure: Callable[[Any], None],
    profiles: Sequence[Mapping[str, ShapeRange]] = (),
    directory: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Compiled:
    """Compiles with the `tensorrt` or the `tensorrt_rtx` module.

    External data of a path are found beside it, those of a model in `directory`. `shapes` has the range of every input
    with dynamic dimensions; each of `profiles` makes an optimization profile, with other ranges for some inputs;
    `configure` sets what the backend needs on the builder config; `on_progress` is called with a fraction in 0..1 and
    the compiler's name of the phase.

    Raises:
        BuildError: parse or build error, with the compiler's message.
    """
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    _parse(parser, model, directory)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _profiles(builder, config, network, [{**shapes, **own} for own in profiles or ({},)])
    configure(config)
    monitor = _monitor(trt, on_progress) if on_progress else None
    if monitor:
        config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor and monitor.error:
        raise monitor.error
    if plan is None:
        graph = load_graph(model).graph
        text = " | ".join(log.errors) or "the builder gave no reason"
        named = [n for n in graph.node if n.name and _names(text, n.name)]
        turns, inner = about_turns(text, graph)
        text = ". ".join(filter(None, (text, about_operators(n.op_type for n in named), turns)))
        raise BuildError(f"The engine builder failed: {text}", nodes=(*(n.name for n in named), *inner))
    if on_progress:
        on_progress(1.0, "Engine built")
    return Compiled(data=bytes(plan), lines=tuple(log.lines))
