"""Odd models, each built in code: loading repairs them exactly, and every verb and the compiler take them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphs import node, normal
from models import save_samples
from onnx import ModelProto, TensorProto, helper, numpy_helper

from engines.core import onnx_runtime as ort
from qdq.assemble.quantize import quantize
from qdq.build.engine import compile_engine, shape_ranges
from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.core.errors import InputError, ModelError
from qdq.deploy.check import float_session
from qdq.deploy.shipped import file_bytes
from qdq.model import accept
from qdq.model.model import Model
from qdq.model.storage import load
from qdq.passes.prepare import prepare

FLOAT = TensorProto.FLOAT
value = helper.make_tensor_value_info
W = normal(8, 4, 3, 3)
SPARSE = np.where(np.abs(W) > 1, W, 0)


def sparse(array: np.ndarray, name: str = "", *, flat: bool = True) -> onnx.SparseTensorProto:
    """A sparse tensor whose indices are flat places, or rows of coordinates."""
    places = np.flatnonzero(array)
    indices = places if flat else np.stack(np.unravel_index(places, array.shape), axis=1)
    return helper.make_sparse_tensor(
        numpy_helper.from_array(array.ravel()[places], name),
        numpy_helper.from_array(indices.astype(np.int64)),
        array.shape,
    )


def net(opset: int = 17) -> ModelProto:
    """x -> Conv -> Relu -> MaxPool -> Conv -> y."""
    nodes = [
        node("Conv", "x w", "c", "conv", pads=[1] * 4),
        node("Relu", "c", "r", "relu"),
        node("MaxPool", "r", "m", "pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", "m v", "y", "last"),
    ]
    tensors = [numpy_helper.from_array(a, n) for n, a in {"w": SPARSE, "v": normal(4, 8, 1, 1, seed=1)}.items()]
    graph = helper.make_graph(
        nodes, "net", [value("x", FLOAT, [1, 4, 8, 8])], [value("y", FLOAT, [1, 4, 4, 4])], tensors
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def nameless(proto: ModelProto) -> None:
    proto.graph.name = ""


def unsorted(proto: ModelProto) -> None:
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def repeated_names(proto: ModelProto) -> None:
    for each in proto.graph.node:
        each.name = "same"


def long_domain(proto: ModelProto) -> None:
    for each in (*proto.graph.node, *proto.opset_import):
        each.domain = "ai.onnx"


def sparse_weight(proto: ModelProto, *, flat: bool = True) -> None:
    proto.graph.sparse_initializer.append(sparse(SPARSE, "w", flat=flat))
    del proto.graph.initializer[0]


def sparse_rows(proto: ModelProto) -> None:
    sparse_weight(proto, flat=False)


def sparse_constant(proto: ModelProto) -> None:
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], "w", sparse_value=sparse(SPARSE)))
    del proto.graph.initializer[0]


def input_is_output(proto: ModelProto) -> None:
    proto.graph.output.append(proto.graph.input[0])


def unread_outputs(proto: ModelProto) -> None:
    proto.graph.node[2].output.append("indices")
    proto.graph.node[3].input[0] = "d"
    proto.graph.node.insert(3, node("Dropout", "m", "d mask", "drop"))


def stored_output(proto: ModelProto) -> None:
    proto.graph.output.append(value("w", FLOAT, W.shape))


def constant_output(proto: ModelProto) -> None:
    weight = proto.graph.initializer[0]
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], "w", value=weight))
    del proto.graph.initializer[0]
    proto.graph.output.append(value("w", FLOAT, W.shape))


def functions(proto: ModelProto) -> None:
    """The first two nodes in a function that another calls; its nodes are unsorted."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    inner = [node("Relu", "c", "r", "relu"), node("Conv", "x w", "c", "conv", pads=[1] * 4)]
    outer = [helper.make_node("Inner", ["x", "w"], ["r"], "inner", domain="mine")]
    proto.functions.append(helper.make_function("mine", "Inner", ["x", "w"], ["r"], inner, opsets))
    proto.functions.append(helper.make_function("mine", "Outer", ["x", "w"], ["r"], outer, opsets))
    del proto.graph.node[:2]
    proto.graph.node.insert(0, helper.make_node("Outer", ["x", "w"], ["r"], "outer", domain="mine"))
    proto.opset_import.append(helper.make_opsetid("mine", 1))


def old_ir(proto: ModelProto) -> None:
    proto.ir_version = 3
    proto.graph.input.extend(value(t.name, t.data_type, t.dims) for t in proto.graph.initializer)


def new_ir(proto: ModelProto) -> None:
    proto.ir_version = 14


