"""What to do about a model that a compiler of NVIDIA's refuses in words of its own parser: its limit, node and fix.

operators that the parser names, text of the builder, graph -> one sentence or two; "" where nothing is known.
Must not guess: each limit was met with TensorRT-RTX 1.7.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from engines.core.nodes import all_graphs, all_nodes, bodies, label
from engines.core.operators import SIZED_BY_VALUES, family

SEQUENCES = family(
    "ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength "
    "SequenceMap SplitToSequence"
)
SCOPES = "graphScope"  # what the builder says of conditions and loops


def about_operators(operators: Iterable[str]) -> str:
    """What to do about operators that are refused: of sequences, and those whose outputs have a size of data."""
    named = set(operators)
    said = []
    if sized := ", ".join(sorted(SIZED_BY_VALUES & named)):
        said.append(
            f"The size of what {sized} gives depends on data, for which the compiler has no kernel: let the graph end "
            "before it, with its inputs as outputs, and do it outside the engine."
        )
    if sequences := ", ".join(sorted(SEQUENCES & named)):
        said.append(
            f"The compiler has no sequences, which {sequences} makes or reads: let the model give their elements as "
            "outputs of their own, or one tensor of them (torch.stack, torch.cat), and export it again."
        )
    return " ".join(said)


def about_text(graph: GraphProto) -> str:
    """What to do about the first tensor of text that a graph holds."""
    makers = {name: node for node in all_nodes(graph) for name in node.output}
    for inner in all_graphs(graph):
        held = [t.name for t in inner.initializer if t.data_type == TensorProto.STRING]
        held += [node.output[0] for node in inner.node if any(map(_is_text, node.attribute))]
        infos = (*inner.input, *inner.output, *inner.value_info)
        held += [v.name for v in infos if v.type.tensor_type.elem_type == TensorProto.STRING]
        for name in held:
            readers = [node for node in all_nodes(graph) if name in node.input]
            where = "an output of the model"
            if readers:
                where = f"read by {readers[0].op_type} {label(readers[0])!r}"
            elif name in makers:
                where = f"made by {makers[name].op_type} {label(makers[name])!r}"
            return (
                f"The compiler has no text, and tensor {name!r}, {where}, is text: let the graph end before it, with "
                "the numbers that it is looked up by as an output, and look it up outside the engine."
            )
    return ""


def about_turns(said: str, graph: GraphProto) -> tuple[str, tuple[str, ...]]:
    """What to do where the builder fails on a Loop that slices at a place which the turn decides; the nodes of that."""
    if SCOPES not in said:
        return "", ()
    for loop, node in _computed_slices(graph):
        return (
            f"In the body of Loop {label(loop)!r}, Slice {label(node)!r} takes elements at a place that the turn "
            "decides, for which the compiler has no form: take one element a turn (x[t] or x[t:t+1]), or give the axis "
            "a fixed size that the parts divide.",
            (label(node),),
        )
    return "", ()


def _is_text(held: AttributeProto) -> bool:
    return bool(held.name == "value" and held.t.data_type == TensorProto.STRING)


def _computed_slices(graph: GraphProto) -> Iterator[tuple[NodeProto, NodeProto]]:
    """Each Slice in the body of a Loop whose bounds are computed there."""
    for loop in (node for node in all_nodes(graph) if node.op_type == "Loop"):
        for body in bodies(loop):
            made = {name for node in body.node if node.op_type != "Constant" for name in node.output}
            made.add(body.input[0].name)
            yield from ((loop, n) for n in body.node if n.op_type == "Slice" and not made.isdisjoint(n.input[1:3]))
