"""Names of a file that torch wrote: nodes by the modules that they are of, open sizes as asked, no places of a machine.

ONNX graph -> `renamed` -> the same graph, changed in place: "/layer1/0/conv1/Conv" with its output
"/layer1/0/conv1/Conv_output_0", whichever exporter wrote it. Must not touch weights, inputs or outputs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence

from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

from engines.core.nodes import all_graphs
from qdq.frontend.pytorch.flat import INNER

_SCOPES = "pkg.torch.onnx.name_scopes"
_WORD = re.compile(r"[A-Za-z_]\w*")


def renamed(proto: ModelProto, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Rename, and remove what tells of the machine.

    Args:
        proto: of torch; external data need not be loaded.
        axes: input name -> axis -> name of an open size.
    """
    graphs = list(all_graphs(proto.graph))
    fixed = {v.name for v in (*proto.graph.output, *(v for graph in graphs for v in graph.input))} | {""}
    names: dict[str, str] = {}
    taken: set[str] = set(fixed)
    for graph in graphs:
        for tensor in (t for t in graph.initializer if t.name not in fixed):
            names[tensor.name] = _free(tensor.name.removeprefix(f"{INNER}."), taken)
    for graph in graphs:
        for node in graph.node:
            node.name = _free(_path(node), taken)
            for i, output in enumerate(node.output):
                if output not in fixed:
                    names[output] = _free(f"{node.name}_output_{i}", taken)
            del node.metadata_props[:]
            node.doc_string = ""
    for graph in graphs:
        _rename_in(graph, names)
    _open_sizes(graphs, axes)
    del proto.metadata_props[:]
    proto.doc_string = ""


def _rename_in(graph: GraphProto, names: Mapping[str, str]) -> None:
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
        tensor.doc_string = ""
    for node in graph.node:
        for part in (node.input, node.output):
            part[:] = [names.get(name, name) for name in part]
    for info in (*graph.input, *graph.output, *graph.value_info):
        info.name = names.get(info.name, info.name)
        info.doc_string = ""
        del info.metadata_props[:]
    del graph.metadata_props[:]
    graph.doc_string = ""


def _path(node: NodeProto) -> str:
    """The name of a node: the module's path with slashes, then its operator."""
    scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), "")
    if scopes:
        inner = [s for s in _listed(scopes)[:-1] if s]
        words = inner[-1].split(".") if inner else []
    elif node.name.startswith("/"):  # of the other exporter: /layer1/layer1.0/conv1/Conv
        given = node.name.split("/")[1:-1]
        before = ["", *given]
        words = [w.removeprefix(f"{b}.") for b, w in zip(before, given, strict=False)]
    else:
        words = []
    if words[:1] == [INNER]:
        words = words[1:]
    return "/".join(("", *words, node.op_type))


def _listed(text: str) -> list[str]:
    try:
        found = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return []
    return [str(word) for word in found] if isinstance(found, list) else []


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number behind it where it is taken; it is taken from now on."""
    free, number = name, 0
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free


def _open_sizes(graphs: Sequence[GraphProto], axes: Mapping[str, Mapping[int, str]]) -> None:
    """Call open sizes as asked, everywhere; one that nobody named by its input and axis."""
    words: dict[str, str] = {}
    for info in graphs[0].input:
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if dim.dim_param and dim.dim_param not in words:
                asked = axes.get(info.name, {}).get(axis)
                words[dim.dim_param] = asked or _free(
                    "batch" if axis == 0 else f"{info.name}_{axis}", set(words.values())
                )
    for info in _infos(graphs):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = _WORD.sub(lambda found: words.get(found[0], found[0]), dim.dim_param)


def _infos(graphs: Sequence[GraphProto]) -> Iterator[ValueInfoProto]:
    for graph in graphs:
        yield from (*graph.input, *graph.output, *graph.value_info)
