"""Tiny float graphs for the tests from placement to insertion, and the way from one to its Q/DQ model.

graph builders -> prepared `Model`; `quantized(model, samples)` -> every intermediate value of the main job.
Must not use the code under test to say what is right: `intended` builds its oracle from ONNX's own zero points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engines.core import onnx_runtime as ort
from qdq.assemble import insert
from qdq.core.formats import FORMATS
from qdq.measure import collect
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.model.nodes import all_nodes, input_axis, weight_axis
from qdq.model.storage import load
from qdq.passes.prepare import prepare
from qdq.passes.rewrites import rewritten
from qdq.plan import placement
from qdq.plan.plan import Plan, Point
from qdq.plan.settings import Settings
from qdq.solve import solve
from qdq.solve.solve import Solution

Sample = dict[str, np.ndarray]
ELEMENT = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def node(op: str, inputs: str, outputs: str, name: str = "", **attributes: object) -> NodeProto:
    """A node named after its operator, or by `name`; "-" stands for an input that is left out."""
    names = ["" if i == "-" else i for i in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name or op.lower(), **attributes)


def build(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    outputs: Sequence[str] = ("y",),
    dtype: str = "float32",
) -> Model:
    """A prepared model. Tensors of any float type are stored in `dtype`; outputs have no declared shape."""
    kind = ELEMENT[dtype]
    ends = [onnx.ValueInfoProto(name=name) for name in outputs]
    for end in ends:
        end.type.tensor_type.elem_type = kind
    stored = []
    for name, array in (tensors or {}).items():
        array = array.astype(helper.tensor_dtype_to_np_dtype(kind)) if array.dtype.kind == "f" else array
        stored.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    starts = [helper.make_tensor_value_info(name, kind, list(shape)) for name, shape in inputs.items()]
    graph = helper.make_graph(list(nodes), "tiny", starts, ends, stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return prepare(load(proto))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 values."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv(
    weight: Sequence[int] = (8, 4, 3, 3),
    spatial: Sequence[int | str] = (6, 6),
    *,
    batch: int | str = 1,
    bias: bool = True,
    values: np.ndarray | None = None,
    dtype: str = "float32",
    **attributes: Any,
) -> Model:
    """x (batch, channels * group, *spatial) -> Conv -> Relu -> y."""
    tensors = {"w": normal(*weight) if values is None else values}
    if bias:
        tensors["b"] = normal(weight[0], seed=1)
    channels = weight[1] * attributes.get("group", 1)
    nodes = [node("Conv", "x w b" if bias else "x w", "a", **attributes), node("Relu", "a", "y")]
    return build(nodes, {"x": (batch, channels, *spatial)}, tensors, dtype=dtype)


def product(
    op: str = "MatMul",
    weight: Sequence[int] = (6, 8),
    data: Sequence[int | str] = (5, 6),
    *,
    bias: Sequence[int] | None = None,
    **attributes: Any,
) -> Model:
    """x -> MatMul or Gemm -> Relu -> y."""
    tensors = {"w": normal(*weight)} | ({} if bias is None else {"b": normal(*bias, seed=1)})
    nodes = [node(op, "x w" if bias is None else "x w b", "a", **attributes), node("Relu", "a", "y")]
    return build(nodes, {"x": data}, tensors)


def residual(shape: Sequence[int] = (1, 8, 6, 6)) -> Model:
    """x -> Relu t -> Conv -> Add t -> y."""
    nodes = [
        node("Relu", "x", "t"),
        node("Conv", "t w", "c", pads=[1, 1, 1, 1]),
        node("Add", "c t", "y"),
    ]
    return build(nodes, {"x": shape}, {"w": normal(shape[1], shape[1], 3, 3)})


def branches() -> Model:
    """Two Relu branches -> Concat -> Conv; each branch is read by a Conv of its own too."""
    nodes = [
        node("Relu", "x", "left"),
        node("Relu", "z", "right", name="relu_right"),
        node("Concat", "left right", "both", axis=1),
        node("Conv", "both w", "a", name="joined"),
        node("Conv", "left v", "b", name="left_conv"),
        node("Conv", "right v", "c", name="right_conv"),
    ]
    tensors = {"w": normal(4, 8, 1, 1), "v": normal(4, 4, 1, 1)}
    sizes = {"x": (1, 4, 5, 5), "z": (1, 4, 5, 5)}
    return build(nodes, sizes, tensors, outputs=("a", "b", "c"))


def attention() -> Model:
    """softmax(q k^T) v with q, k and v from one constant projection each."""
    nodes = [node("MatMul", f"x w{i}", i, name=f"project_{i}") for i in "qkv"]
    nodes += [
        node("Transpose", "k", "kt", perm=[0, 2, 1]),
        node("MatMul", "q kt", "s", name="scores"),
        node("Softmax", "s", "p", axis=-1),
        node("MatMul", "p v", "y", name="mix"),
    ]
    return build(nodes, {"x": (1, 5, 8)}, {f"w{i}": normal(8, 8, seed=ord(i)) for i in "qkv"})


def conditional() -> Model:
    """An If whose branches hold a Conv each, behind a Conv outside."""
    end = [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)]
    bodies = [helper.make_graph([node("Conv", f"a {w}", "r")], w, [], end) for w in ("w", "v")]
    nodes = [
        node("Conv", "x w", "a", name="outer"),
        node("ReduceSum", "a", "total", keepdims=0),
        node("Cast", "total", "flag", to=TensorProto.BOOL),
        node("If", "flag", "y", then_branch=bodies[0], else_branch=bodies[1]),
    ]
    return build(nodes, {"x": (1, 4, 5, 5)}, {"w": normal(4, 4, 1, 1), "v": normal(4, 4, 1, 1, seed=1)})


def samples(model: Model, count: int = 4, *, low: float | None = None, seed: int = 7) -> list[Sample]:
    """Normal values for every input; with `low`, uniform in [low, low + 4] instead. A dynamic size becomes 3."""
    rng = np.random.default_rng(seed)
    made: list[Sample] = []
    for _ in range(count):
        sample = {}
        for i in model.inputs:
            shape = [d if isinstance(d, int) else 3 for d in i.shape or ()]
            values = rng.normal(size=shape) if low is None else rng.uniform(low, low + 4, size=shape)
            kind = helper.tensor_dtype_to_np_dtype(helper.np_dtype_to_tensor_dtype(np.dtype(i.dtype)))
            sample[i.name] = values.astype(kind)
        made.append(sample)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What the stages of the main job made from one model."""

    float_model: Model
    plan: Plan
    table: CalibrationTable
    solution: Solution
    model: Model


