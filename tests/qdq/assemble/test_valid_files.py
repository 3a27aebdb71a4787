"""Every converted file is valid: whatever decides the type of an output, in chains of Casts, bodies and statistics.

The node tests of onnx, a part of them here and all with `tools/low_types.py`, and models of each kind.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build, node, normal, samples
from onnx import TensorProto, helper, numpy_helper
from places import ROOT

from engines.core import onnx_runtime as ort
from qdq.assemble.precision.convert import Converted, convert
from qdq.measure.collect import collect
from qdq.model.model import Model
from qdq.passes.prepare import prepare
from qdq.plan import placement
from qdq.plan.settings import Settings

sys.path.insert(0, str(ROOT / "tools"))
import low_types

LOW = ["fp16", "bf16"]
W = normal(16, 16)


def model_of(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, np.ndarray],
    outputs: dict[str, int],
    shape: list[object] | None = None,
) -> Model:
    """A prepared model that reads x (2, 16), whose outputs have these types."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info(name, kind, shape) for name, kind in outputs.items()],
        [numpy_helper.from_array(v, k) for k, v in tensors.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=domains, ir_version=10)
    return prepare(Model(proto=proto, directory=Path(), sha256="v"))


def made_valid(model: Model, low: str, data: list[dict[str, np.ndarray]]) -> Converted:
    """Convert with measured ranges; the checker, strict inference and ONNX Runtime take the file."""
    table = collect(model, placement.plan(model, Settings(exclude=("*",))), data)
    made = convert(model, unquantized_type=low, table=table)
    onnx.checker.check_model(made.model.proto, full_check=True)
    onnx.shape_inference.infer_shapes(made.model.proto, check_type=True, strict_mode=True)
    said = low_types.runs(made.model.proto, data[0])
    assert not said or (low == "bf16" and "NOT_IMPLEMENTED" in said), said
    return made


def type_of(made: Converted, tensor: str) -> str:
    info = made.model.info(tensor)
    assert info is not None
    return info.dtype


@pytest.mark.parametrize("low", LOW)
def test_a_part_of_the_node_tests_is_valid(low: str) -> None:
    found: Counter[str] = Counter()
    bad = []
    for name, what, said in low_types.verdicts(low, every=11):
        found[what] += 1
        if what in ("invalid", "does not run"):
            bad.append(f"{name}: {said[:200]}")
    assert not bad
    assert found["valid"] > 60 and found["not taken"] + found["float does not run"] < 20


GENERATORS = {
    "zeros": ([node("Shape", "x", "s"), node("ConstantOfShape", "s", "g")], {}),
    "ones": (
        [
            node("Shape", "x", "s"),
            node("ConstantOfShape", "s", "g", value=numpy_helper.from_array(np.ones(1, np.float32))),
        ],
        {},
    ),
    "hann": ([node("HannWindow", "size", "g")], {"size": np.array(16, np.int64)}),
    "hamming": ([node("HammingWindow", "size", "g")], {"size": np.array(16, np.int64)}),
    "blackman": ([node("BlackmanWindow", "size", "g")], {"size": np.array(16, np.int64)}),
    "uniform": ([node("RandomUniform", "", "g", shape=[16])], {}),
    "normal_like": ([node("RandomNormalLike", "x", "g")], {}),
    "uniform_like": ([node("RandomUniformLike", "x", "g", dtype=TensorProto.FLOAT)], {}),
    "bernoulli": ([node("Sigmoid", "x", "p"), node("Bernoulli", "p", "g")], {}),
    "eye": ([node("MatMul", "x w", "xx"), node("EyeLike", "xx", "g")], {}),
    "mel": (
        [node("MelWeightMatrix", "bins length rate low high", "mel"), node("Slice", "mel zero one", "g")],
        {
            "bins": np.array(16, np.int64),
            "length": np.array(16, np.int64),
            "rate": np.array(8000, np.int64),
            "low": np.array(0, np.float32),
            "high": np.array(4000, np.float32),
            "zero": np.array([0], np.int64),
            "one": np.array([1], np.int64),
        },
    ),
}


def generated(kind: str, outputs: dict[str, int]) -> Model:
    """A product and, added to it, what an operator makes out of nothing or of a shape."""
    nodes, tensors = GENERATORS[kind]
    behind = [node("MatMul", "x w", "m", "product"), node("Add", "m g", "a"), node("Softplus", "a", "y")]
    return model_of([*nodes, *behind], {**tensors, "w": W}, outputs)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("kind", GENERATORS)
