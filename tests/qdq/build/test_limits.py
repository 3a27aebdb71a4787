"""What the compiler has no form for is refused with the node: sequences of unlike elements, windows of open size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphs import node, normal
from onnx import TensorProto, helper, numpy_helper

from qdq.cli.main import main

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")

value = helper.make_tensor_value_info
PARTS = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
STEP = [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, [])]
ON = node("Identity", "go", "on", "goes_on")
ENDS = {"w": normal(8, 8), "zero": np.array([0]), "half": np.array([3]), "one": np.array(1), "two": np.array(2)}


def model(nodes: list[onnx.NodeProto], rows: int | str, **numbers: list[int]) -> onnx.ModelProto:
    """x (rows, 8) and some integers -> y."""
    fed = [value("x", TensorProto.FLOAT, [rows, 8])]
    fed += [value(name, TensorProto.INT64, shape) for name, shape in numbers.items()]
    stored = [numpy_helper.from_array(array, name) for name, array in ENDS.items() if name not in numbers]
    graph = helper.make_graph(nodes, "limits", fed, [value("y", TensorProto.FLOAT, None)], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def one_of_two() -> onnx.ModelProto:
    """All rows, or the first half of them, as an input says."""
    nodes = [node("MatMul", "x w", "p", "product"), node("Slice", "p zero half zero", "h", "cut")]
    nodes += [node("SequenceConstruct", "p h", "s", "both"), node("SequenceAt", "s which", "y", "pick")]
    return model(nodes, 6, which=[])


def growing() -> onnx.ModelProto:
    """A list of the first row, the first two rows and so on, as many as an input says, then all of them joined."""
    inner = [
        node("Add", "i one", "n"),
        node("Unsqueeze", "n zero", "end"),
        node("Slice", "p zero end zero", "part", "cut"),
        node("SequenceInsert", "s part", "s2", "insert"),
        ON,
    ]
    state, made = (helper.make_value_info(name, PARTS) for name in ("s", "s2"))
    body = helper.make_graph(inner, "body", [*STEP, state], [value("on", TensorProto.BOOL, []), made])
    nodes = [
        node("MatMul", "x w", "p", "product"),
        node("SequenceEmpty", "", "s0", "empty", dtype=TensorProto.FLOAT),
        node("Loop", "turns - s0", "all", "grow", body=body),
        node("ConcatFromSequence", "all", "y", "join", axis=0),
    ]
    nodes[1].ClearField("input")
    return model(nodes, 6, turns=[])


def windows(*, open_size: bool) -> onnx.ModelProto:
    """Windows that start at every other row, of as many rows as an input says or of three; as many turns as fit."""
    inner = [
        node("Mul", "i two", "at"),
        node("Unsqueeze", "at zero", "begin"),
        node("Add", f"begin {'size' if open_size else 'half'}", "end"),
        node("Slice", "x begin end zero", "part", "window"),
        node("MatMul", "part w", "row", "product"),
        ON,
    ]
    ends = [value("on", TensorProto.BOOL, []), value("row", TensorProto.FLOAT, None)]
    body = helper.make_graph(inner, "body", STEP, ends)
    nodes = [
        node("Shape", "x", "shape", start=0, end=1),
        node("Squeeze", "shape", "rows"),
        node("Div", "rows two", "some"),
        node("Sub", "some two", "turns"),
        node("Loop", "turns -", "all", "slide", body=body),
        node("ReduceMean", "all zero", "y", "mean", keepdims=0),
    ]
    return model(nodes, "T", **({"size": [1]} if open_size else {}))


CASES = {
    "unlike elements, one chosen": (one_of_two(), {"which": np.array(0)}, ("both", "SequenceConstruct")),
    "unlike elements, joined": (growing(), {"turns": np.array(3)}, ("insert", "cut", "grow")),
    "windows of open size": (windows(open_size=True), {"size": np.array([3])}, ("slide", "window", "size")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("verb", ["deploy", "build"])
def test_what_has_no_form_is_refused_by_the_node(tmp_path: Path, case: str, verb: str) -> None:
    proto, numbers, named = CASES[case]
    (tmp_path / "data").mkdir()
    onnx.save(proto, tmp_path / "m.onnx")
    for index in range(3):
        np.savez(tmp_path / "data" / f"{index}.npz", x=normal(12 if "open" in case else 6, 8, seed=index), **numbers)
    rest = {
        "deploy": ["--data", str(tmp_path / "data"), "--tune", "off", "--out", str(tmp_path / "out")],
        "build": ["-o", str(tmp_path / "out"), "--shape", f"x:{12 if 'open' in case else 6}x8"],
    }[verb]
    done = CliRunner().invoke(main, [verb, str(tmp_path / "m.onnx"), *rest])
    error = done.stderr.strip().splitlines()[-1]
    assert done.exit_code == 2 and any(f"'{name}'" in error or f"node {name}" in error for name in named)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "m.onnx"]


def test_windows_of_one_size_at_places_that_the_turn_decides_are_refused(tmp_path: Path) -> None:
    onnx.save(windows(open_size=True), tmp_path / "m.onnx")
    args = ["build", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.engine"), "--shape", "x:12x8"]
    said = CliRunner().invoke(main, args).stderr
    assert "The values of input 'size' decide sizes" in said and "--hold size=VALUE" in said
    for more in (["--hold", "size=3"], []):
        done = CliRunner().invoke(main, [*args, *more])
        assert done.exit_code == 2 and "In the body of Loop 'slide', Slice 'window'" in done.stderr
        onnx.save(windows(open_size=False), tmp_path / "m.onnx")


def test_unlike_elements_are_the_reason_that_is_said(tmp_path: Path) -> None:
    proto, numbers, _ = CASES["unlike elements, joined"]
    onnx.save(proto, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=normal(1, 6, 8), **{name: array[None] for name, array in numbers.items()})
    args = ["quantize", str(tmp_path / "m.onnx"), "--data", str(tmp_path / "x.npz"), "-o", str(tmp_path / "q.onnx")]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 2 and "let every turn make elements of one shape" in " ".join(done.stderr.split())
    assert "'grow'" in done.stderr and not (tmp_path / "q.onnx").exists()
