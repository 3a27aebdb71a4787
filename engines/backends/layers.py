"""The layers of a compiled engine as one table, whatever compiler made it.

TensorRT-RTX's verbose build log, or TensorRT's engine inspector JSON (10.x and 11.x), becomes a `LayerTable`;
the table is saved as JSON beside the engine, and `audit` reads it.
Must not guess: a line that it cannot read is held as such, and nothing but such lines is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from engines.core.documents import Document, DocumentError, Part
from engines.core.errors import BuildError

BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "uint8": 8, "fp8": 8, "bool": 8}
BITS |= {"int4": 4, "fp4": 4, "int32": 32, "int64": 64}

# Events between streams, jumps of an If or a loop, and sizes that go to or come from the host: no kernels.
SYNCHRONIZATION = ("signal", "wait", "jmp", "cjmp", "TrainStation", "DeviceToShapeHost", "ShapeHostToDevice")

# Names seen in RTX 1.7 logs, in inspector JSON ("Row major linear FP32") and in trt.DataType.
DTYPES = {name: name for name in BITS}
DTYPES |= {"float": "float32", "fp32": "float32", "half": "float16", "fp16": "float16", "bf16": "bfloat16"}
DTYPES |= {"e8m0": "uint8", "fp8e4m3": "fp8", "fp4e2m1": "fp4"}


class KernelTensor(Part, frozen=True, kw_only=True):
    """One tensor of a kernel. A dimension that only the run decides is -1."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse a type that has no size."""
        if self.dtype not in BITS:
            raise DocumentError(f"tensor {self.name!r} has the type {self.dtype!r}, which is none of a layer table")

    @property
    def nbytes(self) -> int | None:
        """Bytes of the tensor without padding; None where a dimension is decided at run time."""
        return None if min(self.shape, default=0) < 0 else (math.prod(self.shape) * BITS[self.dtype] + 7) // 8


class Layer(Part, frozen=True, kw_only=True):
    """One kernel: what it reads, what it writes, and the ONNX nodes it comes from.

    `kind` is the compiler's own word: correlation, deconv, gemm, kgen, runtime_fusion, CaskConvolution, ...
    """

    name: str
    kind: str
    inputs: tuple[KernelTensor, ...]
    constants: tuple[KernelTensor, ...]
    outputs: tuple[KernelTensor, ...]
    tactic: str
    onnx_nodes: tuple[str, ...]

    @property
    def bytes_moved(self) -> int | None:
        """Bytes read and written once each; None where a shape is decided at run time."""
        return _total(t.nbytes for t in (*self.inputs, *self.constants, *self.outputs))


class LayerTable(Document, frozen=True, kw_only=True):
    """Every kernel of one engine, in order, and the sizes the compiler reports.

    `unread` holds the beginnings of lines about layers that this version cannot read: what they do is in no figure.
    """

    FORMAT: ClassVar[str] = "qdq.layers/3"
    MAKE: ClassVar[str] = "qdq build"

    layers: tuple[Layer, ...]
    backend: str
    version: str
    targets: tuple[str, ...]
    engine_bytes: int
    weight_bytes: int
    activation_bytes: int
    unread: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """What is not known of the engine; '' where everything is."""
        if not self.unread:
            return ""
        return (
            f"{len(self.unread)} lines of the compiler's layer dump (version {self.version}) cannot be read, so what "
            f"they do is in no figure; the first: {self.unread[0]}"
        )

    @property
    def kernels(self) -> int:
        """Number of kernels launched per inference; waiting for another stream launches none."""
        return sum(layer.kind not in SYNCHRONIZATION for layer in self.layers)

    @property
    def bytes_moved(self) -> int | None:
        """Sum over kernels of inputs + constants + outputs; None for an engine with dynamic shapes.

        Compile with min = opt = max to know it.
        """
        return _total(layer.bytes_moved for layer in self.layers)


def _total(sizes: Iterable[int | None]) -> int | None:
    """The sum; None where a size is not known."""
    known = list(sizes)
    return None if None in known else sum(filter(None, known))


