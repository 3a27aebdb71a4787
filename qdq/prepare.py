"""Bring a float model into the one form that every later pass expects, with the same outputs.

    functions inlined, node names unique, initializers no longer inputs -> opset 21
    constants, shapes, BatchNormalization and automatic padding folded; identities, unused nodes and tensors dropped
    shapes of all tensors inferred -> Model (IR version 10)

It must not change what the model computes beyond float rounding, touch the bodies of If, Loop and Scan, make dynamic
dimensions static, rename inputs, outputs or named nodes, or need a runtime.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qdq.errors import ModelError
from qdq.graph import (
    Model,
    TensorInfo,
    all_nodes,
    bodies,
    captured,
    check,
    dtype_name,
    is_external,
    tensor_array,
    tensor_bytes,
    without_initializers,
)

OLDEST_OPSET = 9
TARGET_OPSET = 21  # the first with block_size and int4 in Q/DQ; newer is needed for float4 only
NEWEST_OPSET = 25  # 22 to 25 are kept and tested; ONNX Runtime 1.31 itself takes 26
SMALL = 4096  # bytes; larger tensors are shown to onnx's converter and shape inference by type and shape only
GROWTH_LIMIT = 1 << 20  # bytes; folding may make no tensor above this and above the node's own inputs
SHAPE_ELEMENTS = 64  # a longer integer tensor is no shape

_Dims = np.ndarray  # an object array: a size is an int, the name of a dynamic dimension, or None (unknown)
_FOLDABLE = """
    Abs Add And Cast CastLike Ceil Clip Concat ConstantOfShape Cos CumSum Div Equal Erf Exp Expand Flatten Floor Gather
    GatherElements GatherND Gemm Greater GreaterOrEqual Less LessOrEqual Log MatMul Max Mean Min Mul Neg NonZero Not Or
    Pad Pow Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape
    ScatterElements ScatterND Shape Sigmoid Sin Size Slice Split Sqrt Squeeze Sub Tanh Tile Transpose Trilu Unsqueeze
    Where Xor
