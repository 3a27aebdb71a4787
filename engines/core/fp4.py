"""NVFP4 in types that ONNX Runtime has: it loads FP4 tensors, but has no kernel for them (1.31.1).

FP4 (E2M1) constants -> FP8 (E4M3) ones, which hold each of its values; TRT_FP4DynamicQuantize -> a function of standard
operators whose codes are FP8 too. Scales and DequantizeLinear stay as they are, so the numbers are those of the model.
Must not be given to a compiler, which would multiply in FP8.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import FunctionProto, ModelProto, TensorProto, helper, numpy_helper

QUANTIZE, DOMAIN = "TRT_FP4DynamicQuantize", "trt"
BLOCK = 16
LARGEST = 6.0  # of E2M1
OPSET = 23


def holds_fp4(model: ModelProto) -> bool:
    """Whether a model has FP4 constants or makes FP4 codes; external data is not looked at."""
    return any(t.data_type == TensorProto.FLOAT4E2M1 for t in model.graph.initializer) or any(
        node.op_type == QUANTIZE and node.domain == DOMAIN for node in model.graph.node
    )


def runnable(model: ModelProto, directory: Path | str = "") -> ModelProto:
    """The same computation without FP4: a copy, or the model itself where it has none.

    Args:
        model: with standard Q/DQ of FP4 constants, and TRT_FP4DynamicQuantize along the last axis.
        directory: of its external data.
    """
    if not holds_fp4(model):
        return model
    copy = ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT4E2M1:
            codes = numpy_helper.to_array(tensor, str(directory)).astype(ml_dtypes.float8_e4m3fn)
            tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    with_function(copy)
    return copy


def with_function(model: ModelProto) -> None:
    """Say in a model what TRT_FP4DynamicQuantize computes, for runtimes and shape inference; its own nodes stay."""
    model.functions.append(dynamic_quantize())
    for value in list(model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT4E2M1:
            model.graph.value_info.remove(value)


def dynamic_quantize() -> FunctionProto:
    """x, s -> codes, scales: blocks of BLOCK of the last axis, scales in FP8 as multiples of s.

    scale = E4M3(max |x| / LARGEST / s) of each block, codes = E2M1(x / (scale s)), rounded half to even; a block whose
    scale vanishes has the codes of scale 1. x: float32 or float16, (..., a multiple of BLOCK); s: () float32.

    Source: NVIDIA's description of NVFP4 (E2M1 with E4M3 scales of blocks of 16 and one FP32 scale per tensor).
    """
    node, constant = helper.make_node, _constant
    numbers = {"largest": LARGEST, "smallest": -LARGEST, "one": 1, "zero": 0, "half": 0.5, "two": 2, "four": 4}
    nodes = [
        *(constant(name, np.float32(value)) for name, value in numbers.items()),
        constant("last", np.array([-1], dtype=np.int64)),
        constant("blocks", np.array([-1, BLOCK], dtype=np.int64)),
        node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        node("Shape", ["x"], ["shape"]),
        node("Shape", ["x"], ["outer"], end=-1),
        node("Concat", ["outer", "blocks"], ["blocked"], axis=0),
        node("Concat", ["outer", "last"], ["counted"], axis=0),
        node("Reshape", ["wide", "blocked"], ["grouped"]),
        node("Abs", ["grouped"], ["size"]),
        node("ReduceMax", ["size", "last"], ["most"], keepdims=1),
        node("Div", ["most", "largest"], ["step"]),
        node("Div", ["step", "s"], ["multiple"]),
        node("Reshape", ["multiple", "counted"], ["multiples"]),
        node("Cast", ["multiples"], ["scales"], to=TensorProto.FLOAT8E4M3FN),
        node("Cast", ["scales"], ["kept"], to=TensorProto.FLOAT),
        node("Mul", ["kept", "s"], ["real"]),
        node("Equal", ["real", "zero"], ["vanished"]),
        node("Where", ["vanished", "one", "real"], ["positive"]),
        node("Unsqueeze", ["positive", "last"], ["each"]),
        node("Div", ["grouped", "each"], ["scaled"]),
        node("Clip", ["scaled", "smallest", "largest"], ["clipped"]),
        node("Abs", ["clipped"], ["magnitude"]),
        # The grid is 0, 0.5 ... 2, 3, 4, 6: steps of a half below 2, of one below 4, then of two.
        node("Less", ["magnitude", "two"], ["low"]),
        node("Less", ["magnitude", "four"], ["middle"]),
        node("Where", ["middle", "one", "two"], ["coarse"]),
        node("Where", ["low", "half", "coarse"], ["grid"]),
        node("Div", ["clipped", "grid"], ["steps"]),
        node("Round", ["steps"], ["rounded"]),
        node("Mul", ["rounded", "grid"], ["values"]),
        node("Reshape", ["values", "shape"], ["whole"]),
        node("Cast", ["whole"], ["codes"], to=TensorProto.FLOAT8E4M3FN),
    ]
    ends, opsets = (["x", "s"], ["codes", "scales"]), [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, QUANTIZE, *ends, nodes, opsets, attributes=["axis", "block_size", "scale_type"])


def _constant(name: str, value: np.ndarray | np.generic) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value), name))
