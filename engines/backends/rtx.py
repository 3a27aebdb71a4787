"""TensorRT-RTX: engines compiled ahead of time, on the CPU, for named GPU generations. The default backend.

model -> types checked against targets -> compiled -> layer lines of the verbose log -> `Engine` with its `LayerTable`.
Must not need a GPU or a driver, and must not build without targets (such an engine may lack kernels for a GPU).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from onnx import TensorProto

from engines.backends.backend import Backend
from engines.backends.compiler import Engine, OnProgress, ShapeRange, compile_model
from engines.backends.layers import table_from_rtx_log
from engines.backends.profile import Fact, Profile
from engines.backends.tensorrt_options import TensorRtOptions
from engines.backends.trt import runner
from engines.core.errors import BuildError, UnsupportedTargetError, import_runtime
from engines.core.load import load_graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A data type that only newer GPUs have."""

    dtype: str
    elem_types: tuple[int, ...]
    minimum_sm: int
    gpus: str


# Source: measured with tensorrt_rtx 1.7.1.116 (sm75, 86, 89, 120 built; sm80 and sm121 by generation).
GATES = (
    Gate(dtype="int4", elem_types=(TensorProto.INT4,), minimum_sm=80, gpus="Ampere or newer"),
    Gate(
        dtype="fp8", elem_types=(TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2), minimum_sm=89, gpus="Ada, Blackwell"
    ),
    Gate(dtype="fp4", elem_types=(TensorProto.FLOAT4E2M1,), minimum_sm=120, gpus="Blackwell"),
)


def _elem_types(graph: onnx.GraphProto) -> set[int]:
    """Every tensor element type that a graph or a graph inside it stores or casts to."""
    found = {i.data_type for i in graph.initializer}
    found |= {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "output_dtype", "dtype"):
                found.add(attribute.i)
            if attribute.type == onnx.AttributeProto.TENSOR:
                found.add(attribute.t.data_type)
            for inner in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                found |= _elem_types(inner)
    return found


def check_targets(model: onnx.ModelProto, targets: Sequence[str]) -> tuple[str, ...]:
    """Normalised targets, each once, in the order given, where they have the types of a model (without external data).

    Raises:
        UnsupportedTargetError: no target, an unknown one, or one without a data type that the model holds.
    """
    names = tuple(dict.fromkeys(BACKEND.target(t) for t in targets))
    if not names:
        raise UnsupportedTargetError(f"No target given. Name at least one of {', '.join(BACKEND.targets)}.")
    found = _elem_types(model.graph)
    for gate in GATES:
        lacking = [t for t in names if int(t[2:]) < gate.minimum_sm]
        if lacking and found & set(gate.elem_types):
            raise UnsupportedTargetError(
                f"The model holds {gate.dtype} tensors, which {', '.join(lacking)} cannot compile: {gate.dtype} needs "
                f"sm{gate.minimum_sm} or newer ({gate.gpus}). Drop that target or quantize to int8."
            )
    return names


