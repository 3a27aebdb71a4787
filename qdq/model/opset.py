"""The version of the default operator set: which a model has, and the same model in another.

Where no operator of the model changed between the two versions, the label changes and nothing else; else onnx's
converter works, which gets no large weights. What that gets wrong is written out before (Hardmax, which until opset 12
ran over all axes from one on) or refused (Scan of opset 8). Must not know passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx.shape_inference
import onnx.version_converter
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

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
