"""Whether values that a low float type cannot hold matter: what they are added to, and what their sum is for.

A constant operand -> the bias of a product, which makes ordinary values -> it does not matter
-> the epsilon of a divisor, a root or a logarithm -> it does
Probabilities of many positions -> the weights of a sum -> they do not. This module must not know ranges.
"""

from __future__ import annotations

from onnx import NodeProto

from engines.core.operators import CONTRACTIONS
from qdq.assemble.precision.positions import MOVES
from qdq.assemble.precision.sums import behind
from qdq.model.model import Model

SUMMED = CONTRACTIONS | {"DeformConv"}  # products whose sums make ordinary values again
_ENDS = ("Sqrt", "Log", "Reciprocal", "Pow")


def biases(model: Model, node: NodeProto, index: int) -> bool:
    """Whether a constant operand is the bias of a product, which is nothing beside the ordinary values that it makes.

    An epsilon is none: its values are all the same, or somebody divides by the sum.
    """
    values = model.array(node.input[index])
    if divides(model, node) or values.size < 2 or bool((values == values.flat[0]).all()):
        return False
    if node.op_type in SUMMED:
        return index == 2
    producer = model.producer(node.input[1 - index]) if node.op_type == "Add" else None
    while producer is not None and producer.op_type in MOVES:
        producer = model.producer(producer.input[0])
    return producer is not None and producer.op_type in SUMMED


def divides(model: Model, node: NodeProto) -> bool:
    """Whether somebody divides by what a node makes, perhaps moved, or takes its root or logarithm."""
    made = (name for near in behind(model, node, MOVES) for name in near.output)
    uses = (use for name in made for use in model.consumers(name))
    return any(u.node.op_type in _ENDS or (u.node.op_type == "Div" and u.index == 1) for u in uses)


def mixes(model: Model, tensor: str) -> bool:
    """Whether a tensor holds the probabilities of a Softmax, perhaps moved, and products alone read them.

    They add up to 1: however many positions share it, what FP16 rounds off each of n is at most n / 2^25 of the sum.
    """
    producer = model.producer(tensor)
    while producer is not None and producer.op_type in MOVES:
        producer = model.producer(producer.input[0])
    if producer is None or producer.op_type != "Softmax":
        return False
    made = {name for near in behind(model, producer, MOVES) for name in near.output}
    readers = {use.node.op_type for name in made for use in model.consumers(name)}
    return bool(readers) and readers <= CONTRACTIONS | MOVES and not any(map(model.is_output, made))
