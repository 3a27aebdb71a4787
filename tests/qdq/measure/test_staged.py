"""A model run in stages gives what it gives at once, with constants that change between the stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from models import assemble, constant
from onnx import TensorProto, helper

from qdq.measure.inference.session import Session
from qdq.measure.inference.staged import Stages, can_stage
from qdq.model.model import Model

Sample = dict[str, np.ndarray]


def branched() -> onnx.ModelProto:
    """x (n, 8) -> first -> Relu -> second -> Add with first's -> third -> y; two products read w0."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Transpose", ["w0"], ["w0_t"], name="turn"),
        helper.make_node("Gemm", ["x", "w0_t", "b0"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "w1", "b1"], ["b"], name="second"),
        helper.make_node("Add", ["a", "b"], ["c"], name="add"),
        helper.make_node("Gemm", ["c", "w0_t", "b2"], ["y"], name="third"),
    ]
    shapes = {"w0": (8, 8), "w1": (8, 8), "b0": (8,), "b1": (8,), "b2": (8,)}
    constants = [constant(n, rng.normal(0, 0.5, s).astype(np.float32)) for n, s in shapes.items()]
    return assemble(nodes, {"x": ("n", 8)}, {"y": ("n", 8)}, constants)


@pytest.fixture
def model() -> Model:
    return Model(proto=branched(), directory=Path(), sha256="m")


@pytest.fixture
def samples() -> list[Sample]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(n, 8)).astype(np.float32)} for n in (3, 5, 4)]


def whole(model: Model, samples: list[Sample], names: list[str]) -> list[Sample]:
    session = Session(model, names, threads=1)
    return [session(sample) for sample in samples]


def with_bias(model: Model, name: str, values: np.ndarray) -> Model:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    next(t for t in proto.graph.initializer if t.name == name).CopyFrom(constant(name, values))
    return model.replace(proto)


@pytest.mark.parametrize("memory", [None, 0, 150])
def test_stages_give_what_one_run_gives(model: Model, samples: list[Sample], memory: int | None) -> None:
    expected = whole(model, samples, ["a", "b", "y"])
    with Stages(model, [["a"], ["b"], ["y"]], samples, memory=memory) as stages:
        for name in ("a", "b", "y"):
            found = stages.run(model, lambda values, name=name: values[name])
            for one, both in zip(found, expected, strict=True):
                np.testing.assert_allclose(one, both[name], rtol=1e-5, atol=1e-5)


def test_a_change_of_bias_reaches_what_has_been_computed(model: Model, samples: list[Sample]) -> None:
    shift = np.linspace(-1, 1, 8).astype(np.float32)
    changed = with_bias(model, "b0", model.array("b0") + shift)
    with Stages(model, [["a"], ["b"], ["y"]], samples) as stages:
        stages.run(model, lambda _: None)
        stages.add("a", shift.astype(np.float64), axis=-1)
        stages.run(changed, lambda _: None)
        found = stages.run(changed, lambda values: values["y"])
    for one, expected in zip(found, whole(changed, samples, ["y"]), strict=True):
        np.testing.assert_allclose(one, expected["y"], rtol=1e-5, atol=1e-5)


def test_only_what_later_stages_read_is_kept_and_files_go(
    model: Model, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Stages(model, [["a"], ["b"], ["y"]], samples, memory=0) as stages:
        sizes = []
        for _ in range(3):
            sizes.append(len([p for p in tmp_path.rglob("*") if p.is_file()]))
            stages.run(model, lambda _: None)
        assert sizes == [3, 3, 6]  # x of each sample; then a, which relu and add read; then a and b
    assert not list(tmp_path.iterdir())


def test_a_sample_in_a_file_stays(model: Model, tmp_path: Path) -> None:
    """What is mapped from the user's own file must not be taken for a temporary one."""
    np.ones((2, 8), np.float32).tofile(tmp_path / "mine")
    mapped = np.memmap(tmp_path / "mine", np.float32, mode="r", shape=(2, 8))
    with Stages(model, [["a"], ["y"]], [{"x": mapped}], memory=0) as stages:
        stages.run(model, lambda _: None)
        stages.run(model, lambda _: None)
    assert (tmp_path / "mine").exists()


def test_types_that_numpy_lacks_are_not_staged(model: Model) -> None:
    assert can_stage(model)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.BFLOAT16, None))
    assert not can_stage(model.replace(proto))