def test_what_names_its_own_type_is_written_in_the_type_that_is_read(kind: str, low: str) -> None:
    model = generated(kind, {"y": TensorProto.FLOAT, "g": TensorProto.FLOAT})
    made = made_valid(model, low, samples(model, 1))
    assert type_of(made, "m") != "float32" and type_of(made, "g") == "float32"  # an output keeps its type


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("ends", [{"y": 1}, {"y": 1, "up": 1}, {"y": 1, "half": 10}, {"y": 1, "again": 10, "half": 10}])
def test_chains_of_casts(low: str, ends: dict[str, int]) -> None:
    nodes = [
        node("MatMul", "x w", "m", "product"),
        node("Cast", "m", "half", "down", to=TensorProto.FLOAT16),
        node("Cast", "half", "up", "up", to=TensorProto.FLOAT),
        node("Cast", "up", "again", "down2", to=TensorProto.FLOAT16),
        node("Relu", "half", "r", "relu"),
        node("Cast", "again", "wide", "up2", to=TensorProto.DOUBLE),
        node("Cast", "wide", "narrow", "back", to=TensorProto.FLOAT),
        node("Cast", "r", "rf", "up3", to=TensorProto.FLOAT),
        node("Add", "narrow rf", "y"),
    ]
    model = model_of(nodes, {"w": W}, ends)
    data = samples(model, 1)
    made = made_valid(model, low, data)
    if low == "fp16":
        (want,), (got,) = ort.run(model.proto, data), ort.run(made.model.proto, data)
        assert np.abs(want["y"] - got["y"]).max() <= 2.0**-8 * np.abs(want["y"]).max()


@pytest.mark.parametrize("low", LOW)
def test_optional_outputs_keep_the_type_that_onnx_gives_them(low: str) -> None:
    nodes = [
        node("MatMul", "x w", "m", "product"),
        node("LayerNormalization", "m scale", "n mean inv", "norm"),
        node("Mul", "n inv", "scaled", "mul"),
        node("Unsqueeze", "scaled one", "u"),
        node("MaxPool", "u", "p places", "pool", kernel_shape=[2]),
        node("Dropout", "p ratio", "d mask", "drop"),
        node("Cast", "mask", "kept", "cast", to=TensorProto.FLOAT),
        node("Add", "d kept", "y"),
    ]
    tensors = {
        "w": W,
        "scale": np.ones(16, np.float32),
        "one": np.array([1], np.int64),
        "ratio": np.array(0.5, np.float32),
    }
    ends = {"y": TensorProto.FLOAT, "mean": TensorProto.FLOAT, "places": TensorProto.INT64}
    model = model_of(nodes, tensors, ends)
    made = made_valid(model, low, samples(model, 1))
    assert type_of(made, "n") != "float32" and type_of(made, "mean") == "float32"
    assert not {"product", "norm"} & {kept.node for kept in made.kept}  # statistics and what applies them stay FP32


@pytest.mark.parametrize("low", LOW)
def test_training_outputs_of_batch_normalization(low: str) -> None:
    nodes = [
        node("MatMul", "x w", "m", "product"),
        node("BatchNormalization", "m one zero zero one", "b mean var", "norm", training_mode=1),
        node("Add", "b mean", "s"),
        node("Relu", "s", "y"),
    ]
    tensors = {"w": W, "one": np.ones(16, np.float32), "zero": np.zeros(16, np.float32)}
    made_valid(model := model_of(nodes, tensors, {"y": 1, "var": 1}), low, samples(model, 1))


@pytest.mark.parametrize("low", LOW)
def test_a_function_that_onnx_writes_with_float32_constants_stays_float32(low: str) -> None:
    model = build(
        [
            node("Conv", "x w", "a"),
            node("MeanVarianceNormalization", "a", "b", axes=[0, 2, 3]),
            node("Conv", "b w", "y", "last"),
        ],
        {"x": (1, 4, 5, 5)},
        {"w": normal(4, 4, 1, 1)},
    )
    made = made_valid(model, low, samples(model, 1))
    assert [(s.op_type, s.rule) for s in made.kept] == [("MeanVarianceNormalization", "schema")]


@pytest.mark.parametrize("low", LOW)
def test_other_domains_and_what_reads_them(low: str) -> None:
    odd = node("FastGelu", "m", "g", "odd")
    odd.domain = "com.microsoft"
    nodes = [node("MatMul", "x w", "m", "product"), odd, node("MatMul", "g w", "k", "second"), node("Relu", "k", "y")]
    model = model_of(nodes, {"w": W}, {"y": 1}, ["n", 16])
    made = made_valid(model, low, samples(model, 1))
    assert {s.node: s.rule for s in made.kept if s.rule != "neighbours"} == {
        "odd": "unknown operator",
        "second": "unknown type",
        "relu": "unknown type",
    }


