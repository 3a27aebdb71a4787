"""prepare() on tiny graphs, one per case, and on the shared models: the same outputs in ONNX Runtime as before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from places import SHARED

from qdq.core.errors import ModelError
from qdq.model import storage
from qdq.model.external import is_external
from qdq.model.model import Model
from qdq.passes.prepare import prepare

ort = pytest.importorskip("onnxruntime")
MODELS = SHARED / "models"
RNG = np.random.default_rng(0)


def node(op: str, inputs: str, outputs: str, name: str = "", **attributes: object) -> NodeProto:
    """A node; "-" stands for an input that is left out."""
    names = ["" if i == "-" else i for i in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name or None, **attributes)


def build(
    nodes: Sequence[NodeProto],
    *,
    x: Sequence[object] = (2, 3, 8, 8),
    tensors: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
    domains: Sequence[str] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> ModelProto:
    """A model from input "x" to output "y" of unknown shape."""
    out = onnx.ValueInfoProto(name="y")
    out.type.tensor_type.elem_type = dtype
    body = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info("x", dtype, list(x))],
        [out],
        [numpy_helper.from_array(v, k) for k, v in (tensors or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(body, opset_imports=imports, ir_version=8, functions=list(functions))


def as_model(proto: ModelProto, directory: Path = Path()) -> Model:
    return replace(storage.load(proto), directory=directory, sha256="0")


def run(proto: ModelProto | str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = proto if isinstance(proto, str) else proto.SerializeToString()
    return list(ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, feeds))


def sqnr_db(reference: np.ndarray, values: np.ndarray) -> float:
    signal = float((reference.astype(np.float64) ** 2).sum())
    noise = float(((reference.astype(np.float64) - values.astype(np.float64)) ** 2).sum())
    return 10 * np.log10(signal / max(noise, 1e-300))


def same(proto: ModelProto, *shapes: Sequence[int], floor_db: float = 100.0) -> Model:
    """The prepared model, after checking that ONNX Runtime computes the same with it as with the original.

    100 dB is a relative error of 1e-5: float32 rounds to 6e-8, and a sum of some hundred terms loses up to 1e-6.
    """
    before = proto.SerializeToString(deterministic=True)
    done = prepare(as_model(proto))
    assert proto.SerializeToString(deterministic=True) == before, "the source was changed"
    again = prepare(as_model(proto)).proto.SerializeToString(deterministic=True)
    assert done.proto.SerializeToString(deterministic=True) == again, "not deterministic"
    storage.check(done.proto)
    assert 21 <= done.opset <= 25 and done.proto.ir_version >= 10
    names = [n.name for n in done.graph.node]
    assert all(names) and len(set(names)) == len(names)
    info = done.inputs[0]
    for shape in shapes or [tuple(d if isinstance(d, int) else 2 for d in info.shape or ())]:
        x = RNG.standard_normal(shape).astype(info.dtype)
        for a, b in zip(run(proto, {"x": x}), run(done.proto, {"x": x}), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert sqnr_db(a, b) > floor_db
    return done


def ops(model: Model) -> list[str]:
    return [n.op_type for n in model.graph.node]


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def norm_tensors(channels: int) -> dict[str, np.ndarray]:
    values = {k: floats(channels) for k in ("scale", "shift", "mean")}
    return {**values, "var": RNG.uniform(0.5, 2, channels).astype(np.float32)}


NORM = node("BatchNormalization", "h scale shift mean var", "y", "norm", epsilon=1e-3)


def test_names_are_unique_and_the_users_are_kept() -> None:
    nodes = [
        node("Relu", "x", "a"),
        node("Neg", "a", "b", "mine"),
        node("Relu", "b", "c", "mine"),
        node("Abs", "c", "y"),
    ]
    done = prepare(as_model(build(nodes)))  # ONNX Runtime refuses the original for its two equal names
    assert [n.name for n in done.graph.node] == ["Relu_0", "mine", "mine_2", "Abs_3"]
    run(done.proto, {"x": floats(2, 3, 8, 8)})


def test_an_invented_name_avoids_the_users() -> None:
    nodes = [node("Relu", "x", "a"), node("Neg", "a", "y", "Relu_0")]
    assert [n.name for n in same(build(nodes)).graph.node] == ["Relu_0_1", "Relu_0"]


def test_initializers_listed_as_inputs_are_inputs_no_more() -> None:
    proto = build([node("Conv", "x w", "y")], tensors={"w": floats(4, 3, 3, 3)}, opset=9)
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 3, 3]))
    proto.ir_version = 3
    done = same(proto)
    assert [v.name for v in done.graph.input] == ["x"] and done.is_constant("w")


@pytest.mark.parametrize(
    "constant",
    [
        {"value": numpy_helper.from_array(np.float32([2.0]))},
        {"value_float": 2.0},
        {"value_floats": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]},
    ],
    ids=lambda c: next(iter(c)),
)
def test_constant_nodes_become_initializers(constant: dict[str, object]) -> None:
    done = same(build([node("Constant", "", "c", **constant), node("Mul", "x c", "y")]))
    assert ops(done) == ["Mul"] and done.is_constant("c")


def test_a_constant_that_is_an_output_stays_a_node() -> None:
    proto = build([node("Constant", "", "y", value_float=2.0), node("Relu", "x", "z")])
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    assert ops(same(proto)) == ["Constant", "Relu"]


def test_a_weight_behind_constant_nodes_becomes_an_initializer() -> None:
    nodes = [
        node("Cast", "w", "w32", to=TensorProto.FLOAT),
        node("Transpose", "w32", "wt", perm=[1, 0]),
        node("Mul", "wt two", "w2"),
        node("Identity", "w2", "w3"),
        node("MatMul", "x w3", "y"),
    ]
    done = same(build(nodes, x=[2, 70], tensors={"w": floats(90, 70).astype(np.float16), "two": np.float32(2)}))
    assert ops(done) == ["MatMul"]
    assert done.array(done.graph.node[0].input[1]).shape == (70, 90)
    assert set(done.initializers) == {"w2"}


def test_folding_makes_no_large_tensor_from_a_small_one() -> None:
    nodes = [node("Expand", "one shape", "big"), node("ReduceMean", "big", "m"), node("Add", "x m", "y")]
    tensors = {"one": np.float32([1]), "shape": np.int64([1024, 1025])}
    assert "Expand" in ops(same(build(nodes, tensors=tensors)))
    tensors["shape"] = np.int64([16, 16])
    assert ops(same(build(nodes, tensors=tensors))) == ["Add"]


def test_negative_integer_division_is_left_to_the_runtime() -> None:
    nodes = [node("Div", "a b", "q"), node("Cast", "q", "f", to=1), node("Add", "x f", "y")]
    assert "Div" in ops(same(build(nodes, tensors={"a": np.int64([-7]), "b": np.int64([2])})))


@pytest.mark.parametrize(("a", "b"), [(48, 7), (-48, 7), (48, -7)])
def test_remainders_are_folded(a: int, b: int) -> None:
    """PyTorch writes them for negative axes and for windows; sizes behind them are static then."""
    nodes = [node("Mod", "a b", "m"), node("Cast", "m", "f", to=1), node("Add", "x f", "y")]
    assert ops(same(build(nodes, tensors={"a": np.int64([a]), "b": np.int64([b])}))) == ["Add"]


def test_static_sizes_are_folded_beside_dynamic_ones() -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s i1", "c"),
        node("Div", "c three", "g"),
        node("Unsqueeze", "g zero", "g1"),
        node("Slice", "s zero one", "n"),
        node("Slice", "s two four", "hw"),
        node("Concat", "n three1 g1 hw", "target", axis=0),
        node("Reshape", "x target", "r"),
        node("ReduceSum", "r one", "t", keepdims=0),
        node("Relu", "t", "y"),
    ]
    integers = {"i1": 1, "three": 3, "zero": [0], "one": [1], "two": [2], "four": [4], "three1": [3]}
    tensors = {k: np.array(v, np.int64) for k, v in integers.items()}
    done = same(build(nodes, x=["N", 6, "H", "W"], tensors=tensors), (2, 6, 4, 5), (1, 6, 8, 3))
    assert "Gather" not in ops(done) and "Div" not in ops(done)
    # only N stands where the input has it: H and W stay, computed by the run
    assert "Concat" in ops(done)
    done = same(build(nodes, x=["N", 6, "H", 5], tensors=tensors), (2, 6, 4, 5), (1, 6, 8, 5))
    assert ops(done) == ["Reshape", "ReduceSum", "Relu"]
    assert done.array(done.graph.node[0].input[1]).tolist() == [0, 3, 2, -1, 5]
    assert done.inputs[0].shape == ("N", 6, "H", 5)
    assert done.info("r").shape == ("N", 3, 2, "H", 5) or done.info("r").shape[1:3] == (3, 2)  # type: ignore[union-attr, index]


def test_stale_shapes_in_the_file_are_not_believed() -> None:
    nodes = [
        node("Neg", "x", "h"),
        node("Shape", "h", "s"),
        node("Gather", "s zero", "n"),
        node("Cast", "n", "f", to=TensorProto.FLOAT),
        node("Mul", "h f", "y"),
    ]
    proto = build(nodes, x=["N", 3], tensors={"zero": np.int64(0)})
    proto.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, 3]))
    assert "Gather" in ops(same(proto, (1, 3), (4, 3)))


def test_reshape_with_a_minus_one_of_its_own() -> None:
    nodes = [
        node("Shape", "x", "n", start=0, end=1),
        node("Concat", "n rest", "target", axis=0),
        node("Reshape", "x target", "y"),
    ]
    done = same(build(nodes, x=["N", 3, 4, 4], tensors={"rest": np.int64([-1])}), (2, 3, 4, 4), (5, 3, 4, 4))
    assert ops(done) == ["Reshape"] and done.array(done.graph.node[0].input[1]).tolist() == [0, -1]


def test_identities_go_but_not_those_that_make_an_output() -> None:
    nodes = [
        node("Identity", "x", "a"),
        node("Dropout", "a", "b"),
        node("Cast", "b", "c", to=TensorProto.FLOAT),
        node("Relu", "c", "d"),
        node("Identity", "d", "y"),
    ]
    done = same(build(nodes))
    assert ops(done) == ["Relu", "Identity"] and done.graph.node[0].input[0] == "x"


def test_a_dropout_whose_mask_is_read_stays() -> None:
    nodes = [node("Dropout", "x", "a mask"), node("Where", "mask a x", "y")]
    assert ops(same(build(nodes))) == ["Dropout", "Where"]


def test_unused_nodes_initializers_and_imports_go() -> None:
    proto = build(
        [node("Relu", "x", "y"), node("Conv", "x w", "z")], tensors={"w": floats(4, 3, 3, 3)}, domains=["ai.onnx.ml"]
    )
    done = same(proto)
    assert ops(done) == ["Relu"] and not done.initializers
    assert [o.domain for o in done.proto.opset_import] == [""]


CONV = {"w": floats(6, 3, 3, 3), "b": floats(6)}


@pytest.mark.parametrize(
    ("before", "tensors", "x"),
    [
        (node("Conv", "x w", "h", "op"), {"w": CONV["w"]}, [2, 3, 8, 8]),
        (node("Conv", "x w b", "h", "op"), CONV, ["N", 3, "H", "W"]),
        (node("Conv", "x w", "h", "op", group=3), {"w": floats(6, 1, 3, 3)}, [2, 3, 8, 8]),
        (node("Conv", "x w b", "h", "op"), {"w": floats(6, 3, 3, 3, 3), "b": CONV["b"]}, [1, 3, 5, 5, 5]),
        (node("ConvTranspose", "x w b", "h", "op"), {"w": floats(3, 6, 2, 2), "b": CONV["b"]}, [2, 3, 8, 8]),
        (node("ConvTranspose", "x w", "h", "op", group=2), {"w": floats(4, 3, 2, 2)}, [2, 4, 8, 8]),
        (node("Gemm", "x w b", "h", "op"), {"w": floats(5, 6), "b": CONV["b"]}, ["N", 5]),
        (node("Gemm", "x w", "h", "op", transB=1, alpha=0.5), {"w": floats(6, 5)}, ["N", 5]),
        (node("Gemm", "x w b", "h", "op"), {"w": floats(5, 6), "b": np.float32(0.3)}, [4, 5]),
    ],
)
def test_batch_norm_is_folded(before: NodeProto, tensors: dict[str, np.ndarray], x: list[object]) -> None:
    shape = [{"N": 2, "H": 9, "W": 7}.get(d, d) if isinstance(d, str) else d for d in x]
    done = same(build([before, NORM], x=x, tensors={**tensors, **norm_tensors(6)}), shape)  # type: ignore[arg-type]
    assert [n.name for n in done.graph.node] == ["op"]
    assert list(done.graph.node[0].input) == ["x", "w", "b" if "b" in tensors else "op_bias"]
    assert list(done.graph.node[0].output) == ["y"] and len(done.initializers) == 2


def test_batch_norms_in_a_row_are_all_folded() -> None:
    second = node("BatchNormalization", "k scale shift mean var", "y")
    first = node("BatchNormalization", "h scale shift mean var", "k")
    assert ops(same(build([node("Conv", "x w", "h"), first, second], tensors={**CONV, **norm_tensors(6)}))) == ["Conv"]


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([node("Relu", "h", "z")], id="the product is read twice"),
        pytest.param([node("Conv", "x w", "z")], id="the weight is shared"),
        pytest.param([node("Identity", "w", "z")], id="the weight is an output"),
    ],
)
def test_batch_norm_stays_where_folding_would_change_something_else(extra: list[NodeProto]) -> None:
    proto = build([node("Conv", "x w", "h"), NORM, *extra], tensors={**CONV, **norm_tensors(6)})
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    assert "BatchNormalization" in ops(same(proto))


def test_batch_norm_stays_where_the_product_is_an_output() -> None:
    proto = build([node("Conv", "x w", "h"), NORM], tensors={**CONV, **norm_tensors(6)})
    proto.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, None))
    assert ops(same(proto)) == ["Conv", "BatchNormalization"]


def test_batch_norm_before_a_convolution_stays() -> None:
    nodes = [node("BatchNormalization", "x scale shift mean var", "h"), node("Conv", "h w", "y")]
    assert ops(same(build(nodes, tensors={**CONV, **norm_tensors(3)}))) == ["BatchNormalization", "Conv"]


def test_a_shared_bias_is_not_overwritten() -> None:
    nodes = [node("Conv", "x w b", "h", "op"), node("Conv", "x w2 b", "g"), node("Relu", "g", "z"), NORM]
    proto = build(nodes, tensors={**CONV, "w2": floats(6, 3, 3, 3), **norm_tensors(6)})
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    done = same(proto)
    assert "BatchNormalization" not in ops(done) and np.array_equal(done.array("b"), CONV["b"])


def test_half_floats_stay() -> None:
    tensors = {k: v.astype(np.float16) for k, v in {"w": floats(5, 6), "b": floats(6), **norm_tensors(6)}.items()}
    kind = TensorProto.FLOAT16
    model = build([node("Gemm", "x w b", "h"), NORM], x=[4, 5], tensors=tensors, dtype=kind)
    done = same(model, floor_db=45)  # float16 rounds to 5e-4, and the scaled weight is rounded once more
    assert ops(done) == ["Gemm"] and {t.data_type for t in done.graph.initializer} == {kind}


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding_is_written_out(mode: str) -> None:
    for kernel, stride, dilation in itertools.product((1, 2, 3), (1, 2, 3), (1, 2)):
        conv = node("Conv", "x w", "y", auto_pad=mode, strides=[stride, 1], dilations=[dilation, 1])
        proto = build([conv], x=[1, 3, 9, 8], tensors={"w": floats(4, 3, kernel, 2)})
        if mode == "VALID" or dilation == 1:
            done = same(proto)
        else:  # ONNX Runtime refuses the original; the standard says ceil(size / stride)
            done = prepare(as_model(proto))
            assert run(done.proto, {"x": floats(1, 3, 9, 8)})[0].shape == (1, 4, -(-9 // stride), 8)
        names = [a.name for a in done.graph.node[0].attribute]
        assert "auto_pad" not in names and "pads" in names


def test_automatic_padding_of_a_dynamic_size_stays_only_where_it_depends_on_it() -> None:
    tensors = {"w": floats(4, 3, 3, 3)}
    for stride, stays in ((1, False), (2, True)):
        conv = node("Conv", "x w", "y", auto_pad="SAME_UPPER", strides=[stride, stride])
        done = same(build([conv], x=[1, 3, "H", "W"], tensors=tensors), (1, 3, 9, 8), (1, 3, 6, 7))
        assert ("auto_pad" in [a.name for a in done.graph.node[0].attribute]) is stays


@pytest.mark.parametrize(
    ("equation", "written"),
    [
        ("BGHID, BGHJD -> BGHIJ", "bghid,bghjd->bghij"),  # torchvision's MaxViT
        ("BGaAD,BGADb->BGab", "egacd,egcdb->egab"),  # a small letter that is taken
        ("...ID,...DJ->...IJ", "...id,...dj->...ij"),
    ],
)
def test_einsum_has_small_letters(equation: str, written: str) -> None:
    done = same(build([node("Einsum", "x x", "y", equation=equation)], x=[2, 2, 2, 2, 2]))
    assert [a.s.decode() for a in done.graph.node[0].attribute] == [written]


def branch(*nodes: NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "branch", [], [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)])


def test_bodies_are_folded_under_names_of_their_own_and_what_they_read_stays() -> None:
    then = branch(node("Identity", "passed", "p"), node("Mul", "p factor", "out"))
    other = branch(node("Neg", "passed", "out", "Relu_0"))
    nodes = [
        node("Constant", "", "factor", value_float=3.0),
        node("Relu", "x", "r"),
        node("Identity", "r", "passed"),
        node("ReduceMax", "x", "m", keepdims=0),
        node("Greater", "m zero", "yes"),
        node("If", "yes", "y", then_branch=then, else_branch=other),
    ]
    done = same(build(nodes, tensors={"zero": np.float32(0)}))
    assert ops(done) == ["Relu", "Identity", "ReduceMax", "Greater", "If"] and done.is_constant("factor")
    bodies = {a.name: a.g for a in done.graph.node[-1].attribute}
    inner = {name: [(n.op_type, *n.input) for n in body.node] for name, body in bodies.items()}
    assert inner == {"then_branch": [("Mul", "passed", "factor")], "else_branch": [("Neg", "passed")]}
    ends = {body.output[0].name for body in bodies.values()}
    assert len(ends) == 2 and all(b.node[-1].output[0] == b.output[0].name for b in bodies.values())


def test_functions_are_inlined() -> None:
    body = [node("Relu", "a", "t"), node("Mul", "t t", "b")]
    function = helper.make_function("mine", "Square", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    nodes = [
        helper.make_node("Square", ["x"], ["h"], domain="mine"),
        helper.make_node("Square", ["h"], ["y"], domain="mine"),
    ]
    done = same(build(nodes, domains=["mine"], functions=[function]))
    assert ops(done) == ["Relu", "Mul", "Relu", "Mul"] and not done.proto.functions
    assert [o.domain for o in done.proto.opset_import] == [""]


GRU = {"s": np.int64([6, 8, 8]), "w": floats(1, 12, 8), "r": floats(1, 12, 4)}


def test_other_domains_are_kept() -> None:
    nodes = [helper.make_node("Gelu", ["x"], ["h"], domain="com.microsoft"), node("Relu", "h", "y")]
    done = same(build(nodes, domains=["com.microsoft"]))
    assert [(o.domain, o.version) for o in done.proto.opset_import] == [("", 21), ("com.microsoft", 1)]


@pytest.mark.parametrize(
    ("opset", "nodes", "tensors"),
    [
        (7, [node("Upsample", "x", "y", scales=[1.0, 1, 2, 2], mode="nearest")], {}),
        (7, [node("BatchNormalization", "x scale shift mean var", "y")], norm_tensors(3)),
        (7, [node("Dropout", "x", "h m", ratio=0.3), node("Relu", "h", "y")], {}),
        (8, [node("MaxPool", "x", "y i", kernel_shape=[2, 2], auto_pad="SAME_UPPER", strides=[2, 2])], {}),
        (8, [node("Reshape", "x s", "q"), node("GRU", "q w r", "y", hidden_size=4)], GRU),
        *((opset, [node("Hardmax", "x", "y", axis=axis)], {}) for opset in (8, 12) for axis in (0, 1, 2, 3)),
        (11, [node("Hardmax", "x", "y", axis=-2)], {}),
        *((opset, [node("GroupNormalization", "x s s", "y", num_groups=3)], {"s": floats(3)}) for opset in (18, 20)),
        (18, [node("GroupNormalization", "x s s", "y", num_groups=1, epsilon=0.1)], {"s": floats(1)}),
        (9, [node("Upsample", "x s", "y", mode="nearest")], {"s": np.float32([1, 1, 2, 2])}),
        (9, [node("Upsample", "x s", "y", mode="linear")], {"s": np.float32([1, 1, 2, 2])}),
        (10, [node("Resize", "x s", "y", mode="nearest")], {"s": np.float32([1, 1, 2, 2])}),
        (10, [node("Resize", "x s", "y", mode="nearest")], {"s": np.float32([1, 1, 1.5, 2.5])}),
        (10, [node("Resize", "x s", "y", mode="nearest")], {"s": np.float32([1, 1, 0.5, 0.3])}),
        (
            10,
            [
                node("Constant", "", "s", value=numpy_helper.from_array(np.float32([1, 1, 0.3, 0.6]))),
                node("Resize", "x s", "y", mode="nearest"),
            ],
            {},
        ),
        (10, [node("Resize", "x s", "y", mode="linear")], {"s": np.float32([1, 1, 1.5, 0.5])}),
        (9, [node("Dropout", "x", "h", ratio=0.3), node("Relu", "h", "y")], {}),
        (9, [node("Pad", "x", "y", pads=[0, 0, 1, 1, 0, 0, 2, 1], value=0.5)], {}),
        (9, [node("Clip", "x", "y", min=0.0, max=0.5)], {}),
        (9, [node("Slice", "x", "y", starts=[1, 2], ends=[3, 100], axes=[1, 3])], {}),
        (11, [node("ReduceSum", "x", "y", axes=[2, 3], keepdims=0)], {}),
        (11, [node("ReduceMean", "x", "y", axes=[1])], {}),
        (11, [node("Unsqueeze", "x", "h", axes=[0]), node("Squeeze", "h", "y", axes=[0])], {}),
        (11, [node("Split", "x", "a b", axis=3, split=[2, 6]), node("Concat", "b a", "y", axis=3)], {}),
        (11, [node("Softmax", "x", "y", axis=1)], {}),
        (11, [node("Softmax", "x", "y", axis=3)], {}),
        (11, [node("LogSoftmax", "x", "y", axis=2)], {}),
        (9, [node("BatchNormalization", "x scale shift mean var", "y")], norm_tensors(3)),
        (9, [node("MaxPool", "x", "h", kernel_shape=[2, 2]), node("AveragePool", "h", "y", kernel_shape=[3, 3])], {}),
        (9, [node("Conv", "x w", "h"), node("PRelu", "h slope", "y")], {"w": CONV["w"], "slope": floats(6, 1, 1)}),
        (9, [node("Flatten", "x", "h"), node("Gemm", "h w b", "y")], {"w": floats(192, 6), "b": floats(6)}),
        (9, [node("TopK", "x", "y i", axis=3, k=2)], {}),
        (10, [node("TopK", "x k", "y i", axis=3)], {"k": np.int64([2])}),
    ],
    ids=lambda v: "-".join(n.op_type for n in v) if isinstance(v, list) else None,
)
def test_old_opsets_are_raised(opset: int, nodes: list[NodeProto], tensors: dict[str, np.ndarray]) -> None:
    assert same(build(nodes, opset=opset, tensors=tensors)).opset == 21


@pytest.mark.parametrize("opset", [22, 23, 24, 25])
def test_newer_opsets_stay(opset: int) -> None:
    assert (
        same(build([node("Conv", "x w", "h"), node("Relu", "h", "y")], tensors={"w": CONV["w"]}, opset=opset)).opset
        == opset
    )


def test_opsets_out_of_range_are_refused() -> None:
    with pytest.raises(ModelError, match=r"opset 6, and qdq takes 7 or newer"):
        prepare(as_model(build([node("Add", "x x", "y")], opset=6)))


def test_bodies_are_raised_too_or_refused() -> None:
    one = branch(node("Unsqueeze", "x", "u", axes=[0]), node("Squeeze", "u", "out", axes=[0]))
    two = branch(node("Clip", "x", "out"))
    nodes = [
        node("ReduceMax", "x", "m", keepdims=0),
        node("Greater", "m zero", "yes"),
        node("If", "yes", "y", then_branch=one, else_branch=two),
    ]
    same(build(nodes, tensors={"zero": np.float32(0)}, opset=11))


def test_an_operator_without_a_new_form_is_refused() -> None:
    training = node("BatchNormalization", "x scale shift mean var", "y a b c d")
    with pytest.raises(ModelError, match=r"from opset 9 to 21: .*BatchNormalization.* opset 17 to 21"):
        prepare(as_model(build([training], tensors=norm_tensors(3), opset=9)))


def test_external_weights_stay_external_unless_folded(tmp_path: Path) -> None:
    tensors = {"w": floats(64, 3, 3, 3), "v": floats(6, 64, 3, 3), **norm_tensors(6)}
    proto = build(
        [node("Conv", "x w", "a"), node("Relu", "a", "c"), node("Conv", "c v", "h", "op"), NORM],
        tensors=tensors,
        opset=12,
    )
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    source = storage.load(tmp_path / "m.onnx")
    done = prepare(source)
    assert is_external(done.initializers["w"]) and not is_external(done.initializers["v"])
    assert done.sha256 == source.sha256
    (tmp_path / "out").mkdir()
    storage.save(done, tmp_path / "out" / "p.onnx")
    x = {"x": floats(2, 3, 8, 8)}
    (a,), (b,) = run(str(tmp_path / "m.onnx"), x), run(str(tmp_path / "out" / "p.onnx"), x)
    assert sqnr_db(a, b) > 100


def feeds(model: Model) -> dict[str, np.ndarray]:
    """Random input of a shared model, of small sizes that it accepts."""
    sizes = {"N": 2, "M": 50, "B": 2, "T": 16, "H": 64, "W": 48, "D": 24}
    found = {}
    for info in model.inputs:
        shape = [d if isinstance(d, int) else sizes.get(str(d), 2) for d in info.shape or ()]
        values = RNG.uniform(0, 1, shape) if info.dtype == "float32" else RNG.integers(0, 200, shape)
        found[info.name] = values.astype(info.dtype)
    return found


@pytest.mark.parametrize("path", sorted(MODELS.glob("*/*.onnx")) or [None], ids=lambda p: p.stem if p else "absent")
def test_shared_models_compute_the_same(path: Path | None) -> None:
    if path is None:
        pytest.skip("the shared models are absent; set QDQ_SHARED to the folder that holds models/")
    model = storage.load(path)
    done = prepare(model)
    onnx.checker.check_model(done.proto, full_check=True)
    assert done.inputs == model.inputs and done.outputs == model.outputs
    again = prepare(done).proto.SerializeToString(deterministic=True)
    assert again == done.proto.SerializeToString(deterministic=True)
    x = feeds(model)
    for a, b in zip(run(str(path), x), run(done.proto, x), strict=True):
        assert sqnr_db(a, b) > 100  # see same()
