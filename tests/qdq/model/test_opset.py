"""Every version of the default operator set that ONNX Runtime takes."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import node
from odd_models import FLOAT, net, results, value
from onnx import helper, numpy_helper

from qdq.core.errors import ModelError
from qdq.model import accept
from qdq.model.storage import load
from qdq.passes.prepare import prepare


@pytest.mark.parametrize("opset", range(7, 29))
def test_every_opset_of_onnx_runtime_is_taken_and_computes_the_same(opset: int) -> None:
    proto = net(opset)
    proto.graph.node.append(node("Softmax", "y", "z", axis=1))
    proto.graph.node.append(node("Upsample", "z", "u", scales=[1.0, 1, 2, 2]) if opset < 9 else node("Neg", "z", "u"))
    proto.graph.output.append(value("u", FLOAT, None))
    proto.ir_version = 14 if opset > 25 else 8
    done = prepare(load(proto))
    assert done.opset == min(max(opset, 21), accept.NEWEST_OPSET) and done.proto.ir_version <= 13
    for name, found in results(done.proto).items():
        assert np.allclose(found, results(proto)[name], rtol=1e-5, atol=1e-6)


def test_an_operator_that_is_new_keeps_its_opset() -> None:
    nodes = [node("CumProd", "x one", "c"), node("Relu", "c", "y")]
    tensors = [numpy_helper.from_array(np.int64(1), "one")]
    graph = helper.make_graph(nodes, "new", [value("x", FLOAT, [1, 4, 8, 8])], [value("y", FLOAT, None)], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 26)], ir_version=13)
    model = prepare(load(proto))
    assert model.opset == 26 and np.array_equal(results(model.proto)["y"], results(proto)["y"])


def test_scan_of_opset_8_is_refused_by_name() -> None:
    body = helper.make_graph(
        [node("Add", "a b", "c"), node("Identity", "c", "d")],
        "body",
        [value("a", FLOAT, [2]), value("b", FLOAT, [2])],
        [value("c", FLOAT, [2]), value("d", FLOAT, [2])],
    )
    scan = helper.make_node("Scan", ["", "s", "x"], ["e", "y"], "scan", num_scan_inputs=1, body=body)
    ends = [value("s", FLOAT, [1, 2]), value("x", FLOAT, [1, 3, 2])], [value("y", FLOAT, [1, 3, 2])]
    graph = helper.make_graph([scan], "g", *ends)
    with pytest.raises(ModelError, match="until opset 8 Scan ran over a batch"):
        prepare(load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=3)))
