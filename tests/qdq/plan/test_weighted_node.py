"""A weighted node says what its numbers do: from its fields alone its product is that of ONNX Runtime."""

from __future__ import annotations

import graphs
import numpy as np
import pytest
from graphs import build, node, normal
from onnx import NodeProto

from engines.core.documents import replace
from qdq.core.errors import InputError
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.settings import Settings
from qdq.plan.weighted_node import WeightedNode, by_data, by_weight, weighted_nodes

# node, shapes of data, weight and bias; output and input axis, groups and columns
CASES: dict[str, tuple[NodeProto, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "Conv": (node("Conv", "x w b", "y", pads=[1, 0, 2, 1]), (2, 4, 6, 7), (8, 4, 3, 2), (8,), (0, 1, 1, 24)),
    "Conv1d without bias": (node("Conv", "x w", "y"), (1, 4, 6), (8, 4, 3), (), (0, 1, 1, 12)),
    "strides and dilations": (
        node("Conv", "x w", "y", strides=[2, 1], dilations=[1, 2]), (1, 3, 9, 8), (4, 3, 2, 3), (), (0, 1, 1, 18),
    ),
    "grouped Conv": (node("Conv", "x w b", "y", group=4), (1, 8, 5, 5), (12, 2, 3, 3), (12,), (0, 1, 4, 18)),
    "Gemm": (node("Gemm", "x w b", "y", alpha=0.5, beta=2.0), (5, 6), (6, 8), (8,), (1, 0, 1, 6)),
    "Gemm transB": (node("Gemm", "x w", "y", transB=1), (5, 6), (8, 6), (), (0, 1, 1, 6)),
    "Gemm transA": (node("Gemm", "x w b", "y", transA=1), (6, 5), (6, 8), (8,), (1, 0, 1, 6)),
    "Gemm transA, transB": (node("Gemm", "x w", "y", transA=1, transB=1), (6, 5), (8, 6), (), (0, 1, 1, 6)),
    "MatMul": (node("MatMul", "x w", "y"), (3, 5, 6), (6, 8), (), (1, 0, 1, 6)),
    "batched MatMul": (node("MatMul", "x w", "y"), (3, 5, 6), (3, 6, 8), (), (2, 1, 1, 6)),
}  # fmt: skip


def weighted(model: Model, **settings: object) -> dict[str, WeightedNode]:
    return weighted_nodes(model, placement.plan(model, Settings(**settings)))  # type: ignore[arg-type]


def made(name: str) -> tuple[Model, WeightedNode]:
    only, data, weight, bias, _ = CASES[name]
    model = build([only], {"x": data}, {"w": normal(*weight)} | ({"b": normal(*bias)} if bias else {}))
    (found,) = weighted(model).values()
    return model, found


def computed(found: WeightedNode, values: dict[str, np.ndarray]) -> np.ndarray:
    """What the fields say that the node computes, in float64."""
    x, w = (values[name].astype(np.float64) for name in (found.data, found.weight))
    bias = values[found.bias].astype(np.float64) if found.bias else np.zeros(1)
    if found.window is None:
        matrix = np.moveaxis(w, (found.input_axis, found.output_axis), (-2, -1))
        return found.alpha * ((x.T if found.data_transposed else x) @ matrix) + found.beta * bias
    half, window = found.spatial, found.window
    pads = zip(window.pads[:half], window.pads[half:], strict=True)
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    reach = [d * (k - 1) + 1 for d, k in zip(window.dilations, found.shape[2:], strict=True)]
    sizes = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, window.strides, strict=True)]
    apart = x.reshape(x.shape[0], found.groups, found.shape[found.input_axis], *x.shape[2:])
    kernels = np.moveaxis(w, (found.output_axis, found.input_axis), (0, 1))
    kernels = kernels.reshape(found.groups, -1, found.columns)
    y = np.empty((x.shape[0], kernels.shape[0] * kernels.shape[1], *sizes))
    for place in np.ndindex(*sizes):
        corner = [p * s for p, s in zip(place, window.strides, strict=True)]
        part = tuple(slice(c, c + r, d) for c, r, d in zip(corner, reach, window.dilations, strict=True))
        patch = apart[(slice(None), slice(None), slice(None), *part)].reshape(x.shape[0], found.groups, found.columns)
        y[(slice(None), slice(None), *place)] = np.einsum("ngc,goc->ngo", patch, kernels).reshape(x.shape[0], -1)
    return y + bias.reshape(-1, *(1,) * half)


