"""Shapes behind operators that inference does not know: what the file and the weights say of them."""

from __future__ import annotations

import pytest
from graphs import node, normal
from odd_models import FLOAT, SAMPLE, W, net, value
from onnx import ModelProto, helper, numpy_helper

from qdq.assemble.quantize import quantize
from qdq.core.errors import InputError
from qdq.model.storage import load
from qdq.passes.prepare import prepare


def test_a_convolution_behind_an_unknown_shape_has_the_rank_of_its_weight() -> None:
    proto = net()
    proto.graph.node[0].CopyFrom(
        helper.make_node(
            "FusedConv", ["x", "w"], ["c"], "conv", domain="com.microsoft", pads=[1] * 4, activation="Relu"
        )
    )
    proto.graph.node[2].CopyFrom(node("Conv", "r u", "m", "second"))
    proto.graph.initializer.append(numpy_helper.from_array(normal(8, 8, 3, 3), "u"))
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    proto.graph.output[0].CopyFrom(value("y", FLOAT, None))
    model = prepare(load(proto))
    assert [(model.rank(name), (model.info(name) or model.inputs[0]).shape[1]) for name in "rmy"] == [
        (4, 8),
        (4, 8),
        (4, 4),
    ]


def behind_a_custom_operator(stated: list[int]) -> ModelProto:
    """x -> an operator that onnx does not know -> c, of a stated shape -> Conv -> y."""
    nodes = [
        helper.make_node("FusedConv", ["x", "w"], ["c"], "first", domain="com.microsoft", pads=[1] * 4),
        node("Conv", "c v", "y", "last"),
    ]
    tensors = [numpy_helper.from_array(a, n) for n, a in {"w": W, "v": normal(4, 8, 1, 1)}.items()]
    ends = [value("x", FLOAT, [1, 4, 8, 8])], [value("y", FLOAT, None)]
    graph = helper.make_graph(nodes, "net", *ends, tensors, value_info=[value("c", FLOAT, stated)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_what_the_file_says_of_a_shape_is_believed_and_checked_on_a_sample() -> None:
    true, untrue = (prepare(load(behind_a_custom_operator(s))) for s in ([1, 8, 8, 8], [1, 8, 9, 8]))
    assert true.sizes("y") == (1, 4, 8, 8)
    made = quantize(true, [{"x": SAMPLE["x"]}])
    assert made.plan.quantized_nodes == ("last",)
    with pytest.raises(InputError, match=r"'c' has shape \[1, 8, 8, 8\] on a sample, and \[1, 8, 9, 8\] is what"):
        quantize(untrue, [{"x": SAMPLE["x"]}])
