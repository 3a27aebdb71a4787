"""Which node a compiler refuses, where its message names none.

model, refusal -> beginnings of the model, compiled -> the shortest that is refused in the same words -> its last node
A beginning of half the nodes, then a quarter more or less: ten for a thousand nodes. Must not change a file, or go on
beyond its time: then it says between which nodes the answer lies.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto

from engines.core.errors import BuildError
from engines.core.files import Scratch
from engines.core.nodes import external_files, label, reads
from engines.core.shapes import inferred

WORDS = 100  # characters of two refusals that are compared: where they were raised, without the names that follow


def located(
    error: BuildError, proto: ModelProto, directory: Path, build: Callable[[Path], object], *, seconds: float
) -> BuildError:
    """The refusal with the node that it is about; the same one where that was not found.

    Args:
        error: what `build` raised for the whole model.
        proto: the model, without its external data, which lies in `directory`.
        directory: of the ONNX file.
        build: compiles a file, and raises BuildError.
        seconds: of compiling, after which the search ends.
    """
    began = time.monotonic()
    graph = inferred(proto)
    types = {v.name: v for v in (*graph.value_info, *graph.output)}
    nodes = list(proto.graph.node)
    taken, refused = 0, len(nodes)
    with Scratch() as folder:
        _link(proto, directory.absolute(), folder)
        while refused - taken > 1 and time.monotonic() - began < seconds:
            middle = (taken + refused) // 2
            path = folder / "beginning.onnx"
            onnx.save(_beginning(proto, middle, types), path)
            try:
                build(path)
                taken = middle
            except BuildError as other:
                if _words(other) != _words(error):
                    return error  # what was cut off changes what is refused
                refused = middle
    first, last = nodes[taken], nodes[refused - 1]
    if first is last:
        said = f"The model compiles up to {_called(last)}, and with that node it does not."
        return BuildError(f"{error} {said}", nodes=(label(last),))
    found = nodes[taken:refused]
    said = f"It is one of the {len(found)} nodes from {_called(first)} to {_called(last)}."
    return BuildError(f"{error} {said}", nodes=tuple(label(n) for n in found))


def _beginning(proto: ModelProto, count: int, types: dict[str, ValueInfoProto]) -> ModelProto:
    """The first nodes of a model; what they make and none of them reads are its outputs."""
    part = ModelProto()
    part.CopyFrom(proto)
    nodes = list(part.graph.node)[:count]
    read = {name for node in nodes for name in reads(node)}
    ends = [name for node in nodes for name in node.output if name and name not in read]
    del part.graph.node[count:]
    del part.graph.output[:]
    part.graph.output.extend(types.get(name, ValueInfoProto(name=name)) for name in ends)
    for tensors in (part.graph.initializer, part.graph.input):
        kept = [t for t in tensors if t.name in read]
        del tensors[:]
        tensors.extend(kept)
    return part


def _link(proto: ModelProto, source: Path, folder: Path) -> None:
    """Make the external data of a model found from another folder."""
    for place in external_files(proto):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).symlink_to(source / place)


def _words(error: BuildError) -> str:
    """A refusal without the names and numbers in it."""
    return re.sub(r"\d+", "", str(error))[:WORDS]


def _called(node: NodeProto) -> str:
    return f"{node.op_type} {label(node)!r}"


def nothing_named(error: BuildError) -> bool:
    """Whether a search may help: the compiler's own refusal, without a node."""
    return not error.nodes and str(error).startswith(("The engine builder failed", "The ONNX parser refused"))