"""
_FOLDABLE_OPS = frozenset(_FOLDABLE.split())


def prepare(model: Model) -> Model:
    """Normalize a float model; the same model always gives the same bytes.

    Args:
        model: as loaded; opset 9 to 25.

    Returns:
        A Model of opset 21 (22 to 25 stay) whose nodes all have unique names, whose weights are initializers, and
        whose tensors have their inferred types and shapes. Inputs and outputs are those of `model`, dynamic sizes
        included; initializers are no longer listed as inputs.

    Raises:
        ModelError: the opset is too old or too new, or an operator has no equivalent in opset 21.
    """
    if model.opset and not OLDEST_OPSET <= model.opset <= NEWEST_OPSET:
        raise ModelError(
            f"Cannot use this model: it is of opset {model.opset}, qdq takes opset {OLDEST_OPSET} to {NEWEST_OPSET}. "
            "Export it again with opset 17 to 21."
        )
    draft = _Draft(model)
    draft.inline_functions()
    draft.name_nodes()
    draft.lift_constants()
    draft.raise_opset()
    draft.name_nodes()
    draft.lift_constants()  # those that the converter made
    draft.drop_unused()
    while draft.infer() and (fold_shapes(draft) | fold_constants(draft) | drop_identities(draft)):
        draft.drop_unused()
    fold_batch_norms(draft)
    pad_explicitly(draft)
    draft.drop_unused()
    return model.replace(draft.finish())


class _Draft:
    """The model in the making: nodes in `proto`, initializers in `tensors`, shapes in `shown` after `infer`.

    The user's tensors are shared, never changed: a new value is a new TensorProto.
    """

    def __init__(self, model: Model) -> None:
        self.directory: Path = model.directory
        self.tensors: dict[str, TensorProto] = dict(model.initializers)
        self.proto = without_initializers(model.proto)
        self.shown = model
        self.inputs = [v for v in model.graph.input if v.name not in self.tensors]
        self.outputs = list(model.graph.output)
        _assign(self.graph.input, self.inputs)
        self.proto.ir_version = max(self.proto.ir_version, 4)  # from 4 on an initializer need not be an input
        for node in all_nodes(self.graph):
            if node.domain == "ai.onnx":  # the long name of the default domain
                node.domain = ""

    @property
    def graph(self) -> onnx.GraphProto:
        return self.proto.graph

    @property
    def output_names(self) -> frozenset[str]:
        return frozenset(v.name for v in self.graph.output)

    def array(self, name: str) -> np.ndarray:
        return tensor_array(self.tensors[name], self.directory)

    def put(self, name: str, values: np.ndarray) -> None:
        self.tensors[name] = numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)

    def info(self, name: str) -> TensorInfo | None:
        return self.shown.info(name)

    def unique(self, name: str) -> str:
        """A tensor name that nothing in the model has yet: `name`, or `name` with a number."""
        inner = [tensor for node in all_nodes(self.graph) for tensor in (*node.input, *node.output)]
        graph = [v.name for v in (*self.graph.input, *self.graph.output)]
        return _unique(name, {*self.tensors, *inner, *graph})

    def captured_names(self) -> frozenset[str]:
        return frozenset().union(*(captured(node) for node in self.graph.node))

    def light(self) -> ModelProto:
        """The model without the weights: small tensors are initializers, larger ones stand as inputs."""
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        # a shape written before somebody made an input dynamic would pass for static; inference finds all but these
        foreign = {name for node in self.graph.node if node.domain for name in node.output}
        _assign(proto.graph.value_info, [v for v in self.graph.value_info if v.name in foreign])
        for name, tensor in self.tensors.items():
            if tensor_bytes(tensor) > SMALL:
                proto.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
            elif is_external(tensor):
                proto.graph.initializer.append(numpy_helper.from_array(self.array(name), name))
            else:
                proto.graph.initializer.append(tensor)
        return proto

    def absorb(self, light: ModelProto) -> None:
        """Take back a light model that a tool of onnx has changed."""
        for tensor in light.graph.initializer:
            if tensor.name not in self.tensors:
                self.tensors[tensor.name] = tensor
        self.proto = without_initializers(light)
        _assign(self.graph.input, self.inputs)
        _assign(self.graph.output, self.outputs)

    def inline_functions(self) -> None:
        """Replace calls of the model's own functions by their nodes."""
        if self.proto.functions:
            self.absorb(onnx.inliner.inline_local_functions(self.light(), convert_version=True))

    def name_nodes(self) -> None:
        """Give every node a unique name: the user's where it is one, else <OpType>_<index>."""
        inside = {n.name for node in self.graph.node for g in bodies(node) for n in all_nodes(g)}
        taken = inside | {node.name for node in self.graph.node}
        seen = {""}
        for index, node in enumerate(self.graph.node):
            if node.name in seen:
                node.name = _unique(node.name or f"{node.op_type}_{index}", taken)
            seen.add(node.name)
            taken.add(node.name)

    def raise_opset(self) -> None:
        """Convert to opset 21 with onnx's converter; weights are not given to it."""
        opset = self.shown.opset
        if 0 < opset < TARGET_OPSET:
            try:
                light = onnx.version_converter.convert_version(self.light(), TARGET_OPSET)
                check(light)
            except (RuntimeError, ValueError, IndexError, onnx.checker.ValidationError) as error:
                raise ModelError(
                    f"Cannot raise this model from opset {opset} to {TARGET_OPSET}: the converter of onnx "
                    f"{onnx.__version__} says: {' '.join(str(error).split())[:500]} "
                    "Export the model again with opset 17 or newer."
                ) from None
            self.absorb(light)
            if opset < 11:
                self.keep_old_resize()
        used = {node.domain for node in all_nodes(self.graph)} | {f.domain for f in self.proto.functions}
        versions = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in self.proto.opset_import}
        _assign(
            self.proto.opset_import,
            [helper.make_opsetid(domain, version) for domain, version in versions.items() if domain in used],
        )
        self.proto.ir_version = max(10, helper.find_min_ir_version_for(self.proto.opset_import, ignore_unknown=True))

    def keep_old_resize(self) -> None:
        """Write out how Upsample and Resize placed samples before opset 11; the converter leaves the newer defaults.

        The standard of opset 10 leaves it open; measured with ONNX Runtime 1.31: asymmetric, and nearest takes the
        floor to enlarge and the ceiling to shrink. Not measured: nearest that enlarges one axis and shrinks another.
        """
        for node in all_nodes(self.graph):
            if node.op_type == "Resize" and not node.domain:
                scales = self.array(node.input[2]) if node.input[2] in self.tensors else np.ones(1)
                nearest = "ceil" if (scales < 1).any() and (scales <= 1).all() else "floor"
                kept = [a for a in node.attribute if a.name == "mode"]
                values = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": nearest}
                _assign(node.attribute, [*kept, *(helper.make_attribute(k, v) for k, v in values.items())])

    def lift_constants(self) -> None:
        """Turn Constant nodes into initializers; text, sparse values and outputs of the model stay nodes."""
        keep = []
        for node in self.graph.node:
            tensor = _constant(node) if node.op_type == "Constant" and not node.domain else None
            if tensor is None or node.output[0] in self.output_names:
                keep.append(node)
            else:
                tensor.name = node.output[0]
                self.tensors[tensor.name] = tensor
        _assign(self.graph.node, keep)

    def drop_unused(self) -> None:
        """Remove nodes and initializers that no output depends on."""
        needed = set(self.output_names)
        keep = []
        for node in reversed(self.graph.node):
            if needed.intersection(node.output):
                keep.append(node)
                needed.update(node.input, captured(node))
        _assign(self.graph.node, keep[::-1])
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in needed}

    def infer(self) -> bool:
        """Infer types and shapes of all tensors; always True."""
        try:
            proto = onnx.shape_inference.infer_shapes(self.light(), data_prop=True)
        except (RuntimeError, onnx.checker.ValidationError) as error:
            raise ModelError(
                f"Cannot infer the shapes of this model: onnx {onnx.__version__} says: "
                f"{' '.join(str(error).split())[:500]} Export the model again."
            ) from None
        self.shown = Model(proto=proto, directory=self.directory, sha256="")
        return True

    def finish(self) -> ModelProto:
        """The complete model, with inferred types and shapes."""
        self.infer()
        found = {v.name: v for v in self.shown.graph.value_info}
        made = (name for node in self.graph.node for name in node.output if name not in self.output_names)
        _assign(self.graph.value_info, [found[name] for name in made if name in found])
        inferred = {v.name: v for v in self.shown.graph.output}
        outputs = [v if v.type.tensor_type.HasField("shape") else inferred[v.name] for v in self.graph.output]
        _assign(self.graph.output, outputs)
        self.graph.initializer.extend(self.tensors.values())
        return self.proto


