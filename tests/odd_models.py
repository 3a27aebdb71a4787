"""Odd models, each a change of one network, that loading repairs; and what they compute of one sample."""

from __future__ import annotations

import numpy as np
import onnx
from graphs import node, normal
from onnx import ModelProto, TensorProto, helper, numpy_helper

from engines.core import onnx_runtime as ort

FLOAT = TensorProto.FLOAT


value = helper.make_tensor_value_info


W = normal(8, 4, 3, 3)


SPARSE = np.where(np.abs(W) > 1, W, 0)


def sparse(array: np.ndarray, name: str = "", *, flat: bool = True) -> onnx.SparseTensorProto:
    """A sparse tensor whose indices are flat places, or rows of coordinates."""
    places = np.flatnonzero(array)
    indices = places if flat else np.stack(np.unravel_index(places, array.shape), axis=1)
    return helper.make_sparse_tensor(
        numpy_helper.from_array(array.ravel()[places], name),
        numpy_helper.from_array(indices.astype(np.int64)),
        array.shape,
    )


def net(opset: int = 17) -> ModelProto:
    """x -> Conv -> Relu -> MaxPool -> Conv -> y."""
    nodes = [
        node("Conv", "x w", "c", "conv", pads=[1] * 4),
        node("Relu", "c", "r", "relu"),
        node("MaxPool", "r", "m", "pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", "m v", "y", "last"),
    ]
    tensors = [numpy_helper.from_array(a, n) for n, a in {"w": SPARSE, "v": normal(4, 8, 1, 1, seed=1)}.items()]
    graph = helper.make_graph(
        nodes, "net", [value("x", FLOAT, [1, 4, 8, 8])], [value("y", FLOAT, [1, 4, 4, 4])], tensors
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def nameless(proto: ModelProto) -> None:
    proto.graph.name = ""


def unsorted(proto: ModelProto) -> None:
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def repeated_names(proto: ModelProto) -> None:
    for each in proto.graph.node:
        each.name = "same"


def long_domain(proto: ModelProto) -> None:
    for each in (*proto.graph.node, *proto.opset_import):
        each.domain = "ai.onnx"


def sparse_weight(proto: ModelProto, *, flat: bool = True) -> None:
    proto.graph.sparse_initializer.append(sparse(SPARSE, "w", flat=flat))
    del proto.graph.initializer[0]


def sparse_rows(proto: ModelProto) -> None:
    sparse_weight(proto, flat=False)


def sparse_constant(proto: ModelProto) -> None:
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], "w", sparse_value=sparse(SPARSE)))
    del proto.graph.initializer[0]


def input_is_output(proto: ModelProto) -> None:
    proto.graph.output.append(proto.graph.input[0])


def unread_outputs(proto: ModelProto) -> None:
    proto.graph.node[2].output.append("indices")
    proto.graph.node[3].input[0] = "d"
    proto.graph.node.insert(3, node("Dropout", "m", "d mask", "drop"))


def stored_output(proto: ModelProto) -> None:
    proto.graph.output.append(value("w", FLOAT, W.shape))


def constant_output(proto: ModelProto) -> None:
    weight = proto.graph.initializer[0]
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], "w", value=weight))
    del proto.graph.initializer[0]
    proto.graph.output.append(value("w", FLOAT, W.shape))


def functions(proto: ModelProto) -> None:
    """The first two nodes in a function that another calls; its nodes are unsorted."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    inner = [node("Relu", "c", "r", "relu"), node("Conv", "x w", "c", "conv", pads=[1] * 4)]
    outer = [helper.make_node("Inner", ["x", "w"], ["r"], "inner", domain="mine")]
    proto.functions.append(helper.make_function("mine", "Inner", ["x", "w"], ["r"], inner, opsets))
    proto.functions.append(helper.make_function("mine", "Outer", ["x", "w"], ["r"], outer, opsets))
    del proto.graph.node[:2]
    proto.graph.node.insert(0, helper.make_node("Outer", ["x", "w"], ["r"], "outer", domain="mine"))
    proto.opset_import.append(helper.make_opsetid("mine", 1))


def old_ir(proto: ModelProto) -> None:
    proto.ir_version = 3
    proto.graph.input.extend(value(t.name, t.data_type, t.dims) for t in proto.graph.initializer)


def new_ir(proto: ModelProto) -> None:
    proto.ir_version = 14


def untrue_infos(proto: ModelProto) -> None:
    proto.graph.value_info.append(value("c", TensorProto.INT64, [1, 8, 8, 8]))
    proto.graph.value_info.append(value("r", FLOAT, [1, 8, 8]))
    proto.graph.value_info.append(value("m", FLOAT, [1, 8, 5, 4]))
    proto.graph.value_info.append(value("nothing", FLOAT, [7]))
    proto.graph.output[0].CopyFrom(value("y", FLOAT, [1, 4, 16]))


def odd_bodies(proto: ModelProto) -> None:
    """An If with nameless, unsorted bodies that repeat names, hold a sparse constant and read the graph around."""
    bodies = {}
    for key in ("then_branch", "else_branch"):
        nodes = [
            node("Mul", "n s", "o", "same"),
            helper.make_node("Constant", [], ["s"], "same", sparse_value=sparse(np.float32([0, 2, 0, 1]))),
            node("Relu", "m", "n", "conv"),
        ]
        bodies[key] = helper.make_graph(nodes, "body", [], [value("o", FLOAT, None)])
        bodies[key].name = ""
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    proto.graph.node.insert(3, node("If", "yes", "i", "same", **bodies))
    proto.graph.node[4].input[0] = "i"


def scalar_input(proto: ModelProto) -> None:
    proto.graph.input.append(value("k", FLOAT, []))
    proto.graph.node[3].output[0] = "z"
    proto.graph.node.append(node("Mul", "z k", "y", "scale"))


def bare_loop(proto: ModelProto) -> None:
    """A Loop as onnxscript writes a for loop: no condition, and a body that passes it on."""
    nodes = [node("Identity", "t", "u"), node("Identity", "on", "going")]
    starts = [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("t", FLOAT, None)]
    body = helper.make_graph(nodes, "body", starts, [value("going", TensorProto.BOOL, []), value("u", FLOAT, None)])
    proto.graph.initializer.append(numpy_helper.from_array(np.array(2), "turns"))
    proto.graph.node.insert(3, node("Loop", "turns - m", "k", "loop", body=body))
    proto.graph.node[4].input[0] = "k"


KINDS = [
    bare_loop,
    nameless,
    unsorted,
    repeated_names,
    long_domain,
    sparse_weight,
    sparse_rows,
    sparse_constant,
    input_is_output,
    unread_outputs,
    stored_output,
    constant_output,
    functions,
    old_ir,
    new_ir,
    untrue_infos,
    odd_bodies,
    scalar_input,
]


SAMPLE = {"x": normal(1, 4, 8, 8, seed=5), "k": np.array(0.5, np.float32)}


def results(model: ModelProto) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes of the sample."""
    fed = {i.name: SAMPLE[i.name] for i in model.graph.input if i.name in SAMPLE}
    return next(ort.run(model, [fed]))