def untrue_infos(proto: ModelProto) -> None:
    proto.graph.value_info.append(value("c", TensorProto.INT64, [1, 8, 8, 8]))
    proto.graph.value_info.append(value("r", FLOAT, [1, 8, 8]))
    proto.graph.value_info.append(value("m", FLOAT, [1, 8, 5, 4]))
    proto.graph.value_info.append(value("nothing", FLOAT, [7]))
    proto.graph.output[0].CopyFrom(value("y", FLOAT, [1, 4, 16]))


def odd_bodies(proto: ModelProto) -> None:
    """An If with nameless, unsorted bodies that repeat names, hold a sparse constant and read the graph around."""
    bodies = {}
    for key in ("then_branch", "else_branch"):
        nodes = [
            node("Mul", "n s", "o", "same"),
            helper.make_node("Constant", [], ["s"], "same", sparse_value=sparse(np.float32([0, 2, 0, 1]))),
            node("Relu", "m", "n", "conv"),
        ]
        bodies[key] = helper.make_graph(nodes, "body", [], [value("o", FLOAT, None)])
        bodies[key].name = ""
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    proto.graph.node.insert(3, node("If", "yes", "i", "same", **bodies))
    proto.graph.node[4].input[0] = "i"


def scalar_input(proto: ModelProto) -> None:
    proto.graph.input.append(value("k", FLOAT, []))
    proto.graph.node[3].output[0] = "z"
    proto.graph.node.append(node("Mul", "z k", "y", "scale"))


def bare_loop(proto: ModelProto) -> None:
    """A Loop as onnxscript writes a for loop: no condition, and a body that passes it on."""
    nodes = [node("Identity", "t", "u"), node("Identity", "on", "going")]
    starts = [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("t", FLOAT, None)]
    body = helper.make_graph(nodes, "body", starts, [value("going", TensorProto.BOOL, []), value("u", FLOAT, None)])
    proto.graph.initializer.append(numpy_helper.from_array(np.array(2), "turns"))
    proto.graph.node.insert(3, node("Loop", "turns - m", "k", "loop", body=body))
    proto.graph.node[4].input[0] = "k"


KINDS = [
    bare_loop,
    nameless,
    unsorted,
    repeated_names,
    long_domain,
    sparse_weight,
    sparse_rows,
    sparse_constant,
    input_is_output,
    unread_outputs,
    stored_output,
    constant_output,
    functions,
    old_ir,
    new_ir,
    untrue_infos,
    odd_bodies,
    scalar_input,
]
SAMPLE = {"x": normal(1, 4, 8, 8, seed=5), "k": np.array(0.5, np.float32)}


