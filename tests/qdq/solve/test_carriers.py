"""Factors that constants of earlier nodes carry: the same outputs, no Mul, and nothing changed that others read."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import pytest
from graphs import build, node, normal, quantized
from onnx import helper, numpy_helper

from engines.backends import rtx
from engines.core.documents import replace
from qdq.assemble.insert import insert
from qdq.core.qtensor import QTensor
from qdq.model.model import Model
from qdq.model.nodes import input_axis, weight_axis
from qdq.plan.weighted_node import WeightedNode, weighted_nodes
from qdq.solve.equalize.carriers import find
from qdq.solve.weights import quantize_weight

C = 16  # channels of t
SQUARE = {"w": normal(C, C, seed=1), "v": normal(C, 24, seed=2), "b": normal(C, seed=3), "g": normal(C, seed=4)}
MATRIX = {"x": (4, 10, C)}
FILTERS = {
    "k": normal(C, 8, 3, 3, seed=1),
    "b": normal(C, seed=3),
    "g": normal(C, seed=4),
    "f": normal(6, C, 3, 3, seed=2),
}
PLANES = {"x": (2, 8, 9, 9)}
LAST = node("MatMul", "t v", "y", "last")
FINAL = node("Conv", "t f", "y", "last", pads=[1] * 4)
FIRST = node("Conv", "x k b", "a", "first")

# nodes, inputs, constants, the nodes whose constants carry the factors, whether a weight is among them
CASES = {
    "layer norm": ([node("LayerNormalization", "x g b", "t", "norm"), LAST], MATRIX, SQUARE, {"norm"}, False),
    "gain": ([node("Mul", "g x", "t", "gain"), LAST], MATRIX, SQUARE, {"gain"}, False),
    "gain and bias": (
        [node("Mul", "x g", "a", "gain"), node("Add", "a b", "t", "bias"), LAST],
        MATRIX, SQUARE, {"gain", "bias"}, False,
    ),
    "divided by a constant": ([node("Div", "x g", "t", "gain"), LAST], MATRIX, SQUARE, {"gain"}, False),
    "one constant for all": (
        [node("Mul", "x c", "t", "gain"), LAST], MATRIX, SQUARE | {"c": np.float32([2])}, {"gain"}, False
    ),
    "MatMul with bias": (
        [node("MatMul", "x w", "a", "first"), node("Add", "b a", "r", "bias"), node("Relu", "r", "t"), LAST],
        MATRIX, SQUARE, {"first", "bias"}, True,
    ),
    "Gemm": (
        [node("Gemm", "x w b", "a", "first", transB=1, alpha=0.5, beta=2.0), node("LeakyRelu", "a", "t"), LAST],
        {"x": (10, C)}, SQUARE, {"first"}, True,
    ),
    "gated": (
        [
            node("MatMul", "x w", "u", "up"), node("MatMul", "x q", "p", "gate"), node("Sigmoid", "p", "s"),
            node("Mul", "s u", "t", "gated"), LAST,
        ],
        MATRIX, SQUARE | {"q": normal(C, C, seed=5)}, {"up"}, True,
    ),
    "Conv and pool": (
        [FIRST, node("Relu", "a", "r"), node("MaxPool", "r", "t", kernel_shape=[2, 2]), FINAL],
        PLANES, FILTERS, {"first"}, True,
    ),
    "instance norm": (
        [FIRST, node("InstanceNormalization", "a g b", "t", "norm"), FINAL], PLANES, FILTERS, {"norm"}, False
    ),
    "two readers": (
        [
            node("LayerNormalization", "x g b", "t", "norm"), LAST, node("MatMul", "t w", "z", "second"),
            node("Add", "g z", "o"),
        ],
        MATRIX, SQUARE, {"norm"}, False,
    ),
}  # fmt: skip


def make(name: str) -> Model:
    nodes, inputs, tensors, *_ = CASES[name]
    made = {output for n in nodes for output in n.output}
    read = {i for n in nodes for i in n.input}
    used = {key: value for key, value in tensors.items() if key in read}
    return build(nodes, inputs, used, outputs=sorted(made - read))


def readers(model: Model) -> list[onnx.NodeProto]:
    return [use.node for use in model.consumers("t") if use.node.op_type in ("Conv", "MatMul", "Gemm")]


def weighted(model: Model) -> dict[str, WeightedNode]:
    return weighted_nodes(model, graphs.placement.plan(model))


@pytest.mark.parametrize("name", CASES)
def test_carried_factors_leave_the_float_outputs_equal_and_divide_the_tensor(name: str) -> None:
    model = make(name)
    *_, nodes, linear = CASES[name]
    carrier = find(model, "t", C, readers=weighted(model).values())
    assert carrier is not None
    assert ({o.node for o in carrier.operands}, carrier.linear is not None) == (nodes, linear)
    divisor = np.geomspace(0.02, 1, C)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    by_name = {n.name: n for n in proto.graph.node}

    def put(reader: str, index: int, values: np.ndarray) -> None:
        name = f"{reader}_{index}"
        proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        by_name[reader].input[index] = name

    for operand in carrier.operands:
        values = model.array(model.node(operand.node).input[operand.index])
        put(operand.node, operand.index, operand.times(values, 1 / divisor))
    for reader in readers(model):
        values = model.array(reader.input[1])
        shape = [-1 if i == input_axis(reader, values.ndim) else 1 for i in range(values.ndim)]
        put(reader.name, 1, (values * divisor.reshape(shape)).astype(np.float32))
    shown = [o.name for o in proto.graph.output]
    data = graphs.samples(model, 3)
    for other in (proto, plain := onnx.ModelProto.FromString(model.proto.SerializeToString())):
        other.graph.output.append(helper.make_empty_tensor_value_info("t"))
    for changed, expected in zip(graphs.run(proto, data), graphs.run(plain, data), strict=True):
        for output in shown:
            assert np.abs(changed[output] - expected[output]).max() <= 1e-5 * np.abs(expected[output]).max()
        axis = 1 if readers(model)[0].op_type == "Conv" else -1
        shape = [-1 if i == axis % expected["t"].ndim else 1 for i in range(expected["t"].ndim)]
        scaled = changed["t"] * divisor.reshape(shape)
        assert np.abs(scaled - expected["t"]).max() <= 1e-5 * np.abs(expected["t"]).max()


GEMM = node("MatMul", "x w", "a", "first")
REFUSED = {
    "read by a node that is not quantized": [GEMM, node("Relu", "a", "t"), LAST, node("Sigmoid", "t", "o")],
    "read on the way": [GEMM, node("Relu", "a", "t"), LAST, node("Sigmoid", "a", "o")],
    "not homogeneous": [GEMM, node("Sigmoid", "a", "t"), LAST],
    "cut off above": [GEMM, node("Clip", "a - six", "t"), LAST],
    "a graph input": [node("MatMul", "t v", "y", "last")],
    "a square": [GEMM, node("Mul", "a a", "t"), LAST],
    "a sum of two": [GEMM, node("Add", "a x", "t"), LAST],
    "its weight read twice": [GEMM, node("Relu", "a", "t"), LAST, node("MatMul", "x w", "o", "again")],
    "constant per row": [node("Mul", "x rows", "t"), LAST],
}


@pytest.mark.parametrize("why", REFUSED)
def test_nothing_is_carried_where_other_values_would_change(why: str) -> None:
    nodes = REFUSED[why]
    tensors = SQUARE | {"six": np.asarray(6, np.float32), "rows": normal(10, 1)}
    made, read = {o for n in nodes for o in n.output}, {i for n in nodes for i in n.input}
    start = "t" if "t" not in made else "x"
    used = {key: value for key, value in tensors.items() if key in read}
    model = build(nodes, {start: (4, 10, C)}, used, outputs=sorted(made - read))
    assert find(model, "t", C, readers=[weighted(model)["last"]]) is None


def test_a_tensor_that_is_an_output_too_is_left_alone() -> None:
    nodes = [node("LayerNormalization", "x g b", "t", "norm"), LAST]
    model = build(nodes, MATRIX, {k: SQUARE[k] for k in "gbv"}, outputs=("t", "y"))
    assert find(model, "t", C, readers=[weighted(model)["last"]]) is None


POWERS = np.geomspace(1, 15, C).astype(np.float32)


def spread(name: str) -> Model:
    """A case whose t has channels of unlike range, all of which matter."""
    nodes, inputs, tensors, *_ = CASES[name]
    made, read = {output for n in nodes for output in n.output}, {i for n in nodes for i in n.input}
    used = {key: value.copy() for key, value in tensors.items() if key in read}
    for key in used.keys() & {"g", "b"}:
        used[key] *= POWERS
    if "g" not in used:
        first = "k" if "k" in used else "w"
        axis = 0 if first == "k" or name == "Gemm" else 1
        used[first] *= POWERS.reshape([-1 if i == axis else 1 for i in range(used[first].ndim)])
    for key in used.keys() & {"v", "f"}:
        axis = 0 if key == "v" else 1
        used[key] /= POWERS.reshape([-1 if i == axis else 1 for i in range(used[key].ndim)])
    return build(nodes, inputs, used, outputs=sorted(made - read))


def divides(model: Model) -> bool:
    """Whether a Mul divides the channels of t."""
    return any(n.op_type == "Mul" and n.input[0] == "t" for n in model.graph.node)


PRODUCTS = ["layer norm", "MatMul with bias", "Gemm", "gated", "two readers"]


def without(made: graphs.Made) -> dict[tuple[str, int | None], QTensor]:
    """The weights of a solution without carried factors."""
    weights = dict(made.solution.weights)
    for linear, factor in made.solution.factors.items():
        reader = made.float_model.node(linear)
        for key in [k for k in weights if k[0] == reader.input[1]]:
            old = weights[key]
            values = old.values() / factor.reshape(
                [-1 if i == weight_axis(reader, old.codes.ndim) else 1 for i in range(old.codes.ndim)]
            )
            spec = next(p.spec for p in made.plan.weights if p.tensor == key[0])
            exact = quantize_weight(
                values.astype(np.float32), spec, outputs=weight_axis(reader, values.ndim), rounding="nearest"
            )
            weights[key] = exact
    return weights


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*((name, scheme) for name in PRODUCTS for scheme in ("int8", "w4a8")), ("Conv and pool", "int8")],
)
def test_the_quantized_model_has_no_mul_and_the_same_accuracy(name: str, scheme: str) -> None:
    model = spread(name)
    data = graphs.samples(model, 6)
    made = quantized(model, data, scheme=scheme, equalize="lae", **({"block": 16} if scheme == "w4a8" else {}))
    assert made.solution.carriers.keys() == {"t"}
    assert not divides(made.model)
    # the same scales and codes with a Mul: outputs differ where a value lies on the edge of two codes
    solution = replace(made.solution, carriers={})
    with_mul = insert(made.float_model, made.plan, replace(solution, weights=without(made)))
    assert divides(with_mul)
    noise = []
    for candidate in (made.model, with_mul):
        pairs = zip(graphs.run(candidate, data), graphs.run(model, data), strict=True)
        noise.append(sum(np.sum((a["y"] - b["y"]) ** 2) for a, b in pairs))
    assert noise[0] <= 1.25 * noise[1]


def test_the_compiled_kernels_multiply_once_less() -> None:
    """TensorRT-RTX fuses a Mul into the kernel before; carried, it is not there at all."""
    model = spread("layer norm")
    made = quantized(model, graphs.samples(model, 4), equalize="lae")
    with_mul = insert(made.float_model, made.plan, replace(made.solution, carriers={}))
    carried, divided = (rtx.build(m.proto).table.layers for m in (made.model, with_mul))
    assert len(carried) == len(divided)
    products = [sum(layer.name.count("Mul") for layer in layers) for layers in (carried, divided)]
    assert products[0] == products[1] - 1


def test_constants_of_others_are_not_touched() -> None:
    """The gain is an operand of another node too: that one reads it as it was."""
    model = spread("two readers")
    made = quantized(model, graphs.samples(model, 4), equalize="lae")
    assert np.array_equal(made.model.array("g"), model.array("g"))
    gain = made.model.array(made.model.node("norm").input[1])
    assert not np.allclose(gain, model.array("g"))


def test_a_weight_with_one_scale_takes_no_factors() -> None:
    model = spread("MatMul with bias")
    data = graphs.samples(model, 4)
    plan = graphs.placement.plan(model, graphs.Settings(equalize="lae"))
    points = tuple(replace(p, spec=replace(p.spec, axis=None)) if p.tensor == "w" else p for p in plan.points)
    plan = replace(plan, points=points)
    table = graphs.collect.collect(model, plan, data)
    solution = graphs.solve.solve(model, plan, table, samples=data)
    assert "t" in solution.divisors
    assert not solution.carriers


def test_correcting_biases_sees_carried_factors() -> None:
    from qdq.assemble.bias import correct
    from qdq.assemble.held_out import split

    model = spread("Conv and pool")
    data = graphs.samples(model, 8)
    made = quantized(model, data, equalize="lae", rounding="nearest")
    assert made.solution.factors.keys() == {"first"}
    held = split(data)
    changed = correct(model, made.model, made.solution.nodes.values(), held, factors=made.solution.factors)
    blind = correct(model, made.model, made.solution.nodes.values(), held)

    def noise(candidate: Model) -> float:
        pairs = zip(graphs.run(candidate, data), graphs.run(model, data), strict=True)
        return float(sum(np.sum((a["y"] - b["y"]) ** 2) for a, b in pairs))

    assert noise(changed) <= 1.1 * noise(made.model)
    assert noise(blind) > 10 * noise(made.model)
