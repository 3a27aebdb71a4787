"""ONNX's own tests of single operators, for the tools that walk them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

RANDOM = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


@cache
def collected() -> tuple[Any, ...]:
    """All of ONNX's node tests; onnx makes them once in a process, and then only those first asked for."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(case for case in collect_testcases(None) if case.model is not None)


def feeds(case: Any) -> dict[str, Any]:
    """The inputs of a test by name: arrays, lists of them for a sequence, None for an empty optional value."""
    given = case.data_sets[0][0] if case.data_sets else []
    arrays = [np.asarray(each) if isinstance(each, np.generic) else each for each in given]
    return dict(zip((v.name for v in case.model.graph.input), arrays, strict=False))


def are_numbers(sample: dict[str, Any]) -> bool:
    """Whether all inputs are tensors of numbers or booleans, as samples are."""
    return all(isinstance(array, np.ndarray) and array.dtype.kind in "fiub" for array in sample.values())


def with_constants(proto: ModelProto, sample: dict[str, np.ndarray]) -> ModelProto:
    """The same model, in which all inputs but the first that is float32 are constants, as weights and shapes are."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    fed = next((v.name for v in proto.graph.input if v.type.tensor_type.elem_type == TensorProto.FLOAT), "")
    for name, array in sample.items():
        if name != fed:
            copy.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    kept = [v for v in proto.graph.input if v.name == fed]
    del copy.graph.input[:]
    copy.graph.input.extend(kept)
    return copy


def float_tests() -> Iterator[tuple[str, ModelProto, dict[str, np.ndarray]]]:
    """Name, model and inputs of each test that has a float input or output and tensors alone."""
    for case in collected():
        kinds = {v.type.tensor_type.elem_type for v in (*case.model.graph.input, *case.model.graph.output)}
        if case.data_sets and TensorProto.FLOAT in kinds and are_numbers(sample := feeds(case)):
            yield case.name, case.model, sample
