"""Rules for what the profile of a compiler says of a Q/DQ model, and nobody tried here: its facts carry their sources.

View with its profile -> findings where a fact does not hold, or is not known to. This module must not change a model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from onnx import NodeProto, TensorProto

from engines.core.nodes import label
from engines.core.quantizers import Product, Quantizer
from qdq.core.formats import FORMATS
from qdq.lint.rule import Found, Rule, reader, rule, weighted
from qdq.lint.view import View

RULES: list[Rule] = []
kernel = partial(rule, RULES, "kernel")
MOST_STEPS = 255  # of a shift, as a zero point has
NEAR_STEP = 2e-3  # of a step, for an offset and a scale that are FP16


@kernel(
    "documents no such fusion: what stands in front of the quantizer may be a kernel of its own, and keep what made "
    "the tensor from writing codes",
    "Quantize the float model again for this compiler (qdq quantize --compiler), or without a shift (--no-shift).",
)
def _moved_data(view: View) -> Found:
    """A Sub of whole steps or a Pad of channels, put between a tensor and its quantizer by who quantized it."""
    for q in view.quantizers:
        maker = view.model.producer(q.node.input[0]) if q.is_q else None
        if maker is None or maker.op_type not in _ADDED:
            continue
        name, added = _ADDED[maker.op_type]
        fact = view.profile.facts[name]
        if not fact and added(view, q, maker):
            yield q.node, f"{maker.op_type} {label(maker)} stands in front of it: {fact.says}."


def _shifts(view: View, q: Quantizer, sub: NodeProto) -> bool:
    """Whether a Sub moves its data by whole steps of the quantizer, as a zero point would; a model's own does not."""
    offset = view.constant(sub.input[1])
    if offset is None or offset.size != 1 or q.scale is None or q.scale.size != 1 or not np.all(q.scale > 0):
        return False
    steps = float(offset.ravel()[0]) / float(q.scale.ravel()[0])
    return abs(steps) <= MOST_STEPS and abs(steps - round(steps)) <= NEAR_STEP * max(abs(steps), 1)


def _fills_channels(view: View, q: Quantizer, pad: NodeProto) -> bool:
    """Whether a Pad adds channels that products behind it have no weights for; a model's own do not."""
    pads, dq = view.constant(pad.input[1]) if len(pad.input) > 1 else None, reader(view, q)
    products = view.products_of(dq) if dq is not None else ()
    if pads is None or pads.size < 6 or not products:  # two axes in front of those of an image
        return False
    added = int(pads[pads.size // 2 + 1])
    return added > 0 and all(_without_weights(view, product, added) for product, _ in products)


def _without_weights(view: View, product: Product, channels: int) -> bool:
    dq = product.weight.dq if product.weight is not None else None
    codes = view.constant((dq.source or dq).node.input[0]) if dq is not None else None
    return codes is not None and codes.ndim > 2 and codes.shape[1] > channels and not np.any(codes[:, -channels:])


# operator in front of a quantizer -> the fact that it is about, and whether it was put there for the quantizer
_ADDED: dict[str, tuple[str, Callable[[View, Quantizer, NodeProto], bool]]] = {
    "Sub": ("shift", _shifts),
    "Pad": ("padding", _fills_channels),
}


@kernel(
    "documents other lengths: the product may run in float behind a kernel that dequantizes the weight",
    "Quantize the float model again for this compiler (qdq quantize --scheme int4 --compiler).",
)
def _block_length(view: View) -> Found:
    """INT4 blocks of a length that other compilers have kernels for, and this one is not known to."""
    lengths = view.profile.blocks.get("int4", ())
    for product, weight in weighted(view):
        q = weight.dq
        if q is None or q.dtype != TensorProto.INT4 or not q.blocked or q.scale is None or not q.shape:
            continue
        size = q.shape[q.axis] if 0 <= q.axis < len(q.shape) == q.scale.ndim else None
        length = size // max(q.scale.shape[q.axis], 1) if size else 0
        if length in FORMATS["int4"].blocks and length not in lengths:
            known = ", ".join(map(str, lengths)) or "none"
            yield q.node, f"Blocks of {length} in the weight of {label(product.node)}; {view.profile.title}: {known}."
