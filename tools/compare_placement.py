"""Where qdq's placement for TensorRT differs from NVIDIA Model Optimizer's own file, node by node, each with its rules.

    python tools/peer_modelopt.py MODEL.onnx DATA.npz PEER.onnx        in Model Optimizer's environment
    python tools/compare_placement.py MODEL.onnx PEER.onnx [--compiler tensorrt:10.16]

The rules of placement see no data, so qdq needs none here. An operand counts as quantized where a DequantizeLinear
feeds it. Equal differences with equal reasons stand together, with every node that they are about. Exit code 1: there
is a difference that no documented rule of Model Optimizer explains.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper
from results import record

from engines.core.nodes import attribute, input_axis, ints, weight_axis
from engines.core.operators import MEAN_POOLS, MOVERS
from qdq.model.model import Model
from qdq.passes.prepare import load_float
from qdq.passes.rewrites import rewritten
from qdq.plan.placement import plan
from qdq.plan.plan import Plan
from qdq.plan.rules.tensorrt import backbone
from qdq.plan.settings import Settings

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
LISTED = ("BatchNormalization", "Clip", "HardSwish", "LRN")
NARROW = 16
FROM = MOVERS | {"Cast"}
Operand = tuple[str, int]  # node, index of the operand


@dataclass(frozen=True, slots=True)
class Peer:
    """What a Q/DQ file quantizes: operand -> scale, None where it is no single number.

    A node counts by its name and by its first output: passes may change either.
    """

    operands: Mapping[Operand, float | None]

    def scale(self, node: NodeProto, index: int) -> float | None:
        """The scale that an operand is read with."""
        return self.operands.get((node.name, index), self.operands.get((node.output[0], index)))

    def has(self, node: NodeProto, index: int) -> bool:
        """Whether an operand is quantized."""
        return (node.name, index) in self.operands or (node.output[0], index) in self.operands

    @classmethod
    def read(cls, path: Path) -> Peer:
        """Of a file; quantizers may have a Cast beside them."""
        graph = onnx.load(path).graph
        made = {name: node for node in graph.node for name in node.output}
        stored = {t.name: t for t in graph.initializer}
        found: dict[Operand, float | None] = {}
        for node in graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                continue
            for index, name in enumerate(node.input):
                before = made.get(name)
                while before is not None and before.op_type == "Cast":
                    before = made.get(before.input[0])
                if before is None or before.op_type != "DequantizeLinear":
                    continue
                scale = stored.get(before.input[1]) or _constant(made.get(before.input[1]))
                values = None if scale is None else numpy_helper.to_array(scale)
                one = float(values.reshape(-1)[0]) if values is not None and values.size == 1 else None
                found[node.output[0], index] = found[node.name, index] = one
        return cls(found)


def _constant(node: NodeProto | None) -> onnx.TensorProto | None:
    return (
        next((a.t for a in node.attribute if a.name == "value"), None) if node and node.op_type == "Constant" else None
    )


def theirs(model: Model, peer: Peer, node: NodeProto, index: int) -> str:
    """The documented rule of Model Optimizer by which an operand is quantized or not; "" where none is known."""
    quantized = peer.has(node, index)
    computed = [name for name in node.input if name and not model.is_constant(name)]
    weight = model.info(node.input[1]) if len(node.input) > 1 else None
    shape = [n for n in (weight.shape or ()) if isinstance(n, int)] if weight else []
    if quantized:
        if node.op_type in ("Gemm", "MatMul") and len(computed) > 1:
            return "attention is quantized up to 512 tokens, unless a computed mask is added before its Softmax"
        if node.op_type in WEIGHTED:
            return "a region starts at every convolution, transposed convolution and product"
        shared = [use for use in model.consumers(node.input[index]) if use.node.op_type in WEIGHTED]
        if any(peer.has(use.node, use.index) for use in shared):
            return "one pair of Q and DQ a tensor, which all its readers share"
        if node.op_type == "Add" and any(backbone(model, name) for name in node.input):
            return "of a sum the input that is not in the region of the main path is quantized"
        if node.op_type == "Add":
            return "a sum that heads a pointwise region behind the region of a product reads quantized"
        if node.op_type == "Mul":
            return "a product of two computed tensors that is no SiLU is quantized where regions make its inputs"
        if node.op_type in MEAN_POOLS or node.op_type == "MaxPool":
            return "a pool is quantized beside a quantized producer or reader"
        if node.op_type in ("Resize", "Upsample"):
            return "an interpolation directly behind a region reads quantized"
        if node.op_type == "LayerNormalization":
            return "a LayerNormalization behind a convolution's region reads quantized"
        return "its type is in the list of those that are quantized" if node.op_type in LISTED else ""
    if node.op_type in ("Gemm", "MatMul"):
        sizes = [shape[axis(node, len(shape))] for axis in (input_axis, weight_axis)] if len(shape) > 1 else [NARROW]
        if min(sizes) < NARROW:
            return "products of fewer than 16 summands or outputs are excluded"
        if (model.rank(node.output[0]) or 0) < 3:
            return "a matrix times a vector in its run of the first sample (an open batch is 1 there) is excluded"
        return ""
    if node.op_type == "Conv" and shape and min(shape[:2]) < NARROW:
        kind = f"{attribute(node, 'group', 1)} groups, kernel {ints(node, 'kernel_shape', shape[2:])}"
        return f"convolutions of few channels ({shape[1]} in, {shape[0]} out, {kind}) are excluded"
    if node.op_type not in WEIGHTED and any(model.is_output(name) for name in node.output):
        return "nodes that give outputs stay float"
    if node.op_type == "Add":
        one = [backbone(model, name) for name in node.input]
        if one[0] is one[1]:
            return "a sum with no convolution of its own behind one of its inputs is no residual block"
        return "an input whose producer is in no region stays float unless another quantized node reads it"
    if node.op_type in MEAN_POOLS:
        return "a pool without a quantized neighbour stays float"
    return "only sums and products of two computed tensors at the head of a region are" if node.op_type == "Mul" else ""


def ours(model: Model, made: Plan, node: NodeProto, index: int) -> str:
    """Why the plan quantizes an operand, or does not."""
    consumer = f"{node.name}:{index}"
    point = next((p for p in made.points if consumer in p.consumers), None)
    if point is not None:
        return f"rule {point.rule}" + (f": {point.reason}" if point.reason else "")
    skip = next((s for s in made.skips if s.node == node.name), None)
    if node.op_type in ("MaxPool", *FROM):
        return "Q and DQ of its reader move through it"
    if (
        node.op_type == "Add"
        and node.name not in made.quantized_nodes
        and skip is not None
        and skip.rule != "no_weight"
    ):
        return "the main path: Q and DQ in front of the Add would keep it out of the convolution's kernel"
    if node.op_type == "Add" and any(backbone(model, name) for name in node.input):
        return (
            "nothing quantized reads the sum, so the convolution writes floats and would need a kernel for the shortcut"
        )
    if node.op_type in ("Add", "Mul"):
        return "nothing else reads it quantized: what INT8 would save here is a small or unknown part of the traffic"
    return f"rule {skip.rule}: {skip.reason}" if skip is not None else ""


def main() -> None:
    """Print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("peer", type=Path)
    parser.add_argument("--compiler", default="tensorrt")
    parser.add_argument("--names", type=int, default=1000, help="most nodes to name per reason")
    options = parser.parse_args()
    model, peer = load_float(options.model), Peer.read(options.peer)
    made = plan(model, Settings(compiler=options.compiler))
    model = rewritten(model, made.rewrites)
    mine = {use for point in made.points for use in point.uses}
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    same = unknown = 0
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            here, there = (node.name, index) in mine, peer.has(node, index)
            if not name or here == there:
                same += here
                continue
            rule = theirs(model, peer, node, index)
            unknown += not rule
            what = f"{node.op_type}'s {'weight' if model.is_constant(name) else 'data'}"
            reasons = (ours(model, made, node, index), rule or "no documented rule is known")
            grouped.setdefault((what, "qdq" if here else "Model Optimizer", *reasons), []).append(
                f"{node.name}:{index}"
            )
    weights = {name for point in made.weights for name, _ in point.uses}
    of_them = {n.name for n in model.graph.node if n.op_type in WEIGHTED and peer.has(n, 1)}
    differ = sum(map(len, grouped.values()))
    print(
        f"{options.model.name}: {len(weights)} weighted nodes quantized by qdq, {len(of_them)} by Model Optimizer, ",
        end="",
    )
    print(
        f"{len(weights & of_them)} by both; {same} operands alike, {differ} different, {unknown} of them unexplained\n"
    )
    print(
        "| operand | quantized by | nodes | why qdq does as it does | Model Optimizer's rule |\n|---|---|---|---|---|"
    )
    for (what, who, reason, rule), names in grouped.items():
        shown = f"{len(names)}: {', '.join(names[: options.names])}" + (", ..." if len(names) > options.names else "")
        print(f"| {what} | {who} | {shown} | {reason} | {rule} |")
    print()
    for line in _scales(model, made, peer):
        print(line)
    if unknown:
        sys.exit(1)


def _scales(model: Model, made: Plan, peer: Peer) -> list[str]:
    """Of every Concat and MaxPool with several quantized tensors around it: whether they share a scale."""
    ties = {p.tensor: p.tie or p.tensor for p in made.activations}
    read = ((name, peer.scale(node, i)) for node in model.graph.node for i, name in enumerate(node.input))
    scales = {name: scale for name, scale in read if scale is not None}
    lines = []
    for node in model.graph.node:
        if node.op_type not in ("Concat", "MaxPool"):
            continue
        around = [node.output[0], *(node.input if node.op_type == "Concat" else node.input[:1])]
        own, found = [ties[t] for t in around if t in ties], [scales[t] for t in around if t in scales]
        if len(own) > 1 or len(found) > 1:
            equal = "one scale" if found and np.ptp(found) <= 1e-6 * max(found) else f"{len(set(found))} scales"
            lines.append(
                f"{node.op_type} {node.name}: qdq ties {len(own)} tensors to {len(set(own))} scale(s), as far as "
                f"their ranges are alike; Model Optimizer quantizes {len(found)} with {equal}"
            )
    return lines


if __name__ == "__main__":
    record(main)
