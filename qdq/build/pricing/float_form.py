"""A Q/DQ model as the float model that it computes without rounding, and what of it is quantized.

Q/DQ model -> `FloatForm`: the graph without Q and DQ, the names of INT8 products, and of what reads codes beside them
Weights are codes as floats: no kernel depends on values. It must not compile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, helper

from engines.core.quantizers import LOW, QuantizedGraph, Quantizer, code_name, read_graph
from qdq.model.model import Model
from qdq.model.nodes import all_nodes, read_as
from qdq.passes.draft import Draft, assign


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatForm:
    """A Q/DQ model without its quantizers.

    Attributes:
        model: the float model; nodes have the names that they had.
        int8: products whose operands are both INT8.
        others: low type -> products that read it in another way than these.
        sharing: nodes that are no products and read what a DQ gives, such as the Add of a shortcut.
    """

    model: Model
    int8: frozenset[str]
    others: dict[str, frozenset[str]]
    sharing: frozenset[str]


def float_form(model: Model) -> FloatForm:
    """The float form of a model, of one without quantizers too."""
    graph = read_graph(model.proto, {})
    int8, others, products = set[str](), dict[str, set[str]](), set[str]()
    for _, product in graph.all_products():
        products.add(product.node.name)
        types = [code_name(operand.dtype) for operand in product.operands if operand.dtype]
        if types == ["int8", "int8"]:
            int8.add(product.node.name)
        for low in set(types) & LOW if types != ["int8", "int8"] else ():
            others.setdefault(low, set()).add(product.node.name)
    sharing = {name for inner in graph.all_graphs() for name in _sharing(inner)}
    return FloatForm(
        model=_without_quantizers(model, graph) if any(g.by_output for g in graph.all_graphs()) else model,
        int8=frozenset(int8),
        others={low: frozenset(nodes) for low, nodes in others.items()},
        sharing=frozenset(sharing - products),
    )


def _sharing(graph: QuantizedGraph) -> set[str]:
    """The nodes that read what a DQ of data gives, through what moves values."""
    given = {name for name, q in graph.by_output.items() if not q.is_q and not q.constant}
    found = set[str]()
    for node in graph.nodes:
        if given.isdisjoint(node.input):
            continue
        if node.op_type in graph.through:
            given.update(node.output)
        else:
            found.add(node.name)
    return found


def _without_quantizers(model: Model, graph: QuantizedGraph) -> Model:
    draft = Draft(model)
    known = {name: (inner, q) for inner in graph.all_graphs() for name, q in inner.by_output.items() if not q.is_q}
    for node in all_nodes(draft.graph):
        if node.op_type == "DequantizeLinear" and node.output[0] in known:
            _write_float(draft, node, *known[node.output[0]])
    same = {n.output[0]: n.input[0] for n in draft.graph.node if n.op_type == "Identity"}
    same = {new: _first(old, same) for new, old in same.items() if new not in draft.output_names}
    for node in draft.graph.node:
        read_as(node, same)
    return draft.finish()


def _write_float(draft: Draft, node: NodeProto, graph: QuantizedGraph, q: Quantizer) -> None:
    """Make a DQ an Identity, or where types differ a Cast, of what was quantized, or of codes as floats."""
    source, elem = q.source.node.input[0] if q.source else node.input[0], graph.output_type(q) or TensorProto.FLOAT
    if q.source is None and source in draft.tensors:
        values = draft.array(source).astype(np.float32)
        source = draft.unique(f"{source}_float")
        draft.put(source, values.astype(helper.tensor_dtype_to_np_dtype(elem)))
    cast = source not in draft.tensors and graph.elem(source) != elem
    node.op_type = "Cast" if cast else "Identity"
    node.input[:] = [source]
    assign(node.attribute, [helper.make_attribute("to", elem)] if cast else [])


def _first(name: str, same: dict[str, str]) -> str:
    while name in same:
        name = same[name]
    return name
