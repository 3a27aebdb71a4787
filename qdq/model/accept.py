"""A model in the form that ONNX Runtime and TensorRT's parser take: exact repairs that every verb's model goes through.

    | in the file                                     | after `accept`                                      |
    |-------------------------------------------------|-----------------------------------------------------|
    | domain "ai.onnx"                                | "", its short name                                  |
    | calls of the model's own functions              | their nodes, named as TensorRT's parser names them  |
    | TensorRT's own quantizers, as of Model Optimizer | the standard's QuantizeLinear, DequantizeLinear     |
    | opset 26 or newer                               | 25, where onnx can convert it                       |
    | GroupNormalization of opset 18 to 20            | its groups' InstanceNormalization                   |
    | IR version below 4, or newer than it has to be  | 4; the oldest that holds it                         |
    | a graph or body without a name                  | "graph"                                             |
    | sparse initializers and constants               | dense ones                                          |
    | nodes in any order, in bodies too               | each behind those that it reads                     |
    | nodes with the same name                        | one keeps it, the others get a number               |
    | optional outputs that nobody reads              | dropped                                             |
    | an output that is an initializer or is read as  | made by an Identity, its value read by another name |
    | a constant                                      |                                                     |
    | a Loop without a condition, whose body reads it | a constant one, true                                |
    | stated types and shapes that are not true       | left out; of outputs, the true ones                 |

No value changes, and no name of an input or output. It must not read the values of dense tensors or fold anything. Of
what it cannot repair, the checker of onnx, ONNX Runtime or the compiler say what is wrong, unless they would not.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    SparseTensorProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from engines.core.load import inlined
from engines.core.nodes import all_graphs, all_nodes, reads
from engines.core.shapes import inferred, light
from qdq.core.errors import ModelError
from qdq.model.external import embedded, tensor_bytes
from qdq.model.model import dtype_name
from qdq.model.nodes import Names, read_as, without_initializers
from qdq.model.opset import (
    group_norm,
    opset_of,
    standard_quantizers,
    tensor_names,
    tensorrt_quantizers,
    with_opset,
    write_out,
)

NEWEST_OPSET = 25  # ONNX Runtime 1.31 takes 26 at most, and 25 is what the passes are tested with
FIRST_IR, PLAIN_IR = 4, 11  # from 4 on an initializer need not be an input; 11 is what ONNX Runtime 1.24 takes
MOST_DENSE = 1 << 28  # bytes that a sparse tensor may become
OPTIONAL = onnx.defs.OpSchema.FormalParameterOption.Optional


def accept(proto: ModelProto, directory: Path) -> bool:
    """Repair a model in place; whether something changed.

    Args:
        proto: any; external data stays where it is.
        directory: of its external data.

    Raises:
        ModelError: a sparse tensor would become too large, or its indices lie outside of it; functions cannot be put in
            place of their calls; an output is stated to be of another type than it is made as.
        onnx.checker.ValidationError: a sparse tensor is malformed.
    """
    steps: tuple[Callable[[], bool], ...] = (
        lambda: _short_domain(proto),
        lambda: _inline(proto),
        lambda: _standard_quantizers(proto),
        lambda: _lower_opset(proto),
        lambda: 18 <= opset_of(proto) < 21 and write_out(proto.graph, "GroupNormalization", group_norm),
        lambda: _mark_ir(proto),
        lambda: _name_graphs(proto.graph),
        lambda: _make_dense(proto.graph, directory),
        lambda: any([sort_nodes(graph) for graph in all_graphs(proto.graph)]),
        lambda: _name_apart(proto.graph),
        lambda: any([_drop_unread(graph, proto) for graph in all_graphs(proto.graph)]),
        lambda: _make_outputs(proto.graph),
        lambda: _state_conditions(proto.graph),
        lambda: _leave_out_untrue(proto),
    )
    return any([step() for step in steps])


def sort_nodes(graph: GraphProto | FunctionProto) -> bool:
    """Put each node behind those whose results it, or a body in it, reads; the first that can be is the next.

    Nodes in a circle leave the order as it is, and the checker of onnx says so.
    """
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    before = [{makers[name] for name in reads(node) if name in makers} for node in graph.node]
    if all(max(needs, default=-1) < index for index, needs in enumerate(before)):
        return False
    behind: dict[int, list[int]] = {}
    for index, needs in enumerate(before):
        for other in needs:
            behind.setdefault(other, []).append(index)
    ready = [index for index, needs in enumerate(before) if not needs]
    order: list[int] = []
    while ready:
        order.append(heapq.heappop(ready))
        for index in behind.get(order[-1], ()):
            before[index].discard(order[-1])
            if not before[index]:
                heapq.heappush(ready, index)
    if len(order) < len(before):
        return False
    found = [graph.node[index] for index in order]
    del graph.node[:]
    graph.node.extend(found)
    return True


def _short_domain(proto: ModelProto) -> bool:
    """Call the default domain "" everywhere, and import it once."""
    nodes = [*all_nodes(proto.graph), *(node for f in proto.functions for node in f.node)]
    entries = [*proto.opset_import, *(entry for f in proto.functions for entry in f.opset_import)]
    long = [each for each in (*nodes, *entries) if each.domain == "ai.onnx"]
    for each in long:
        each.domain = ""
    versions: dict[str, int] = {}
    for entry in proto.opset_import:
        versions[entry.domain] = max(entry.version, versions.get(entry.domain, 0))
    if repeated := len(versions) < len(proto.opset_import):
        del proto.opset_import[:]
        proto.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())
    return bool(long) or repeated


def _inline(proto: ModelProto) -> bool:
    """Put the nodes of the model's own functions in place of their calls."""
    if not proto.functions:
        return False
    for function in proto.functions:
        sort_nodes(function)
    flat = inlined(without_initializers(proto))
    if flat is None:
        raise ModelError(
            "Cannot use this model: its functions cannot be put in place of their calls, which are very many, go in a "
            "circle, or do not fit the functions. Export it again without functions of its own."
        )
    _take(proto, flat)
    return True


