"""Models that nothing can repair are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import node
from odd_models import net
from onnx import ModelProto, TensorProto, helper, numpy_helper

from qdq.core.errors import ModelError
from qdq.model.storage import load


def test_functions_that_call_each_other_without_end_are_refused_at_once() -> None:
    proto = net()
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    for i in range(24):
        calls = [helper.make_node(f"F{i - 1}", [a], [b], domain="mine") for a, b in ("at", "tb")]
        body = calls if i else [node("Relu", "a", "b")]
        proto.functions.append(helper.make_function("mine", f"F{i}", ["a"], ["b"], body, opsets))
    proto.graph.node[1].CopyFrom(helper.make_node("F23", ["c"], ["r"], domain="mine"))
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    with pytest.raises(ModelError, match="cannot be put in place of their calls"):
        load(proto)


@pytest.mark.parametrize(
    "calls",
    [
        [helper.make_node("F", ["a"], ["b"], domain="mine")],  # itself
        [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("G", ["a", "a", "a"], ["c"], domain="mine")],
    ],
)
def test_functions_that_cannot_be_put_in_place_of_their_calls(calls: list[onnx.NodeProto]) -> None:
    proto = net()
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    proto.functions.append(helper.make_function("mine", "F", ["a"], ["b"], calls, opsets))
    proto.functions.append(helper.make_function("mine", "G", ["a"], ["b"], [node("Relu", "a", "b")], opsets[:1]))
    proto.graph.node[1].CopyFrom(helper.make_node("F", ["c"], ["r"], domain="mine"))
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    with pytest.raises(ModelError, match="cannot be put in place of their calls"):
        load(proto)


def test_an_output_of_another_type_than_its_node_makes_is_refused() -> None:
    proto = net()
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(ModelError, match="is stated as int64, but it is made as float32"):
        load(proto)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            helper.make_sparse_tensor(*map(numpy_helper.from_array, (np.ones(1, "f"), np.int64([99]))), [4]),
            "not a valid",
        ),
        (
            helper.make_sparse_tensor(
                *map(numpy_helper.from_array, (np.ones(1, "f"), np.int64([9]))), [1 << 20, 1 << 10]
            ),
            "a dense one of 4294967296 bytes",
        ),
    ],
    ids=["out of range", "too large"],
)
def test_sparse_tensors_that_cannot_be_dense_are_refused(tensor: onnx.SparseTensorProto, message: str) -> None:
    proto = net()
    tensor.values.name = "w"
    proto.graph.sparse_initializer.append(tensor)
    del proto.graph.initializer[0]
    with pytest.raises(ModelError, match=message):
        load(proto)


def of_unknown_type(proto: ModelProto) -> None:
    proto.graph.initializer[0].data_type = 999


def without_outputs(proto: ModelProto) -> None:
    del proto.graph.output[:]


def made_twice(proto: ModelProto) -> None:
    proto.graph.node[1].output[0] = "c"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of_unknown_type, "tensor 'w' is of type 999"),
        (without_outputs, "it has no outputs"),
        (made_twice, "used as output names multiple times"),
    ],
)
def test_what_cannot_be_repaired_is_refused(make: Callable[[ModelProto], None], message: str) -> None:
    proto = net()
    make(proto)
    with pytest.raises(ModelError, match=message):
        load(proto)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    proto = net()
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = "broken"
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString().replace(b"broken", b"brok\xffn"))
    with pytest.raises(ModelError, match="not UTF-8"):
        load(tmp_path / "m.onnx")


def test_a_name_in_a_body_that_is_no_text_is_refused(tmp_path: Path) -> None:
    proto = net()
    ends = [helper.make_tensor_value_info("broken", TensorProto.FLOAT, None)]
    body = helper.make_graph([node("Relu", "k", "inner")], "body", [], ends)
    proto.graph.node.append(helper.make_node("If", ["k"], ["z"], "if", then_branch=body, else_branch=body))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString().replace(b"broken", b"brok\xffn"))
    with pytest.raises(ModelError, match="not UTF-8"):
        load(tmp_path / "m.onnx")


def test_a_data_file_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "m.onnx", save_as_external_data=True, location="broken", size_threshold=0)
    content = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(content.replace(b"broken", b"brok\xffn"))
    with pytest.raises(ModelError, match="not UTF-8"):
        load(tmp_path / "m.onnx")


def test_a_sparse_text_is_refused() -> None:
    texts = net().graph.sparse_initializer.add()
    texts.values.CopyFrom(numpy_helper.from_array(np.array(["a"], object), "w"))
    texts.indices.CopyFrom(numpy_helper.from_array(np.array([0])))
    texts.dims.extend([8])
    proto = net()
    proto.graph.sparse_initializer.append(texts)
    with pytest.raises(ModelError, match="holds texts"):
        load(proto)
