"""Loading, asking and saving: every bad file gives one paragraph, and no user's file is ever changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from engines.core import arithmetic
from engines.core.errors import BuildError, EngineError
from engines.core.files import sha256_file
from engines.core.load import load_graph
from qdq.core.errors import InputError, ModelError
from qdq.model import storage
from qdq.model.external import is_external
from qdq.model.model import Model, TensorInfo
from qdq.model.nodes import needed
from qdq.model.storage import load, save

WEIGHT = np.random.default_rng(0).standard_normal((16, 3, 5, 5)).astype(np.float32)  # 4800 bytes


def tiny() -> ModelProto:
    """x -> Conv -> Relu -> y, beside an If that reads the tensor h in its bodies."""
    value = helper.make_tensor_value_info
    out = [value("o", TensorProto.FLOAT, None)]
    then = helper.make_graph([helper.make_node("Neg", ["h"], ["o"])], "then", [], out)
    other = helper.make_graph([helper.make_node("Identity", ["h"], ["o"])], "other", [], out)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], "conv"),
        helper.make_node("Relu", ["h"], ["y"], "relu"),
        helper.make_node("If", ["yes"], ["z"], "if", then_branch=then, else_branch=other),
    ]
    inputs = [value("x", TensorProto.FLOAT, ["N", 3, 8, None]), value("w", TensorProto.FLOAT, WEIGHT.shape)]
    outputs = [value("y", TensorProto.FLOAT, ["N", 16, 4, None]), value("z", TensorProto.FLOAT, None)]
    tensors = [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(np.array(True), "yes")]
    body = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def external(folder: Path, location: str = "m.data") -> Path:
    """The tiny model with its weight in a side file."""
    proto = tiny()
    onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location=location, size_threshold=1024)
    return folder / "m.onnx"


def relocate(path: Path, location: str) -> None:
    """Make the model's weight point at another side file."""
    proto = onnx.load(path, load_external_data=False)
    next(e for e in proto.graph.initializer[0].external_data if e.key == "location").value = location
    path.write_bytes(proto.SerializeToString())