def _standard_quantizers(proto: ModelProto) -> bool:
    """Write quantizers by names of TensorRT's own in the standard's form, in an opset that has it."""
    least = tensorrt_quantizers(proto.graph)
    if not least:
        return False
    if opset_of(proto) < least:
        _take(proto, with_opset(light(proto), least))
    changed = standard_quantizers(proto.graph)
    used = {node.domain for node in all_nodes(proto.graph)}
    kept = [entry for entry in proto.opset_import if not entry.domain or entry.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    return changed


def _lower_opset(proto: ModelProto) -> bool:
    """Convert to the newest opset that the passes are tested with; an operator that is new since then keeps its own."""
    if opset_of(proto) <= NEWEST_OPSET:
        return False
    try:
        _take(proto, with_opset(light(proto), NEWEST_OPSET))
    except ModelError:
        return False
    return True


def _take(proto: ModelProto, changed: ModelProto) -> None:
    """Take back the nodes of a model that was changed without its tensors."""
    graph = proto.graph
    known = {t.name for t in graph.initializer}
    for held, new in ((graph.node, changed.graph.node), (proto.opset_import, changed.opset_import)):
        del held[:]
        held.extend(new)
    del proto.functions[:], graph.value_info[:]
    graph.value_info.extend(changed.graph.value_info)
    graph.initializer.extend(t for t in changed.graph.initializer if t.name not in known)


def _mark_ir(proto: ModelProto) -> bool:
    """Mark the model with an IR version that ONNX Runtime and onnx take."""
    least = max(FIRST_IR, helper.find_min_ir_version_for(proto.opset_import, ignore_unknown=True))
    version = min(max(proto.ir_version, least), max(PLAIN_IR, least))
    changed = version != proto.ir_version
    proto.ir_version = version
    return changed


def _name_graphs(graph: GraphProto) -> bool:
    nameless = [each for each in all_graphs(graph) if not each.name]
    for each in nameless:
        each.name = "graph"
    return bool(nameless)


def _make_dense(graph: GraphProto, directory: Path) -> bool:
    """Put dense tensors in place of sparse ones."""
    changed = False
    for each in all_graphs(graph):
        for sparse in each.sparse_initializer:
            each.initializer.append(_dense(sparse, sparse.values.name, directory))
            changed = True
        del each.sparse_initializer[:]
        for node in each.node:
            for held in node.attribute if node.op_type == "Constant" and not node.domain else ():
                if held.name == "sparse_value":
                    value = helper.make_attribute("value", _dense(held.sparse_tensor, node.output[0], directory))
                    held.CopyFrom(value)
                    changed = True
    return changed


def _dense(sparse: SparseTensorProto, name: str, directory: Path) -> TensorProto:
    """The dense tensor of a sparse one, whose indices are places in the flat tensor or one row per value."""
    if sparse.values.data_type == TensorProto.STRING:
        raise ModelError(f"Cannot use the sparse tensor {name!r}: it holds texts. Store it as a dense initializer.")
    size = tensor_bytes(TensorProto(data_type=sparse.values.data_type, dims=sparse.dims))
    if size > MOST_DENSE:
        raise ModelError(
            f"Cannot use the sparse tensor {name!r} of shape {list(sparse.dims)}: TensorRT takes dense tensors alone, "
            f"and a dense one of {size} bytes is above the limit of {MOST_DENSE}. Store it as a dense initializer."
        )
    parts = [embedded(part, directory) for part in (sparse.values, sparse.indices)]
    whole = SparseTensorProto(values=parts[0], indices=parts[1], dims=sparse.dims)
    onnx.checker.check_sparse_tensor(whole)
    values, indices = (numpy_helper.to_array(part) for part in parts)
    if indices.ndim == 2:
        indices = np.ravel_multi_index(tuple(indices.T), tuple(sparse.dims)) if len(indices) else indices.ravel()
    dense = np.zeros(math.prod(sparse.dims), values.dtype)
    dense[indices] = values
    return numpy_helper.from_array(dense.reshape(tuple(sparse.dims)), name)


def _name_apart(graph: GraphProto) -> bool:
    """Give each name to one node only, of the graph and all bodies; nodes without a name stay without."""
    names, seen, changed = Names(node.name for node in all_nodes(graph)), {""}, False
    for node in all_nodes(graph):
        if node.name and node.name in seen:
            node.name = names.fresh(node.name)
            changed = True
        seen.add(node.name)
    return changed


def _drop_unread(graph: GraphProto, proto: ModelProto) -> bool:
    """Leave out optional outputs that nothing reads, of nodes that make something else."""
    read = {v.name for v in graph.output}.union(*map(reads, graph.node))
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    changed = False
    for node in graph.node:
        unread = [i for i, name in enumerate(node.output) if name and name not in read]
        if not unread or len(unread) == sum(map(bool, node.output)) or node.op_type == "BatchNormalization":
            continue  # how many outputs a BatchNormalization has says whether it trains
        try:
            schema = onnx.defs.get_schema(node.op_type, versions.get(node.domain, 1), node.domain)
        except onnx.defs.SchemaError:
            continue
        for index in unread:
            if schema.outputs[min(index, len(schema.outputs) - 1)].option == OPTIONAL:
                node.output[index] = ""
                changed = True
        while not node.output[-1]:
            del node.output[-1]
    return changed


def _make_outputs(graph: GraphProto) -> bool:
    """Let an Identity make each output that is a constant which is read; its readers read it by another name."""
    outputs, read = {v.name for v in graph.output}, {name for node in graph.node for name in reads(node)}
    stored = [t for t in graph.initializer if t.name in outputs]
    constants = [n for n in graph.node if n.op_type == "Constant" and not n.domain and n.output[0] in outputs & read]
    if not stored and not constants:
        return False
    names = Names(tensor_names(graph))
    fresh = {
        name: names.fresh(f"{name}_value") for name in (*(t.name for t in stored), *(n.output[0] for n in constants))
    }
    for node in graph.node:
        read_as(node, fresh)
    for tensor in stored:
        tensor.name = fresh[tensor.name]
    for node in constants:
        node.output[0] = fresh[node.output[0]]
    kept = [v for v in graph.input if v.name not in fresh]
    del graph.input[:]
    graph.input.extend(kept)
    graph.node.extend(helper.make_node("Identity", [inner], [name]) for name, inner in fresh.items())
    return True


def _state_conditions(graph: GraphProto) -> bool:
    """Give a Loop that runs a number of times the condition true, which its body reads and passes on.

    onnxscript writes a for loop without one, and TensorRT's parser knows the body's input by the Loop's.
    """
    without = [
        node
        for node in all_nodes(graph)
        if node.op_type == "Loop" and not node.domain and node.input and not any(node.input[1:2])
    ]
    if not without:
        return False
    true = numpy_helper.from_array(np.array(True), Names(tensor_names(graph)).fresh("true"))
    for node in without:
        node.input[1:2] = [true.name]
    graph.initializer.append(true)
    return True


def _leave_out_untrue(proto: ModelProto) -> bool:
    """Forget what is stated without a type, or is contradicted by inference; an output gets what is inferred then.

    An output of another type than its node makes is refused, as ONNX Runtime does.
    """
    stated = [*proto.graph.value_info, *proto.graph.output]
    if not any(v.type.HasField("tensor_type") for v in stated):
        return False
    shown = inferred(proto, stated=False)
    found = {v.name: v for v in (*shown.value_info, *shown.output)}
    untyped = {v.name for v in stated if v.type.HasField("tensor_type") and not v.type.tensor_type.elem_type}
    untrue = {v.name for v in stated if v.name in found and _contradict(v, found[v.name])} | untyped
    kept = [v for v in proto.graph.value_info if v.name not in untrue]
    changed = len(kept) < len(proto.graph.value_info)
    if changed:
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(kept)
    for value in proto.graph.output:
        if value.name in untrue:
            made = found.get(value.name, ValueInfoProto())
            says, makes = value.type.tensor_type.elem_type, made.type.tensor_type.elem_type
            if value.name in untyped and not makes:
                raise ModelError(
                    f"Cannot use this model: its output {value.name!r} has no type, and none can be inferred. Export "
                    "it again."
                )
            if says and says != makes:
                raise ModelError(
                    f"Cannot use this model: its output {value.name!r} is stated as {dtype_name(says)}, but it is made "
                    f"as {dtype_name(makes)}. Export it again."
                )
            value.CopyFrom(made)
            changed = True
    return changed


def _contradict(stated: ValueInfoProto, found: ValueInfoProto) -> bool:
    """Whether two statements about a tensor cannot both be true."""
    if not (stated.type.HasField("tensor_type") and found.type.HasField("tensor_type")):
        return stated.type.WhichOneof("value") not in (None, found.type.WhichOneof("value"))
    a, b = stated.type.tensor_type, found.type.tensor_type
    if a.elem_type and b.elem_type and a.elem_type != b.elem_type:
        return True
    if not (a.HasField("shape") and b.HasField("shape")):
        return False
    sizes = zip(a.shape.dim, b.shape.dim, strict=False)
    both = (d.dim_value != e.dim_value for d, e in sizes if d.HasField("dim_value") and e.HasField("dim_value"))
    return len(a.shape.dim) != len(b.shape.dim) or any(both)
