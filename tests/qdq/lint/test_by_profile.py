"""What is found of a model depends on the compiler that it is for."""

from __future__ import annotations

import json
from pathlib import Path

import graphs
import ml_dtypes
import numpy as np
import onnx
import pytest
from broken_models import BROKEN, matrix, product
from click.testing import CliRunner

from engines.backends.profile import profile_named
from qdq.cli.lint import lint_command
from qdq.lint.lint import lint
from qdq.lint.repair.repair import repair
from qdq.model.model import Model
from qdq.model.storage import save

RTX, TENSORRT = profile_named("rtx"), profile_named("tensorrt")


def model_of(proto: onnx.ModelProto) -> Model:
    return Model(proto=proto, directory=Path(), sha256="")


def rules(model: Model, compiler: str | None = None) -> set[str]:
    """The rules that find something; for the model's own compiler if none is named."""
    return {f.rule for f in lint(model, compiler and profile_named(compiler))}


def shifted(compiler: str) -> Model:
    """A padded convolution of asymmetric data, quantized for a compiler."""
    model = graphs.conv(pads=[1, 1, 1, 1])
    return graphs.quantized(model, graphs.samples(model, low=-0.1), compiler=compiler).model


def test_what_stands_before_a_quantizer_is_found_for_who_does_not_fuse_it() -> None:
    for_rtx, for_tensorrt = shifted("rtx"), shifted("tensorrt")
    assert rules(for_rtx) == rules(for_tensorrt) == rules(for_tensorrt, "rtx") == set()
    (found,) = lint(for_rtx, TENSORRT)
    assert (found.rule, found.effect) == ("moved-data", "kernel")
    assert TENSORRT.shift.says in found.message and found.message.startswith("Sub ")


def test_a_models_own_pad_and_sub_are_no_form_of_another_compiler() -> None:
    """TensorFlow pads in front of a convolution, CIFAR's ResNet pads channels, and a mean is taken from an image."""
    weights = {"w": graphs.normal(16, 8, 3, 3, seed=0), "w2": graphs.normal(16, 16, 3, 3, seed=1)}
    constants = {
        "border": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "channels": np.array([0, 4, 0, 0, 0, 4, 0, 0]),
        "mean": np.float32([0.31]).reshape(1, 1, 1, 1),
    }
    nodes = [
        graphs.node("Sub", "x mean", "centred"),
        graphs.node("Pad", "centred border", "padded"),
        graphs.node("Conv", "padded w", "a", "first"),
        graphs.node("Pad", "x channels", "more"),
        graphs.node("Conv", "more w2", "b", "second", pads=[1, 1, 1, 1]),
        graphs.node("Add", "a b", "y", "sum"),
    ]
    model = graphs.build(nodes, {"x": (2, 8, 12, 12)}, {**weights, **constants})
    made = graphs.quantized(model, graphs.samples(model), compiler="tensorrt").model
    quantized = {made.producer(n.input[0]).op_type for n in made.graph.node if n.op_type == "QuantizeLinear"} - {None}
    assert "Pad" in quantized and rules(made) == rules(made, "rtx") == set()


def test_channels_that_were_filled_up_are_found() -> None:
    tensors = {"w": graphs.normal(16, 6, 3, 3, seed=0)}
    model = graphs.build([graphs.node("Conv", "x w", "y", "conv")], {"x": (2, 6, 12, 12)}, tensors)
    made = graphs.quantized(model, graphs.samples(model), compiler="rtx", shift=False).model
    assert rules(made) == set() and [f.message[:4] for f in lint(made, TENSORRT)] == ["Pad "]


@pytest.mark.parametrize(("block", "missed"), [(128, False), (64, False), (32, True)])
def test_blocks_of_a_length_that_nobody_documents(block: int, missed: bool) -> None:
    weight = matrix(
        np.full([128 // block, 64], 0.01, np.float32), ml_dtypes.int4, axis=0, block_size=block, shape=(128, 64)
    )
    model = model_of(product(lambda g: "x", weight))
    assert rules(model, "rtx") == set() and rules(model, "tensorrt") == ({"block-length"} if missed else set())


def test_types_that_a_version_does_not_read() -> None:
    weight = matrix(np.full([8, 64], 0.01, np.float32), ml_dtypes.float4_e2m1fn, axis=0, block_size=16, shape=(128, 64))
    model = model_of(product(lambda g: "x", weight, opset=23))
    old, new = (
        [f.message for f in lint(model, profile_named(f"tensorrt:{v}")) if f.rule == "code-type"]
        for v in ("10.3", "11")
    )
    assert new == [] and old == ["The codes are FLOAT4_E2M1FN, which TensorRT 10.3 does not read."]


@pytest.mark.parametrize("rule", ["transposed", "attention"])
def test_what_one_compiler_is_known_to_run_in_float_is_found_for_that_one(rule: str) -> None:
    model = model_of(next(b for b in BROKEN.values() if b.rule == rule).build())
    assert rules(model, "rtx") == {rule} and rules(model, "tensorrt") == set()
    assert repair(model, RTX).changes and not repair(model, TENSORRT).changes


def test_the_command_takes_a_compiler_and_else_the_models_own(tmp_path: Path) -> None:
    save(shifted("rtx"), tmp_path / "m.onnx")
    save(shifted("tensorrt"), tmp_path / "t.onnx")

    def found(name: str, *more: str) -> list[str]:
        result = CliRunner().invoke(lint_command, [str(tmp_path / name), "--json", *more])
        assert result.exit_code == 0, result.output
        return [f["rule"] for f in json.loads(result.stdout)["findings"]]

    assert found("m.onnx") == [] and found("m.onnx", "--compiler", "tensorrt") == ["moved-data"]
    assert found("t.onnx") == []
    said = CliRunner().invoke(lint_command, [str(tmp_path / "t.onnx")]).output
    assert "t.onnx for TensorRT 11: nothing found" in " ".join(said.split())


def test_a_repaired_model_is_checked_by_who_stands_in(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    onnx.save(BROKEN["default axis"].build(), tmp_path / "m.onnx")
    arguments = ["--fix", "-o", str(tmp_path / "out.onnx"), "--compiler", "tensorrt", "--target", "sm90", "--json"]
    result = CliRunner().invoke(lint_command, [str(tmp_path / "m.onnx"), *arguments])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["proof"]["compiles"] and (tmp_path / "out.onnx").is_file()
