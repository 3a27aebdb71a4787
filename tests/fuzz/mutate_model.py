"""ONNX models that are almost right: one to three hostile changes of a small network.

Random -> `model` -> the bytes of a file.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from models import assemble, constant, segmenter
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

INTEGERS = [0, 1, -1, 2, 3, 7, 255, 4096, 1 << 31, 1 << 40, -(1 << 40), (1 << 63) - 1, -(1 << 63)]
TEXTS = ["", "x", "a\0b", "../up", "/etc/passwd", "\u202e\ud55c\uae00", "n" * 5000, "image", "%s{0}", "nan", "1e999"]
OPERATORS = [
    *("Add", "Concat", "Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "Reshape", "Transpose", "Slice", "Gather"),
    *("Split", "Resize", "Pad", "Cast", "Constant", "If", "Loop", "Scan", "LSTM", "BatchNormalization", "TopK"),
    *("LayerNormalization", "Softmax", "MaxPool", "Einsum", "NonZero", "Shape", "Expand", "Tile", "Identity"),
    *("Dropout", "QuantizeLinear", "DequantizeLinear", "Attention", "NoSuchOperator", "SequenceConstruct"),
    *("OptionalGetElement", "StringNormalizer"),
]


def network() -> ModelProto:
    """A product, a branch with a body, a convolution, in one graph of few nodes."""
    rng = np.random.default_rng(3)
    body = helper.make_graph(
        [helper.make_node("Add", ["r", "bias"], ["then"])],
        "then",
        [],
        [helper.make_tensor_value_info("then", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Relu", ["r"], ["else"])],
        "else",
        [],
        [helper.make_tensor_value_info("else", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
        helper.make_node("Relu", ["p"], ["r"], name="relu"),
        helper.make_node("If", ["yes"], ["q"], name="branch", then_branch=body, else_branch=other),
        helper.make_node("Reshape", ["q", "shape"], ["s"], name="reshape"),
        helper.make_node("Conv", ["s", "k"], ["t"], name="conv", pads=[1, 1, 1, 1], strides=[1, 1], group=1),
        helper.make_node("Softmax", ["t"], ["y"], name="softmax", axis=1),
    ]
    tensors = [
        constant("w", rng.normal(size=(8, 16)).astype(np.float32)),
        constant("bias", rng.normal(size=16).astype(np.float32)),
        constant("k", rng.normal(size=(4, 4, 3, 3)).astype(np.float32)),
        constant("yes", np.array(True)),
        constant("shape", np.array([0, 4, 2, 2], np.int64)),
    ]
    return assemble(nodes, {"x": ("n", 8)}, {"y": ("n", 4, 2, 2)}, tensors, opset=18)


def _attribute(model: ModelProto, random: Random) -> None:
    node = _node(model, random)
    if not node.attribute:
        node.attribute.append(
            helper.make_attribute(random.choice(["axis", "group", "to", "perm"]), random.choice(INTEGERS))
        )
        return
    held = random.choice(node.attribute)
    if held.type == AttributeProto.INTS and held.ints:
        held.ints[random.randrange(len(held.ints))] = random.choice(INTEGERS)
    elif held.type == AttributeProto.INT:
        held.i = random.choice(INTEGERS)
    else:
        held.type = random.choice([0, 1, 2, 3, 4, 5, 6, 7, 11])


def _operator(model: ModelProto, random: Random) -> None:
    node = _node(model, random)
    node.op_type = random.choice(OPERATORS)
    if random.random() < 0.2:
        node.domain = random.choice(["ai.onnx", "com.microsoft", "trt", "", "a\0b"])


def _edge(model: ModelProto, random: Random) -> None:
    node = _node(model, random)
    names = [name for n in model.graph.node for name in (*n.input, *n.output)] + TEXTS
    side = random.choice([node.input, node.output])
    if side and random.random() < 0.8:
        side[random.randrange(len(side))] = random.choice(names)
    else:
        side.append(random.choice(names))


def _nodes(model: ModelProto, random: Random) -> None:
    nodes = list(model.graph.node)
    if random.random() < 0.5:
        nodes.pop(random.randrange(len(nodes)))
    else:
        nodes.append(random.choice(nodes))
    random.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _name(model: ModelProto, random: Random) -> None:
    held = random.choice([_node(model, random), model.graph, *model.graph.initializer, *model.graph.input])
    held.name = random.choice(TEXTS)


def _tensor(model: ModelProto, random: Random) -> None:
    tensor = random.choice(model.graph.initializer)
    what = random.randrange(8)
    if what == 0 and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(INTEGERS)
    elif what == 1:
        tensor.data_type = random.choice([0, 1, 2, 6, 7, 8, 10, 11, 14, 16, 17, 22, 23, 26, 999])
    elif what == 2:
        tensor.raw_data = tensor.raw_data[: random.randrange(len(tensor.raw_data) + 1)]
    elif what == 3:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": random.choice([*TEXTS, "samples/000.npz", "pipe"]), "offset": str(random.choice(INTEGERS))}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
    elif what == 4:
        tensor.dims[:0] = [1] * random.choice([1, 7, 63, 70])
    elif what == 5:
        tensor.segment.begin, tensor.segment.end = random.choice(INTEGERS), random.choice(INTEGERS)
    elif what == 6:
        field = random.choice([tensor.float_data, tensor.int32_data, tensor.int64_data])
        field.extend([1] * random.choice([1, 16, 128]))
        if random.random() < 0.5:
            tensor.ClearField("raw_data")
    else:
        size = len(tensor.raw_data) // 4
        fill = random.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45, 0.0])
        tensor.raw_data = np.full(size, fill, np.float32).tobytes() + tensor.raw_data[4 * size :]


def _sparse(model: ModelProto, random: Random) -> None:
    """A sparse tensor in the place of a dense one, with indices that may lie anywhere."""
    dense = random.choice(model.graph.initializer)
    count = random.choice([0, 1, 2, 5])
    values = random.choice([np.ones(count, np.float32), np.ones(count, np.int64), np.array(["a"] * count, object)])
    rows = (count,) if random.random() < 0.6 else (count, random.choice([1, 2, 3]))
    places = np.array([random.choice([*range(8), *INTEGERS]) for _ in range(int(np.prod(rows)))], np.int64)
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(numpy_helper.from_array(values))
    sparse.values.name = dense.name
    sparse.indices.CopyFrom(numpy_helper.from_array(np.sort(places, axis=0).reshape(rows)))
    sparse.dims.extend(dense.dims if random.random() < 0.7 else random.choices(INTEGERS, k=random.choice([0, 1, 2])))
    model.graph.initializer.remove(dense)


def _nested(model: ModelProto, random: Random) -> None:
    """Bodies inside bodies, as deep as a file can hold them."""
    held = [a for node in model.graph.node for a in node.attribute if a.HasField("g")]
    inner, flat = random.choice(held).g, onnx.GraphProto()
    flat.CopyFrom(inner)
    for _ in range(random.choice([1, 5, 20, 27])):
        body = onnx.GraphProto()
        body.CopyFrom(inner)
        node = helper.make_node("If", ["yes"], [inner.output[0].name], then_branch=body, else_branch=flat)
        inner.node[0].CopyFrom(node)


def _value(model: ModelProto, random: Random) -> None:
    values = random.choice([model.graph.input, model.graph.output])
    what = random.randrange(6)
    if what == 0 or not values:
        values.append(
            random.choice([*model.graph.input, *model.graph.output]) if values else onnx.ValueInfoProto(name="v")
        )
        return
    value = random.choice(values)
    shape = value.type.tensor_type.shape
    if what == 1 and shape.dim:
        shape.dim[random.randrange(len(shape.dim))].dim_value = random.choice(INTEGERS)
    elif what == 2:
        value.type.tensor_type.elem_type = random.choice([0, 1, 7, 8, 9, 10, 11, 14, 16, 999])
    elif what == 3:
        value.type.Clear()
    elif what == 4:
        shape.dim.add(dim_value=random.choice(INTEGERS))
    else:
        values.remove(value)


def _stated(model: ModelProto, random: Random) -> None:
    node = _node(model, random)
    if node.output:
        dims = [random.choice([*INTEGERS, "n"]) for _ in range(random.randrange(5))]
        dims = [d if isinstance(d, str) else max(min(d, 1 << 62), -1) for d in dims]
        model.graph.value_info.append(helper.make_tensor_value_info(node.output[0], random.choice([1, 7, 10]), dims))


def _versions(model: ModelProto, random: Random) -> None:
    what = random.randrange(4)
    if what == 0:
        model.ir_version = random.choice([0, -1, 1, 3, 14, 999])
    elif what == 1:
        model.opset_import[0].version = random.choice([0, -1, 1, 6, 7, 9, 12, 25, 28, 29, 999])
    elif what == 2:
        model.opset_import.append(helper.make_opsetid(random.choice(["", "ai.onnx", "x"]), random.choice([1, 17, 999])))
    else:
        del model.opset_import[:]


def _functions(model: ModelProto, random: Random) -> None:
    """Functions that call each other twice, so that they stand for very many nodes; sometimes in a circle."""
    depth = random.choice([1, 2, 5, 25])
    for level in range(depth):
        inner = f"f{level - 1}" if level else random.choice(["Relu", "NoSuchOperator", f"f{depth - 1}"])
        domain = "mine" if inner.startswith("f") else ""
        calls = [helper.make_node(inner, [a], [b], domain=domain) for a, b in (("a", "b"), ("b", "c"))]
        imports = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
        model.functions.append(helper.make_function("mine", f"f{level}", ["a"], ["c"], calls, imports))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    node = _node(model, random)
    node.op_type, node.domain = f"f{depth - 1}", "mine"


def _node(model: ModelProto, random: Random) -> NodeProto:
    nodes = list(model.graph.node)
    inner = [n for node in nodes for a in node.attribute if a.HasField("g") for n in a.g.node]
    return random.choice([*nodes, *inner]) if nodes or inner else model.graph.node.add()


MODEL: tuple[Callable[[ModelProto, Random], None], ...] = (
    *(_attribute, _operator, _edge, _nodes, _name, _tensor, _sparse, _nested, _value, _stated, _versions, _functions),
)


def model(random: Random) -> bytes:
    """An ONNX file."""
    made = random.choice([network, segmenter])()
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        try:
            random.choice(MODEL)(made, random)
        except (IndexError, ValueError, TypeError, DecodeError):  # an earlier change left no room for this one
            continue
    return flipped(made.SerializeToString(), random) if random.random() < 0.1 else made.SerializeToString()


def flipped(data: bytes, random: Random) -> bytes:
    """The same bytes with a few of them changed, perhaps cut short."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 2, 20])):
        if changed:
            changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed[: random.randrange(len(changed) + 1)] if random.random() < 0.3 else changed)
