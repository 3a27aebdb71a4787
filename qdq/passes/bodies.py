"""Bring the bodies of If, Loop and Scan into a form in which later passes see what they hold.

    name_bodies     every node and tensor in a body has a name that nothing else in the model has
    lift_bodies     weights of bodies, and what is computed of them alone -> the main graph, where bodies read it
    take_branches   an If whose condition is constant -> the nodes of its branch
    simplify_bodies what folds a graph -> done to bodies as well
    show_bodies     the shapes that inference found inside bodies -> the bodies

It must not change what a body computes, nor unroll: TensorRT-RTX 1.7.1 does so by itself with Scan of static length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from qdq.model.model import Model
from qdq.model.nodes import (
    WEIGHTED,
    Names,
    all_graphs,
    all_nodes,
    bodies,
    captured,
    constant_tensor,
    controls,
    without_initializers,
)
from qdq.passes.draft import Draft, assign
from qdq.passes.fold import why_kept

_READERS = WEIGHTED
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def name_bodies(draft: Draft) -> None:
    """Give the nodes and tensors in all bodies names of their own; sibling bodies often share theirs."""
    held = [node for node in draft.graph.node if any(True for _ in bodies(node))]
    if not held:
        return
    main = draft.graph
    tensors = Names([*draft.tensors, *(v.name for v in main.input), *(t for n in main.node for t in n.output)])
    nodes = Names(node.name for node in main.node)
    for body in (body for node in held for body in bodies(node)):
        _rename(body, {}, tensors, nodes)


def _rename(body: GraphProto, around: Mapping[str, str], tensors: Names, nodes: Names) -> None:
    """Rename what a body defines; `around` has the new names of what the bodies around it define."""
    defined = [v.name for v in body.input] + [t.name for t in body.initializer]
    defined += [name for node in body.node for name in node.output if name]
    del body.value_info[:]  # as `Draft.light` has it: inference finds all of it that is right
    scope = {**around, **{name: tensors.fresh(name) for name in dict.fromkeys(defined)}}
    for value in (*body.input, *body.output, *body.initializer):
        value.name = scope.get(value.name, value.name)
    for node in body.node:
        node.name = nodes.fresh(node.name or node.op_type)
        node.input[:] = [scope.get(name, name) for name in node.input]
        node.output[:] = [scope.get(name, name) for name in node.output]
        for inner in bodies(node):
            _rename(inner, scope, tensors, nodes)


def lift_bodies(draft: Draft) -> bool:
    """Move weights of bodies, and what is computed of them alone, to the main graph; True if there were any.

    Other constants stay: onnx's shape inference sees the values of those in a body only.
    """
    weights = {name for name, tensor in draft.tensors.items() if _is_weight(tensor)}
    known, moved = set(draft.tensors), list[NodeProto]()
    before = len(known)
    for body in _controlled(draft):
        given = {v.name for v in (*body.input, *body.output)}
        held = {t.name: t for t in body.initializer}
        held |= {node.output[0]: t for node in body.node if (t := constant_tensor(node)) is not None}
        read = {name for node in body.node if node.op_type in _READERS for name in node.input[1:]}
        leaving = {name for name, t in held.items() if name not in given and (_is_weight(t) or name in read)}
        for node in body.node:
            weighty = any(name in weights or name in leaving for name in node.input[:1])
            constant = all(name in known or (name in held and name not in given) for name in filter(None, node.input))
            movable = not why_kept(node.op_type, node.domain) and given.isdisjoint(node.output)
            if weighty and constant and movable:
                moved.append(NodeProto.FromString(node.SerializeToString()))
                leaving |= {*node.output, *(held.keys() & set(node.input))}
                known |= {*node.output}
        draft.tensors |= {n: TensorProto.FromString(held[n].SerializeToString()) for n in leaving & held.keys()}
        known |= leaving
        weights |= leaving
        assign(body.node, [node for node in body.node if leaving.isdisjoint(node.output)])
        assign(body.initializer, [t for t in body.initializer if t.name not in leaving])
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in draft.graph.node]
    assign(draft.graph.node, [*moved, *nodes])
    return len(known) > before


def _is_weight(tensor: TensorProto) -> bool:
    """Whether a constant is a weight: a float of several axes."""
    return tensor.data_type in _FLOATS and len(tensor.dims) > 1


def take_branches(draft: Draft) -> bool:
    """Put the nodes of the branch in place of each If of a graph whose condition is constant; True if there was one."""
    for graph in (draft.graph, *_controlled(draft)):
        branches = [(node, _branch(draft, node)) for node in graph.node]
        if any(branch is not None for _, branch in branches):
            assign(graph.node, [new for node, branch in branches for new in _taken(draft, node, branch)])
            draft.lift_constants()
            return True
    return False


def _taken(draft: Draft, node: NodeProto, branch: GraphProto | None) -> Iterator[NodeProto]:
    """Copies of the nodes that stand for a node, which is an If where there is a branch."""
    for kept in [node] if branch is None else branch.node:
        yield NodeProto.FromString(kept.SerializeToString())
    if branch is not None:
        draft.tensors.update((t.name, TensorProto.FromString(t.SerializeToString())) for t in branch.initializer)
        for end, name in zip(branch.output, node.output, strict=False):
            if name:
                yield helper.make_node("Identity", [end.name], [name], name=f"{node.name}_{name}")


def _branch(draft: Draft, node: NodeProto) -> GraphProto | None:
    """The branch that an If takes whatever the inputs are; None where that is not known."""
    if node.op_type != "If" or node.domain or node.input[0] not in draft.tensors:
        return None
    wanted = "then_branch" if draft.array(node.input[0]).any() else "else_branch"
    branches: list[GraphProto] = [a.g for a in node.attribute if a.name == wanted]
    return branches[0]


def show_bodies(draft: Draft) -> None:
    """Write into bodies the types and shapes of their tensors, as last inferred.

    Not of outputs: what a body states of these twice makes onnx's strict inference lose their types.
    """
    shown = {tuple(node.output): node for node in all_nodes(draft.shown.graph) if node.output}
    for node in all_nodes(draft.graph):
        for body, found in zip(bodies(node), bodies(shown.get(tuple(node.output), node)), strict=False):
            if body is not found:
                ends = {value.name for value in body.output}
                assign(body.value_info, [value for value in found.value_info if value.name not in ends])


def simplify_bodies(draft: Draft, simplify: Callable[[Draft], None]) -> bool:
    """Do to each body of the main graph what is done to the graph itself; True if that changed one.

    A body is a model of its own, whose inputs are the tensors that it reads from around it too. Sizes that a Loop or
    Scan states of what it carries are not believed: they may have been written before a size became open.
    """
    changed = False
    for node in filter(controls, draft.graph.node):
        for body in bodies(node):
            inner = _inner_draft(draft, body)
            if inner is None:
                continue
            before = body.SerializeToString(deterministic=True)
            simplify(inner)
            assign(body.node, list(inner.graph.node))
            assign(body.initializer, [t for name, t in inner.tensors.items() if name not in draft.tensors])
            changed = changed or body.SerializeToString(deterministic=True) != before
    return changed


def _inner_draft(draft: Draft, body: GraphProto) -> Draft | None:
    """A body as a model; None where the type of something that it reads is not known."""
    own = NodeProto(attribute=[AttributeProto(name="body", type=AttributeProto.GRAPH, g=body)])
    around = captured(own)
    shown = {v.name: v for g in (draft.shown.graph,) for v in (*g.value_info, *g.output, *g.input)}
    read = sorted(around - draft.tensors.keys())
    if any(name not in shown for name in read) or not all(v.type.WhichOneof("value") for v in body.input):
        return None
    proto = ModelProto()
    proto.CopyFrom(without_initializers(draft.proto))
    proto.graph.CopyFrom(GraphProto(name=body.name, node=body.node, input=body.input, output=body.output))
    for dim in (d for v in proto.graph.input for d in v.type.tensor_type.shape.dim):
        dim.Clear()
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    proto.graph.input.extend(shown[name] for name in read)
    proto.graph.initializer.extend([*body.initializer, *(draft.tensors[name] for name in sorted(around - {*read}))])
    return Draft(Model(proto=proto, directory=draft.directory, sha256=""), taken=draft.names())


def _controlled(draft: Draft) -> Iterator[GraphProto]:
    """The bodies of If, Loop and Scan, and those in them; bodies of other operators are theirs alone."""
    held = [body for node in draft.graph.node if controls(node) for body in bodies(node)]
    return (graph for body in held for graph in all_graphs(body))
