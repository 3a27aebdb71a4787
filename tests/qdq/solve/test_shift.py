"""No tensor is shifted where what is made of it tells an exact zero from a rounding."""

from __future__ import annotations

import graphs
import numpy as np
import pytest
from graphs import build, node, normal
from onnx import TensorProto

from qdq.assemble.quantize import quantize
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.settings import Settings
from qdq.solve.shift import shifts

EPS = np.float32(1e-12)


def behind(nodes: list[object], *, bias: bool = False, eps: float = 1e-12) -> Model:
    """x -> MatMul (-> Add of a bias) -> what reads its output, `m`."""
    front = [node("MatMul", "x w", "n" if bias else "m")] + [node("Add", "n bias", "m")] * bias
    constants = {
        "w": normal(8, 6),
        "bias": normal(6),
        "eps": np.float32(eps),
        "zero": np.float32(0),
        "one": np.float32(1),
        "minus": np.float32(-1),
        "last": np.array([-1]),
    }
    read = {name for n in [*front, *nodes] for name in n.input}  # type: ignore[attr-defined]
    return build([*front, *nodes], {"x": (4, 8)}, {k: v for k, v in constants.items() if k in read})


def normalized(eps: str = "eps") -> list[object]:
    return [node("ReduceL2", "m last", "l"), node("Max", f"l {eps}", "c"), node("Div", "m c", "y")]


def root() -> list[object]:
    return [
        node("Mul", "m m", "q"),
        node("ReduceMean", "q last", "r"),
        node("Add", "r eps", "s"),
        node("Sqrt", "s", "t"),
        node("Reciprocal", "t", "u"),
        node("Mul", "m u", "y"),
    ]


def shifted(model: Model) -> bool:
    (point,) = placement.plan(model, Settings(shift=True)).activations
    return shifts(model, point)


@pytest.mark.parametrize(
    ("nodes", "bias", "eps", "expected"),
    [
        (normalized(), False, 1e-12, False),
        (normalized(), True, 1e-12, True),  # a bias: no zeros to keep
        (normalized(), False, 1e-3, True),  # hides a rounding
        (normalized("one"), False, 1e-12, True),
        (root(), False, 1e-12, False),
        (root(), False, 1e-5, True),
        ([node("LpNormalization", "m", "y")], False, 0, False),
        ([node("Pow", "m minus", "y")], False, 0, False),
        ([node("Pow", "m one", "y")], False, 0, True),
        ([node("Greater", "m zero", "g"), node("Where", "g m zero", "y")], False, 0, False),
        ([node("Greater", "m one", "g"), node("Where", "g m one", "y")], False, 0, True),
        ([node("Cast", "m", "g", to=TensorProto.BOOL), node("Where", "g m one", "y")], False, 0, False),
        ([node("Relu", "m", "r"), node("Sign", "r", "y")], False, 0, False),
        ([node("Exp", "m", "e"), node("Reciprocal", "e", "y")], False, 0, True),
        ([node("Relu", "m", "y")], False, 0, True),
    ],
)
def test_where_zeros_count_behind_a_product_its_data_are_not_shifted(
    nodes: list[object], bias: bool, eps: float, expected: bool
) -> None:
    assert shifted(behind(nodes, bias=bias, eps=eps)) == expected


def test_rows_of_zeros_stay_zeros_behind_a_normalization() -> None:
    model = behind(normalized())
    data = [{"x": np.abs(s["x"]) * (np.arange(4) < 2)[:, None].astype(np.float32)} for s in graphs.samples(model, 4)]
    made = quantize(model, data, settings=Settings(shift=True))
    (found,) = graphs.run(made.model, data[:1])
    assert not found["y"][2:].any()
    assert found["y"][:2].all()
