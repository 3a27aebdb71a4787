"""ONNX Runtime: the reference, what calibration runs, and the stand-in for an engine where no GPU can run it.

model -> `session` (Q/DQ kept apart) -> `run` over samples, or a Polygraphy `runner` for `compare`.
`session_options`, `give_weights` and `open_session` are its parts, for who needs other outputs or weights.
Must not let ONNX Runtime fuse Q/DQ into its own integer kernels: their arithmetic is not TensorRT's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from engines.core.errors import EngineError, import_runtime
from engines.core.files import regular
from engines.core.fp4 import holds_fp4, runnable
from engines.core.load import settle

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8
LARGE_BLOCK = 1 << 20

Sample = Mapping[str, np.ndarray]

EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
# Optimizers of ONNX Runtime 1.32.0 that compute something else. Found by turning off one at a time over Q/DQ models and
# comparing with no optimization; the others change the order of FP32 sums at most, or rearrange.
WRONG_REWRITES = [
    "ReluQuantRewrite",  # drops a Relu in front of a QuantizeLinear to FP8, as if its zero point were the lowest code
    "ClipQuantRewrite",  # reads an FP8 zero point as an integer, and fails
    "DoubleQDQPairsRemover",  # quantizes once in place of twice, with a scale of its own
    "DivMulFusion",  # (1 / x) * y becomes y / x: a rounding less, and other codes behind it
]


def session(
    model: Path | str | onnx.ModelProto | bytes,
    *,
    directory: Path | str = "",
    where: str = "",
    providers: Sequence[str] = ("CPUExecutionProvider",),
    custom_ops: Sequence[Path | str] = (),
    threads: int = 0,
) -> Any:
    """An `onnxruntime.InferenceSession` that computes Q and DQ as the ONNX standard says.

    Args:
        model: a path, serialized bytes, or a model.
        directory: of the external data of what is no path.
        where: what messages call the model; "" for its path.
        providers: ONNX Runtime's own names, by preference.
        custom_ops: shared libraries of custom operators to register.
        threads: inside one operator; 0 lets ONNX Runtime choose, 1 makes the order of sums the same on every machine.

    Raises:
        EngineError: ONNX Runtime refuses the model or a library; holds its message.
        MissingRuntimeError: onnxruntime is not installed.
    """
    options = session_options(threads=threads, severity=3)
    if isinstance(model, onnx.ModelProto):
        source: str | bytes = runnable(model, directory).SerializeToString()
    else:
        source = model if isinstance(model, bytes) else str(model)
    where = where or (str(model) if isinstance(model, Path | str) else "the model")
    if directory:
        options.add_session_config_entry(EXTERNAL_FOLDER, str(directory))
    try:
        for library in custom_ops:
            register_library(options, library)
        try:
            return open_session(source, options, providers)
        except refusals():
            if (stand_in := _without_fp4(source)) is None:
                raise
            return open_session(stand_in.SerializeToString(), options, providers)
    except refusals() as error:
        raise EngineError(f"ONNX Runtime cannot load {where}: {error}") from error


def session_options(*, threads: int, severity: int) -> Any:
    """`onnxruntime.SessionOptions` with which Q and DQ are computed as the standard says.

    Args:
        threads: inside one operator; 0 lets ONNX Runtime choose.
        severity: of the messages that ONNX Runtime prints: 3 errors, 4 fatal ones only.

    What a run allocates is given back when it ends: an arena would keep the most that it ever took, or twice that, in
    each session (a 3-D U-Net: 201 MB where 105 are in use, and 21 between runs; 8 % of the time). Nor is memory laid
    out by the first run of a shape: every later one would hold a block for all its tensors from beginning to end, with
    the outputs beside it (a 3-D U-Net: 353 MB where 227 are alive at once).

    Source: session option `session.disable_quant_qdq`, onnxruntime_session_options_config_keys.h.
    """
    options = import_runtime("onnxruntime").SessionOptions()
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    _give_back()
    options.log_severity_level = severity
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def register_library(options: Any, library: Path | str) -> None:
    """Lets sessions of these options have the operators of a shared library, whose name the loader may search for.

    Raises:
        Exception: one of `refusals`; OSError where the path leads to a pipe or a device, whose loading may never end.
    """
    if Path(library).exists():
        regular(library)
    options.register_custom_ops_library(str(library))


@cache
def _give_back() -> None:
    """Let the C library return every large block that is freed, as it does until it has freed one of 32 MB.

    Small blocks come from one heap: of a heap for each thread, what one thread frees is of no use to the next.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_ARENA_MAX; other C libraries have no such function.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, LARGE_BLOCK)
        mallopt(_ARENA_MAX, 1)


