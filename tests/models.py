"""Tiny float graphs and samples that several tests share, built in code from a seeded generator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def constant(name: str, array: np.ndarray) -> TensorProto:
    """An initializer holding an array."""
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def assemble(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str | None]],
    outputs: dict[str, Sequence[int | str | None]],
    initializers: Sequence[TensorProto] = (),
    *,
    opset: int = 17,
) -> onnx.ModelProto:
    """A checked float32 model."""
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    graph = helper.make_graph(list(nodes), "tiny", *ends, list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def segmenter(
    *, spatial: Sequence[int | str] = (8, 8), classes: int = 3, inputs: int = 1, width: int = 4, seed: int = 0
) -> onnx.ModelProto:
    """image (1, inputs, *spatial) -> /encode/Conv -> Relu -> /head/Conv -> logits (1, classes, *spatial); 2-D, 3-D."""
    rng = np.random.default_rng(seed)
    rank = len(spatial)
    kernel, pads = (3,) * rank, [1] * (2 * rank)
    weights = {
        "encode.weight": rng.normal(0, 0.5, (width, inputs, *kernel)),
        "encode.bias": rng.normal(0, 0.1, width),
        "head.weight": rng.normal(0, 0.5, (classes, width, *kernel)),
        "head.bias": rng.normal(0, 0.1, classes),
    }
    nodes = [
        helper.make_node("Conv", ["image", "encode.weight", "encode.bias"], ["a"], name="/encode/Conv", pads=pads),
        helper.make_node("Relu", ["a"], ["b"], name="/encode/Relu"),
        helper.make_node("Conv", ["b", "head.weight", "head.bias"], ["logits"], name="/head/Conv", pads=pads),
    ]
    tensors = [constant(name, array.astype(np.float32)) for name, array in weights.items()]
    return assemble(nodes, {"image": (1, inputs, *spatial)}, {"logits": (1, classes, *spatial)}, tensors)


def images(count: int, shape: Sequence[int] = (1, 1, 8, 8), *, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Samples for `segmenter`: standard normal values."""
    rng = np.random.default_rng(seed)
    return [{"image": rng.normal(size=tuple(shape)).astype(np.float32)} for _ in range(count)]


def save_samples(folder: Path, samples: Sequence[dict[str, np.ndarray]]) -> Path:
    """A folder with one .npz per sample."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, sample in enumerate(samples):
        np.savez(folder / f"{index:03}.npz", **sample)
    return folder