def test_load_answers_questions(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(tiny().SerializeToString())
    model = load(path)
    assert model.inputs == (TensorInfo(name="x", dtype="float32", shape=("N", 3, 8, None)),)
    assert [o.name for o in model.outputs] == ["y", "z"] and model.outputs[1].shape is None
    assert model.opset == 17 and model.directory == tmp_path
    assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert np.array_equal(model.array("w"), WEIGHT)
    assert model.is_constant("w") and not model.is_constant("x")
    producer = model.producer("h")
    assert producer is not None and producer.name == "conv" and model.producer("x") is None
    assert [(u.node.name, u.index) for u in model.consumers("h")] == [("relu", 0), ("if", -1)]
    assert [(u.node.name, u.index) for u in model.consumers("w")] == [("conv", 1)]
    assert model.consumers("y") == () and model.is_output("y") and not model.is_output("h")
    assert model.info("w") == TensorInfo(name="w", dtype="float32", shape=(16, 3, 5, 5))
    assert model.info("h") is None and model.node("relu").op_type == "Relu"
    with pytest.raises(KeyError):
        model.node("none")


def test_a_model_knows_types_ranks_sizes_names_and_only_uses() -> None:
    model = Model(proto=tiny(), directory=Path(), sha256="")
    assert [model.rank(t) for t in ("x", "w", "yes", "z", "h")] == [4, 4, 0, None, None]
    assert [model.sizes(t) for t in ("w", "yes", "x", "z", "h")] == [(16, 3, 5, 5), (), None, None, None]
    assert [model.sizes(t, 1) for t in ("w", "x")] == [(3, 5, 5), None] and model.sizes("x", 4) == ()
    assert [model.dtype(t) for t in ("x", "yes", "h")] == ["float32", "bool", "float32"]  # h is not known
    only = {tensor: model.only_use(tensor) for tensor in "xhy"}
    assert only["x"] is not None and (only["x"].node.name, only["x"].index) == ("conv", 0)
    assert only["h"] is None and only["y"] is None  # read by a body too; read by nobody
    model.proto.graph.node.append(helper.make_node("Neg", ["y"], ["n"], "neg"))
    assert Model(proto=model.proto, directory=Path(), sha256="").only_use("y") is None  # an output as well
    assert model.names() == {"x", "w", "yes", "h", "y", "z", "n", "conv", "relu", "if", "neg", "o"}


def test_nodes_that_tensors_need_are_found_through_bodies_and_past_inputs_left_out() -> None:
    nodes = [helper.make_node("Dropout", ["x"], ["d", ""], "drop"), *tiny().graph.node]
    nodes.append(helper.make_node("Clip", ["y", "", "w"], ["c"], "clip"))
    assert [n.name for n in needed(nodes, ["z"])] == ["conv", "if"]
    assert [n.name for n in needed(nodes, ["c"])] == ["conv", "relu", "clip"]
    assert needed(nodes, ["x"]) == []


def png() -> bytes:
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x02\0\0\0\x90wS\xde"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (png(), "not a complete ONNX model"),
        (b"This is a text, not a model.\n" * 20, "not a complete ONNX model"),
        (ModelProto(ir_version=8).SerializeToString(), "it holds no nodes"),
        (tiny().SerializeToString() + b"\0", "not a complete ONNX model"),
    ],
    ids=["empty", "PNG", "text", "no nodes", "a byte more"],
)
def test_files_that_are_no_model_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=message) as error:
        load(tmp_path / "m.onnx")
    assert "\n" not in str(error.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = tiny().SerializeToString()
    path = tmp_path / "m.onnx"
    for length in [*range(1, 60), *range(60, len(whole) - 40, 97), *range(len(whole) - 40, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError) as error:
            load(path)
        assert "\n" not in str(error.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        load(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="it is a folder"):
        load(tmp_path)


def test_a_model_that_breaks_the_standard_is_refused(tmp_path: Path) -> None:
    proto = tiny()
    proto.graph.node[1].op_type = "NoSuchOperator"
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"not a valid ONNX model.*NoSuchOperator"):
        load(tmp_path / "m.onnx")


def test_a_tensor_that_cannot_be_an_array_is_refused() -> None:
    def changed(change: Callable[[TensorProto], object]) -> ModelProto:
        proto = tiny()
        change(proto.graph.initializer[0])
        return proto

    def typed(tensor: TensorProto) -> None:
        tensor.ClearField("raw_data")
        tensor.float_data.append(1)

    raw = WEIGHT.tobytes()
    for proto, said in (
        (changed(lambda t: setattr(t, "raw_data", raw[:-4])), r"needs 4800 stored bytes or values and has 4796\."),
        (changed(lambda t: setattr(t, "raw_data", raw + raw)), r"needs 4800 .* and has 9600\."),
        (changed(typed), r"needs 1200 .* and has 1\."),
        (changed(lambda t: t.segment.SetInParent()), "is stored in segments"),
        (changed(lambda t: setattr(t, "data_type", 999)), "is of type 999"),
        (changed(lambda t: t.dims.extend([1] * 61)), "has 65 axes; an array has at most 64"),
    ):
        with pytest.raises(ModelError, match=said):
            load(proto)


def test_bodies_nested_deeper_than_a_file_can_hold_are_refused() -> None:
    value = helper.make_tensor_value_info
    for depth in (3, 26):
        nodes = [helper.make_node("Relu", ["x"], ["y0"])]
        for level in range(depth):
            outputs = [value(f"y{level}", TensorProto.FLOAT, None)]
            body = helper.make_graph(nodes, "then", [], outputs)
            other = helper.make_graph([helper.make_node("Neg", ["x"], [f"y{level}"])], "else", [], outputs)
            nodes = [helper.make_node("If", ["yes"], [f"y{level + 1}"], then_branch=body, else_branch=other)]
        outputs = [value(f"y{depth}", TensorProto.FLOAT, None)]
        yes = numpy_helper.from_array(np.array(True), "yes")
        graph = helper.make_graph(nodes, "nested", [value("x", TensorProto.FLOAT, [2])], outputs, [yes])
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        if depth == 3:
            assert load(proto).proto.graph.node
        else:
            with pytest.raises(ModelError, match="nest deeper than 25"):
                load(proto)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    os.mkfifo(path)
    with pytest.raises(ModelError, match="it is a folder, a pipe or a device"):
        load(path)
    with pytest.raises(BuildError, match="a pipe or a device"):
        load_graph(path)
    with pytest.raises(EngineError, match="a pipe or a device"):
        sha256_file(path)
    with pytest.raises(EngineError, match="a pipe or a device"):
        arithmetic.session(path)
    with pytest.raises(InputError, match="a pipe or a device"):
        save(tiny(), path)
    assert path.is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_external_data_stays_outside_and_counts_in_the_hash(tmp_path: Path) -> None:
    path = external(tmp_path)
    model = load(path)
    assert is_external(model.initializers["w"]) and not model.initializers["w"].raw_data
    assert np.array_equal(model.array("w"), WEIGHT)
    data = bytearray((tmp_path / "m.data").read_bytes())
    assert model.sha256 == hashlib.sha256(path.read_bytes() + WEIGHT.tobytes()).hexdigest()
    data[7] ^= 1
    (tmp_path / "m.data").write_bytes(data)
    assert load(path).sha256 != model.sha256


def remove(folder: Path) -> None:
    (folder / "m.data").unlink()


def truncate(folder: Path) -> None:
    (folder / "m.data").write_bytes(b"\0" * 100)


def climb(folder: Path) -> None:
    (folder / "m.data").rename(folder.parent / "outside.data")
    relocate(folder / "m.onnx", "../outside.data")


def absolute(folder: Path) -> None:
    (folder / "m.data").rename(folder.parent / "outside.data")
    relocate(folder / "m.onnx", str(folder.parent / "outside.data"))


def link(folder: Path) -> None:
    (folder / "m.data").rename(folder.parent / "outside.data")
    (folder / "m.data").symlink_to(folder.parent / "outside.data")


def linked_folder(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "m.data").rename(folder.parent / "elsewhere" / "m.data")
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    relocate(folder / "m.onnx", "sub/m.data")


def no_location(folder: Path) -> None:
    relocate(folder / "m.onnx", "")


def negative(folder: Path) -> None:
    proto = onnx.load(folder / "m.onnx", load_external_data=False)
    next(e for e in proto.graph.initializer[0].external_data if e.key == "offset").value = "-5"
    (folder / "m.onnx").write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, "'m.data' is not a file in the model's folder"),
        (truncate, "needs 4800 bytes .* holds 100"),
        (climb, "is not inside the model's folder"),
        (absolute, "is not inside the model's folder"),
        (link, "is not inside the model's folder"),
        (linked_folder, "is not inside the model's folder"),
        (no_location, "is not inside the model's folder|is not a file"),
        (negative, "belongs to another model"),
    ],
)
def test_bad_external_data_is_refused(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(folder)
    model = load(path)
    spoil(folder)
    with pytest.raises(ModelError, match=message) as error:
        load(path)
    assert "'w'" in str(error.value) and "\n" not in str(error.value)
    if spoil in (remove, truncate, link):
        with pytest.raises(ModelError, match=message):
            model.array("w")


def test_save_and_load_give_the_same_model(tmp_path: Path) -> None:
    save(tiny(), tmp_path / "a.onnx")
    model = load(tmp_path / "a.onnx")
    save(model, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "b.onnx"]
    assert model.proto == tiny()


def test_external_data_is_saved_beside_the_file(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    model = load(external(source))
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.initializer.append(
        TensorProto(name="f", dims=[300], data_type=TensorProto.FLOAT, float_data=[1.5] * 300)
    )
    proto.graph.initializer.append(helper.make_tensor("i", TensorProto.INT4, [3001], [-8, 7, 1] * 1000 + [3]))
    for name in ("p.onnx", "q.onnx"):
        save(model.replace(proto), target / name)
    assert sorted(os.listdir(target)) == ["p.onnx", "p.onnx.data", "q.onnx", "q.onnx.data"]
    assert (target / "p.onnx.data").read_bytes() == (target / "q.onnx.data").read_bytes()
    again = load(target / "p.onnx")
    assert all(is_external(again.initializers[n]) for n in "wfi")
    assert not is_external(again.initializers["yes"])
    assert np.array_equal(again.array("w"), WEIGHT) and again.array("f").tolist() == [1.5] * 300
    assert again.array("i").astype(int).tolist() == [-8, 7, 1] * 1000 + [3]
    assert np.array_equal(numpy_helper.to_array(onnx.load(target / "p.onnx").graph.initializer[0]), WEIGHT)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_a_model_too_large_for_one_file_gets_a_side_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "IN_FILE_LIMIT", 4000)
    save(tiny(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size == WEIGHT.nbytes
    assert np.array_equal(load(tmp_path / "m.onnx").array("w"), WEIGHT)


def test_the_sources_own_data_is_never_overwritten(tmp_path: Path) -> None:
    model = load(external(tmp_path, "m.onnx.data"))
    before = (tmp_path / "m.onnx.data").read_bytes()
    with pytest.raises(InputError, match="would replace the data that tensor 'w'"):
        save(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").read_bytes() == before


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="Choose a folder that exists"):
        save(tiny(), tmp_path / "none" / "m.onnx")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="Choose a folder that exists"):
        save(tiny(), tmp_path / "file" / "m.onnx")
    (tmp_path / "source").mkdir()
    model = load(external(tmp_path / "source"))
    (tmp_path / "source" / "m.data").unlink()
    (tmp_path / "target").mkdir()
    with pytest.raises(ModelError, match="is not a file"):
        save(model, tmp_path / "target" / "m.onnx")
    assert not list((tmp_path / "target").iterdir())

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        save(tiny(), tmp_path / "target" / "m.onnx")
    assert not list((tmp_path / "target").iterdir())


@pytest.mark.parametrize("op", ["QuantizeLinear", "DequantizeLinear", "QLinearConv", "MatMulInteger", "MatMulNBits"])
def test_quantized_models_are_recognized(op: str) -> None:
    proto = tiny()
    assert not storage.is_quantized(Model(proto=proto, directory=Path(), sha256=""))
    inner = next(a.g for a in proto.graph.node[2].attribute if a.name == "else_branch")
    inner.node[0].op_type = op
    assert storage.is_quantized(Model(proto=proto, directory=Path(), sha256=""))