def bodies() -> Model:
    """A Loop and an If that read tensors from outside, one of them a constant, one given back as it is."""
    kind = TensorProto.FLOAT
    info = helper.make_tensor_value_info
    rounds = helper.make_graph(
        [
            node("MatMul", "state w", "t", "in_product"),
            node("Add", "t m", "u", "in_add"),
            node("Identity", "cond", "again", "in_id"),
        ],
        "rounds",
        [info("i", TensorProto.INT64, []), info("cond", TensorProto.BOOL, []), info("state", kind, ["n", 16])],
        [info("again", TensorProto.BOOL, []), info("u", kind, ["n", 16])],
    )
    then = helper.make_graph([node("Mul", "m l", "r", "in_mul")], "then", [], [info("r", kind, ["n", 16])])
    other = helper.make_graph([node("Identity", "m", "r2", "in_same")], "other", [], [info("r2", kind, ["n", 16])])
    nodes = [
        node("MatMul", "x w", "m", "product"),
        helper.make_node("Loop", ["count", "yes", "m"], ["l"], "loop", body=rounds),
        node("ReduceMax", "l", "top", keepdims=0),
        node("Greater", "top one", "flag"),
        helper.make_node("If", ["flag"], ["i"], "if", then_branch=then, else_branch=other),
        node("MatMul", "i w", "k", "second"),
        node("Add", "k m", "y"),
    ]
    return model_of(
        nodes,
        {"w": W / 16, "count": np.array(3, np.int64), "yes": np.array(True), "one": np.array(1, np.float32)},
        {"y": 1, "m": 1},
    )


@pytest.mark.parametrize("low", LOW)
def test_bodies_that_read_tensors_from_outside(low: str) -> None:
    model = bodies()
    data = samples(model, 2)
    made = made_valid(model, low, data)
    assert {"loop", "if"} <= {s.node for s in made.kept} and type_of(made, "k") != "float32"
    if low == "fp16":
        for want, got in zip(ort.run(model.proto, data), ort.run(made.model.proto, data), strict=True):
            assert np.abs(want["y"] - got["y"]).max() <= 2.0**-7 * np.abs(want["y"]).max()


def test_a_type_that_only_the_file_knows_is_believed() -> None:
    """onnx's inference stops at an operator of another domain: what the file says of its output counts."""
    odd = node("FastGelu", "m", "g", "odd")
    odd.domain = "com.microsoft"
    nodes = [
        node("MatMul", "x w", "m", "product"),
        odd,
        node("MatMul", "g w", "k", "second"),
        node("Softplus", "k", "y"),
    ]
    graph = model_of(nodes, {"w": W}, {"y": 1}, ["n", 16]).graph
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    proto.graph.value_info.append(helper.make_tensor_value_info("g", TensorProto.FLOAT, ["n", 16]))
    model = prepare(Model(proto=proto, directory=Path(), sha256="v"))
    made = made_valid(model, "fp16", samples(model, 1))
    assert {s.node for s in made.kept} == {"odd"} and type_of(made, "k") == "float16"


