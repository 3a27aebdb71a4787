"""Constants of a Q/DQ model as INT8 codes with zero point 0, or as floats: what `repair` does to weights and biases.

draft -> a constant DequantizeLinear that the rules flag -> new codes and scales, the old grid where INT8 can hold it.
Each function takes a refreshed draft, which needs another `refresh` afterwards, and must not touch the quantizers of
activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto, TensorProto, helper

from engines.core.nodes import attribute, label
from engines.core.operators import family
from engines.core.quantizers import Quantizer
from qdq.core.formats import FORMATS
from qdq.core.qtensor import QParams, representable, to_codes, weight_params
from qdq.lint.errors import gather_of_codes
from qdq.lint.repair.draft import RepairDraft
from qdq.lint.rule import FP8, smallest
from qdq.lint.view import dequantized, spread
from qdq.lint.warnings import unpaired

INT8 = FORMATS["int8"]
# Rules of `lint` that new codes or scales answer: on any quantizer, and on constants only.
OF_GRID = family(
    "asymmetric unsigned unsigned-codes no-zero-point code-type output-dtype scale-value scale-range zero-point-shape"
)
_OF_CODES = OF_GRID | family(
    "scale-shape block-shape odd-codes block-product weight-axis slow-weight float-weight scalar-codes"
)


def float_biases(draft: RepairDraft) -> None:
    """INT32 biases become floats."""
    for q in draft.view.heads:
        if "int32-bias" in draft.flagged(q.node) and q.stored:
            to_float(draft, q, ["int32-bias"])


def recode(draft: RepairDraft) -> None:
    """Flagged constants become INT8 codes with zero point 0 and positive scales along the output channels."""
    for q in draft.view.quantizers:
        if q.is_q or not q.constant or q.dtype in (*FP8, TensorProto.FLOAT4E2M1, TensorProto.INT32):
            continue
        rules = draft.flagged(q.node, q.source.node if q.source else None) & _OF_CODES
        if not rules:
            continue
        products = [(p, i) for p, i in draft.view.products_of(q) if p.node.op_type != "ConvTranspose"]
        axes = {p.operands[i].output_axis for p, i in products}
        axis = axes.pop() if len(axes) == 1 and draft.view.model.opset >= 13 else None
        if "slow-weight" in rules and q.dtype == TensorProto.INT4:
            _in_blocks(draft, q, axis)
            continue
        try:
            values = dequantized(draft.view, q, axis)
        except ValueError:
            continue
        if values.ndim == 0 or (values.size == 1 and not products):
            to_float(draft, q, sorted(rules))
            continue
        _store(draft, q, values, axis if products else None, sorted(rules))


def quantize_partners(draft: RepairDraft) -> None:
    """Float weights of products whose data are quantized become INT8 codes."""
    for product in draft.view.products:
        if "unpaired-activation" not in draft.flagged(product.node) or not unpaired(draft.view, product):
            continue
        weight = product.weight
        assert weight is not None
        values = draft.view.constant(weight.tensor)
        if values is None or values.dtype.name not in ("float32", "float16", "bfloat16") or values.ndim < 2:
            continue
        index = list(product.operands).index(weight)
        axis = weight.output_axis if weight.output_axis is not None else values.ndim - 1
        params = weight_params(values, axis=axis, fmt=INT8)
        name = weight.tensor
        inputs = [
            draft.init(name + "_codes", to_codes(values, params)),
            draft.init(name + "_scale", params.scale.astype(values.dtype)),
            draft.init(name + "_zero", np.zeros(params.scale.shape, np.int8)),
        ]
        out = draft.name(name + "_dequantized")
        title = draft.name(name + "_DequantizeLinear")
        node = helper.make_node("DequantizeLinear", inputs, [out], name=title, axis=axis)
        product.node.input[index] = out
        draft.proto.graph.node.insert(0, node)
        draft.log(["unpaired-activation"], product.node, f"weight stored as INT8, scales along axis {axis}")


def gather_floats(draft: RepairDraft) -> None:
    """The DequantizeLinear of gathered codes moves in front of its Gather, where its scales fit the rows of a table."""
    for q in draft.view.heads:
        gather = gather_of_codes(draft.view, q) if "gathered-codes" in draft.flagged(q.node) else None
        shape = None if gather is None else draft.view.shape(gather.input[0])
        if gather is None or shape is None or q.shape is None or attribute(gather, "axis", 0) != 0 or q.blocked:
            continue
        axis = q.axis - len(q.shape) + len(shape)  # of the table, whose last axes are those of what is gathered
        if q.vector and axis < 1:
            continue
        out = draft.name(gather.input[0] + "_dequantized")
        made = helper.make_node(
            "DequantizeLinear", [gather.input[0], *q.node.input[1:]], [out], draft.name(out + "_DQ")
        )
        if q.vector:
            made.attribute.append(helper.make_attribute("axis", axis))
        draft.proto.graph.node.insert(0, made)
        new = helper.make_node("Gather", [out, gather.input[1]], list(q.node.output), name=label(q.node))
        q.node.CopyFrom(new)
        draft.log(["gathered-codes"], gather, "its codes are dequantized in front of it")
        draft.refresh(always=True)


def to_float(draft: RepairDraft, q: Quantizer, rules: Sequence[str]) -> None:
    """Replace a constant DQ by a float constant, if its parts fit each other."""
    try:
        values = dequantized(draft.view, q)
    except ValueError:
        return
    draft.rewire(q.node.output[0], draft.init(q.node.output[0] + "_float", values.astype(_float_dtype(draft, q))))
    draft.log(rules, q.node, "constant kept in float")


def set_axis(node: NodeProto, axis: int | None) -> None:
    """Write the axis, and drop attributes that INT8 with a zero point does without."""
    dropped = ("axis", "block_size", *(["output_dtype"] if node.op_type == "QuantizeLinear" else []))
    for old in [a for a in node.attribute if a.name in dropped]:
        node.attribute.remove(old)
    if axis is not None:
        node.attribute.append(helper.make_attribute("axis", axis))


def _store(draft: RepairDraft, q: Quantizer, values: np.ndarray, axis: int | None, rules: Sequence[str]) -> None:
    """Write a constant as INT8 codes; the grid it has is kept where INT8 holds it."""
    dtype = _float_dtype(draft, q)
    params = _kept_grid(q, values, axis, dtype)
    exact = params is not None
    if params is None and axis is not None:
        params = weight_params(values.astype(dtype), axis=axis, fmt=INT8)
    if params is None:
        high = float(np.abs(values).max(initial=0.0)) / INT8.high
        params = QParams(scale=representable(high or 1.0, dtype.name))
    codes = to_codes(values.astype(np.float32), params)
    hint = (q.source or q).node.input[0]
    q.node.input[:] = [draft.init(hint + "_codes", codes), *draft.params(q.node, params.scale.astype(dtype))]
    set_axis(q.node, params.axis)
    along = f"along axis {params.axis}" if params.axis is not None else "for the tensor"
    draft.log(rules, q.node, f"stored as INT8, scales {along}, {'the same grid' if exact else 'requantized'}")


def _kept_grid(q: Quantizer, values: np.ndarray, axis: int | None, dtype: np.dtype[np.generic]) -> QParams | None:
    """The scales a constant has, if INT8 with zero point 0 can hold its values on them."""
    if q.scale is None or q.blocked or (q.vector and q.axis != axis and axis is not None):
        return None
    if not np.all(np.isfinite(q.scale.astype(np.float64))) or np.any(q.scale < 0):
        return None
    kept = None if not q.vector else q.axis
    if kept is not None and not (kept < values.ndim and values.shape[kept] == q.scale.size):
        return None
    scale = q.scale.astype(np.float64)
    alive = scale[scale >= smallest(q.scale)]
    fill = float(alive.max()) if alive.size else 1.0
    scale = np.where(scale >= smallest(q.scale), scale, fill).reshape(() if kept is None else (-1,))
    params = QParams(scale=representable(scale, dtype.name), axis=kept)
    codes = np.rint(values / spread(params.scale.astype(np.float64), kept or 0, values.shape))
    symmetric = q.dtype == TensorProto.INT8 and (q.zero is None or not np.any(q.zero))
    fits = codes.min(initial=0) >= INT8.low and codes.max(initial=0) <= INT8.high
    return params if fits or (q.source is not None and symmetric) else None  # its own Q clips in the same way


def _in_blocks(draft: RepairDraft, q: Quantizer, axis: int | None) -> None:
    """Repeat the scales of an INT4 weight along the summed axis, so that a weight-only kernel takes it; exact."""
    codes = draft.view.constant(q.node.input[0])
    if codes is None or codes.ndim != 2 or axis is None or q.scale is None:
        return
    if q.scale.size not in (1, codes.shape[axis]) or (q.vector and q.axis != axis) or draft.view.model.opset < 21:
        return
    summed, blocks = 1 - axis, draft.profile.blocks.get("int4", ())
    block = next((b for b in blocks if codes.shape[summed] % b == 0 and codes.shape[summed] > b), None)
    if block is None:  # one block is no block
        return
    shape = [0, 0]
    shape[axis], shape[summed] = codes.shape[axis], codes.shape[summed] // block
    scale = np.broadcast_to(q.scale.reshape((-1, 1) if axis == 0 else (1, -1)), shape)
    set_axis(q.node, summed)
    q.node.attribute.append(helper.make_attribute("block_size", block))
    zero = draft.init(q.node.input[1] + "_zero", np.zeros(shape, codes.dtype))
    q.node.input[:] = [q.node.input[0], draft.init(q.node.input[1] + "_blocks", scale), zero]
    draft.log(["slow-weight"], q.node, f"its scales repeated in blocks of {block}, the same values")


def _float_dtype(draft: RepairDraft, q: Quantizer) -> np.dtype[np.generic]:
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(draft.view.output_type(q) or TensorProto.FLOAT))
    return np.dtype(np.float32) if dtype == np.float64 else dtype
