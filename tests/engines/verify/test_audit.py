"""The audit on real compiler dumps: what ran INT8, what did not and why; and shared models as peers quantize them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import engine_graphs as graphs
import numpy as np
import onnx
import pytest
from onnx import helper
from places import SHARED

from engines.backends import rtx
from engines.backends.compiler import ShapeRange
from engines.backends.layers import KernelTensor, Layer, LayerTable
from engines.core.documents import replace
from engines.core.errors import EngineError
from engines.core.macs import macs
from engines.core.quantizers import read_graph
from engines.core.shapes import inferred_at
from engines.verify.audit import Audit, audit, compute_kernel

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")

HALF = np.float16
CONV_MACS = 16 * 16 * 9 * 64


def audited(model: onnx.ModelProto, *targets: str) -> Audit:
    """Compiles and audits."""
    return audit(model, rtx.build(model, targets=targets or ("sm89",)).table)


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        (graphs.conv(), CONV_MACS),
        (graphs.conv(group=4), CONV_MACS // 4),
        (graphs.conv(group=16), CONV_MACS // 16),
        (graphs.matmul(), 32 * 128 * 64),
        (graphs.matmul(rows=1), 128 * 64),
        (graphs.matmul(op="Gemm"), 32 * 128 * 64),
    ],
    ids=["conv", "grouped", "depthwise", "matmul", "one row", "gemm"],
)
def test_a_well_quantized_node_runs_int8(model: onnx.ModelProto, macs: int) -> None:
    result = audited(model)
    (node,) = result.nodes
    assert (node.requested, node.consumed, node.cause, node.macs) == ("int8", "int8", "", macs)
    assert result.int8_share == result.low_precision_share == 1.0 and not result.missed


@pytest.mark.parametrize(
    ("model", "targets", "cause"),
    [
        (graphs.conv(axis=1), ["sm89"], "quantized along axis 1; Conv needs axis 0"),
        (graphs.matmul(axis=0), ["sm89"], "quantized along axis 0; MatMul needs axis 1"),
        (graphs.conv(data_axis=1), ["sm89"], "activation has per-channel scales"),
        (graphs.conv(op="ConvTranspose", axis=1), ["sm89"], "transposed convolution never runs in low precision"),
        (graphs.conv(fmt=None), ["sm89"], "only one operand is quantized"),
        (graphs.conv(dtype=HALF), ["sm75"], "sm75 has no low-precision convolution"),
        (graphs.conv(dtype=HALF), ["sm75", "sm89"], "sm75 has no low-precision convolution"),
    ],
    ids=["conv axis", "matmul axis", "activation axis", "transposed", "weight float", "sm75", "sm75 of two"],
)
def test_a_node_that_runs_in_float_is_named_with_its_cause(
    model: onnx.ModelProto, targets: list[str], cause: str
) -> None:
    result = audited(model, *targets)
    (node,) = result.missed
    assert cause in node.cause and "float" in node.consumed and node.kernel
    assert result.int8_share == 0.0
    assert json.loads(result.to_json())["missed"] == [node.node]


def test_a_dynamic_scale_is_the_cause() -> None:
    g = graphs.Graph()
    scale = g.add("ReduceMax", ["x"], name="largest", keepdims=0)
    zero = g.init("zero", np.array(0, np.int8))
    codes = g.add("QuantizeLinear", ["x", scale, zero], name="q")
    x = g.add("DequantizeLinear", [codes, scale, zero], name="dq")
    model = g.finish(g.add("MatMul", [x, g.weight("w", [128, 64], axis=1)], name="product"), [32, 128], [32, 64])
    (node,) = audited(model).missed
    assert "computed at run time" in node.cause


@pytest.mark.parametrize("model", [graphs.conv(data=None), graphs.matmul(data=None)], ids=["conv", "matmul"])
def test_weight_only_is_never_missed(model: onnx.ModelProto) -> None:
    result = audited(model)
    assert result.nodes[0].requested == "weight-only int8" and not result.missed and result.int8_share == 0.0


def test_a_float_node_asks_for_nothing() -> None:
    (node,) = audited(graphs.conv(data=None, fmt=None)).nodes
    assert (node.requested, node.consumed, node.missed) == ("", "float32", False)


def test_a_node_without_a_name_is_found() -> None:
    model = graphs.conv()
    model.graph.node[-1].name = ""
    (node,) = audited(model).nodes
    assert (node.node, node.consumed) == ("node_of_conv_out", "int8")


def test_a_shared_quantized_input_is_no_request() -> None:
    """A float convolution beside a quantized one reads the same dequantized tensor: that asks for nothing."""
    g = graphs.Graph()
    x = g.activation("x")
    a = g.add("Conv", [x, g.weight("w", [16, 16, 3, 3])], name="quantized")
    b = g.add("Conv", [x, g.weight("v", [16, 16, 3, 3], fmt=None)], name="plain")
    result = audited(g.finish(g.add("Add", [a, b], name="sum"), [1, 16, 8, 8], [1, 16, 6, 6]))
    rows = {n.node: (n.requested, n.consumed) for n in result.nodes}
    assert rows["quantized"] == ("int8", "int8") and rows["plain"][0] == "" and not result.missed
    assert result.int8_share == pytest.approx(0.5)  # both have as many multiply-adds


def test_block_scales_on_an_int8_product_are_suspect() -> None:
    result = audited(graphs.matmul(axis=0, block=32, dtype=HALF))
    (node,) = result.suspect
    assert node.consumed == "int8" and "block scales" in node.cause and not result.missed


def test_fp8_counts_as_low_precision_but_not_int8() -> None:
    result = audited(graphs.conv(data="fp8", fmt="fp8", dtype=HALF))
    assert result.nodes[0].consumed == "fp8"
    assert (result.int8_share, result.low_precision_share) == (0.0, 1.0)


@pytest.mark.parametrize(("data", "dtype"), [(None, "float16"), ("fp8", "fp8")])
def test_fused_attention_is_found_by_both_products(data: str | None, dtype: str) -> None:
    result = audited(graphs.attention(data=data, softmax=data is not None, dtype=HALF))
    assert [n.consumed for n in result.nodes] == [dtype, dtype]
    assert {n.kernel for n in result.nodes} == {"_gemm_mha_v2_myl0_1"}
    assert result.macs == 2 * 4 * 64 * 64 * 64


def test_a_transposed_weight_keeps_its_axis() -> None:
    g = graphs.Graph()
    w = g.add("Transpose", [g.weight("w", [64, 128], axis=0)], name="turn", perm=[1, 0])
    y = g.add("MatMul", [g.activation("x"), w], name="product")
    model = g.finish(y, [32, 128], [32, 64])
    assert audited(model).nodes[0].consumed == "int8"
    ((_, product),) = read_graph(model, {}).all_products()
    weight = product.operands[1]
    assert weight.dq is not None and weight.dq.axis == weight.output_axis == 0  # axis 1 behind the transposition


def test_products_inside_an_if_are_counted() -> None:
    g = graphs.Graph()
    g.init("w", np.ones((8, 4), np.float32))
    bodies = [
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], [f"{n}_y"], name=n)], n, [], [graphs.value(f"{n}_y", [2, 4])]
        )
        for n in ("yes", "no")
    ]
    g.init("flag", np.array(True))
    y = g.add("If", ["flag"], name="choice", then_branch=bodies[0], else_branch=bodies[1])
    graph = read_graph(g.finish(y, [2, 8], [2, 4]), {})
    assert {p.node.name: macs(inner, p.node) for inner, p in graph.all_products()} == {"yes": 64, "no": 64}


def test_multiply_adds_follow_the_optimal_shape() -> None:
    model = graphs.conv(batch="N")
    shape = ShapeRange(min=(1, 16, 8, 8), opt=(3, 16, 8, 8), max=(4, 16, 8, 8))
    table = rtx.build(model, shapes={"x": shape}).table
    assert audit(model, table, shapes={"x": shape}).macs == 3 * CONV_MACS
    (node,) = audit(model, table).unknown
    assert node.macs is None and "--shape" in node.cause


def test_a_shape_of_another_rank_is_refused() -> None:
    """As a damaged manifest gives it."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")]
    stored = [graphs.const("w", np.zeros((8, 8), np.float32))]
    model = graphs.model(nodes, [graphs.value("x", ["n", 8])], [graphs.value("y", ["n", 8])], stored)
    layers = LayerTable(
        layers=(), backend="rtx", version="1", targets=("sm89",), engine_bytes=0, weight_bytes=0, activation_bytes=0
    )
    assert audit(model, layers, shapes={"x": ShapeRange.fixed((4, 8))}).macs == 256
    with pytest.raises(EngineError, match="'x' has 2 sizes in the model"):
        audit(model, layers, shapes={"x": ShapeRange.fixed(())})