@pytest.mark.parametrize("name", CASES)
def test_the_fields_say_what_the_node_computes(name: str) -> None:
    model, found = made(name)
    (data,) = graphs.samples(model, 1)
    (expected,) = graphs.run(model, [data])
    y = computed(found, {**data, **{tensor: model.array(tensor) for tensor in model.initializers}})
    np.testing.assert_allclose(y, expected[found.output], rtol=1e-4, atol=1e-4)
    assert y.shape[found.channel_axis] == found.shape[found.output_axis]
    assert found.data_transposed or data["x"].shape[found.channel_axis] == found.groups * found.shape[found.input_axis]


@pytest.mark.parametrize("name", CASES)
def test_axes_operands_and_specs(name: str) -> None:
    only, _, weight, bias, numbers = CASES[name]
    model, found = made(name)
    assert (found.name, found.op_type) == (only.name, only.op_type)
    assert (found.data, found.weight, found.bias, found.output) == ("x", "w", "b" if bias else "", "y")
    assert found.shape == weight
    assert (found.output_axis, found.input_axis, found.groups, found.columns) == numbers
    plan = placement.plan(model)
    assert (found.spec, found.data_spec) == (plan.weights[0].spec, plan.activations[0].spec)
    assert found.key == ("w", found.output_axis)


def test_weight_only_leaves_the_data_float() -> None:
    (found,) = weighted(graphs.product(weight=(64, 32), data=(4, 64)), scheme="int4").values()
    assert found.data_spec is None and found.spec.weight_only and found.key == ("w", found.input_axis)


def test_pads_that_only_a_sample_decides_are_named() -> None:
    (found,) = weighted(graphs.conv((6, 4, 3, 3), ("h", "w"), auto_pad="SAME_LOWER", strides=[2, 2])).values()
    assert found.window is not None
    assert (found.window.auto_pad, found.window.pads) == ("SAME_LOWER", (0, 0, 0, 0))


def test_a_shared_weight_is_one_weight_per_axis_and_its_readers_stand_in_order() -> None:
    nodes = [
        node("MatMul", "x w", "a", name="one"),
        node("MatMul", "z w", "c", name="two"),
        node("Gemm", "c w", "y", name="back", transB=1),
    ]
    model = build(nodes, {"x": (3, 6), "z": (2, 6)}, {"w": normal(6, 4)}, outputs=("a", "y"))
    found = weighted(model)
    assert {key: [n.name for n in each] for key, each in by_weight(found.values()).items()} == {
        ("w", 1): ["one", "two"],
        ("w", 0): ["back"],
    }
    assert {t: [n.name for n in each] for t, each in by_data(found.values()).items()} == {
        "x": ["one"],
        "z": ["two"],
        "c": ["back"],
    }


def test_nodes_that_stay_float_are_left_out() -> None:
    model = graphs.attention()
    names = list(weighted(model))
    assert list(weighted(model, exclude=(names[0],))) == names[1:]


def test_an_axis_that_no_kernel_sums_over_is_refused_by_name() -> None:
    model = graphs.product(weight=(64, 32), data=(4, 64))
    plan = placement.plan(model, Settings(scheme="int4"))
    points = tuple(replace(p, spec=replace(p.spec, axis=1)) for p in plan.points)
    with pytest.raises(InputError, match=r"the reduction of .matmul. lie on axis 0"):
        weighted_nodes(model, replace(plan, points=points))
