"""The layer table: reading logs and inspector JSON of both dialects, its sizes, and its file."""

from __future__ import annotations

import json

import pytest

from engines.backends.layers import (
    KernelTensor,
    LayerTable,
    dtype_name,
    onnx_node_names,
    table_from_inspector,
    table_from_rtx_log,
)
from engines.core.errors import BuildError, EngineError

# Shortened from a log of tensorrt_rtx 1.7.1.116 (strides and formats left out where nothing reads them).
FORMAT = "Strides: [1], StrideOrder: [0], Datatype"
CONV = (
    "Name: conv, one_myl0_1, LayerType: correlation, "
    f"Inputs: [ {{ Name: x, q, Dimensions: [1,16,8,8], {FORMAT}: Int8, Format: (NHWC) Channel major format }}], "
    f"Constants: [ {{ Name: w, Dimensions: [16,16,3,3], {FORMAT}: Int8, Format: (NHWC) Channel major format }}, "
    f"{{ Name: s, Dimensions: [1], {FORMAT}: Float, Format: (Linear) Row major linear format }}], "
    f"Outputs: [ {{ Name: y, Dimensions: [1,16,8,8], {FORMAT}: Half, Format: (NHWC) Channel major format }}], "
    "TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: conv, one]\x1f[ONNX Layer: x_Dequantize[0]]"
)
MEMORY = ["Total Weights Memory: 2308 bytes", "Total Activation Memory: 512 bytes"]


def table(*lines: str) -> LayerTable:
    """The table of a log."""
    return table_from_rtx_log(lines, version="1.7.1", targets=("sm89",), engine_bytes=1000)


def test_a_log_line_is_read() -> None:
    result = table(CONV, *MEMORY)
    (layer,) = result.layers
    assert (layer.name, layer.kind, layer.tactic) == ("conv, one_myl0_1", "correlation", "__myelin_CASK_STUB")
    assert layer.onnx_nodes == ("conv, one", "x_Dequantize[0]")
    assert layer.inputs == (KernelTensor(name="x, q", dtype="int8", shape=(1, 16, 8, 8)),)
    assert [t.dtype for t in layer.constants] == ["int8", "float32"] and layer.outputs[0].dtype == "float16"
    # 1024 codes in, 2304 weight codes and one float, 1024 halves out
    assert result.bytes_moved == 1024 + 2304 + 4 + 2048
    assert (result.kernels, result.weight_bytes, result.activation_bytes) == (1, 2308, 512)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no 'LayerType:' line"),
        (MEMORY, "no 'LayerType:' line"),
        (["Name: a, LayerType: kgen, Something: else"], "Cannot read this line"),
        ([CONV.replace("Datatype: Half", "Kind: Half")], "Cannot read a tensor"),
        ([CONV.replace("Datatype: Half", "Datatype: Int9")], "data type 'Int9'"),
    ],
)
def test_a_log_that_cannot_be_read_is_an_error(lines: list[str], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        table(*lines)


def test_waiting_for_another_stream_is_a_layer_but_no_kernel() -> None:
    wait = (
        "Name: __mye1_myl0_2, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , "
        "StreamId: 1, EventId: 3, Metadata: "
    )
    result = table(CONV, wait)
    assert [la.kind for la in result.layers] == ["correlation", "wait"] and result.kernels == 1
    assert result.bytes_moved == table(CONV).bytes_moved


ENDS = "TacticName: , StreamId: 0"
HOST = "Location: Device, Dimensions: [1], Datatype: Int64, Format: Format not available due to dynamic shapes"
NO_KERNELS = {  # of an If, a loop, and sizes that the host computes; tensorrt_rtx 1.7.1.116
    "jmp": f"Inputs: [], Constants: [], Outputs: [], {ENDS}, JumpTarget: <EXIT>, Metadata: [ONNX Layer: if]",
    "cjmp": (
        f"Inputs: [ {{ Name: c, Dimensions: [1], {FORMAT}: Bool, Format: (Linear) }}], Constants: [], Outputs: [], "
        f"{ENDS}, JumpTargetThen: a_1, JumpTargetElse: b_2, Metadata: [ONNX Layer: if]"
    ),
    "TrainStation": "Inputs: [], Outputs: [], TacticValue: 0x0000000000000000, StreamId: 0, Metadata: ",
    "DeviceToShapeHost": f"Inputs: [ {{ Name: s, {HOST}}}], Outputs: [], TacticValue: 0x0, StreamId: 0, Metadata: ",
    "ShapeHostToDevice": (
        f"Inputs: [], Outputs: [ {{ Name: s, {HOST} }}, {{ Name: t, {HOST} }}], ParameterType: ShapeH2D, "
        "shapeValues0: [-8], shapeValues1: [-23], TacticValue: 0x0, StreamId: 0, Metadata: "
    ),
}


@pytest.mark.parametrize("kind", NO_KERNELS)
def test_what_only_steers_is_a_layer_but_no_kernel(kind: str) -> None:
    result = table(CONV, f"Name: [x 0], LayerType: {kind}, {NO_KERNELS[kind]}")
    assert [la.kind for la in result.layers] == ["correlation", kind] and result.kernels == 1
    assert result.layers[1].onnx_nodes == (("if",) if kind.endswith("jmp") else ()) and not result.note
    assert all(t.name in "cst" for t in (*result.layers[1].inputs, *result.layers[1].outputs))


@pytest.mark.parametrize(
    "line", ["Name: a, LayerType: kgen, Something: else", CONV.replace("Datatype: Half", "Datatype: Posit")]
)
def test_a_line_that_cannot_be_read_is_held_and_said(line: str) -> None:
    result = table(CONV, line)
    assert result.unread == (line.strip()[:300],) and result.unread[0] in result.note
    assert result.layers == table(CONV).layers and not table(CONV).note
    assert LayerTable.from_json(result.to_json()) == result


def test_the_table_survives_its_file() -> None:
    result = table(CONV, *MEMORY)
    assert LayerTable.from_json(result.to_json()) == result


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "layer-table", "format_version": 1}'])
def test_another_file_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match=r"not JSON|with `qdq build`"):
        LayerTable.from_json(text)


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [("int4", (3,), 2), ("fp4", (4, 4), 8), ("float16", (), 2), ("int64", (2,), 16), ("int8", (-1, 4), None)],
)
def test_tensor_bytes(dtype: str, shape: tuple[int, ...], nbytes: int | None) -> None:
    assert KernelTensor(name="t", dtype=dtype, shape=shape).nbytes == nbytes


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Row major linear FP32", "float32"),
        ("Channel major FP16 format where channel % 8 == 0", "float16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("FP4E2M1", "fp4"),
        ("BFloat16", "bfloat16"),
        ("Bool", "bool"),
    ],
)
def test_dtype_names(text: str, name: str) -> None:
    assert dtype_name(text) == name