def results(model: ModelProto) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes of the sample."""
    fed = {i.name: SAMPLE[i.name] for i in model.graph.input if i.name in SAMPLE}
    return next(ort.run(model, [fed]))


@pytest.mark.parametrize("make", KINDS)
def test_an_odd_model_computes_the_same_repaired_prepared_and_compiled(make: Callable[[ModelProto], None]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    proto = net()
    make(proto)
    before = proto.SerializeToString()
    model = load(proto)
    done = prepare(model)
    assert proto.SerializeToString() == before
    wanted = results(net())["y"] * (0.5 if make is scalar_input else 1)
    if make is odd_bodies:
        wanted = results(model.proto)["y"]
    for made in (model.proto, done.proto):
        onnx.checker.check_model(made, full_check=True)
        onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
        assert [v.name for v in made.graph.output] == [v.name for v in proto.graph.output]
        assert not made.functions and not made.graph.sparse_initializer
        found = results(made)
        assert np.allclose(found["y"], wanted, rtol=1e-5, atol=1e-5)
        for name, stored in {"w": SPARSE, "x": SAMPLE["x"]}.items():
            assert name not in found or np.array_equal(found[name], stored)
    assert [i.name for i in done.inputs] == [v.name for v in proto.graph.input if v.name in SAMPLE]
    assert sum(n.op_type == "Conv" for n in done.graph.node) == 2 and done.is_constant(done.graph.node[0].input[1])
    for each in (model, done):
        assert compile_engine(each, recipe=Recipe(), shapes=shape_ranges(each, (), None)).table.kernels


def test_an_ordinary_file_is_taken_as_it_is(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    assert model.file == tmp_path / "m.onnx" and model.proto == net() and model.replace(net()).file is None
    proto = net()
    repeated_names(proto)
    onnx.save(proto, tmp_path / "m.onnx")
    assert load(tmp_path / "m.onnx").file is None
    assert [n.name for n in load(proto).graph.node] == ["same", "same_2", "same_3", "same_4"]


def test_nodes_of_functions_have_the_names_of_tensorrts_parser() -> None:
    proto = net()
    functions(proto)
    names = [n.name for n in load(proto).graph.node]
    assert names == ["conv | inner (Inner) | outer (Outer)", "relu | inner (Inner) | outer (Outer)", "pool", "last"]


def test_functions_that_call_each_other_without_end_are_refused_at_once() -> None:
    proto = net()
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    for i in range(24):
        calls = [helper.make_node(f"F{i - 1}", [a], [b], domain="mine") for a, b in ("at", "tb")]
        body = calls if i else [node("Relu", "a", "b")]
        proto.functions.append(helper.make_function("mine", f"F{i}", ["a"], ["b"], body, opsets))
    proto.graph.node[1].CopyFrom(helper.make_node("F23", ["c"], ["r"], domain="mine"))
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    with pytest.raises(ModelError, match="cannot be put in place of their calls"):
        load(proto)


@pytest.mark.parametrize(
    "calls",
    [
        [helper.make_node("F", ["a"], ["b"], domain="mine")],  # itself
        [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("G", ["a", "a", "a"], ["c"], domain="mine")],
    ],
)
def test_functions_that_cannot_be_put_in_place_of_their_calls(calls: list[onnx.NodeProto]) -> None:
    proto = net()
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    proto.functions.append(helper.make_function("mine", "F", ["a"], ["b"], calls, opsets))
    proto.functions.append(helper.make_function("mine", "G", ["a"], ["b"], [node("Relu", "a", "b")], opsets[:1]))
    proto.graph.node[1].CopyFrom(helper.make_node("F", ["c"], ["r"], domain="mine"))
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    with pytest.raises(ModelError, match="cannot be put in place of their calls"):
        load(proto)


def test_an_output_of_another_type_than_its_node_makes_is_refused() -> None:
    proto = net()
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(ModelError, match="is stated as int64, but it is made as float32"):
        load(proto)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            helper.make_sparse_tensor(*map(numpy_helper.from_array, (np.ones(1, "f"), np.int64([99]))), [4]),
            "not a valid",
        ),
        (
            helper.make_sparse_tensor(
                *map(numpy_helper.from_array, (np.ones(1, "f"), np.int64([9]))), [1 << 20, 1 << 10]
            ),
            "a dense one of 4294967296 bytes",
        ),
    ],
    ids=["out of range", "too large"],
)
def test_sparse_tensors_that_cannot_be_dense_are_refused(tensor: onnx.SparseTensorProto, message: str) -> None:
    proto = net()
    tensor.values.name = "w"
    proto.graph.sparse_initializer.append(tensor)
    del proto.graph.initializer[0]
    with pytest.raises(ModelError, match=message):
        load(proto)


@pytest.mark.parametrize("opset", range(7, 29))
def test_every_opset_of_onnx_runtime_is_taken_and_computes_the_same(opset: int) -> None:
    proto = net(opset)
    proto.graph.node.append(node("Softmax", "y", "z", axis=1))
    proto.graph.node.append(node("Upsample", "z", "u", scales=[1.0, 1, 2, 2]) if opset < 9 else node("Neg", "z", "u"))
    proto.graph.output.append(value("u", FLOAT, None))
    proto.ir_version = 14 if opset > 25 else 8
    done = prepare(load(proto))
    assert done.opset == min(max(opset, 21), accept.NEWEST_OPSET) and done.proto.ir_version <= 13
    for name, found in results(done.proto).items():
        assert np.allclose(found, results(proto)[name], rtol=1e-5, atol=1e-6)


def test_an_operator_that_is_new_keeps_its_opset() -> None:
    nodes = [node("CumProd", "x one", "c"), node("Relu", "c", "y")]
    tensors = [numpy_helper.from_array(np.int64(1), "one")]
    graph = helper.make_graph(nodes, "new", [value("x", FLOAT, [1, 4, 8, 8])], [value("y", FLOAT, None)], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 26)], ir_version=13)
    model = prepare(load(proto))
    assert model.opset == 26 and np.array_equal(results(model.proto)["y"], results(proto)["y"])


def test_scan_of_opset_8_is_refused_by_name() -> None:
    body = helper.make_graph(
        [node("Add", "a b", "c"), node("Identity", "c", "d")],
        "body",
        [value("a", FLOAT, [2]), value("b", FLOAT, [2])],
        [value("c", FLOAT, [2]), value("d", FLOAT, [2])],
    )
    scan = helper.make_node("Scan", ["", "s", "x"], ["e", "y"], "scan", num_scan_inputs=1, body=body)
    ends = [value("s", FLOAT, [1, 2]), value("x", FLOAT, [1, 3, 2])], [value("y", FLOAT, [1, 3, 2])]
    graph = helper.make_graph([scan], "g", *ends)
    with pytest.raises(ModelError, match="until opset 8 Scan ran over a batch"):
        prepare(load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=3)))


def test_a_batch_normalization_that_trains_keeps_its_outputs() -> None:
    """ONNX Runtime computes statistics of the batch where it has five outputs, read or not."""
    proto = net(9)
    proto.graph.node[1].CopyFrom(node("BatchNormalization", "c s b n q", "r i j k l", "norm"))
    proto.graph.initializer.extend(numpy_helper.from_array(np.ones(8, np.float32), name) for name in "sbnq")
    assert len(load(proto).graph.node[1].output) == 5


def test_a_convolution_behind_an_unknown_shape_has_the_rank_of_its_weight() -> None:
    proto = net()
    proto.graph.node[0].CopyFrom(
        helper.make_node(
            "FusedConv", ["x", "w"], ["c"], "conv", domain="com.microsoft", pads=[1] * 4, activation="Relu"
        )
    )
    proto.graph.node[2].CopyFrom(node("Conv", "r u", "m", "second"))
    proto.graph.initializer.append(numpy_helper.from_array(normal(8, 8, 3, 3), "u"))
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    proto.graph.output[0].CopyFrom(value("y", FLOAT, None))
    model = prepare(load(proto))
    assert [(model.rank(name), (model.info(name) or model.inputs[0]).shape[1]) for name in "rmy"] == [
        (4, 8),
        (4, 8),
        (4, 4),
    ]


def behind_a_custom_operator(stated: list[int]) -> ModelProto:
    """x -> an operator that onnx does not know -> c, of a stated shape -> Conv -> y."""
    nodes = [
        helper.make_node("FusedConv", ["x", "w"], ["c"], "first", domain="com.microsoft", pads=[1] * 4),
        node("Conv", "c v", "y", "last"),
    ]
    tensors = [numpy_helper.from_array(a, n) for n, a in {"w": W, "v": normal(4, 8, 1, 1)}.items()]
    ends = [value("x", FLOAT, [1, 4, 8, 8])], [value("y", FLOAT, None)]
    graph = helper.make_graph(nodes, "net", *ends, tensors, value_info=[value("c", FLOAT, stated)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_what_the_file_says_of_a_shape_is_believed_and_checked_on_a_sample() -> None:
    true, untrue = (prepare(load(behind_a_custom_operator(s))) for s in ([1, 8, 8, 8], [1, 8, 9, 8]))
    assert true.sizes("y") == (1, 4, 8, 8)
    made = quantize(true, [{"x": SAMPLE["x"]}])
    assert made.plan.quantized_nodes == ("last",)
    with pytest.raises(InputError, match=r"'c' has shape \[1, 8, 8, 8\] on a sample, and \[1, 8, 9, 8\] is what"):
        quantize(untrue, [{"x": SAMPLE["x"]}])


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an odd model, whose weights lie in a side file, and samples; the current directory."""
    monkeypatch.chdir(tmp_path)
    proto = net()
    for make in (unread_outputs, odd_bodies, untrue_infos, input_is_output, repeated_names, unsorted, nameless):
        make(proto)
    onnx.save(proto, "m.onnx", save_as_external_data=True, location="m.data", size_threshold=64)
    rng = np.random.default_rng(3)
    save_samples(tmp_path / "data", [{"x": rng.normal(size=(1, 4, 8, 8)).astype(np.float32)} for _ in range(3)])
    return tmp_path