def test_group_normalization_of_opset_21_stops_inference_and_not_the_conversion() -> None:
    nodes = [
        node("Conv", "x w", "a", "first"),
        node("GroupNormalization", "a scale bias", "g", "group", num_groups=2),
        node("Relu", "g", "r"),
        node("Conv", "r w", "y", "last"),
    ]
    tensors = {"w": normal(4, 4, 1, 1), "scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    graph = build(nodes[:1], {"x": (1, 4, 5, 5)}, tensors, outputs=("a",)).graph
    del graph.node[:], graph.output[:], graph.value_info[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.output.append(helper.make_tensor_value_info("y", 1, [1, 4, 5, 5]))
    graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in tensors.items())
    graph.value_info.extend(helper.make_tensor_value_info(n, 1, [1, 4, 5, 5]) for n in "agr")
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = prepare(Model(proto=proto, directory=Path(), sha256="g"))
    made = made_valid(model, "fp16", samples(model, 1))
    assert not made.kept and {type_of(made, n) for n in "agr"} == {"float16"}
    assert [d for d in model.info("g").shape or ()] == [1, 4, 5, 5]  # type: ignore[union-attr]


@pytest.mark.parametrize("low", LOW)
def test_sequences_and_a_constant_that_is_an_output(low: str) -> None:
    constant = numpy_helper.from_array(np.ones(16, np.float32), "c")
    nodes = [
        node("Constant", "", "c", value=constant),
        node("SequenceEmpty", "", "none"),
        node("MatMul", "x w", "m", "product"),
        node("SequenceInsert", "none m", "one"),
        node("SequenceInsert", "one x", "two", "insert2"),
        node("ConcatFromSequence", "two", "j", axis=0),
        node("SequenceAt", "two zero", "first"),
        node("Add", "first c", "a"),
        node("MatMul", "j w", "k", "second"),
        node("Multinomial", "k", "drawn", sample_size=2),
        node("Concat", "k a", "b", axis=0),
        node("Reshape", "b shape", "y"),
    ]
    tensors = {"w": W, "zero": np.array(0, np.int64), "shape": np.array([-1, 16], np.int64)}
    model = model_of(nodes, tensors, {"y": 1, "c": 1, "drawn": TensorProto.INT32})
    made = made_valid(model, low, samples(model, 1))
    assert type_of(made, "m") != "float32" or type_of(made, "k") != "float32"


def recurrent(op: str, inputs: str, direction: str) -> Model:
    """x (5, 2, 4) -> one of LSTM, GRU, RNN with the optional inputs of these letters -> Relu -> y."""
    gates, count = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 2 if direction == "bidirectional" else 1
    tensors = {"w": normal(count, gates * 8, 4), "r": normal(count, gates * 8, 8), "b": normal(count, 2 * gates * 8)}
    found = {
        "s": np.array([5, 3], np.int32),
        "h": normal(count, 2, 8),
        "c": normal(count, 2, 8),
        "p": normal(count, 24),
    }
    tensors |= {letter: found[letter] for letter in inputs}
    names = " ".join(
        ["x w r b", *(letter if letter in inputs else "-" for letter in "shcp")][: 5 if op == "LSTM" else 3]
    )
    return build(
        [node(op, names, "a", hidden_size=8, direction=direction), node("Relu", "a", "y")], {"x": (5, 2, 4)}, tensors
    )


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize(
    ("op", "inputs"),
    [(op, i) for op in ("LSTM", "GRU", "RNN") for i in ("", "s", "h", "sh")]
    + [("LSTM", i) for i in ("sc", "shcp", "cp")],
)
def test_recurrent_nodes_compile_in_whatever_form(op: str, inputs: str, low: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    model = recurrent(op, inputs, "bidirectional")
    made = made_valid(model, low, samples(model, 1))
    refused = "s" in inputs or (op, low) == ("GRU", "bf16")
    assert (op in {s.op_type for s in made.kept if s.rule == "compiler"}) == refused
    assert not low_types.compiler()(made.model.proto)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("kind", [*GENERATORS, "bodies"])
def test_what_compiles_in_float32_compiles_converted(kind: str, low: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    from engines.backends import rtx
    from engines.backends.compiler import ShapeRange
    from engines.core.errors import EngineError

    model = bodies() if kind == "bodies" else generated(kind, {"y": TensorProto.FLOAT})
    shapes = {"x": ShapeRange.fixed((16, 16))}
    try:
        rtx.build(model.proto, shapes=shapes)
    except EngineError as error:
        pytest.skip(f"not in float32 either: {' '.join(str(error).split())[:200]}")
    rtx.build(made_valid(model, low, [{"x": normal(16, 16)}]).model.proto, shapes=shapes)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("gain_first", [False, True])
def test_a_written_out_norm_that_stays_fp32_loads_in_onnx_runtime(low: str, gain_first: bool) -> None:
    """Its optimizer would make a LayerNormalization of two types of it."""
    model = model_of(
        [
            node("MatMul", "x w", "h"),
            node("ReduceMean", "h last", "m"),
            node("Sub", "h m", "d"),
            node("Pow", "d two", "p"),
            node("ReduceMean", "p last", "v", "variance"),
            node("Add", "v epsilon", "ve"),
            node("Sqrt", "ve", "s"),
            node("Div", "d s", "n"),
            node("Mul", "gain n" if gain_first else "n gain", "g"),
            node("Add", "g shift", "y", "shifted"),
        ],
        {
            "w": W,
            "last": np.array([-1]),
            "two": np.array(2, np.float32),
            "epsilon": np.array(1e-6, np.float32),
            "gain": normal(16, seed=3),
            "shift": normal(16, seed=4),
        },
        {"y": TensorProto.FLOAT},
    )
    data = samples(model)
    made = made_valid(model, low, data)
    assert any(skip.node == "pow" for skip in made.kept)  # else there is nothing to fuse in two types
    want = ort.session(model.proto).run(None, data[0])[0]
    if low == "fp16":  # ONNX Runtime has no product in BF16
        assert np.allclose(ort.session(made.model.proto).run(None, data[0])[0], want, atol=0.02)
