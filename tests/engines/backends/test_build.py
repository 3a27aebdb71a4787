"""Compiling: the contract of every backend, targets, dynamic shapes, errors, and the missing runtime."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import engine_graphs as graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.backends import doctor, rtx, trt
from engines.backends.backend import backend_named
from engines.backends.compiler import Engine, ShapeRange, compile_model
from engines.core import errors
from engines.core.errors import BuildError, EngineError, MissingRuntimeError, UnsupportedTargetError

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")


def test_saving_into_a_missing_folder_is_one_error(tmp_path: Path) -> None:
    engine = Engine(data=b"x", table=rtx.build(graphs.identity()).table)
    with pytest.raises(EngineError, match="Choose a folder that exists"):
        engine.save(tmp_path / "absent" / "m.engine")


@pytest.mark.parametrize("text", ["sm89", "89", "8.9", "SM89", "sm_89"])
def test_a_target_is_normalised(text: str) -> None:
    assert rtx.BACKEND.target(text) == "sm89"


@pytest.mark.parametrize("text", ["sm90", "100", "ada", "", "9"])
def test_an_unknown_target_names_the_known_ones(text: str) -> None:
    with pytest.raises(UnsupportedTargetError, match="sm75, sm80, sm86, sm89, sm120, sm121"):
        rtx.BACKEND.target(text)


def test_one_engine_serves_several_targets() -> None:
    engine = rtx.build(graphs.conv(), targets=["SM86", "8.9", "sm86", "120"])
    assert engine.table.targets == ("sm86", "sm89", "sm120")
    assert len(engine.data) > len(rtx.build(graphs.conv()).data)


@pytest.mark.parametrize(
    ("fmt", "target", "allowed"),
    [
        ("fp8", "sm86", False),
        ("fp8", "sm89", True),
        ("int4", "sm75", False),
        ("int4", "sm80", True),
        ("fp4", "sm89", False),
        ("fp4", "sm120", True),
        ("int8", "sm75", True),
    ],
)
def test_a_type_that_a_target_lacks_is_refused_before_the_compiler(
    fmt: str, target: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CompilerAsked(Exception):
        pass

    def refuse(name: str) -> ModuleType:
        raise CompilerAsked

    monkeypatch.setattr(rtx, "import_runtime", refuse)
    opset = 23 if fmt == "fp4" else 21
    model = graphs.conv(data=None, fmt=fmt, opset=opset)
    with pytest.raises(CompilerAsked if allowed else UnsupportedTargetError, match=None if allowed else fmt):
        rtx.build(model, targets=[target])


def test_no_target_is_an_error() -> None:
    with pytest.raises(UnsupportedTargetError, match="No target given"):
        rtx.build(graphs.identity(), targets=[])


def test_a_dynamic_input_needs_a_range() -> None:
    with pytest.raises(BuildError, match=r"Input x has dynamic dimensions \(-1, 16, 8, 8\).*--shape x:min:opt:max"):
        rtx.build(graphs.conv(batch="N"))


def test_a_range_makes_one_profile_and_sizes_are_known_only_when_fixed() -> None:
    model = graphs.conv(batch="N")
    ranged = ShapeRange(min=(1, 16, 8, 8), opt=(2, 16, 8, 8), max=(4, 16, 8, 8))
    assert rtx.build(model, shapes={"x": ranged}).table.bytes_moved is None
    fixed = rtx.build(model, shapes={"x": ShapeRange.fixed((2, 16, 8, 8))}).table
    assert fixed.bytes_moved is not None and fixed.layers[-1].outputs[0].shape == (2, 16, 8, 8)


def test_several_optimization_profiles_are_in_one_engine() -> None:
    """Compiled for real, by the function that both compilers share: each profile has kernels of its own."""
    trt, model = errors.import_runtime("tensorrt_rtx"), graphs.conv(batch="N")
    ranges = [{"x": ShapeRange.parse(t)} for t in ("1x16x8x8", "8x16x8x8:8x16x8x8:32x16x8x8")]

    def kernels(*profiles: dict[str, ShapeRange]) -> int:
        found: list[int] = []

        def configure(config: Any) -> None:
            found.append(config.num_optimization_profiles)
            config.num_compute_capabilities = 1
            config.set_compute_capability(trt.ComputeCapability.SM89, 0)

        made = compile_model(trt, model, shapes=ranges[0], profiles=profiles, configure=configure)
        assert found == [max(len(profiles), 1)]
        return len(made.lines)

    assert kernels(*ranges) > kernels(ranges[0]) == kernels()
    with pytest.raises(BuildError, match=r"Shape \(9, 3, 8, 8\) does not fit input x"):
        kernels(ranges[0], {"x": ShapeRange.fixed((9, 3, 8, 8))})


@pytest.mark.parametrize("text", ["", "3", "1x2:2x2:4x2", "0x4"])
def test_a_range_is_written_as_it_is_read(text: str) -> None:
    assert str(ShapeRange.parse(text)) == text


@pytest.mark.parametrize("text", ["1x2:2x2", "axb", "1:2:3:4"])
def test_a_text_that_is_no_range_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        ShapeRange.parse(text)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": ShapeRange.fixed((1,))}, "No input is named z; the model's inputs are x"),
        ({"x": ShapeRange.fixed((1, 3, 8, 8))}, r"Shape \(1, 3, 8, 8\) does not fit input x"),
        ({"x": ShapeRange.fixed((1, 16))}, "does not fit input x"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, ShapeRange], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        rtx.build(graphs.conv(batch="N"), shapes=shapes)


def test_a_range_must_be_ordered() -> None:
    with pytest.raises(BuildError, match="no range"):
        ShapeRange(min=(2,), opt=(1,), max=(3,))


def test_a_parse_error_names_the_node() -> None:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"], name="dynamic")
    outputs = [graphs.value("y", [1, 4], TensorProto.UINT8)]
    with pytest.raises(BuildError, match="DynamicQuantizeLinear") as caught:
        rtx.build(graphs.model([node], [graphs.value("x", [1, 4])], outputs))
    assert caught.value.nodes == ("dynamic",)


@pytest.mark.parametrize("operator", ["NonMaxSuppression", "NonZero"])  # refused by the builder, by the parser
def test_an_output_sized_by_data_is_refused_with_what_to_do(operator: str) -> None:
    shapes = {"boxes": [1, 9, 4], "scores": [1, 1, 9]} if operator == "NonMaxSuppression" else {"x": [1, 1, 9]}
    most = graphs.const("most", np.array([5]))
    inputs = [*shapes, "most"] if len(shapes) > 1 else [*shapes]
    node, found = helper.make_node(operator, inputs, ["i"], name="last"), graphs.value("i", ["n", 3], TensorProto.INT64)
    with pytest.raises(BuildError, match=f"size of what {operator} gives depends on data.*end before it") as caught:
        rtx.build(graphs.model([node], [graphs.value(*item) for item in shapes.items()], [found], [most]))
    assert caught.value.nodes in (("last",), ())


def test_a_build_error_carries_the_builders_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "GATES", ())  # so that the compiler is asked
    with pytest.raises(BuildError, match="HW-specific datatypes"):
        rtx.build(graphs.conv(data="fp8", fmt="fp8"), targets=["sm86"])


def test_a_failed_build_does_not_change_the_next_one() -> None:
    """The compiler keeps the targets of a failed build (sm75 has no FP32 gemm) for the next one, unless cleared."""
    expected = rtx.build(graphs.conv(), targets=["sm86"]).table
    with pytest.raises(BuildError, match="FP32 GEMM"):
        rtx.build(graphs.matmul(data=None, fmt=None), targets=["sm75"])
    with pytest.raises(BuildError, match=r"no FP32 matrix products for sm75.*--unquantized-type fp16"):
        rtx.build(graphs.matmul(data=None, fmt=None), targets=["sm75"])
    kinds = [[t.dtype for t in la.inputs] for la in rtx.build(graphs.conv(), targets=["sm86"]).table.layers]
    assert kinds == [[t.dtype for t in la.inputs] for la in expected.layers]


@pytest.mark.parametrize("content", [b"", b"not onnx at all", None])
def test_a_file_that_is_no_model_is_one_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BuildError, match=r"m\.onnx"):
        rtx.build(path)


def test_external_data_is_found_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(graphs.conv(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert rtx.build(path).table.layers == rtx.build(graphs.conv()).table.layers
    with pytest.raises(BuildError, match="give its path"):
        rtx.build(onnx.load(path, load_external_data=False))


def test_progress_rises_to_the_end() -> None:
    seen: list[float] = []
    rtx.build(graphs.conv(), on_progress=lambda fraction, text: seen.append(fraction))
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) > 3


def test_an_exception_in_the_progress_callback_stops_the_build() -> None:
    def stop(fraction: float, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rtx.build(graphs.conv(), on_progress=stop)


@pytest.mark.parametrize(("name", "extra"), [("tensorrt_rtx", "cpu"), ("tensorrt", "gpu"), ("onnxruntime", "cpu")])
def test_a_missing_runtime_says_what_to_install(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # makes the import fail
    with pytest.raises(MissingRuntimeError, match=rf"pip install 'qdq\[{extra}\]'") as caught:
        errors.import_runtime(name)
    assert caught.value.exit_code == 3 and EngineError.exit_code == 2


def test_building_without_the_runtime_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingRuntimeError, match="tensorrt_rtx"):
        rtx.build(graphs.identity())


def test_tensorrt_without_a_gpu_points_to_the_other_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "gpus", list)
    for call in (lambda: trt.build(graphs.identity()), lambda: trt.runner(b"")):
        with pytest.raises(MissingRuntimeError, match="--compiler rtx"):
            call()


def test_the_doctor_lists_runtimes_gpus_and_abilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpus", list)
    rows = {f.name: f for f in doctor.diagnose()}
    assert rows["tensorrt_rtx"].ok and rows["compile with TensorRT-RTX"].ok
    assert not rows["GPU"].ok and not rows["run engines"].ok and rows["run engines"].fix
    card = doctor.InstalledGpu(name="L4", target="sm89", memory_bytes=24 * 2**30)
    monkeypatch.setattr(doctor, "gpus", lambda: [card])
    rows = {f.name: f for f in doctor.diagnose()}
    assert rows["GPU"].detail == "L4, sm89, 24 GiB" and rows["run engines"].ok


def test_the_doctor_says_what_a_purpose_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpus", list)
    assert doctor.lacking("prepare") == doctor.lacking("build") == []
    (why,) = doctor.lacking("build", backend_named("trt"))
    assert "tensorrt" in why.lower()
    assert all("NVIDIA GPU" in why or "Cannot import" in why for why in doctor.lacking("run"))
    monkeypatch.setattr(
        doctor, "gpus", lambda: [doctor.InstalledGpu(name="L4", target="sm89", memory_bytes=24 * 2**30)]
    )
    assert doctor.lacking("run") == []
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as a wheel whose library is not there
    (why,) = doctor.lacking("prepare")
    assert "Cannot import onnxruntime" in why and "pip install" in why


def test_importing_engines_loads_no_runtime() -> None:
    code = (
        "import sys, engines, engines.backends.rtx, engines.backends.trt; print([m for m in sys.modules if m in "
        + repr(["onnxruntime", "tensorrt_rtx", "tensorrt", "polygraphy", "torch"])
        + "])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert out.stdout.strip() == "[]"


def test_weights_do_not_change_the_layers() -> None:
    """Two seeds give the same kernels: the audit of a plan needs no data."""
    tables = []
    for seed in (0, 1):
        g = graphs.Graph(np.float32, seed)
        y = g.add("Conv", [g.activation("x"), g.weight("w", [16, 16, 3, 3])], name="conv")
        tables.append(rtx.build(g.finish(y, [1, 16, 8, 8], [1, 16, 6, 6])).table)
    assert [(la.kind, la.inputs[0].dtype) for la in tables[0].layers] == [
        (la.kind, la.inputs[0].dtype) for la in tables[1].layers
    ]


def test_python_collects_no_garbage_while_the_compiler_may_call_its_logger() -> None:
    """It would free the builder of a failed build, which waits for the lock that the call holds: a standstill."""
    seen: list[bool] = []
    rtx.build(graphs.conv(), targets=["sm89"], on_progress=lambda *_: seen.append(gc.isenabled()))
    assert len(seen) > 2 and not any(seen[:-1]) and gc.isenabled()
    with pytest.raises(BuildError):
        rtx.build(helper.make_model(helper.make_graph([helper.make_node("No", [], ["y"])], "g", [], [])))
    assert gc.isenabled()