def trim() -> None:
    """Return to the system the small blocks that were freed: the C library keeps them, some ten MB after a stage.

    Source: malloc_trim(3); other C libraries have no such function.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def give_weights(options: Any, weights: Mapping[str, np.ndarray], folder: Path) -> list[Any]:
    """Lets a session take external initializers from arrays, without a copy, and the others from a folder.

    What it returns must live as long as the session, as must the arrays.
    """
    ort = import_runtime("onnxruntime")
    options.add_session_config_entry(EXTERNAL_FOLDER, str(folder))
    given = [_value(ort, array) for array in weights.values()]
    for name, value in zip(weights, given, strict=True):
        options.add_initializer(name, value)
    if weights:  # else every weight would be copied, to be packed for the product and to an arena that grows
        options.add_session_config_entry("session.disable_prepacking", "1")
        # Optimizers read a weight from the file that the graph names, not the values given here.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return given


def _value(ort: Any, array: np.ndarray) -> Any:
    """An OrtValue on the memory of an array, which NumPy may know as a type that ONNX Runtime's binding does not."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    if array.dtype.kind == "V" or array.dtype.num > np.dtype(np.float16).num:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(f"u{array.dtype.itemsize}"), kind)
    return ort.OrtValue.ortvalue_from_numpy(array)


def open_session(source: str | bytes, options: Any, providers: Sequence[str]) -> Any:
    """An `onnxruntime.InferenceSession` without the optimizers that are wrong; raises `refusals`."""
    return _sessions()(source, options, providers=list(providers), disabled_optimizers=WRONG_REWRITES)


@cache
def _sessions() -> Any:
    """`onnxruntime.InferenceSession`, which looks up each input in a list of all: 2 s a run for 20,000 of them."""
    base = import_runtime("onnxruntime").InferenceSession
    if not hasattr(base, "_validate_input"):
        return base
    return type("Session", (base,), {"_validate_input": lambda s, fed: base._validate_input(s, dict.fromkeys(fed))})


def _without_fp4(source: str | bytes) -> onnx.ModelProto | None:
    """The model to run in place of a refused one that holds FP4; None for any other, and for what is no model."""
    try:
        if isinstance(source, bytes):
            model = onnx.load_from_string(source)
        else:
            model = onnx.load(source, load_external_data=False)
        if not holds_fp4(model):
            return None
        if isinstance(source, str):
            onnx.load_external_data_for_model(model, str(settle(model, source)))
    except (OSError, ValueError, DecodeError):
        return None
    return runnable(model)


def failures() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exception types; they share no base but Exception."""
    state = import_runtime("onnxruntime").capi.onnxruntime_pybind11_state
    return tuple(t for t in vars(state).values() if isinstance(t, type) and issubclass(t, Exception))


def refusals() -> tuple[type[Exception], ...]:
    """What opening and running a session raise, and `register_library`."""
    return (RuntimeError, ValueError, OSError, *failures())


def check_sample(sample: Sample, names: Iterable[str]) -> None:
    """Refuses a sample whose names are not exactly the model's inputs.

    Raises:
        EngineError: names both lists.
    """
    names = list(names)
    if set(sample) != set(names):
        raise EngineError(f"A sample holds {sorted(sample)}, but the model's inputs are {sorted(names)}.")


def run(model: Any, samples: Iterable[Sample]) -> Iterator[dict[str, np.ndarray]]:
    """Runs a model on samples, one at a time.

    Args:
        model: what `session` takes, or a session.
        samples: {input name: array}.

    Yields:
        {output name: array} for each sample, without the outputs that are no tensors.

    Raises:
        EngineError: wrong input names, or ONNX Runtime's own message.
    """
    opened = model if hasattr(model, "get_inputs") else session(model)
    inputs = [i.name for i in opened.get_inputs()]
    outputs = [o.name for o in opened.get_outputs() if _is_tensor(o)]
    for sample in samples:
        check_sample(sample, inputs)
        try:
            arrays = opened.run(outputs, dict(sample))
        except refusals() as error:
            raise EngineError(f"ONNX Runtime failed on a sample: {error}") from error
        yield dict(zip(outputs, arrays, strict=True))
        del arrays  # before the next run


def runner(model: Any, *, name: str = "onnxrt", **options: Any) -> Any:
    """A Polygraphy `OnnxrtRunner` of a session, or of what `session` takes with its options; reports show its name."""
    polygraphy = import_runtime("polygraphy.backend.onnxrt")
    opened = model if hasattr(model, "get_inputs") else session(model, **options)
    return polygraphy.OnnxrtRunner(_TensorsOnly(opened), name=name)


def no_tensors(model: Any) -> dict[str, str]:
    """The outputs of a session that are no tensors, and what they are: 'a sequence', 'an optional', 'a map'."""
    kinds = {"seq": "a sequence", "optional": "an optional", "map": "a map"}
    others = (o for o in model.get_outputs() if not _is_tensor(o))
    return {o.name: kinds.get(o.type.partition("(")[0], o.type) for o in others}


def _is_tensor(output: Any) -> bool:
    return str(output.type).startswith("tensor(")


class _TensorsOnly:
    """A session as a runner sees it, without the outputs that are no tensors."""

    def __init__(self, opened: Any) -> None:
        self._session, self.get_inputs = opened, opened.get_inputs

    def get_outputs(self) -> list[Any]:
        return [o for o in self._session.get_outputs() if _is_tensor(o)]

    def run(self, _: object, feeds: Sample) -> list[np.ndarray]:
        names = [o.name for o in self.get_outputs()]
        found: list[np.ndarray] = self._session.run(names, feeds) if names else []
        return found