def fold_shapes(draft: _Draft) -> bool:
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
    _assign(draft.graph.node, keep)
    return changed


def fold_constants(draft: _Draft) -> bool:
    """Compute nodes whose inputs are all constant; nothing grows beyond `GROWTH_LIMIT` or its own inputs."""
    keep = []
    for node in draft.graph.node:
        results = _evaluate(draft, node)
        if results is None:
            keep.append(node)
        for name, values in (results or {}).items():
            draft.put(name, values)
    changed = len(keep) < len(draft.graph.node)
    _assign(draft.graph.node, keep)
    return changed


def drop_identities(draft: _Draft) -> bool:
    """Remove Identity, Dropout in inference and Cast to the same type, unless it makes an output of the model."""
    fixed = draft.output_names | draft.captured_names()
    rename: dict[str, str] = {}
    keep = []
    for node in draft.graph.node:
        for index, name in enumerate(node.input):
            if name in rename:
                node.input[index] = rename[name]
        if _passes_through(draft, node) and node.output[0] not in fixed:
            rename[node.output[0]] = node.input[0]
        else:
            keep.append(node)
    _assign(draft.graph.node, keep)
    return bool(rename)


def fold_batch_norms(draft: _Draft) -> None:
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
    _assign(draft.graph.node, keep)


