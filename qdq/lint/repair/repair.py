"""Repair a Q/DQ model for TensorRT without data: what can be derived from the scales and codes that it holds.

Model -> rounds of passes, each led by what the rules of `lint` find -> Repaired: model, changes, findings left.
Codes become INT8 with zero point 0. The grid stays as it is where INT8 can hold it: weights whose codes fit, and
activations of 8 bits by a shift in front of them (see `shifting`). Elsewhere a weight is quantized again from what it
stands for, and an activation gets the smallest symmetric scale that covers its range. A quantizer that began at 0 may
be all that is left of a Relu or Clip (ONNX Runtime drops them), so where it goes its limits stay. This module must not
measure anything, nor touch the user's proto.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from engines.backends.profile import Profile
from engines.core.nodes import attribute, attribute_value, label
from engines.core.operators import ARRANGERS, MOVERS, POOLS
from engines.core.quantizers import Quantizer
from qdq.core.formats import FORMATS
from qdq.core.qtensor import representable
from qdq.lint.errors import mistyped
from qdq.lint.lint import Finding, lint, profile_for
from qdq.lint.repair.draft import Change, RepairDraft
from qdq.lint.repair.integer_operators import write_floats
from qdq.lint.repair.recode import OF_GRID, float_biases, gather_floats, quantize_partners, recode, set_axis, to_float
from qdq.lint.repair.shift import shift
from qdq.lint.rule import EIGHT_BIT, FP8, smallest
from qdq.lint.view import View
from qdq.lint.warnings import attention_quantizers, needless, transposed_quantizers
from qdq.model.model import Model

INT8 = FORMATS["int8"]
ROUNDS = 4  # a repair can uncover another fault of the same node
_CODE_READERS = ARRANGERS | {"DequantizeLinear", "MaxPool"}  # they give codes on as codes
_OF_ACTIVATION = OF_GRID | {"activation-axis", "one-element-scale"}
_SHIFTED = frozenset(("asymmetric", "unsigned", "no-zero-point", "output-dtype"))  # a grid that INT8 can hold, shifted
_RESCALED = frozenset(("code-type", "scale-value", "scale-range"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Repaired:
    """The repaired model, what was changed, and what the rules still find."""

    model: Model
    changes: tuple[Change, ...]
    left: tuple[Finding, ...]


def repair(model: Model, profile: Profile | None = None) -> Repaired:
    """Repair what needs no data, in a copy with the same inputs and outputs. Without changes it is the model given.

    `profile` is of the compiler that it is repaired for, None as `lint.profile_for`.

    Raises:
        ModelError: external data of the model cannot be read.
    """
    profile = profile or profile_for(model)
    draft = RepairDraft(model, profile)
    for _ in range(ROUNDS):
        before = len(draft.changes)
        for step in _steps():
            draft.refresh()
            step(draft)
            draft.sweep()
        if len(draft.changes) == before:
            break
    if not draft.changes:
        return Repaired(model=model, changes=(), left=tuple(lint(model, profile)))
    del draft.proto.graph.value_info[:]  # types of codes have changed
    repaired = model.replace(draft.proto)
    return Repaired(model=repaired, changes=tuple(draft.changes), left=tuple(lint(repaired, profile)))


def _steps() -> tuple[Callable[[RepairDraft], None], ...]:
    first = write_floats, gather_floats, float_biases, _outputs, _float_readers, _transposed, _attention
    return *first, _scale_types, recode, quantize_partners, _activations, _axes


def _limits(dtype: int) -> tuple[int, int]:
    """Smallest and largest code of an integer type."""
    np_dtype = np.dtype(helper.tensor_dtype_to_np_dtype(dtype))
    info = np.iinfo(np_dtype) if np_dtype.kind in "iu" else ml_dtypes.iinfo(np_dtype)  # type: ignore[no-untyped-call]
    return int(info.min), int(info.max)


def _outputs(draft: RepairDraft) -> None:
    for q in draft.view.quantizers:
        out = q.node.output[0]
        if q.source is None or "output" not in draft.flagged(q.source.node) or not draft.view.model.is_output(out):
            continue
        tensor = _unquantized(draft, q.source)
        draft.log(["output"], q.source.node, f"Q/DQ before output {out!r} removed")
        draft.refresh()
        producer = draft.view.model.producer(tensor)
        draft.proto.graph.node.remove(q.node)
        if producer is None or draft.view.model.is_output(tensor):
            name = draft.name(out + "_Identity")
            draft.proto.graph.node.append(helper.make_node("Identity", [tensor], [out], name=name))
        else:
            draft.rewire(tensor, out)
            producer.output[list(producer.output).index(tensor)] = out
        draft.refresh(always=True)
        return _outputs(draft)


def _float_readers(draft: RepairDraft) -> None:
    for q in draft.view.quantizers:
        if q.source is not None and needless(draft.view, q):
            draft.log(["before-float"], q.source.node, "Q/DQ before float operators removed")
            draft.rewire(q.node.output[0], _unquantized(draft, q.source))


def _transposed(draft: RepairDraft) -> None:
    for product in draft.view.products:
        if "transposed" not in draft.flagged(product.node):
            continue
        for q in transposed_quantizers(draft.view, product):
            if q.constant:
                to_float(draft, q, ["transposed"])
            elif q.source is not None and q.node.output[0] in product.node.input:
                draft.log(["transposed"], product.node, f"Q/DQ on its data {q.source.node.input[0]!r} removed")
                index = list(product.node.input).index(q.node.output[0])
                product.node.input[index] = _unquantized(draft, q.source)


def _attention(draft: RepairDraft) -> None:
    products = [p for p in draft.view.products if attention_quantizers(draft.view, p)]
    for product in products:
        for q in attention_quantizers(draft.view, product):
            if q.source is not None and all(p in products for p, _ in draft.view.products_of(q)):
                draft.log(["attention"], product.node, f"Q/DQ on {q.source.node.input[0]!r} removed")
                draft.rewire(q.node.output[0], _unquantized(draft, q.source))


def _scale_types(draft: RepairDraft) -> None:
    for product in draft.view.products:
        for q in mistyped(draft.view, product):
            if "scale-type" not in draft.flagged(q.node) or q.scale is None or attribute(q.node, "output_dtype", 0):
                continue
            other = next(o for o in product.operands if o.dq is not q)
            wanted = draft.view.elem(q.source.node.input[0]) if q.source else other.elem
            if other.dq is not None and other.dq.source is not None:
                wanted = draft.view.elem(other.dq.source.node.input[0])
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(wanted))
            scale = representable(q.scale, dtype.name).astype(dtype)
            name = draft.init(q.node.input[1] + "_" + dtype.name, scale)
            for node in (q.node, *([q.source.node] if q.source else [])):
                node.input[1] = name
            draft.log(["scale-type"], q.node, f"scale stored as {dtype.name}")


def _activations(draft: RepairDraft) -> None:
    """Activations: one INT8 scale that covers the old range."""
    for q in draft.view.heads:
        rules = draft.flagged(q.node) & _OF_ACTIVATION
        model = draft.view.model
        if q.constant or not rules or q.scale is None or q.computed_zero:
            continue
        if q.dtype in (*FP8, TensorProto.FLOAT4E2M1, TensorProto.INT32, 0) and rules != {"activation-axis"}:
            continue
        if not q.is_q and model.producer(q.node.input[0]) is None:
            continue  # codes that the caller feeds: their type is part of the interface
        codes = q.node.output[0]
        others = any(u.node.op_type not in _CODE_READERS for u in model.consumers(codes))
        if q.is_q and (model.is_output(codes) or others):
            continue
        if (scale := _covering(q)) is None:
            continue
        dtype = np.dtype(np.float32) if q.scale.dtype == np.float64 else q.scale.dtype
        if q.is_q and rules & _SHIFTED and not rules & _RESCALED and shift(draft, q, sorted(rules)):
            continue
        if q.is_q and _starts_at_zero(q) and not _not_negative(draft.view, q.node.input[0]):
            q.node.input[0] = _before(draft, q, "Relu", [q.node.input[0]])
            draft.log(sorted(rules), q.node, "Relu before it: its smallest code was 0, so it clipped what is negative")
        names = draft.params(q.node, representable(scale, dtype.name).astype(dtype))
        readers = [d for d in draft.view.quantizers if d.source is q and d not in draft.view.heads] if q.is_q else []
        for node in (q.node, *(d.node for d in readers)):
            node.input[:] = [node.input[0], *names]
            set_axis(node, None)
        draft.log(sorted(rules), q.node, f"INT8, zero point 0, scale {scale:.6g} in place of {np.max(q.scale):.6g}")


def _covering(q: Quantizer) -> float | None:
    """The smallest symmetric INT8 scale that covers the range of a quantizer; None where it has no range."""
    assert q.scale is not None
    scale = np.abs(q.scale.astype(np.float64)).ravel()
    if not np.all(np.isfinite(scale)):
        return None
    low, high = _limits(q.dtype)
    zero = np.zeros(1) if q.zero is None else q.zero.astype(np.float64).ravel()
    if zero.size not in (1, scale.size):
        zero = zero[:1] if not np.any(zero != zero[0]) else np.zeros(1)
    needed = np.maximum((high - zero) * scale / INT8.high, (zero - low) * scale / -INT8.low)
    largest = float(needed.max(initial=0.0))
    return largest if largest >= smallest(q.scale) else (1.0 if largest == 0 else smallest(q.scale))


def _starts_at_zero(q: Quantizer) -> bool:
    """Whether a quantizer's smallest code stands for 0: it does the work of a Relu, which ONNX Runtime then removes."""
    low, _ = _limits(q.dtype)
    return bool(np.all((np.zeros(()) if q.zero is None else q.zero).astype(np.int64) == low))


