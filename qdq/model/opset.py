"""Operator sets: the version of the default one that a model has, the same model in another, and TensorRT's quantizers.

Where no operator of the model changed between the two versions, the label changes and nothing else; else onnx's
converter works, which gets no large weights. What that gets wrong is written out before (Hardmax, which until opset 12
ran over all axes from one on) or refused (Scan of opset 8). Must not know passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx
import onnx.shape_inference
import onnx.version_converter
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from engines.core.nodes import all_graphs, all_nodes, attribute
from qdq.core.errors import ModelError
from qdq.model.nodes import Names

FAILURES = (  # of onnx's converter
    onnx.shape_inference.InferenceError,
    onnx.version_converter.ConvertError,
    RuntimeError,
    ValueError,
    IndexError,
)

FP8, INT4 = int(TensorProto.FLOAT8E4M3FN), int(TensorProto.INT4)
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
# Quantizers by names of TensorRT's own, which its parser takes in any domain, and what their codes are.
_TENSORRTS = {f"TRT_{kind}{op}": (op, dtype) for kind, dtype in (("FP8", FP8), ("INT4", INT4)) for op in QUANTIZERS}
_DOMAIN = "trt"  # of Model Optimizer, which writes the standard's quantizers in it too


def opset_of(proto: ModelProto) -> int:
    """The version of the default operator set, 0 if it is not imported."""
    return max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)


def with_opset(proto: ModelProto, target: int) -> ModelProto:
    """A light model, as of `engines.core.shapes.light`, in another version of the default operator set.

    Raises:
        ModelError: onnx cannot convert it; names the operator.
    """
    source = opset_of(proto)
    if is_same(proto, target):
        made = ModelProto()
        made.CopyFrom(proto)
        for entry in made.opset_import:
            entry.version = target if not entry.domain else entry.version
        return made
    if source < 13 <= target and any(node.op_type == "Hardmax" for node in all_nodes(proto.graph)):
        copy = ModelProto()
        copy.CopyFrom(proto)
        write_out(copy.graph, "Hardmax", _flat_hardmax)
        proto = copy
    if source < 9 <= target and any(node.op_type == "Scan" for node in all_nodes(proto.graph)):
        raise ModelError(
            f"Cannot convert this model from opset {source} to {target}: until opset 8 Scan ran over a batch, and the "
            "converter of onnx keeps it so. Export the model again with opset 17 to 21."
        )
    try:
        return onnx.version_converter.convert_version(proto, target)
    except FAILURES as error:
        raise ModelError(
            f"Cannot convert this model from opset {source} to {target}: the converter of onnx {onnx.__version__} "
            f"says: {' '.join(str(error).split())[:500]} Export the model again with opset 17 to {target}."
        ) from None


def is_same(proto: ModelProto, target: int) -> bool:
    """Whether every operator of a model is the same in another version of the default operator set."""
    source = opset_of(proto)
    return all(_unchanged(node.op_type, source, target) for node in all_nodes(proto.graph) if not node.domain)


def write_out(graph: GraphProto, op_type: str, expand: Callable[[NodeProto, Names], list[NodeProto]]) -> bool:
    """Put what `expand` makes in place of every node of an operator, in a graph and its bodies; whether there were any.

    `expand` is given the node and the tensors' names; its nodes make the node's output.
    """
    found = [each for each in all_graphs(graph) if any(n.op_type == op_type and not n.domain for n in each.node)]
    names = Names(tensor_names(graph)) if found else None
    for each in found:
        nodes = [
            new
            for node in each.node
            for new in (expand(node, names) if names and node.op_type == op_type and not node.domain else [node])
        ]
        del each.node[:]
        each.node.extend(nodes)
    return bool(found)


def group_norm(node: NodeProto, names: Names) -> list[NodeProto]:
    """GroupNormalization of opset 18 to 20, whose scales are per group: an InstanceNormalization of the groups.

    The standard takes it back since ("deprecated"), so onnx's checker refuses it, and ONNX Runtime runs it.
    """
    x, scale, bias = node.input
    shape, groups, grouped, done = (
        names.fresh(f"{node.output[0]}_{part}") for part in ("shape", "groups", "in", "out")
    )
    sizes = numpy_helper.from_array(np.array([0, attribute(node, "num_groups", 1), -1]))
    kept = [a for a in node.attribute if a.name == "epsilon"]
    norm = NodeProto(op_type="InstanceNormalization", name=node.name, input=[grouped, scale, bias], output=[done])
    norm.attribute.extend(kept)
    return [
        helper.make_node("Shape", [x], [shape]),
        helper.make_node("Constant", [], [groups], value=sizes),
        helper.make_node("Reshape", [x, groups], [grouped]),
        norm,
        helper.make_node("Reshape", [done, shape], [node.output[0]]),
    ]


def tensor_names(graph: GraphProto) -> Iterator[str]:
    """The names of all tensors of a graph and its bodies."""
    for each in all_graphs(graph):
        yield from (v.name for v in (*each.input, *each.output, *each.initializer))
        for node in each.node:
            yield from (*node.input, *node.output)


def tensorrt_quantizers(graph: GraphProto) -> int:
    """The opset in which the standard has all quantizers that are TensorRT's own; 0 where a graph has none."""
    found = [node for node in all_nodes(graph) if _is_tensorrts(node)]
    eight = all("FP8" in node.op_type for node in found)  # of the others the codes may be INT4
    return (19 if eight else 21) if found else 0


