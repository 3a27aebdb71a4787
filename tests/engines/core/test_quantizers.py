"""The reader of Q/DQ graphs: codes of every type under their own names, operands traced back, axes followed."""

from __future__ import annotations

import engine_graphs as graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.backends import layers
from engines.backends.layers import KernelTensor, Layer, LayerTable
from engines.core.quantizers import LOW, code_bits, code_name, read_graph
from engines.verify.audit import Audit, audit

# What DequantizeLinear reads, but INT32, which is for biases: the newest version says which there are.
CODES = sorted(
    onnx.TensorProto.DataType.Value(text[len("tensor(") : -1].upper())
    for c in onnx.defs.get_schema("DequantizeLinear").type_constraints
    if c.type_param_str == "T1"
    for text in c.allowed_type_strs
    if text != "tensor(int32)"
)


def product(dtype: int) -> onnx.ModelProto:
    """A MatMul of data and a weight with codes of some type, which need not be a type that a compiler takes."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["codes"], output_dtype=dtype),
        helper.make_node("DequantizeLinear", ["codes", "s"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["y"], name="product"),
    ]
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 4])] for n in ("x", "y")]
    stored = [helper.make_tensor("w", dtype, [4, 4], [0] * 16), graphs.const("s", np.float32(1))]
    graph = helper.make_graph(nodes, "g", *ends, stored)
    opset = onnx.defs.get_schema("DequantizeLinear").since_version
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def audited(model: onnx.ModelProto, *dtypes: str) -> Audit:
    """What an audit says where a kernel of these operands runs the product."""
    kernel = Layer(
        name="product_myl0_0",
        kind="gemm",
        inputs=tuple(KernelTensor(name="t", dtype=d, shape=(4, 4)) for d in dtypes),
        constants=(),
        outputs=(KernelTensor(name="y", dtype="float32", shape=(4, 4)),),
        tactic="",
        onnx_nodes=("product",),
    )
    sizes = {"engine_bytes": 0, "weight_bytes": 0, "activation_bytes": 0}
    return audit(model, LayerTable(layers=(kernel,), backend="rtx", version="1", targets=("sm89",), **sizes))


@pytest.mark.parametrize("dtype", CODES, ids=TensorProto.DataType.Name)
def test_codes_are_audited_under_their_own_name(dtype: int) -> None:
    (row,) = audited(product(dtype), "float32", "float32").nodes
    assert row.requested == code_name(dtype) and row.missed
    assert (row.requested == "int8") == (dtype in (TensorProto.INT8, TensorProto.UINT8))
    assert (row.requested in LOW) == (code_bits(dtype) <= 8)


def test_two_bits_are_no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(TensorProto, "INT2"):
        pytest.skip("this version of onnx has no 2-bit types")
    (row,) = audited(product(TensorProto.INT2), "int8", "int8").missed
    assert (row.requested, row.consumed) == ("int2", "int8")
    monkeypatch.setitem(layers.BITS, "int2", 2)  # of a compiler that has such kernels
    result = audited(product(TensorProto.INT2), "int2", "int2")
    assert not result.missed and (result.int8_share, result.low_precision_share) == (0.0, 1.0)
    assert audited(product(TensorProto.UINT2), "int2", "int2").nodes[0].requested == "uint2"


def test_codes_of_an_unknown_type_are_no_int8() -> None:
    model = product(TensorProto.INT8)
    del model.graph.initializer[0]
    model.graph.node.insert(0, helper.make_node("Unheard", ["x"], ["w"], domain="custom"))
    model.opset_import.append(helper.make_opsetid("custom", 1))
    (row,) = audited(model, "int8", "int8").missed
    assert row.requested == "undefined" and row.cause == "the operands have different types: int8 and undefined"


@pytest.mark.parametrize(
    ("op", "axis", "attributes", "needed"),
    [
        ("MatMul", 1, {}, 1),
        ("Gemm", 1, {}, 1),
        ("Gemm", 0, {"transB": 1}, 0),
        ("Conv", 1, {}, 0),
        ("ConvTranspose", 0, {}, 1),
    ],
)
def test_the_axis_of_the_output_channels_is_that_of_the_stored_weight(
    op: str, axis: int, attributes: dict[str, int], needed: int
) -> None:
    """Behind a Transpose of the first two axes it is the other one."""
    for turned in (False, True):
        g = graphs.Graph()
        shape = [4, 4] if op in ("MatMul", "Gemm") else [4, 4, 1, 1]
        w = g.weight("w", shape, axis=axis)
        if turned:
            w = g.add("Transpose", [w], name="turn", perm=[1, 0, 2, 3][: len(shape)])
        y = g.add(op, [g.activation("x"), w], name="product", **attributes)
        ((_, found),) = read_graph(g.finish(y, shape, shape), {}).all_products()
        weight = found.operands[1]
        assert weight.dq is not None and weight.dq.axis == axis
        assert weight.output_axis == (1 - needed if turned else needed)


def test_a_weight_on_the_left_has_its_output_channels_in_its_rows() -> None:
    g = graphs.Graph()
    w = g.weight("w", [4, 4], axis=0)
    ((_, found),) = read_graph(
        g.finish(g.add("MatMul", [w, g.activation("x")], name="product"), [4, 4], [4, 4]), {}
    ).all_products()
    assert found.weight is found.operands[0] and found.operands[0].output_axis == 0
