"""Rounding where kernels write: each case of a layer table by hand, and what TensorRT-RTX compiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.backends import rtx
from engines.backends.layers import KernelTensor, Layer, LayerTable
from engines.core import arithmetic, onnx_runtime as ort
from engines.verify.as_compiled import Roundings, roundings

HALF = TensorProto.FLOAT16
node = helper.make_node


def tensor(text: str) -> KernelTensor:
    """'name:float16', or 'name:float16:2x3'; the shape is (4,) otherwise."""
    name, dtype, *shape = text.split(":")
    return KernelTensor(name=name, dtype=dtype, shape=tuple(map(int, shape[0].split("x"))) if shape else (4,))


def kernel(nodes: str, reads: str, writes: str, constants: str = "") -> Layer:
    """One kernel; nodes and tensors are separated by spaces."""
    sides = [tuple(map(tensor, text.split())) for text in (reads, constants, writes)]
    return Layer(
        name=nodes, kind="kgen", inputs=sides[0], constants=sides[1], outputs=sides[2], tactic="",
        onnx_nodes=tuple(nodes.split()),
    )  # fmt: skip


def table(*kernels: Layer) -> LayerTable:
    return LayerTable(
        layers=kernels,
        backend="rtx",
        version="0",
        targets=("sm89",),
        engine_bytes=1,
        weight_bytes=1,
        activation_bytes=1,
    )


def chain() -> onnx.ModelProto:
    """x (4,) -> Cast to FP16 -> Mul -> Add -> Exp -> Cast to FP32 -> y; 'c' is FP16."""
    nodes = [
        node("Cast", ["x"], ["h"], "start", to=HALF),
        node("Mul", ["h", "c"], ["m"], "mul"),
        node("Add", ["m", "c"], ["a"], "add"),
        node("Exp", ["a"], ["e"], "exp"),
        node("Cast", ["e"], ["y"], "end", to=TensorProto.FLOAT),
    ]
    return made(nodes, {"c": np.float16(1.7)})


def made(nodes: list[onnx.NodeProto], tensors: dict[str, Any]) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def types(found: Roundings, names: str) -> list[str]:
    return [found.written.types[name] for name in names.split()]


def test_one_kernel_rounds_nothing_inside() -> None:
    found = roundings(chain(), table(kernel("start mul add exp end", "x:float32", "y:float32")))
    assert types(found, "h m a e y") == ["float32"] * 5
    assert (found.mapped, found.unmapped) == (5, ())
    x = np.array([0.1, 0.2, -0.3, 0.7], np.float32)
    c = np.float32(np.float16(1.7))
    y = next(ort.run(arithmetic.session(chain(), written=found.written), [{"x": x}]))["y"]
    assert np.allclose(y, np.exp(x * c + c), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_passes_between_kernels_is_rounded_to_its_type_there(dtype: str) -> None:
    kernels = kernel("start mul add", "x:float32", f"t0:{dtype}"), kernel("exp end", f"t0:{dtype}", "y:float32")
    found = roundings(chain(), table(*kernels))
    assert types(found, "h m a e") == ["float32", "float32", dtype, "float32"]


def test_a_reader_inside_the_kernel_gets_the_unrounded_value() -> None:
    """`m` is read by `add` in its own kernel, and by `sum` in the next."""
    proto = chain()
    proto.graph.node[3].CopyFrom(node("Add", ["a", "m"], ["e"], "sum"))
    kernels = (
        kernel("start mul add", "x:float32", "m:float16 a:float32"),
        kernel("sum end", "m:float16 a:float32", "y:float32"),
    )
    found = roundings(proto, table(*kernels))
    assert found.written.inside["m"] == {"add"} and types(found, "m a") == ["float16", "float32"]
    x = np.array([0.1, 0.2, -0.3, 0.7], np.float32)
    c = np.float32(np.float16(1.7))
    y = next(ort.run(arithmetic.session(proto, written=found.written), [{"x": x}]))["y"]
    assert np.array_equal(y, (x * c + c) + (x * c).astype(np.float16).astype(np.float32))


def test_tensors_of_two_types_are_told_apart_by_their_size_or_name() -> None:
    """Kernel 1 writes `a` (4) in FP16 and something of one element in FP32."""
    first = kernel("start mul add", "x:float32", "t0:float16 t1:float32:1")
    found = roundings(chain(), table(first, kernel("exp end", "t0:float16 t1:float32:1", "y:float32")))
    assert types(found, "a") == ["float16"]
    named = kernel("start mul add", "x:float32", "a:bfloat16 t1:float32")
    found = roundings(chain(), table(named, kernel("exp end", "a:bfloat16 t1:float32", "y:float32")))
    assert types(found, "a") == ["bfloat16"]


def test_what_is_in_doubt_is_named_and_left_to_the_file() -> None:
    first = kernel("start mul add", "x:float32", "t0:float16 t1:float32")
    found = roundings(chain(), table(first, kernel("exp end", "t0:float16 t1:float32", "y:float32")))
    assert found.unmapped == ("a",) and "a" not in found.written.types
    assert found.note == (
        "4 of 5 float tensors are found in the kernels, 0 rounded; 1 are rounded as the file says, the first 'a'"
    )


def test_a_node_of_no_kernel_is_named() -> None:
    found = roundings(
        chain(), table(kernel("start mul", "x:float32", "t:float16"), kernel("exp end", "t:float16", "y:float32"))
    )
    assert found.unmapped == ("a",)


def test_a_mover_that_the_compiler_dropped_belongs_to_its_source() -> None:
    proto = chain()
    proto.graph.node[3].CopyFrom(node("Reshape", ["a", "s"], ["e"], "move"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([4]), "s"))
    found = roundings(
        proto, table(kernel("start mul add", "x:float32", "t:float16"), kernel("end", "t:float16", "y:float32"))
    )
    assert types(found, "a e") == ["float32", "float16"] and found.unmapped == ()


def test_copies_without_nodes_are_seen_through() -> None:
    kernels = (
        kernel("start mul add", "x:float32", "t0:float16 o:float32"),
        kernel("", "t0:float16", "t1:float16"),
        kernel("exp end", "t1:float16", "y:float32"),
    )
    assert types(roundings(chain(), table(*kernels)), "a") == ["float16"]


def test_waiting_for_a_stream_is_no_kernel() -> None:
    wait = Layer(
        name="w", kind="wait", inputs=(), constants=(), outputs=(), tactic="", onnx_nodes=("mul", "exp")
    )  # fmt: skip
    kernels = kernel("start mul", "x:float32", "t:float16"), wait, kernel("add exp end", "t:float16", "y:float32")
    assert types(roundings(chain(), table(*kernels)), "m") == ["float16"]


def quantized() -> onnx.ModelProto:
    """x -> FP16 -> Q -> DQ -> MatMul with INT8 codes -> Add -> y."""
    nodes = [
        node("Cast", ["x"], ["h"], "start", to=HALF),
        node("QuantizeLinear", ["h", "s", "z"], ["q"], "quantize"),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
        node("DequantizeLinear", ["codes", "s", "z"], ["w"], "weight"),
        node("MatMul", ["d", "w"], ["p"], "product"),
        node("Add", ["p", "b"], ["a"], "add"),
        node("Cast", ["a"], ["y"], "end", to=TensorProto.FLOAT),
    ]
    codes = np.arange(16, dtype=np.int8).reshape(4, 4)
    return made(nodes, {"s": np.float16(0.0371), "z": np.int8(0), "codes": codes, "b": np.float16(0.3)})


def test_codes_are_not_rounded_as_floats_and_weights_in_codes_are_exact() -> None:
    kernels = (
        kernel("start quantize", "x:float32", "t:int8"),
        kernel("dequantize weight product", "t:int8", "u:float16", "k:int8:4x4"),
        kernel("add end", "u:float16", "y:float32"),
    )
    found = roundings(quantized(), table(*kernels))
    assert types(found, "h d w p a") == ["float32", "float32", "float32", "float16", "float32"]
    assert found.mapped == 5  # the weight is constant


def test_weights_that_a_kernel_holds_in_floats_are_rounded_as_the_file_says() -> None:
    kernels = kernel("start quantize dequantize weight product add end", "x:float32", "y:float32", "k:float16:4x4")
    assert "w" not in roundings(quantized(), table(kernels)).written.types


def test_a_product_is_written_by_its_first_kernel() -> None:
    """A second kernel that names it adds the bias to what the first wrote in FP16."""
    kernels = (
        kernel("start quantize dequantize weight product", "x:float32", "u:float16", "k:int8:4x4"),
        kernel("product add end", "u:float16", "y:float32"),
    )
    assert types(roundings(quantized(), table(*kernels)), "p") == ["float16"]


def test_a_compiled_fp16_network_rounds_only_between_kernels() -> None:
    """Two convolutions with Relu between: TensorRT-RTX fuses what it can, and every float tensor is found."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    rng = np.random.default_rng(0)
    nodes = [
        node("Conv", ["x", "v"], ["a"], "first", pads=[1] * 4),
        node("Relu", ["a"], ["r"], "relu"),
        node("Conv", ["r", "w"], ["b"], "second", pads=[1] * 4),
        node("Sigmoid", ["b"], ["y"], "sigmoid"),
    ]
    stored = [numpy_helper.from_array(rng.normal(size=(16, 16, 3, 3)).astype(np.float16), n) for n in ("v", "w")]
    ends = [helper.make_tensor_value_info(name, HALF, [1, 16, 8, 8]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found = roundings(proto, rtx.build(proto).table)
    assert found.unmapped == () and found.mapped == 4
    assert found.written.types["a"] == "float32"  # the Relu is in the convolution's kernel
    assert found.written.types["r"] == "float16"
