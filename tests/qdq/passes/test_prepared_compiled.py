"""What `prepare` writes in another form is compiled by TensorRT-RTX, and its weights multiply in INT8."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import node, normal, quantized
from raw_models import Shape, feeds, raw

from engines.backends import rtx
from engines.backends.compiler import ShapeRange
from engines.core.errors import BuildError
from engines.verify import audit
from qdq.model.model import Model
from qdq.passes.prepare import prepare

pytest.importorskip("tensorrt_rtx")
SIZES = {"n": 2, "l": 20, "h": 16, "e": 16, "a": 4}


def compiled(model: Model, *, refused: str = "") -> tuple[float, float]:
    """Kernels of the float model, and the share of INT8 of the quantized one; `refused` is said of the raw model."""
    shapes = {i.name: ShapeRange.fixed([SIZES.get(str(d), d) for d in i.shape or ()]) for i in model.inputs}  # type: ignore[misc, arg-type]
    if refused:
        with pytest.raises(BuildError, match=refused):
            rtx.build(model.proto, shapes=shapes)
    done = prepare(model)
    kernels = rtx.build(done.proto, shapes=shapes).table.kernels
    made = quantized(done, [feeds(done, SIZES, seed) for seed in range(3)]).model.proto
    return kernels, audit.audit(made, rtx.build(made, shapes=shapes).table, shapes=shapes).int8_share


@pytest.mark.parametrize(
    ("equation", "data", "weight"),
    [
        ("bchw,oc->bohw", ("n", 64, "h", 16), (128, 64)),
        ("nld,hdk->nhlk", ("n", "l", 64), (4, 64, 32)),
        ("nhlk,hkd->nld", ("n", 4, "l", 32), (4, 32, 64)),
        ("bthi,hij->bthj", ("n", "l", 4, 64), (4, 64, 32)),
    ],
)
def test_einsum_runs_in_int8(equation: str, data: Shape, weight: tuple[int, ...]) -> None:
    nodes = [node("Einsum", "x w", "y", "sum", equation=equation)]
    assert compiled(raw(nodes, {"x": data}, {"w": normal(*weight)}))[1] == 1


def test_a_left_weight_runs_in_int8_and_costs_no_kernel_in_float() -> None:
    model = raw([node("MatMul", "w x", "y", "product")], {"x": ("n", 64, "l")}, {"w": normal(128, 64)})
    assert compiled(model) == (1, 1)
    model = raw([node("Gemm", "w x c", "y", "p")], {"x": (64, "l")}, {"w": normal(128, 64), "c": normal(128, 1)})
    assert compiled(model) == (1, 1)


def test_statistics_of_a_norm_compile() -> None:
    nodes = [
        node("MatMul", "x w", "n"),
        node("LayerNormalization", "n s b", "m mean inv", "ln"),
        node("Mul", "m inv", "y"),
    ]
    tensors = {"w": normal(64, 64), "s": normal(64), "b": normal(64)}
    assert compiled(raw(nodes, {"x": ("n", 64)}, tensors), refused="outputs for LayerNormalization")[1] == 1


@pytest.mark.parametrize("kind", ["static", "two axes", "dynamic", "elements"])
def test_scattered_sums_compile(kind: str) -> None:
    tensors, inputs = {"w": normal(64, 64)}, {"x": ("e", 64), "i": (("e", 1), "int64"), "z": ("a", 64)}
    nodes = [node("MatMul", "x w", "u"), node("ScatterND", "z i u", "y", "sum", reduction="add")]
    if kind == "static":
        inputs = {"x": (16, 64), "i": ((16, 1), "int64")}
        tensors["z"] = np.zeros((8, 64), np.float32)
    elif kind == "two axes":
        inputs = {"x": ("e", 64), "i": (("e", 2), "int64"), "z": ("a", 4, 64)}
    elif kind == "elements":
        inputs = {"x": (4, 16, 64), "i": ((4, 16, 64), "int32"), "z": (4, 8, 64)}
        nodes[-1] = node("ScatterElements", "z i u", "y", "sum", axis=1, reduction="add")
    assert compiled(raw(nodes, inputs, tensors), refused="educ")[1] > 0.7  # type: ignore[arg-type]


@pytest.mark.parametrize("group", [1, 4])
def test_a_strided_and_dilated_transposed_convolution_compiles(group: int) -> None:
    nodes = [
        node("ConvTranspose", "x w", "a", "up", strides=[2, 1], dilations=[2, 2], group=group),
        node("Conv", "a v", "y"),
    ]
    model = raw(nodes, {"x": ("n", 16, 6, 6)}, {"w": normal(16, 4, 3, 3), "v": normal(8, 4 * group, 1, 1)})
    assert compiled(model, refused="Strided & Dilated")[1] > 0
