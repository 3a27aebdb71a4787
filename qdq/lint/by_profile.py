"""Rules for what the profile of a compiler says of a Q/DQ model, and nobody tried here: its facts carry their sources.

View with its profile -> findings where a fact does not hold, or is not known to. This module must not change a model.
"""

from __future__ import annotations

from functools import partial

from onnx import TensorProto

from engines.core.nodes import label
from qdq.core.formats import FORMATS
from qdq.lint.rule import Found, Rule, rule, weighted
from qdq.lint.view import View

RULES: list[Rule] = []
kernel = partial(rule, RULES, "kernel")
_MOVED = {"Sub": "shift", "Pad": "padding"}  # operator in front of a quantizer -> the fact that it is about


@kernel(
    "documents no such fusion: what stands in front of the quantizer may be a kernel of its own, and keep what made "
    "the tensor from writing codes",
    "Quantize the float model again for this compiler (qdq quantize --compiler), or without a shift (--no-shift).",
)
def _moved_data(view: View) -> Found:
    """A Sub or a Pad between a tensor and its quantizer."""
    for q in view.quantizers:
        maker = view.model.producer(q.node.input[0]) if q.is_q else None
        fact = view.profile.facts[_MOVED[maker.op_type]] if maker is not None and maker.op_type in _MOVED else None
        if maker is not None and fact is not None and not fact:
            yield q.node, f"{maker.op_type} {label(maker)} stands in front of it: {fact.says}."


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