def standard_quantizers(graph: GraphProto) -> bool:
    """Put the standard's QuantizeLinear and DequantizeLinear in place of TensorRT's own; whether there were any.

    They compute the same: values over the scale, rounded to the nearest code, ties to even, and saturated. The scale of
    blocks divides the axis in which its shape differs, as TensorRT reads it, whatever `axis` says. In Model Optimizer's
    trace, before its own finish, floats in front of a DequantizeLinear of blocks mean their INT4 codes: they get a Q.
    """
    stored = {t.name: t for each in all_graphs(graph) for t in each.initializer}
    constants = [node for node in all_nodes(graph) if node.op_type == "Constant" and not node.domain]
    stored |= {node.output[0]: a.t for node in constants for a in node.attribute if a.HasField("t")}
    names, types = Names(tensor_names(graph)), dict.fromkeys(tensor_names(graph), int(TensorProto.FLOAT))  # the usual
    types |= {name: tensor.data_type for name, tensor in stored.items()}
    changed = False
    for each in all_graphs(graph):
        nodes, made = list[NodeProto](), set[str]()
        for node in each.node:
            if _is_tensorrts(node) and (dtype := _code_type(node, types)):
                floats = _is_dq(node) and types[node.input[0]] == TensorProto.FLOAT
                types[node.output[0]] = TensorProto.FLOAT if _is_dq(node) else dtype
                nodes += _in_standard(node, dtype, stored, names, each, floats=floats)
                made.update(node.output)
            else:
                nodes.append(node)
        if made:
            changed = True
            kept = [v for v in each.value_info if v.name not in made]  # of codes they say UINT8
            for held, new in ((each.node, nodes), (each.value_info, kept)):
                copies = [type(item).FromString(item.SerializeToString()) for item in new]
                del held[:]
                held.extend(copies)
    return changed


def _is_tensorrts(node: NodeProto) -> bool:
    plain = node.op_type in QUANTIZERS and node.domain == _DOMAIN
    return (plain or node.op_type in _TENSORRTS) and len(node.input) > 1


def _code_type(node: NodeProto, types: Mapping[str, int]) -> int:
    """The ONNX type of a quantizer's codes; 0 where nothing says."""
    if node.op_type in _TENSORRTS:
        return _TENSORRTS[node.op_type][1]
    given = [types[name] for name in (*node.input[2:], *(node.input[:1] if _is_dq(node) else ()))]
    found = next((dtype for dtype in given if dtype != TensorProto.FLOAT), 0)
    return found or (INT4 if attribute(node, "block_size", 0) else 0)