def test_every_verb_takes_an_odd_model_with_weights_beside_it(odd: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in odd.glob("m.*")}
    for command in (
        "plan m.onnx",
        "calibrate m.onnx --data data -o t.json",
        "quantize m.onnx --data data --rest fp32 -o q.onnx",
        "check m.onnx q.onnx --data data",
        "explain m.onnx same",
        "build m.onnx -o m.engine",
        "audit m.onnx",
        "audit m.engine",
        "check m.onnx m.onnx --data data --as-compiled",
        "compare m.onnx --data data --schemes int8",
        "deploy m.onnx --data data --tune off --out out",
        "lint m.onnx",
    ):
        result = CliRunner().invoke(main, command.split())
        assert result.exit_code == 0, f"{command}: {result.output}"
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in odd.glob("m.[od]*")} == files


def test_weights_beside_the_file_may_belong_to_a_body(tmp_path: Path) -> None:
    proto, weight = net(), numpy_helper.from_array(normal(8, 8, 1, 1), "inner")
    proto.graph.input.append(value("flag", TensorProto.BOOL, []))
    branches = {
        "then_branch": helper.make_graph(
            [node("Conv", "m inner", "a")], "then", [], [value("a", FLOAT, None)], [weight]
        ),
        "else_branch": helper.make_graph([node("Relu", "m", "b")], "else", [], [value("b", FLOAT, None)]),
    }
    proto.graph.node.insert(3, node("If", "flag", "k", "if", **branches))
    proto.graph.node[4].input[0] = "k"
    fed = {"x": SAMPLE["x"], "flag": np.array(True)}
    wanted = next(ort.run(proto, [fed]))["y"]
    plain = file_bytes(load(proto))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=64)
    model = load(tmp_path / "m.onnx")
    assert abs(file_bytes(model) - plain) < 1000
    (found,) = float_session(prepare(model), "the model").run(None, fed)
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_lint_looks_into_functions(tmp_path: Path) -> None:
    proto = net()
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "scale"))
    proto.graph.initializer.append(numpy_helper.from_array(np.uint8(0), "zero"))
    pair = [node("QuantizeLinear", "x s z", "q", "quantize"), node("DequantizeLinear", "q s z", "d", "dequantize")]
    proto.functions.append(
        helper.make_function("mine", "Pair", ["x", "s", "z"], ["d"], pair, [helper.make_opsetid("", 17)])
    )
    proto.graph.node[0].input[0] = "d"
    proto.graph.node.insert(0, helper.make_node("Pair", ["x", "scale", "zero"], ["d"], "call", domain="mine"))
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(proto, tmp_path / "q.onnx")
    result = CliRunner().invoke(main, ["lint", str(tmp_path / "q.onnx")])
    assert result.exit_code == 1 and "quantize | call (Pair)" in result.output
    fixed = CliRunner().invoke(main, ["lint", str(tmp_path / "q.onnx"), "--fix", "-o", str(tmp_path / "f.onnx")])
    assert fixed.exit_code == 0, fixed.output