def _forget_failure(trt: ModuleType) -> None:
    """Compiles y = relu(x) and throws it away.

    After a failed build, tensorrt_rtx 1.7.1.116 compiles the next graph of the process for the targets of the failed
    one: sm86 after a failed sm75 got Turing's float kernels, without a word. One more build clears it (measured).
    """
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ends = [value(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "forget", ends[:1], ends[1:])
    tiny = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    compile_model(trt, tiny, shapes={}, configure=lambda config: None)


_TURING = (
    "TensorRT-RTX has no FP32 matrix products for sm75, and hardly any INT8: give the model in FP16 "
    "(--unquantized-type fp16), or leave sm75 out."
)


def build(
    model: Path | str | onnx.ModelProto,
    *,
    targets: Sequence[str] = ("sm89",),
    shapes: Mapping[str, ShapeRange] | None = None,
    options: TensorRtOptions | None = None,
    directory: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Engine:
    """Compiles one engine that runs on every target. Needs no GPU. Arguments and errors as of `backend.Build`.

    The compiler chooses one plan for all targets, so an old one can cost every other its integer kernels (sm75 has no
    INT8 convolution). The table knows sizes only where min = opt = max. `options` change nothing
    (`BACKEND.no_options`).
    """
    proto = load_graph(model)
    names = check_targets(proto, targets)
    external = any(i.data_location == TensorProto.EXTERNAL for i in proto.graph.initializer)
    if proto is model and directory is None and external:
        raise BuildError("The model keeps weights in external files: give its path, or their folder.")
    trt = import_runtime("tensorrt_rtx")

    def configure(config: Any) -> None:
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)

    try:
        compiled = compile_model(
            trt, model, shapes=shapes or {}, configure=configure, directory=directory, on_progress=on_progress
        )
    except BuildError as error:
        _forget_failure(trt)
        if "sm75" in names and "check_turing_op_compatibility" in str(error):
            raise BuildError(f"{error} {_TURING}", nodes=error.nodes) from error
        raise
    lines, size = compiled.lines, len(compiled.data)
    table = table_from_rtx_log(lines, version=trt.__version__, targets=names, engine_bytes=size)
    return Engine(data=compiled.data, table=table)


BACKEND = Backend(
    name="rtx",
    compiler="rtx",
    title="TensorRT-RTX",
    runtime="tensorrt_rtx",
    packages=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt_rtx"),
    targets=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
    needs_gpu=False,
    predicts=True,
    check_targets=check_targets,
    build=build,
    runner=partial(runner, rtx=True),
    # Its timing cache does nothing and is deprecated since 1.2: release notes of TensorRT-RTX 1.1 to 1.3.
    no_options="TensorRT-RTX takes no `tensorrt` options: they are TensorRT's, and its own timing cache does nothing, "
    "since it times no kernels; `runtime_cache` keeps what it compiles when an engine first runs",
)

_MEASURED = "measured: compiled with tensorrt_rtx 1.7.1.116 for SM86 and SM89, the types of every kernel read"

PROFILES = (
    Profile(
        name=BACKEND.compiler,
        version="",
        title=BACKEND.title,
        backend=BACKEND.name,
        targets=BACKEND.targets,
        kinds=("geforce", "workstation"),
        # Turing has INT8 products of matrices, and runs convolutions in FP16 whatever is quantized (measured).
        formats={"int8": 75, **{gate.dtype.replace("fp4", "nvfp4"): gate.minimum_sm for gate in GATES}},
        blocks={"int4": (128, 64, 32, 16), "nvfp4": (16,)},  # one fused kernel each, on SM86 and SM89 (measured)
        opset=None,  # 25 parses (measured); the newest is documented nowhere
        types=("int8", "fp8", "int4", "fp4"),
        trtexec=(),
        integer_output=Fact(
            holds=False,
            says="TensorRT-RTX's INT8 convolutions write floats, which a kernel behind them quantizes",
            source=_MEASURED,
        ),
        shift=Fact(holds=True, says="Sub and Q fuse into the kernel that made the tensor", source=_MEASURED),
        hoist=Fact(
            holds=True,
            says="Mul, Add, activation and Q behind a convolution of one weight scale are one kernel",
            source=_MEASURED,
        ),
        padding=Fact(
            holds=True,
            says="Pad and Q fuse, and left to itself the compiler concatenates zeros as large as the tensor to fill up "
            "channels, stored in the engine",
            source=_MEASURED,
        ),
        residual=Fact(
            holds=True, says="the kernel that adds reads the shortcut in INT8, half the traffic", source=_MEASURED
        ),
        concat=Fact(holds=True, says="one kernel requantizes what two convolutions gave", source=_MEASURED),
        mean_pool=Fact(
            holds=False,
            says="average pooling runs in float on TensorRT-RTX even if its input is quantized",
            source=_MEASURED,
        ),
        conv_transpose=Fact(
            holds=False,
            says="TensorRT-RTX has no INT8 kernel for ConvTranspose (measured on SM86 and SM89)",
            source=_MEASURED,
        ),
        first_layer=Fact(holds=True, says="it runs in INT8, behind a kernel that fills the channels", source=_MEASURED),
        depthwise=Fact(holds=True, says="it runs in INT8, behind a kernel that fills the channels", source=_MEASURED),
        small_products=Fact(
            holds=None,
            says="whether small products gain by INT8 is not known",
            source="no published time of this compiler",
        ),
        attention=Fact(
            holds=False,
            says="a product of two computed tensors (attention): INT8 there breaks the fused attention kernel",
            source=_MEASURED,
        ),
        narrow=Fact(
            holds=None,
            says="whether convolutions of few channels gain by INT8 the compiled kernels show, one by one",
            source="no published time of this compiler",
        ),
        odd_groups=Fact(holds=True, says="channels that are missing in a group are filled up", source=_MEASURED),
        fp8_convolutions=Fact(
            holds=None,
            says="how fast FP8 convolutions are is not known",
            source="no published time of this compiler",
        ),
        two_level=Fact(holds=True, says="one kernel unpacks 4 bits, then the product is INT8", source=_MEASURED),
        token=Fact(holds=True, says="a kernel quantizes, the product is INT8, a Mul follows", source=_MEASURED),
        tables=Fact(holds=True, says="one kernel dequantizes the rows that it picks", source=_MEASURED),
        attention_fp8=Fact(
            holds=True,
            says="one kernel of FP8 operands, and three that quantize Q, K and V",
            source="measured: compiled with tensorrt_rtx 1.7.1.116 for SM89 and SM120, the types of every kernel read",
        ),
    ),
)