def quantized(model: Model, data: Sequence[Sample], **settings: Any) -> Made:
    """Plan, rewrite, calibrate, solve and insert."""
    return written(model, placement.plan(model, Settings(**settings)), data)


def written(model: Model, plan: Plan, data: Sequence[Sample]) -> Made:
    """Rewrite, calibrate, solve and insert."""
    model = rewritten(model, plan.rewrites)
    table = collect.collect(model, plan, data)
    solution = solve.solve(model, plan, table, samples=data)
    made = insert.insert(model, plan, solution)
    onnx.checker.check_model(made.proto, full_check=True)
    return Made(float_model=model, plan=plan, table=table, solution=solution, model=made)


def run(model: Model | onnx.ModelProto, data: Iterable[Sample]) -> list[Sample]:
    """Outputs in ONNX Runtime with quantizers and dequantizers kept apart."""
    return list(ort.run(model.proto if isinstance(model, Model) else model, data))


def intended(made: Made) -> onnx.ModelProto:
    """The arithmetic that `insert` must realise, written with what TensorRT lacks: real zero points.

    The float model, in which every quantized operand is read through QuantizeLinear and DequantizeLinear with the
    solution's zero point (behind a Mul where its channels are equalized), and every weight holds the dequantized codes
    as floats. Padding and bias stay as they are. A float16 model is written in float32.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(made.float_model.proto)
    nodes = {n.name: n for n in all_nodes(proto.graph)}
    front: dict[str, list[NodeProto]] = {}
    for point in made.plan.points:
        if point.role == "weight":
            values, name = read_values(made, point), f"{point.tensor}@{point.spec.axis}"
            proto.graph.initializer.append(numpy_helper.from_array(values, name))
            new = name
        else:
            params, new = made.solution.activations[point.tensor], f"{point.tensor}@dq"
            scale = numpy_helper.from_array(params.scale, f"{point.tensor}@scale")
            zero = numpy_helper.from_array(
                np.asarray(params.zero_point).astype(FORMATS[params.format].dtype), f"{point.tensor}@zero"
            )
            proto.graph.initializer.extend([scale, zero])
            names = [scale.name, zero.name]
            source = point.tensor
            front[source] = []
            if (factor := factors(made, source)) is not None:
                proto.graph.initializer.append(numpy_helper.from_array(factor, f"{source}@factor"))
                front[source] = [helper.make_node("Mul", [source, f"{source}@factor"], [f"{source}@divided"])]
                source += "@divided"
            first = f"{point.tensor}@first" if point.spec.residual else new
            front[point.tensor] += [
                helper.make_node("QuantizeLinear", [source, *names], [f"{point.tensor}@q"]),
                helper.make_node("DequantizeLinear", [f"{point.tensor}@q", *names], [first]),
            ]
            if point.spec.residual:
                step, rest = f"{point.tensor}@step", f"{point.tensor}@rest"
                proto.graph.initializer.append(numpy_helper.from_array(np.asarray(params.scale / 256), step))
                front[point.tensor] += [
                    helper.make_node("Sub", [source, first], [rest]),
                    helper.make_node("QuantizeLinear", [rest, step, names[1]], [f"{rest}@q"]),
                    helper.make_node("DequantizeLinear", [f"{rest}@q", step, names[1]], [f"{rest}@dq"]),
                    helper.make_node("Add", [first, f"{rest}@dq"], [new]),
                ]
        for name, index in point.uses:
            nodes[name].input[index] = new
    ordered: list[NodeProto] = []
    for tensor in (i.name for i in proto.graph.input):
        ordered += front.get(tensor, [])
    for n in proto.graph.node:
        ordered += [n, *(q for out in n.output for q in front.get(out, []))]
    copies = [NodeProto.FromString(n.SerializeToString()) for n in ordered]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    return proto


def read_values(made: Made, point: Point) -> np.ndarray:
    """The weight as its product reads it, without factors that it carries for later tensors; where its data stay float,
    without the factors of their channels.
    """
    values: np.ndarray = made.solution.weights[point.tensor, point.spec.axis].values()
    reader = made.float_model.node(point.uses[0][0])
    if (factor := made.solution.factors.get(reader.name)) is not None:
        axis = weight_axis(reader, values.ndim)
        values = (values / factor.reshape([-1 if i == axis else 1 for i in range(values.ndim)])).astype(values.dtype)
    divisor = made.solution.divisors.get(reader.input[0])
    if divisor is None or not point.spec.weight_only:
        return values
    axis = input_axis(reader, values.ndim)
    return np.asarray(values / divisor.reshape([-1 if i == axis else 1 for i in range(values.ndim)]))


def factors(made: Made, tensor: str) -> np.ndarray | None:
    """What the tensor is multiplied with before it is quantized, with the tensor's rank; None for nothing."""
    divisor, info = made.solution.divisors.get(tensor), made.float_model.info(tensor)
    if divisor is None or info is None or info.shape is None:
        return None
    reader = made.float_model.consumers(tensor)[0].node
    axis = 1 if reader.op_type == "Conv" else len(info.shape) - 1
    shape = [-1 if i == axis else 1 for i in range(len(info.shape))]
    return np.asarray((1 / divisor).reshape(shape), dtype=np.float32)


def off_ties(made: Made, sample: Sample, seed: int = 3) -> Sample:
    """The sample with each quantized input moved to within 0.4 steps of a code, so that no rounding can flip."""
    rng = np.random.default_rng(seed)
    moved = dict(sample)
    for name in sorted(moved.keys() & made.solution.activations.keys()):
        factor = factors(made, name)
        step = made.solution.activations[name].scale.astype(np.float64) / (1 if factor is None else factor)
        steps = np.rint(moved[name] / step) + rng.uniform(-0.4, 0.4, moved[name].shape)
        moved[name] = (steps * step).astype(moved[name].dtype)
    return moved