def pad_explicitly(draft: _Draft) -> None:
    """Write the padding of Conv nodes that have `auto_pad`, where it does not depend on a dynamic size."""
    for node in draft.graph.node:
        mode = str(_attribute(node, "auto_pad", b"NOTSET").decode())
        weight = draft.info(node.input[1]) if node.op_type == "Conv" and not node.domain else None
        if weight is None or weight.shape is None or mode not in ("VALID", "SAME_UPPER", "SAME_LOWER"):
            continue
        info = draft.info(node.input[0])
        kernel = weight.shape[2:]
        sizes = info.shape[2:] if info and info.shape else (None,) * len(kernel)
        strides = _attribute(node, "strides", [1] * len(kernel))
        dilations = _attribute(node, "dilations", [1] * len(kernel))
        totals = [_same_padding(*axis) for axis in zip(sizes, kernel, strides, dilations, strict=True)]
        if mode == "VALID":
            totals = [0] * len(kernel)
        if any(total is None for total in totals):
            continue
        low = [total // 2 for total in totals if total is not None]
        high = [total - total // 2 for total in totals if total is not None]
        kept = [a for a in node.attribute if a.name not in ("auto_pad", "pads")]
        pads = low + high if mode == "SAME_UPPER" else high + low
        _assign(node.attribute, [*kept, helper.make_attribute("pads", pads)])


def _same_padding(size: object, kernel: object, stride: int, dilation: int) -> int | None:
    """Padding of one axis so that the output has ceil(size / stride) elements; None if it hangs on a dynamic size."""
    if not isinstance(kernel, int):
        return None
    reach = (kernel - 1) * dilation + 1
    if stride == 1:
        return reach - 1
    if not isinstance(size, int):
        return None
    return max((math.ceil(size / stride) - 1) * stride + reach - size, 0)


def _fold_batch_norm(draft: _Draft, before: NodeProto, norm: NodeProto) -> bool:
    """Fold one BatchNormalization into the node before it, if the conditions hold; True if done."""
    product = norm.input[0]
    constants = [name for name in (*before.input[1:], *norm.input[1:]) if name]
    readers = draft.shown
    if (
        before.op_type not in ("Conv", "ConvTranspose", "Gemm")
        or before.domain
        or readers.is_output(product)
        or len(readers.consumers(product)) != 1
        or any(name not in draft.tensors for name in constants)
        or len(readers.consumers(before.input[1])) != 1
        or readers.is_output(before.input[1])
        or _attribute(norm, "training_mode", 0)
        or sum(map(bool, norm.output)) != 1
        or (before.op_type == "Gemm" and (_attribute(before, "beta", 1.0) != 1.0 or _attribute(before, "transA", 0)))
    ):
        return False
    scale, shift, mean, variance = (draft.array(name).astype(np.float64) for name in norm.input[1:5])
    factor = scale / np.sqrt(variance + _attribute(norm, "epsilon", 1e-5))
    weight = draft.array(before.input[1])
    bias_name = before.input[2] if len(before.input) > 2 else ""
    bias = draft.array(bias_name).astype(np.float64) if bias_name else np.zeros(1)
    if bias.size not in (1, factor.size) or bias.shape[-1:] not in ((), (1,), factor.shape):
        return False  # a Gemm whose C differs from row to row
    wide = weight.astype(np.float64)
    if before.op_type == "ConvTranspose":  # (C, M / group, ...): output channel g * (M / group) + m
        groups = _attribute(before, "group", 1)
        wide = wide.reshape(groups, -1, *weight.shape[1:])
        wide = wide * factor.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    elif before.op_type == "Conv" or _attribute(before, "transB", 0):
        wide = wide * factor.reshape(-1, *[1] * (weight.ndim - 1))
    else:
        wide = wide * factor
    folded = wide.reshape(weight.shape).astype(weight.dtype)
    folded_bias = ((bias.ravel() - mean) * factor + shift).astype(weight.dtype)
    if not (np.isfinite(folded.astype(np.float32)).all() and np.isfinite(folded_bias.astype(np.float32)).all()):
        return False  # float16 would overflow
    draft.put(before.input[1], folded)
    if not bias_name or len(readers.consumers(bias_name)) != 1 or readers.is_output(bias_name):
        bias_name = draft.unique(f"{before.name}_bias")
    draft.put(bias_name, folded_bias)
    _assign(before.input, [before.input[0], before.input[1], bias_name])
    return True


def _evaluate(draft: _Draft, node: NodeProto) -> Mapping[str, np.ndarray] | None:
    """The outputs of a node whose inputs are all constant, by name; None if it is to stay."""
    inputs = [name for name in node.input if name]
    outputs = [name for name in node.output if name]
    if (
        node.domain
        or node.op_type not in _FOLDABLE_OPS
        or any(name not in draft.tensors for name in inputs)
        or draft.output_names.intersection(outputs)
    ):
        return None
    infos = [draft.info(name) for name in outputs]
    limit = max(GROWTH_LIMIT, sum(tensor_bytes(draft.tensors[name]) for name in inputs))
    if node.op_type != "NonZero" and any(info is None or _bytes(info) > limit for info in infos):
        return None
    arrays = {name: draft.array(name) for name in inputs}
    if node.op_type == "Div" and any(a.dtype.kind == "i" and (a < 0).any() for a in arrays.values()):
        return None  # ONNX truncates towards zero, onnx's reference rounds down
    feeds, fetches = ([ValueInfoProto(name=name) for name in names] for names in (arrays, outputs))
    graph = helper.make_graph([node], "fold", feeds, fetches)
    model = helper.make_model(graph, opset_imports=list(draft.proto.opset_import))
    try:
        results = ReferenceEvaluator(model).run(None, arrays)
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError):
        return None  # what it would do is the runtime's to say
    return {
        name: np.asarray(values).astype(info.dtype if info else np.int64, copy=False)
        for name, info, values in zip(outputs, infos, results, strict=True)
    }


def _bytes(info: TensorInfo) -> float:
    """Size of a tensor of that type and shape, infinite if a dimension is dynamic."""
    if info.shape is None or any(not isinstance(d, int) for d in info.shape) or info.dtype in ("string", "undefined"):
        return math.inf
    return math.prod(d for d in info.shape if isinstance(d, int)) * np.dtype(info.dtype).itemsize


def _dims(draft: _Draft, node: NodeProto, known: Mapping[str, _Dims]) -> _Dims | None:
    """The elements of a node's output as far as they are static, if the node is shape arithmetic."""
    if node.domain or not node.input:
        return None

    def read(index: int) -> _Dims | None:
        name = node.input[index] if index < len(node.input) else ""
        if name in known:
            return known[name]
        tensor = draft.tensors.get(name)
        integer = tensor is not None and tensor.data_type in (TensorProto.INT64, TensorProto.INT32)
        if tensor is None or not integer or math.prod(tensor.dims) > SHAPE_ELEMENTS:
            return None
        return draft.array(name).astype(object)

    def constant(index: int, default: list[int]) -> list[int] | None:
        if index >= len(node.input) or not node.input[index]:
            return default
        return [int(v) for v in draft.array(node.input[index]).ravel()] if node.input[index] in draft.tensors else None

    if node.op_type == "Shape":
        info = draft.info(node.input[0])
        if info is None or info.shape is None:
            return None
        dims = np.array(info.shape, object)
        return dims[_attribute(node, "start", 0) : _attribute(node, "end", None)]
    values = read(0)
    if node.op_type == "Concat":
        parts = [read(i) if read(i) is not None else _unknown(draft.info(name)) for i, name in enumerate(node.input)]
        whole = [p for p in parts if p is not None and p.ndim == 1]
        return np.concatenate(whole) if len(whole) == len(parts) else None
    if values is None:
        return None
    if node.op_type == "Cast" and _attribute(node, "to", 0) in (TensorProto.INT64, TensorProto.INT32):
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
    if node.op_type in _ARITHMETIC and (other := read(1)) is not None:
        if node.op_type == "Div" and any(isinstance(v, int) and v < 0 for v in (*values.ravel(), *other.ravel())):
            return None
        if node.op_type == "Div" and 0 in other.ravel():
            return None
        operation = _ARITHMETIC[node.op_type]
        pairs = np.frompyfunc(lambda a, b: operation(a, b) if isinstance(a, int) and isinstance(b, int) else None, 2, 1)
        return np.asarray(pairs(values, other), object)
    return None


_ARITHMETIC = {"Add": int.__add__, "Sub": int.__sub__, "Mul": int.__mul__, "Div": int.__floordiv__}


def _passes_through(draft: _Draft, node: NodeProto) -> bool:
    """Whether the first output of a node is its first input."""
    if node.domain or not node.input:
        return False
    if node.op_type == "Cast":
        info = draft.info(node.input[0])
        return info is not None and info.dtype == dtype_name(_attribute(node, "to", 0))
    if node.op_type == "Dropout":
        training = node.input[2] if len(node.input) > 2 else ""
        off = not training or (training in draft.tensors and not draft.array(training).any())
        return off and not any(draft.shown.consumers(m) or draft.shown.is_output(m) for m in node.output[1:])
    return node.op_type == "Identity"


def _constant(node: NodeProto) -> TensorProto | None:
    """A copy of the value of a Constant node; None for text and sparse values."""
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(attribute.t)
        return tensor
    if attribute.name in ("value_int", "value_ints"):
        return numpy_helper.from_array(np.array(helper.get_attribute_value(attribute), np.int64))
    if attribute.name in ("value_float", "value_floats"):
        return numpy_helper.from_array(np.array(helper.get_attribute_value(attribute), np.float32))
    return None


def _reshape_target(draft: _Draft, node: NodeProto, known: Mapping[str, _Dims]) -> np.ndarray | None:
    """The computed target of a Reshape as a constant; None if it needs more than one size that only the run knows."""
    if node.op_type != "Reshape" or node.domain or node.input[1] not in known or _attribute(node, "allowzero", 0):
        return None
    info = draft.info(node.input[0])
    source = info.shape if info and info.shape else ()
    target = list(known[node.input[1]])
    for axis, size in enumerate(target):
        if isinstance(size, str) and axis < len(source) and source[axis] == size:
            target[axis] = 0
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


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute, or what the standard says where it is absent."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _assign(field: Any, values: Iterable[Any]) -> None:
    """Replace the contents of a repeated protobuf field."""
    values = list(values)
    del field[:]
    field.extend(values)


def _unique(name: str, taken: Collection[str]) -> str:
    """`name`, or the first of name_1, name_2, ... that is not taken."""
    candidates = (f"{name}_{i}" for i in itertools.count(1))
    return name if name not in taken else next(c for c in candidates if c not in taken)
