"""Types and shapes of the tensors of a model, inferred without its weights. Must not change the model it was given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper

from engines.core import fp4

SMALL = 512  # elements; shape inference reads the values of constants up to here, of others type and shape only


def without_initializers(proto: ModelProto) -> ModelProto:
    """A copy of a model that leaves out the initializers of the main graph, which is nearly all of its bytes."""
    copy = ModelProto()
    for field, value in proto.ListFields():
        if field.name != "graph":
            _assign(copy, field.name, value)
    for field, value in proto.graph.ListFields():
        if field.name != "initializer":
            _assign(copy.graph, field.name, value)
    return copy


def light(proto: ModelProto) -> ModelProto:
    """A copy of a model for shape inference, where large and external constants are inputs of their type and shape."""
    copy = without_initializers(proto)
    listed = {v.name for v in copy.graph.input}
    for tensor in proto.graph.initializer:
        if math.prod(tensor.dims) <= SMALL and tensor.data_location != TensorProto.EXTERNAL:
            copy.graph.initializer.append(tensor)
        elif tensor.name not in listed:
            copy.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return copy


def inferred(proto: ModelProto) -> GraphProto:
    """The main graph of a model with what inference adds to the types and shapes that it states.

    Where inference fails, what the model states is all.
    """
    shown = light(proto)
    try:
        return onnx.shape_inference.infer_shapes(shown, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return shown.graph


def inferred_at(proto: ModelProto, inputs: Mapping[str, Sequence[int]]) -> GraphProto:
    """The main graph of a model with all shapes inferred anew at given input shapes; 1 stands for a size left open."""
    fixed = light(proto)
    del fixed.graph.value_info[:]
    for info in fixed.graph.input:
        for i, dim in enumerate(info.type.tensor_type.shape.dim):
            if info.name in inputs:
                dim.dim_value = inputs[info.name][i]
            elif not dim.dim_value:
                dim.dim_value = 1
    for info in fixed.graph.output:
        info.type.tensor_type.ClearField("shape")
    if fp4.holds_fp4(proto):
        fp4.with_function(fixed)
    return onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph


def _assign(message: ModelProto | GraphProto, name: str, value: object) -> None:
    target = getattr(message, name)
    if hasattr(target, "MergeFrom"):
        target.MergeFrom(value)
    else:
        setattr(message, name, value)
