"""An asymmetric activation as a shift before a symmetric quantizer: the same codes, so nothing is lost.

Q with zero point z -> Sub c, Q with zero point 0, DQ; c = -z * scale. What reads it gets c back:

| reader | how |
|---|---|
| Conv, Gemm, MatMul with a constant weight | bias += c * sum(W), so that the product still multiplies integers |
| the same, padded Conv | Pad with 0 before the Sub, the Conv's own pads become 0; then as above |
| anything else | Add c behind the DQ |

UINT8 codes become INT8 codes by subtracting 128. Only rounding of float sums differs from the model as it was.
This module must not choose which quantizers to shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, helper

from engines.core.nodes import attribute_value, ints, label
from engines.core.quantizers import Product, Quantizer
from qdq.lint.repair.draft import RepairDraft
from qdq.lint.rule import EIGHT_BIT
from qdq.lint.view import View
from qdq.model.shift_correction import channel_sums, correct


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """A product whose operand `index` reads the shifted tensor, and the pads that must be made explicit."""

    product: Product
    index: int
    pads: tuple[int, ...]
    weight: np.ndarray


def shift(draft: RepairDraft, q: Quantizer, rules: Sequence[str]) -> bool:
    """Rewrite the QuantizeLinear of an activation and the DequantizeLinear nodes behind it, in a refreshed draft.

    False, and nothing is changed, where a reader cannot be corrected: then a wider scale must do.
    """
    view = draft.view
    readers = [d for d in view.quantizers if d.source is q]
    codes = view.model.consumers(q.node.output[0])
    if q.dtype not in EIGHT_BIT or q.scale is None or q.scale.size != 1 or not np.all(q.scale > 0):
        return False
    if (q.zero is not None and q.zero.size != 1) or len(codes) != len(readers) or view.model.opset < 11:
        return False
    if any(d in view.heads or view.model.is_output(d.node.output[0]) for d in readers):
        return False
    zero = (0 if q.zero is None else int(q.zero.ravel()[0])) - (128 if q.dtype == TensorProto.UINT8 else 0)
    elem = view.elem(q.node.input[0]) or view.elem(q.node.input[1])
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(elem))
    scale = q.scale.reshape(()).astype(np.float32 if q.scale.dtype == np.float64 else q.scale.dtype)
    found = _products(view, readers) if zero else []
    if found is None:
        return False
    offset = -zero * float(scale)
    names = draft.params(q.node, scale)
    nodes: list[NodeProto] = []

    def append(op: str, inputs: Sequence[str], hint: str) -> str:
        out = draft.name(hint)
        nodes.append(helper.make_node(op, list(inputs), [out], name=draft.name(f"{label(q.node)}_{op}")))
        return out

    made: dict[tuple[int, ...], str] = {}
    constant = draft.init(q.node.input[0] + "_offset", np.asarray(offset, dtype)) if zero else ""

    def value(pads: tuple[int, ...]) -> str:
        if pads not in made:
            source = q.node.input[0]
            if pads:
                half = len(pads) // 2
                amounts = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
                source = append("Pad", [source, draft.init(source + "_pads", amounts)], source + "_padded")
            if zero:
                source = append("Sub", [source, constant], source + "_shifted")
            coded = append("QuantizeLinear", [source, *names], source + "_codes")
            made[pads] = append("DequantizeLinear", [coded, *names], source + "_dequantized")
        return made[pads]

    for reader in found:
        reader.product.node.input[reader.index] = value(reader.pads)
        _correct(draft, reader, offset)
    corrected = {(id(r.product.node), r.index) for r in found}
    uses = [(id(u.node), u.index) for d in readers for u in view.model.consumers(d.node.output[0])]
    if not corrected.issuperset(uses):
        whole = append("Add", [value(()), constant], q.node.input[0] + "_unshifted") if zero else value(())
        for d in readers:
            draft.rewire(d.node.output[0], whole)
    place = next(i for i, n in enumerate(draft.proto.graph.node) if list(n.output) == list(q.node.output))
    for node in reversed(nodes):
        draft.proto.graph.node.insert(place, node)
    what = f"shifted by {offset:.6g} before it, {len(found)} products corrected" if zero else "the same grid"
    draft.log(rules, q.node, f"INT8, zero point 0: {what}")
    return True


def _products(view: View, readers: Sequence[Quantizer]) -> list[_Reader] | None:
    """The products that read a tensor directly; None if one of them cannot be corrected."""
    found = []
    for d in readers:
        for product, index in view.products_of(d):
            other = product.operands[1 - index]
            weight = view.constant(other.tensor) if other.constant else None
            node = product.node
            pads = tuple(ints(node, "pads", []))
            automatic = attribute_value(node, "auto_pad", b"") not in (b"NOTSET", b"VALID", b"")
            if product.operands[index].tensor != d.node.output[0] or weight is None or weight.ndim < 2 or automatic:
                return None
            right = index == 1 and (node.op_type != "MatMul" or weight.ndim != 2)
            if node.op_type == "ConvTranspose" or right:
                return None
            shown = pads if any(pads) else ()
            found.append(_Reader(product=product, index=index, pads=shown, weight=weight.astype(np.float64)))
    return found


def _correct(draft: RepairDraft, reader: _Reader, offset: float) -> None:
    """Add c * sum(W) to a product, and move its pads into the Pad in front of it."""
    node, other = reader.product.node, reader.product.operands[1 - reader.index]
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(other.elem or TensorProto.FLOAT))
    place = next(i for i, n in enumerate(draft.proto.graph.node) if n.output[:1] == node.output[:1])
    if reader.pads:
        next(a for a in node.attribute if a.name == "pads").ints[:] = [0] * len(reader.pads)
    added = correct(
        node,
        offset * channel_sums(node, reader.weight, 1 - reader.index),
        reader.weight.ndim,
        stored=draft.view.constant,
        constant=lambda name, values: draft.init(name, values.astype(dtype)),
        fresh=draft.name,
    )
    if added is not None:
        draft.proto.graph.node.insert(place + 1, added)
