"""Compute what does not depend on the inputs: constants, shape arithmetic, BatchNormalization.

    fold_shapes, fold_constants   nodes of a Draft -> initializers; True if something changed, then infer and repeat
    fold_batch_norms              BatchNormalization -> weight and bias of the Conv, ConvTranspose or Gemm before it

It must not change results beyond float rounding, make a large tensor from small ones, or make a dynamic size static.
`fold_constants` of onnx-graphsurgeon needs ONNX Runtime, and leaves shape arithmetic with one dynamic size (measured:
1,558 nodes of SwinUNETR in place of 619, in twice the time).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper
from onnx.reference import ReferenceEvaluator

from engines.core.operators import POOLS, family
from engines.core.shapes import DRAWN
from qdq.model.external import tensor_bytes
from qdq.model.model import TensorInfo
from qdq.model.nodes import attribute_value
from qdq.passes.draft import Draft, assign

GROWTH_LIMIT = 1 << 20  # bytes; folding may make no tensor above this and above the node's own inputs
SHAPE_ELEMENTS = 64  # a longer integer tensor is no shape

_Dims = np.ndarray  # an object array: a size is an int, the name of a dynamic dimension, or None (unknown)
# Why an operator of ONNX's own domain is not computed though all that it reads is constant.
_KEPT = {
    DRAWN: "its result is random",
    family("If Loop Scan SequenceMap"): "it holds nodes of its own",
    family("DequantizeLinear DynamicQuantizeLinear QuantizeLinear"): "it says what is quantized",
    family("Constant Identity"): "it is one already, and a copy would be stored twice",
    family(
        "Attention LogSoftmax MaxUnpool MeanVarianceNormalization NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss"
    ): "onnx's reference computes it another way than ONNX Runtime",  # onnx 1.23: large values, zeros, masks
}
# What onnx's reference computes element by element: 2 to 70 us each, measured with onnx 1.23.
_LOOPS = POOLS | family(
    "AffineGrid Col2Im Conv ConvTranspose DeformConv Erf GRU Gelu GridSample LSTM LpPool MaxRoiPool NonMaxSuppression "
    "RNN Resize RoiAlign Upsample"
)
LOOP_ELEMENTS = 1 << 17  # of their results and weights, at most


def why_kept(op_type: str, domain: str = "") -> str:
    """Why a node is never computed, "" where it is as soon as its inputs are constant."""
    if domain:
        return f"what an operator of the domain {domain!r} computes is not known here"
    return next((reason for operators, reason in _KEPT.items() if op_type in operators), "")


def fold_shapes(draft: Draft) -> bool:
    """Make initializers of shape arithmetic whose elements are all static, wherever the other sizes are dynamic.

    Shape of (N, 3, H, W) -> Gather 1 is the constant 3. In the target of a Reshape a dynamic size that stands where
    the input has it becomes 0 (copy), and a single other one -1.
    """
    known: dict[str, _Dims] = {}
    keep: list[NodeProto] = []
    for node in draft.graph.node:
        dims = _dims(draft, node, known)
        if dims is not None and len(dims.ravel()) <= SHAPE_ELEMENTS:
            known[node.output[0]] = dims
        info = draft.info(node.output[0]) if node.output else None
        static = dims is not None and all(isinstance(d, int) for d in dims.ravel())
        if static and info is not None and info.dtype in ("int64", "int32") and info.name not in draft.output_names:
            draft.put(info.name, np.asarray(dims).astype(info.dtype))
        else:
            keep.append(node)
    changed = len(keep) < len(draft.graph.node)
    for node in keep:
        target = _reshape_target(draft, node, known)
        if target is not None:
            node.input[1] = draft.unique(f"{node.name}_shape")
            draft.put(node.input[1], target)
            changed = True
    assign(draft.graph.node, keep)
    return changed


def fold_constants(draft: Draft, limit: int = GROWTH_LIMIT, only: Collection[str] | None = None) -> bool:
    """Compute nodes whose inputs are all constant; True if there were any: infer shapes and call again.

    No tensor is made above `limit` bytes and above its node's own inputs. `only` names nodes that may be computed.
    """
    keep = []
    for node in draft.graph.node:
        results = _evaluate(draft, node, limit) if only is None or node.name in only else None
        if results is None:
            keep.append(node)
        for name, values in (results or {}).items():
            draft.put(name, values)
    changed = len(keep) < len(draft.graph.node)
    assign(draft.graph.node, keep)
    return changed


def fold_batch_norms(draft: Draft) -> None:
    """Fold BatchNormalization (inference) into the Conv, ConvTranspose or Gemm before it.

    s = scale / sqrt(var + epsilon);  weight *= s per output channel;  bias = (bias - mean) * s + shift.
    The product must have no other reader and its weights no other use; the arithmetic is in float64.
    """
    keep = []
    made: dict[str, NodeProto] = {}
    for node in draft.graph.node:
        before = made.get(node.input[0]) if node.op_type == "BatchNormalization" and not node.domain else None
        if before is not None and _fold_batch_norm(draft, before, node):
            before.output[0] = node.output[0]
            made[node.output[0]] = before
            continue
        keep.append(node)
        made.update(dict.fromkeys(node.output, node))
    assign(draft.graph.node, keep)


def _takes(draft: Draft, before: NodeProto, norm: NodeProto) -> bool:
    """Whether a BatchNormalization scales what a product of constants makes, and nothing else reads."""
    constants = [name for name in (*before.input[1:], *norm.input[1:]) if name]
    plain = attribute_value(before, "beta", 1.0) == 1.0 and not attribute_value(before, "transA", 0)
    return (
        before.op_type in ("Conv", "ConvTranspose", "Gemm")
        and not before.domain
        and (before.op_type != "Gemm" or plain)
        and all(name in draft.tensors for name in constants)
        and draft.shown.only_use(norm.input[0]) is not None
        and draft.shown.only_use(before.input[1]) is not None
        and not attribute_value(norm, "training_mode", 0)
        and sum(map(bool, norm.output)) == 1
    )


def _fold_batch_norm(draft: Draft, before: NodeProto, norm: NodeProto) -> bool:
    """Fold one BatchNormalization into the node before it, if the conditions hold; True if done."""
    if not _takes(draft, before, norm):
        return False
    scale, shift, mean, variance = (draft.array(name).astype(np.float64) for name in norm.input[1:5])
    factor = scale / np.sqrt(variance + attribute_value(norm, "epsilon", 1e-5))
    weight = draft.array(before.input[1])
    bias_name = before.input[2] if len(before.input) > 2 else ""
    bias = draft.array(bias_name).astype(np.float64) if bias_name else np.zeros(1)
    if bias.size not in (1, factor.size) or bias.shape[-1:] not in ((), (1,), factor.shape):
        return False  # a Gemm whose C differs from row to row
    wide, along = weight.astype(np.float64), factor
    if before.op_type == "ConvTranspose":  # (C, M / group, ...): output channel g * (M / group) + m
        groups = attribute_value(before, "group", 1)
        wide = wide.reshape(groups, -1, *weight.shape[1:])
        along = factor.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    elif before.op_type == "Conv" or attribute_value(before, "transB", 0):
        along = factor.reshape(-1, *[1] * (weight.ndim - 1))
    folded = (wide * along).reshape(weight.shape).astype(weight.dtype)
    folded_bias = ((bias.ravel() - mean) * factor + shift).astype(weight.dtype)
    if not (np.isfinite(folded.astype(np.float32)).all() and np.isfinite(folded_bias.astype(np.float32)).all()):
        return False  # float16 would overflow
    draft.put(before.input[1], folded)
    if not bias_name or draft.shown.only_use(bias_name) is None:
        bias_name = draft.unique(f"{before.name}_bias")
    draft.put(bias_name, folded_bias)
    assign(before.input, [before.input[0], before.input[1], bias_name])
    return True


def _evaluate(draft: Draft, node: NodeProto, limit: int) -> Mapping[str, np.ndarray] | None:
    """The outputs of a node whose inputs are all constant, by name; None if it is to stay.

    Half floats are computed in float32 and rounded once, as kernels do.
    """
    inputs, outputs = ([name for name in names if name] for names in (node.input, node.output))
    if node.op_type == "CastLike" and (like := draft.info(inputs[1])):
        node = helper.make_node("Cast", inputs[:1], outputs, to=helper.np_dtype_to_tensor_dtype(np.dtype(like.dtype)))
        inputs = inputs[:1]  # of the second input only the type matters
    if why_kept(node.op_type, node.domain) or not draft.tensors.keys() >= set(inputs):
        return None
    if draft.output_names.intersection(outputs) or any(
        draft.tensors[i].data_type == TensorProto.STRING for i in inputs
    ):
        return None
    infos = [draft.info(name) for name in outputs]
    limit = max(limit, _read_bytes(draft, inputs), *(_joined_bytes(draft, name) for name in outputs))
    if node.op_type != "NonZero" and any(info is None or _bytes(info) > limit for info in infos):
        return None
    if node.op_type in _LOOPS and _elements(draft, node) > LOOP_ELEMENTS:
        return None
    arrays = {name: draft.array(name) for name in inputs}
    if node.op_type == "Div" and any(a.dtype.kind == "i" and (a < 0).any() for a in arrays.values()):
        return None  # ONNX truncates towards zero, onnx's reference rounds down
    arrays = {name: a.astype(np.float32) if a.dtype.name in _HALVES else a for name, a in arrays.items()}
    signed = arrays
    if node.op_type == "LpNormalization":  # for p = 1 onnx's reference divides by the sum of values, not of magnitudes
        arrays = {name: np.abs(a) for name, a in signed.items()}
    feeds, fetches = ([ValueInfoProto(name=name) for name in names] for names in (arrays, outputs))
    graph = helper.make_graph([node], "fold", feeds, fetches)
    model = helper.make_model(graph, opset_imports=list(draft.proto.opset_import))
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(model).run(None, arrays)
            if node.op_type == "LpNormalization":
                results = [np.copysign(np.asarray(next(iter(results))), signed[inputs[0]])]
            return {
                name: np.asarray(values).astype(info.dtype if info else np.int64, copy=False)
                for name, info, values in zip(outputs, infos, results, strict=True)
            }
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None  # what it would do is the runtime's to say


_HALVES = ("float16", "bfloat16")


def _read_bytes(draft: Draft, names: Collection[str]) -> int:
    """Size of tensors, numbers of less than four bytes counted as float32, which what they store is read as."""
    tensors = [draft.tensors[name] for name in names]
    logical = TensorProto.BOOL
    return sum(
        tensor_bytes(t) if t.data_type == logical else max(4 * math.prod(t.dims), tensor_bytes(t)) for t in tensors
    )


def _joined_bytes(draft: Draft, result: str) -> int:
    """Size of the constants that all readers of a tensor compute with it: what is made of them takes its place."""
    others = [[t for t in use.node.input if t and t != result] for use in draft.shown.consumers(result)]
    return min((_read_bytes(draft, o) if draft.tensors.keys() >= set(o) else 0 for o in others), default=0)


def _elements(draft: Draft, node: NodeProto) -> int:
    """Numbers that a node reads and makes; what is not known counts as none."""
    infos = (draft.info(name) for name in (*node.input, *node.output) if name)
    return sum(math.prod(d for d in i.shape if isinstance(d, int)) for i in infos if i is not None and i.shape)


def _bytes(info: TensorInfo) -> float:
    """Size of a tensor of that type and shape, infinite if a dimension is dynamic."""
    if info.shape is None or any(not isinstance(d, int) for d in info.shape) or info.dtype in ("string", "undefined"):
        return math.inf
    return math.prod(d for d in info.shape if isinstance(d, int)) * np.dtype(info.dtype).itemsize


def _dims(draft: Draft, node: NodeProto, known: Mapping[str, _Dims]) -> _Dims | None:
    """The elements of a node's output as far as they are static, if the node is shape arithmetic."""
    if node.domain or not node.input:
        return None

    def read(index: int) -> _Dims | None:
        name = node.input[index] if index < len(node.input) else ""
        tensor = draft.tensors.get(name)
        integer = tensor is not None and tensor.data_type in (TensorProto.INT64, TensorProto.INT32)
        if name in known or tensor is None or not integer or math.prod(tensor.dims) > SHAPE_ELEMENTS:
            return known.get(name)
        return draft.array(name).astype(object)

    def constant(index: int, default: list[int]) -> list[int] | None:
        if index >= len(node.input) or not node.input[index]:
            return default
        return [int(v) for v in draft.array(node.input[index]).ravel()] if node.input[index] in draft.tensors else None

    if node.op_type == "Shape":
        info, start, end = (
            draft.info(node.input[0]),
            attribute_value(node, "start", 0),
            attribute_value(node, "end", None),
        )
        return None if info is None or info.shape is None else np.array(info.shape, object)[start:end]
    values = read(0)
    if node.op_type == "Concat":
        parts = [read(i) if read(i) is not None else _unknown(draft.info(name)) for i, name in enumerate(node.input)]
        whole = [p for p in parts if p is not None and p.ndim == 1]
        return np.concatenate(whole) if len(whole) == len(parts) else None
    if values is None:
        return None
    if node.op_type == "Cast" and attribute_value(node, "to", 0) in (TensorProto.INT64, TensorProto.INT32):
        return values
    if node.op_type == "Unsqueeze" and values.ndim == 0:
        return values.reshape(1)
    if node.op_type == "Squeeze" and values.shape == (1,):
        return values.reshape(())
    if node.op_type == "Gather" and values.ndim == 1 and node.input[1] in draft.tensors:
        index = draft.array(node.input[1])
        inside = index.size <= SHAPE_ELEMENTS and ((-values.size <= index) & (index < values.size)).all()
        return np.asarray(values[index], object) if inside else None
    if node.op_type == "Slice" and values.ndim == 1:
        starts, ends, steps = constant(1, []), constant(2, []), constant(4, [1])
        return values[starts[0] : ends[0] : steps[0]] if starts and ends and steps and steps[0] > 0 else None
    other = read(1) if node.op_type in _ARITHMETIC else None
    return None if other is None else _computed(node.op_type, values, other)