def _tensor(name: str, dtype: str, shape: Iterable[int]) -> KernelTensor:
    return KernelTensor(name=name, dtype=dtype_name(dtype), shape=tuple(shape))


def dtype_name(text: str) -> str:
    """The normalised data type named in a compiler's text.

    >>> dtype_name("Thirty-two wide channel vectorized row major Int8 format")
    'int8'

    Raises:
        BuildError: no known data type in it.
    """
    for word in re.findall(r"[a-z0-9]+", text.lower()):
        if word in DTYPES:
            return DTYPES[word]
    raise BuildError(f"The compiler's layer dump names the data type {text!r}, which this version does not know.")


def onnx_node_names(metadata: str) -> tuple[str, ...]:
    """The node names in '[ONNX Layer: a]<separator>[ONNX Layer: b]'; the separator is \\x1f (RTX), \\x1e or nothing.

    A kernel that the compiler made of another form carries a mark behind the bracket: ']__gemm_from_conv1x1'.
    """
    entries = re.sub(r"\]__\w+(?=[\x1e\x1f\[]|$)", "]", metadata.strip())
    parts = re.split(r"\][\x1e\x1f]?\[", entries.removeprefix("[").removesuffix("]"))
    return tuple(p.removeprefix("ONNX Layer: ") for p in parts if p.startswith("ONNX Layer: "))


_LINE = re.compile(
    r"\s*Name: (?P<name>.*), LayerType: (?P<kind>\S+), Inputs: (?P<inputs>.*?)(?:, Constants: (?P<constants>.*?))?"
    r", Outputs: (?P<outputs>.*?), Tactic(?:Name|Value): (?P<tactic>.*), StreamId: \d+(?:, .*?)??"
    r"(?:, Metadata: (?P<metadata>.*))?$"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?)(?:, Location: \w+)?, Dimensions: \[(?P<dims>[-\d, ]*)\],.*?Datatype: (?P<dtype>\w+)"
)


def _log_tensors(text: str | None, line: str) -> tuple[KernelTensor, ...]:
    """The tensors in one bracketed list of a log line."""
    matches = list(_TENSOR.finditer(text or ""))
    if len(matches) != (text or "").count("{ Name: "):
        raise BuildError(f"Cannot read a tensor in the compiler's layer dump: {line[:300]}")
    return tuple(_tensor(m["name"], m["dtype"], (int(d) for d in m["dims"].split(",") if d.strip())) for m in matches)


def _log_layer(line: str) -> Layer:
    """The layer in one line of the log.

    Raises:
        BuildError: it cannot be read.
    """
    if not (m := _LINE.match(line)):
        raise BuildError(f"Cannot read this line of the compiler's layer dump: {line[:300]}")
    return Layer(
        name=m["name"],
        kind=m["kind"],
        inputs=_log_tensors(m["inputs"], line),
        constants=_log_tensors(m["constants"], line),
        outputs=_log_tensors(m["outputs"], line),
        tactic=m["tactic"].strip(),
        onnx_nodes=onnx_node_names(m["metadata"] or ""),
    )


def _memory(lines: Iterable[str], label: str) -> int:
    """Sum of the byte counts that the log reports under a label."""
    return sum(int(m[1]) for line in lines if (m := re.search(rf"{label}: (\d+) bytes", line)))


def table_from_rtx_log(
    lines: Iterable[str], *, version: str, targets: Sequence[str], engine_bytes: int, backend: str = "rtx"
) -> LayerTable:
    """The table in TensorRT-RTX's verbose build log.

    Args:
        lines: log lines of one build with `profiling_verbosity` DETAILED.
        version: of the compiler.
        targets: normalised names, like 'sm89'.
        engine_bytes: size of the serialized engine.
        backend: name kept in the table.

    Raises:
        BuildError: no layer line, or none that can be read. The log is not an API: a new version can do this.

    Source: observed with tensorrt_rtx 1.7.1.116.
    """
    lines, layers, unread = list(lines), [], list[str]()
    for line in (line for line in lines if "LayerType: " in line):
        try:
            layers.append(_log_layer(line))
        except BuildError as error:
            unread.append(line.strip()[:300])
            reason = error
    if unread and not layers:
        raise BuildError(f"{reason} (of {len(unread)} lines about layers, none can be read; {backend} {version})")
    if not layers:
        raise BuildError(
            f"The build log of {backend} {version} has no 'LayerType:' line, so what it compiled cannot be audited. "
            "This happens with a compiler version whose log differs; 1.7.1 is known to work."
        )
    return LayerTable(
        layers=tuple(layers),
        backend=backend,
        version=version,
        targets=tuple(targets),
        engine_bytes=engine_bytes,
        weight_bytes=_memory(lines, "Total Weights Memory"),
        activation_bytes=_memory(lines, "Total Activation Memory"),
        unread=tuple(unread),
    )