def test_einsum_and_transposed_convolution_multiply_adds() -> None:
    g = graphs.Graph()
    y = g.add("Einsum", ["x", g.weight("w", [8, 5], fmt=None)], name="e", equation="bik,kj->bij")
    graph = read_graph(g.finish(y, [2, 3, 8], [2, 3, 5]), {})
    assert [macs(inner, p.node) for inner, p in graph.all_products()] == [2 * 3 * 8 * 5]
    graph = read_graph(graphs.conv(op="ConvTranspose"), {})
    assert [macs(inner, p.node) for inner, p in graph.all_products()] == [16 * 64 * 16 * 9]


def test_the_compute_kernel_is_chosen_among_those_that_name_the_node() -> None:
    tensor = KernelTensor(name="t", dtype="int8", shape=(4, 4))
    pad = Layer(
        name="__myl_Conc_myl0_0",
        kind="kgen",
        inputs=(tensor,),
        constants=(),
        outputs=(tensor,),
        tactic="",
        onnx_nodes=("n",),
    )
    product = replace(pad, name="n_myl0_1", kind="correlation")
    assert compute_kernel([pad, product, pad], "n") is product
    unnamed = replace(product, name="m+n_myl0_1", kind="gemm", onnx_nodes=())
    assert compute_kernel([pad, unnamed], "n") is unnamed
    assert compute_kernel([pad], "absent") is None