@pytest.mark.parametrize("separator", ["", "\x1e", "\x1f"])
def test_node_names_are_split_at_any_separator(separator: str) -> None:
    assert onnx_node_names(f"[ONNX Layer: a b]{separator}[ONNX Layer: c]") == ("a b", "c")
    assert onnx_node_names("") == ()


@pytest.mark.parametrize("separator", ["", "\x1e", "\x1f"])
def test_a_convolution_made_gemm_keeps_its_name(separator: str) -> None:
    marked = ("[ONNX Layer: a]__gemm_from_conv1x1", "[ONNX Layer: b[0]/x]", "[ONNX Layer: c]__gemm_from_conv1x1")
    assert onnx_node_names(separator.join(marked)) == ("a", "b[0]/x", "c")


def inspector(*, split: bool) -> str:
    """Inspector JSON of one INT8 convolution, in the dialect of 10.x or 11.x."""

    def tensor(name: str, text: str, dtype: str) -> dict[str, object]:
        common = {"Name": name, "Location": "Device", "Dimensions": [1, 16, 8, 8]}
        return {**common, **({"Format": text, "Datatype": dtype} if split else {"Format/Datatype": f"{text} {dtype}"})}

    layer = {
        "Name": "conv + relu",
        "LayerType": "CaskConvolution",
        "Inputs": [tensor("x", "Thirty-two wide channel vectorized row major", "Int8")],
        "Outputs": [tensor("y", "Row major linear", "FP32")],
        "Weights": {"Type": "Int8", "Count": 2304},
        "Bias": {"Type": "Float", "Count": 0},
        "TacticName": "sm80_xmma",
        "StreamId": 0,
        "Metadata": "[ONNX Layer: conv]\x1e[ONNX Layer: relu]",
    }
    return json.dumps({"Layers": [layer], "I/O Tensors" if split else "Bindings": ["x", "y"]})


@pytest.mark.parametrize("split", [False, True], ids=["10.x", "11.x"])
def test_both_inspector_dialects_give_the_same_table(split: bool) -> None:
    result = table_from_inspector(
        inspector(split=split), backend="trt", version="11", targets=("sm89",), engine_bytes=10, activation_bytes=7
    )
    (layer,) = result.layers
    assert layer.onnx_nodes == ("conv", "relu") and layer.kind == "CaskConvolution"
    assert [t.dtype for t in (*layer.inputs, *layer.constants, *layer.outputs)] == ["int8", "int8", "float32"]
    assert result.bytes_moved == 1024 + 2304 + 4096
    assert (result.weight_bytes, result.activation_bytes) == (2304, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "no JSON with 'Layers'"),
        ('{"Layers": ["conv"]}', "layer names only"),
        ('{"Layers": []}', "layer names only"),
    ],
)
def test_an_inspector_text_without_layers_is_an_error(text: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        table_from_inspector(text, backend="trt", version="11", targets=(), engine_bytes=0)


def test_an_inspector_tensor_without_type_is_an_error() -> None:
    text = inspector(split=True).replace('"Datatype"', '"Kind"')
    with pytest.raises(BuildError, match="no data type for tensor 'x'"):
        table_from_inspector(text, backend="trt", version="11", targets=(), engine_bytes=0)