def _json_tensors(rows: Any) -> tuple[KernelTensor, ...]:
    """The tensors of one inspector list; 10.x joins 'Format/Datatype', 11.x splits it."""
    out = []
    for row in rows or ():
        key = next((k for k in ("Datatype", "DataType", "Format/Datatype", "Format/DataType") if k in row), None)
        if key is None:
            raise BuildError(f"The engine inspector gives no data type for tensor {row.get('Name')!r}: {sorted(row)}")
        out.append(_tensor(row.get("Name", ""), row[key], row.get("Dimensions", ())))
    return tuple(out)


def _json_weights(row: Mapping[str, Any]) -> tuple[KernelTensor, ...]:
    """The constants of a layer: a list of tensors, or TensorRT's own Weights and Bias counts."""
    held = [(k, w) for k in ("Weights", "Bias") if isinstance(w := row.get(k), Mapping) and w.get("Count")]
    return (*_json_tensors(row.get("Constants")), *(_tensor(k, w["Type"], (w["Count"],)) for k, w in held))


_LATER_PROFILE = re.compile(r"\[profile +[1-9]\d*\]")


def table_from_inspector(
    text: str,
    *,
    backend: str,
    version: str,
    targets: Sequence[str],
    engine_bytes: int,
    weight_bytes: int = 0,
    activation_bytes: int = 0,
) -> LayerTable:
    """The table in the engine inspector's JSON of TensorRT 10.x or 11.x: its first optimization profile.

    Args:
        text: `EngineInspector.get_engine_information(JSON)` of an engine built with DETAILED verbosity.
        backend: 'trt' or 'rtx'.
        version: of the runtime.
        targets: normalised names of the GPU the engine is for.
        engine_bytes: size of the serialized engine.
        weight_bytes: of the engine; 0 takes the sum of the layers' constants.
        activation_bytes: device memory of one execution context.

    Raises:
        BuildError: not JSON, no layers, or layers that are bare names (not built with DETAILED verbosity).

    Source: TensorRT issues 4020 and 3737 (10.x text), "Migrating from TensorRT 10.x to 11.x" (11.x keys); for the
    layers of further profiles, whose names end in '[profile 1]', the parser of NVIDIA's trt-engine-explorer.
    """
    try:
        rows = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        where = f"The engine inspector of {backend} {version}"
        raise BuildError(f"{where} gave no JSON with 'Layers' ({error!r}).") from error
    if not rows or not all(isinstance(row, Mapping) and "LayerType" in row for row in rows):
        raise BuildError("The engine inspector gives layer names only: build with profiling_verbosity DETAILED.")
    layers = tuple(
        Layer(
            name=row.get("Name", ""),
            kind=row["LayerType"],
            inputs=_json_tensors(row.get("Inputs")),
            constants=_json_weights(row),
            outputs=_json_tensors(row.get("Outputs")),
            tactic=row.get("TacticName", ""),
            onnx_nodes=onnx_node_names(row.get("Metadata", "")),
        )
        for row in rows
        if not _LATER_PROFILE.search(row.get("Name", ""))
    )
    return LayerTable(
        layers=layers,
        backend=backend,
        version=version,
        targets=tuple(targets),
        engine_bytes=engine_bytes,
        weight_bytes=weight_bytes or sum(t.nbytes or 0 for layer in layers for t in layer.constants),
        activation_bytes=activation_bytes,
    )