def test_products_inside_the_models_own_functions_are_counted_and_found() -> None:
    """Functions in functions, called more than once, with and without names."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    node = helper.make_node
    once = helper.make_function("own", "Once", ["x", "w"], ["y"], [node("MatMul", ["x", "w"], ["y"], name="m")], opsets)
    calls = [
        node("Once", ["x", "w"], ["a"], name="first", domain="own"),
        node("Once", ["a", "w"], ["b"], domain="own"),
        node("MatMul", ["b", "w"], ["y"]),
    ]
    three = helper.make_function("own", "Three", ["x", "w"], ["y"], calls, opsets)
    graph = helper.make_graph(
        [node("Three", ["x", "w"], ["y"], name="call", domain="own"), node("Once", ["y", "w"], ["z"], domain="own")],
        "g",
        [graphs.value("x", [8, 64])],
        [graphs.value("z", [8, 64])],
        [graphs.const("w", np.eye(64, dtype=np.float32))],
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=[once, three], ir_version=10)
    result = audited(model)
    assert {n.node: (n.consumed, n.macs) for n in result.nodes} == dict.fromkeys(
        (
            "m | first (Once) | call (Three)",
            "m | node_of_b (Once) | call (Three)",
            "node_of_y | call (Three)",
            "m | node_of_z (Once)",
        ),
        ("float32", 8 * 64 * 64),
    )


def test_functions_that_double_at_each_level_are_not_followed() -> None:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    functions = [helper.make_function("own", "F0", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], opsets)]
    for k in range(1, 40):
        calls = [helper.make_node(f"F{k - 1}", [a], [b], domain="own") for a, b in (("x", "a"), ("a", "y"))]
        functions.append(helper.make_function("own", f"F{k}", ["x"], ["y"], calls, opsets))
    ends = [graphs.value("x", [4])], [graphs.value("y", [4])]
    graph = helper.make_graph([helper.make_node("F39", ["x"], ["y"], domain="own")], "g", *ends)
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    assert [n.op_type for n in inferred_at(model, {}).node] == ["F39"]


def test_products_inside_an_if_and_a_recurrence_are_found_or_said_to_be_unknown() -> None:
    node, opsets = helper.make_node, [helper.make_opsetid("", 21)]
    bodies = {
        f"{name}_branch": helper.make_graph(
            [node("MatMul", ["s", name], [f"{name}_y"], name=f"{name}_product")],
            name,
            [],
            [graphs.value(f"{name}_y", [5, 4])],
        )
        for name in ("then", "else")
    }
    nodes = [
        node("LSTM", ["x", "w", "r"], ["l"], name="memory", hidden_size=8),
        node("Squeeze", ["l", "axes"], ["s"], name="squeeze"),
        node("If", ["c"], ["y"], name="choice", **bodies),
    ]
    constants = {"w": (1, 32, 16), "r": (1, 32, 8), "then": (8, 4), "else": (8, 4)}
    held = [graphs.const(n, np.random.default_rng(0).normal(size=s).astype(np.float32)) for n, s in constants.items()]
    held.append(graphs.const("axes", np.array([1, 2], np.int64)))
    ends = [graphs.value("x", [5, 1, 16]), graphs.value("c", [], onnx.TensorProto.BOOL)], [graphs.value("y", [5, 4])]
    model = helper.make_model(helper.make_graph(nodes, "g", *ends, held), opset_imports=opsets, ir_version=10)
    result = audited(model)
    found = {n.node: (n.consumed, n.macs) for n in result.nodes}
    branch = ("float32", 5 * 8 * 4)
    assert found == {"then_product": branch, "else_product": branch, "memory": ("unknown", 5 * 32 * (16 + 8))}
    (unknown,) = result.unknown
    assert unknown.node == "memory" and "recurrence" in unknown.cause


def bare(*layers: Layer) -> LayerTable:
    sizes = {"engine_bytes": 0, "weight_bytes": 0, "activation_bytes": 0}
    return LayerTable(layers=layers, backend="rtx", version="1", targets=("sm89",), **sizes)


def test_two_kernels_of_two_types_leave_the_type_unknown_and_say_why() -> None:
    def half(dtype: str) -> Layer:
        factors = tuple(KernelTensor(name="t", dtype=dtype, shape=(32, 64)) for _ in range(2))
        shown = {"name": f"half_{dtype}", "kind": "gemm", "tactic": "", "onnx_nodes": ("product",)}
        return Layer(inputs=factors, constants=(), outputs=factors[:1], **shown)

    result = audit(graphs.matmul(data=None, fmt=None), bare(half("float16"), half("float32")))
    (node,) = result.unknown
    assert node.consumed == "unknown" and "half_float" in node.cause and not result.suspect and not result.missed
    assert json.loads(result.to_json())["unknown"] == ["product"]
    same = audit(graphs.matmul(data=None, fmt=None), bare(half("float32"), half("float32")))
    assert same.nodes[0].consumed == "float32" and not same.unknown


def test_a_kernel_that_only_names_a_node_is_not_its_product() -> None:
    tensor = KernelTensor(name="t", dtype="int8", shape=(32, 128))
    pad = {"kind": "kgen", "tactic": "", "onnx_nodes": ("product",)}
    layers = [Layer(name=n, inputs=(tensor,), constants=(), outputs=(tensor,), **pad) for n in ("Conc_1", "Conc_2")]
    (node,) = audit(graphs.matmul(), bare(*layers)).missed
    assert node.consumed == "unknown" and node.kernel == "" and "Conc_1 and 1 more" in node.cause


def test_a_1x1_convolution_made_gemm_is_found() -> None:
    """FP16, few positions and many channels: RTX 1.7.1 marks its name with `__gemm_from_conv1x1`."""
    g = graphs.Graph(HALF)
    y = g.add("Conv", ["x", g.weight("w", [1024, 256, 1, 1], fmt=None)], name="conv")
    (node,) = audited(g.finish(y, [1, 256, 6, 6], [1, 1024, 6, 6])).nodes
    assert (node.consumed, node.macs, node.cause) == ("float16", 256 * 1024 * 36, "") and node.kernel


# The shared models, quantized by ONNX Runtime's tool to symmetric INT8 with float biases.
PEER_CASES = {
    "resnet20": ("resnet20/resnet20_cifar10.onnx", [4, 3, 32, 32]),
    "ani": ("ani1ccx/ani1ccx_mlp_H.onnx", [4, 384]),
    "magika": ("magika/model.onnx", [2, 2048]),
    "stories260k": ("stories260k/stories260K.onnx", [1, 16]),
}


@pytest.fixture(scope="module")
def rtxlayers() -> ModuleType:
    """The shared measuring program."""
    if not (SHARED / "tools/rtxlayers.py").exists():
        pytest.skip("the shared tools are not here")
    sys.path.insert(0, str(SHARED / "tools"))
    try:
        return importlib.import_module("rtxlayers")
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("case", PEER_CASES)
def test_every_product_of_a_peers_model_is_matched(case: str, tmp_path: Path, rtxlayers: ModuleType) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization", reason="onnxruntime is not installed")
    file, shape = PEER_CASES[case]
    source = SHARED / "models" / file
    if not source.exists():
        pytest.skip("the shared models are not here")
    first = onnx.load(source).graph.input[0]
    dtype = helper.tensor_dtype_to_np_dtype(first.type.tensor_type.elem_type)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            values = rng.integers(0, 200, shape) if dtype.kind == "i" else rng.normal(size=shape)
            self.samples = iter([{first.name: values.astype(dtype)}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.samples, None)

    path = tmp_path / "q.onnx"
    quantization.quantize_static(
        str(source),
        str(path),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "AddQDQPairToWeight": True,
        },
    )
    fixed = {first.name: ShapeRange.fixed(shape)}
    table = rtx.build(path, shapes=fixed).table
    result = audit(path, table, shapes=fixed)
    assert len(result.nodes) >= 3 and all(n.macs > 0 for n in result.nodes)
    assert {(n.requested, n.consumed, n.cause) for n in result.nodes} == {("int8", "int8", "")}
    assert all("kgen" not in la.kind for la in table.layers if la.name in {n.kernel for n in result.nodes})
    assert result.int8_share == 1.0

    theirs = rtxlayers.compile(str(path), ["SM89"], {first.name: (tuple(shape),) * 3})
    assert (table.kernels, table.bytes_moved) == (theirs["kernels"], theirs["moved"])
    assert (table.weight_bytes, table.activation_bytes) == (theirs["weights"], theirs["activation"])


@pytest.mark.parametrize("file", ["hippodeep/hippodeep_head.onnx"])
def test_a_float_model_agrees_with_the_shared_tool(file: str, rtxlayers: ModuleType) -> None:
    path = SHARED / "models" / file
    if not path.exists():
        pytest.skip("the shared models are not here")
    table, theirs = rtx.build(path).table, rtxlayers.compile(str(path), ["SM89"])
    assert (table.kernels, table.bytes_moved) == (theirs["kernels"], theirs["moved"])
    assert not audit(path, table).missed and audit(path, table).int8_share == 0