def _is_dq(node: NodeProto) -> bool:
    return "Dequantize" in node.op_type


def _in_standard(
    node: NodeProto, dtype: int, stored: Mapping[str, TensorProto], names: Names, graph: GraphProto, *, floats: bool
) -> list[NodeProto]:
    """The nodes in place of one, which is changed; zero points go to the graph. `floats`: a DQ reads no codes yet."""
    node.op_type, node.domain = _TENSORRTS.get(node.op_type, (node.op_type, 0))[0], ""
    data, scale, zero = (stored.get(name) for name in (*node.input[:2], *(node.input[2:] or [""])))
    sizes = tuple(scale.dims) if scale is not None else ()
    _name_block_axis(node, tuple(data.dims) if data is not None else None, sizes)
    given = len(node.input) > 2
    if not (_is_dq(node) or given) or (given and zero is not None and tuple(zero.dims) != sizes):
        node.input[2:] = [_zeros(f"{node.output[0]}_zero", dtype, sizes, names, graph)]
    if data is not None and data.data_type in (TensorProto.UINT8, TensorProto.INT8) and dtype == FP8 and _is_dq(node):
        data.int32_data[:] = [value & 255 for value in data.int32_data]
        data.data_type = FP8  # the same bytes
    if not floats:
        return [node]
    codes = names.fresh(f"{node.output[0]}_codes")
    q = NodeProto(op_type="QuantizeLinear", input=node.input[:2], output=[codes], attribute=node.attribute)
    q.input.append(_zeros(f"{codes}_zero", dtype, sizes, names, graph))
    node.input[0] = codes
    return [q, node]


def _name_block_axis(node: NodeProto, shape: tuple[int, ...] | None, scales: tuple[int, ...]) -> None:
    """Let `axis` be the one in which the shapes of a tensor and of its block scales differ; of computed ones the last.

    Model Optimizer writes 0, and cuts rows into blocks.
    """
    known = shape if shape is not None else (*scales[:-1], -1)
    differ = [axis for axis, (size, count) in enumerate(zip(known, scales, strict=False)) if size != count]
    blocks = any(held.name == "block_size" for held in node.attribute)
    for held in node.attribute:
        if held.name == "axis" and blocks and len(known) == len(scales) and len(differ) == 1:
            held.i = differ[0]


def _zeros(name: str, dtype: int, sizes: tuple[int, ...], names: Names, graph: GraphProto) -> str:
    """The name of a new initializer of zeros of 8 or 4 bits each."""
    made = TensorProto(name=names.fresh(name), data_type=dtype, dims=sizes)
    made.raw_data = bytes(-(-math.prod(sizes) * (4 if dtype == INT4 else 8) // 8))
    graph.initializer.append(made)
    return made.name


def _flat_hardmax(node: NodeProto, names: Names) -> list[NodeProto]:
    """Hardmax over all axes from one on, as it was until opset 12."""
    shape, flat, done = (names.fresh(f"{node.output[0]}_{part}") for part in ("shape", "flat", "out"))
    return [
        helper.make_node("Shape", [node.input[0]], [shape]),
        helper.make_node("Flatten", [node.input[0]], [flat], axis=attribute(node, "axis", 1)),
        helper.make_node("Hardmax", [flat], [done], node.name, axis=1),
        helper.make_node("Reshape", [done, shape], [node.output[0]]),
    ]


def _unchanged(op_type: str, source: int, target: int) -> bool:
    """Whether an operator of the default domain is the same in two versions of the set."""
    try:
        return bool(
            onnx.defs.get_schema(op_type, source).since_version == onnx.defs.get_schema(op_type, target).since_version
        )
    except onnx.defs.SchemaError:
        return False