_ARITHMETIC = {"Add": int.__add__, "Sub": int.__sub__, "Mul": int.__mul__, "Div": int.__floordiv__}


def _computed(op_type: str, left: _Dims, right: _Dims) -> _Dims | None:
    """The elements of a sum, difference, product or quotient; None for a quotient that ONNX and Python round apart."""
    negative = any(isinstance(v, int) and v < 0 for v in (*left.ravel(), *right.ravel()))
    if op_type == "Div" and (negative or 0 in right.ravel()):
        return None
    operation = _ARITHMETIC[op_type]
    pairs = np.frompyfunc(lambda a, b: operation(a, b) if isinstance(a, int) and isinstance(b, int) else None, 2, 1)
    return np.asarray(pairs(left, right), object)


def _reshape_target(draft: Draft, node: NodeProto, known: Mapping[str, _Dims]) -> np.ndarray | None:
    """The computed target of a Reshape as a constant; None if it needs more than one size that only the run knows."""
    if node.op_type != "Reshape" or node.domain or node.input[1] not in known or attribute_value(node, "allowzero", 0):
        return None
    info = draft.info(node.input[0])
    source = info.shape if info and info.shape else ()
    sizes = enumerate(known[node.input[1]])
    target = [0 if isinstance(size, str) and size in source[axis : axis + 1] else size for axis, size in sizes]
    free = [axis for axis, size in enumerate(target) if not isinstance(size, int)]
    if len(free) > 1 or (free and -1 in target):
        return None
    return np.array([-1 if axis in free else size for axis, size in enumerate(target)], np.int64)


def _unknown(info: TensorInfo | None) -> _Dims | None:
    """Dynamic elements for a short integer vector of known length."""
    if info is None or info.dtype != "int64" or info.shape is None or len(info.shape) != 1:
        return None
    length = info.shape[0]
    return np.full(length, None, object) if isinstance(length, int) and length <= SHAPE_ELEMENTS else None
