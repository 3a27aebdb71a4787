"""What depends on no input is computed, whatever operators lead to it; and what must stay stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import node, normal
from onnx import NodeProto, TensorProto
from raw_models import operators, prepared_alike, raw

from qdq.passes.fold import why_kept
from qdq.plan import placement

V, G = normal(8, 4, 3), np.abs(normal(8, 1, 1, seed=1)) + 0.5
LAST = np.int64([1, 2])

CHAINS: dict[str, tuple[list[NodeProto], dict[str, np.ndarray]]] = {
    "L2 norm": ([node("ReduceL2", "v ax", "n"), node("Div", "g n", "d"), node("Mul", "v d", "w")], {"ax": LAST}),
    "L1 norm": ([node("ReduceL1", "v ax", "n"), node("Div", "v n", "w")], {"ax": LAST}),
    "squares": (
        [
            node("ReduceSumSquare", "v ax", "s"),
            node("Sqrt", "s", "n"),
            node("Div", "v n", "u"),
            node("Mul", "u g", "w"),
        ],
        {"ax": LAST},
    ),
    "LpNormalization": ([node("LpNormalization", "v", "u", axis=1, p=1), node("Mul", "u g", "w")], {}),
    "expanded": (
        [node("Expand", "g big", "e"), node("Mul", "v e", "w")],
        {"big": np.int64([8, 4, 3])},
    ),
    "Einsum": ([node("Einsum", "a v", "w", equation="oi,ick->ock")], {"a": normal(8, 8, seed=2)}),
    "low rank": (
        [node("MatMul", "a b", "ab"), node("Reshape", "ab big", "d"), node("Sum", "v d", "w")],
        {"a": normal(8, 2), "b": normal(2, 12), "big": np.int64([8, 4, 3])},
    ),
    "half": (
        [node("Cast", "v", "h", "down", to=TensorProto.FLOAT16), node("Cast", "h", "w", to=TensorProto.FLOAT)],
        {},
    ),
    "like": ([node("CastLike", "i x", "f"), node("Mul", "v f", "w")], {"i": np.int64([[[2]]])}),
    "codes": (
        [node("Cast", "q", "f", to=TensorProto.FLOAT), node("Mul", "f g", "w")],
        {"q": np.arange(-48, 48).astype(np.int8).reshape(8, 4, 3)},
    ),
    "standardized": (
        [
            node("ReduceMean", "v ax", "m"),
            node("Sub", "v m", "c"),
            node("ReduceSumSquare", "c ax", "s", "squares"),
            node("Max", "s tiny", "t"),
            node("Sqrt", "t", "r"),
            node("Div", "c r", "w"),
        ],
        {"ax": LAST, "tiny": np.float32(1e-6)},
    ),
    "masked": (
        [
            node("Sign", "v", "s"),
            node("Abs", "v", "a"),
            node("Clip", "a lo", "c"),
            node("Mul", "s c", "p"),
            node("Greater", "a lo", "k"),
            node("Where", "k p z", "w"),
        ],
        {"lo": np.float32(0.2), "z": np.float32(0)},
    ),
    "joined": (
        [
            node("Split", "v", "p q", num_outputs=2),
            node("Neg", "q", "r"),
            node("PRelu", "r g4", "t"),
            node("Concat", "p t", "w", axis=0),
        ],
        {"g4": np.float32([0.3])},
    ),
    "softmax": ([node("Softmax", "v", "w", axis=0)], {}),
    "filled": (
        [
            node("ConstantOfShape", "big", "o", value=onnx.numpy_helper.from_array(np.float32([2]))),
            node("Add", "v o", "w"),
        ],
        {"big": np.int64([8, 4, 3])},
    ),
    "sorted": (
        [node("TopK", "v two", "t i", axis=2), node("Pad", "t pads", "u"), node("Neg", "u", "w")],
        {"two": np.int64([2])},
    ),
    "convolved": ([node("Conv", "v k", "w", "inner", pads=[1, 1])], {"k": normal(4, 4, 3, seed=3)}),
    "pooled": ([node("MaxPool", "v", "w", kernel_shape=[2])], {}),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_weight_behind_constants_is_quantized(name: str) -> None:
    nodes, tensors = CHAINS[name]
    tensors = {"v": V, "g": G, "pads": np.int64([0, 0, 0, 0, 0, 1]), **tensors}
    model = raw([*nodes, node("Conv", "x w", "y", "conv")], {"x": (1, 4, 9)}, tensors)
    done = prepared_alike(model)
    assert operators(done) == ["Conv"]
    assert placement.plan(done).quantized_nodes == ("conv",)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_large_weight_stored_in_another_type_is_computed(dtype: str) -> None:
    weight = normal(640, 900).astype(dtype)  # 1.1 MB as float16: its float32 form is larger than both limits
    nodes = [
        node("Cast", "v", "f", to=TensorProto.FLOAT),
        node("Transpose", "f", "w"),
        node("MatMul", "x w", "y", "mm"),
    ]
    done = prepared_alike(raw(nodes, {"x": (2, 900)}, {"v": weight}))
    assert operators(done) == ["MatMul"]


def test_a_large_gain_expanded_to_its_weight_is_computed() -> None:
    nodes = [node("Expand", "g big", "e"), node("Mul", "v e", "w"), node("MatMul", "x w", "y")]
    tensors = {"g": normal(1, 700), "v": normal(500, 700), "big": np.int64([500, 700])}
    assert operators(prepared_alike(raw(nodes, {"x": (2, 500)}, tensors))) == ["MatMul"]


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([node("RandomNormalLike", "v", "r"), node("Add", "x r", "z"), node("Sub", "z r", "y")], "random"),
        (
            [node("QuantizeLinear", "v s", "q"), node("DequantizeLinear", "q s", "d"), node("Add", "x d", "y")],
            "quantized",
        ),
    ],
)
def test_what_must_stay_stays(nodes: list[NodeProto], reason: str) -> None:
    done = prepared_alike(raw(nodes, {"x": (4,)}, {"v": normal(4), "s": np.float32(0.1)}), floor_db=60)
    assert nodes[0].op_type in operators(done) and reason in why_kept(nodes[0].op_type)


def test_what_is_computed_element_by_element_has_a_limit() -> None:
    nodes = [node("Resize", "v - - size", "r", mode="nearest"), node("Add", "x r", "y")]
    for side, folded in ((64, True), (256, False)):
        model = raw(nodes, {"x": (1, 3, side, side)}, {"v": normal(1, 3, 8, 8), "size": np.int64([1, 3, side, side])})
        assert ("Resize" not in operators(prepared_alike(model))) is folded


def test_half_floats_are_summed_as_kernels_sum_them() -> None:
    """1 + 4096 times 2^-11 is 3; summed in FP16 one after the other it stays 1."""
    values = np.full((1, 4097), 2.0**-11, np.float16)
    values[0, 0] = 1
    nodes = [node("ReduceSum", "v ax", "s", keepdims=0), node("Cast", "s", "f", to=1), node("Mul", "x f", "y")]
    done = prepared_alike(raw(nodes, {"x": (1,)}, {"v": values, "ax": np.int64([1])}), floor_db=40)
    assert operators(done) == ["Mul"] and done.array("f").item() == 3