def test_a_model_of_empty_arrays_is_quantized(tmp_path: Path) -> None:
    """A cache that is empty before the first step, beside an input that is not."""
    nodes = [node("MatMul", "x w", "h"), node("Concat", "past h", "y", axis=1)]
    ends = [value("x", FLOAT, ["b", "t", 8]), value("past", FLOAT, ["b", "p", 8])], [value("y", FLOAT, None)]
    graph = helper.make_graph(nodes, "cache", *ends, [numpy_helper.from_array(normal(8, 8), "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    samples = [{"x": normal(1, 3, 8, seed=i), "past": normal(1, i, 8, seed=i)} for i in range(3)]
    save_samples(tmp_path / "data", samples)
    paths = [str(tmp_path / name) for name in ("m.onnx", "data", "q.onnx")]
    result = CliRunner().invoke(main, ["quantize", paths[0], "--data", paths[1], "-o", paths[2]])
    assert result.exit_code == 0 and "1 nodes in INT8" in result.output, result.output


def test_a_model_in_memory_has_no_file() -> None:
    assert load(net()).file is None and isinstance(load(net()), Model)


def of_unknown_type(proto: ModelProto) -> None:
    proto.graph.initializer[0].data_type = 999


def without_outputs(proto: ModelProto) -> None:
    del proto.graph.output[:]


def made_twice(proto: ModelProto) -> None:
    proto.graph.node[1].output[0] = "c"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of_unknown_type, "tensor 'w' is of type 999"),
        (without_outputs, "it has no outputs"),
        (made_twice, "used as output names multiple times"),
    ],
)
def test_what_cannot_be_repaired_is_refused(make: Callable[[ModelProto], None], message: str) -> None:
    proto = net()
    make(proto)
    with pytest.raises(ModelError, match=message):
        load(proto)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    proto = net()
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = "broken"
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString().replace(b"broken", b"brok\xffn"))
    with pytest.raises(ModelError, match="not UTF-8"):
        load(tmp_path / "m.onnx")


def test_an_output_without_a_type_gets_the_inferred_one_and_a_sparse_text_is_refused() -> None:
    proto = net()
    proto.graph.output[0].type.tensor_type.elem_type = 0
    assert load(proto).proto.graph.output[0].type.tensor_type.elem_type == FLOAT
    texts = net().graph.sparse_initializer.add()
    texts.values.CopyFrom(numpy_helper.from_array(np.array(["a"], object), "w"))
    texts.indices.CopyFrom(numpy_helper.from_array(np.array([0])))
    texts.dims.extend([8])
    proto = net()
    proto.graph.sparse_initializer.append(texts)
    with pytest.raises(ModelError, match="holds texts"):
        load(proto)