def _not_negative(view: View, tensor: str) -> bool:
    """Whether a tensor is known to hold no negative value."""
    if (node := view.model.producer(tensor)) is None:
        return False
    if node.op_type in ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Sqrt", "Exp", "Softplus"):
        return True
    q = view.by_output.get(tensor)
    if q is not None and q.source is not None:
        return _not_negative(view, q.source.node.input[0])
    passed_on = node.input if node.op_type == "Concat" else node.input[:1]
    return node.op_type in MOVERS | POOLS | {"Concat"} and all(_not_negative(view, i) for i in passed_on)


def _unquantized(draft: RepairDraft, q: Quantizer) -> str:
    """What a removed Q read; limited to the Q's range where that began at 0, as a Relu or Clip may live on in it."""
    tensor = q.node.input[0]
    if q.scale is None or not _starts_at_zero(q) or q.dtype not in EIGHT_BIT:
        return str(tensor)
    if draft.view.model.opset < 11:
        return tensor if _not_negative(draft.view, tensor) else _before(draft, q, "Relu", [tensor])
    high = draft.init(tensor + "_high", np.asarray(255 * q.scale.reshape(-1)[0], _float_type(draft, tensor)))
    low = draft.init(tensor + "_low", np.asarray(0, _float_type(draft, tensor)))
    return _before(draft, q, "Clip", [tensor, low, high])


def _float_type(draft: RepairDraft, tensor: str) -> np.dtype[np.generic]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(draft.view.elem(tensor) or TensorProto.FLOAT))


def _before(draft: RepairDraft, q: Quantizer, op_type: str, inputs: Sequence[str]) -> str:
    """One more node in front of a Q; returns its output."""
    out = draft.name(f"{inputs[0]}_{op_type}")
    node = helper.make_node(op_type, list(inputs), [out], name=draft.name(f"{label(q.node)}_{op_type}"))
    index = next(i for i, n in enumerate(draft.proto.graph.node) if list(n.output) == list(q.node.output))
    draft.proto.graph.node.insert(index, node)
    return out


def _axes(draft: RepairDraft) -> None:
    for q in draft.view.heads:
        if "default-axis" in draft.flagged(q.node):
            for node in (q.node, *(d.node for d in draft.view.quantizers if d.source is q)):
                if attribute_value(node, "axis", None) is None:
                    node.attribute.append(helper.make_attribute("axis", q.axis))
            draft.log(["default-axis"], q.node, f"axis {q.axis} written")
