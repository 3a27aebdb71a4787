"""What every backend promises, whichever files there are; and that a backend is one file."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import engine_graphs as graphs
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from places import ROOT

import engines.backends
from engines.backends import doctor
from engines.backends.backend import DEFAULT, Backend, backend_named, backends, predicting
from engines.backends.layers import LayerTable
from engines.backends.tensorrt_options import TensorRtOptions
from engines.core.errors import EngineError, MissingRuntimeError, UnsupportedTargetError, import_runtime
from engines.verify.compare import compare
from qdq.build.any_model import audit_model, price
from qdq.build.engine import audit_engine, compile_engine, engine_backend, save_engine
from qdq.build.pricing.pricer import Pricer, gpus_of
from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.model.storage import load

TOY = '''
"""Writes the model down in place of compiling it: one float kernel a node."""

from dataclasses import replace

from engines.backends.backend import Backend
from engines.backends.compiler import Engine
from engines.backends.layers import Layer, LayerTable, KernelTensor
from engines.backends.rtx import PROFILES as OTHERS
from engines.core.load import load_graph


def check_targets(model, targets):
    return tuple(BACKEND.target(target) for target in targets)


def build(model, *, targets=("sm42",), shapes=None, options=None, directory=None, on_progress=None):
    proto = load_graph(model)
    names = check_targets(proto, targets)
    if on_progress:
        on_progress(1.0, "Written down")
    data = proto.SerializeToString()
    x = KernelTensor(name="x", dtype="float32", shape=(1, 4))
    layers = tuple(
        Layer(name=n.name, kind="copy", inputs=(x,), constants=(), outputs=(x,), tactic="", onnx_nodes=(n.name,))
        for n in proto.graph.node
    )
    sizes = {"engine_bytes": len(data), "weight_bytes": 0, "activation_bytes": 0}
    return Engine(data=data, table=LayerTable(layers=layers, backend="toy", version="1", targets=names, **sizes))


def runner(engine, *, name="engine", running=None):
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    return OnnxrtRunner(SessionFromOnnx(engine if isinstance(engine, bytes) else engine.read_bytes()), name=name)


BACKEND = Backend(
    name="toy",
    compiler="toy",
    title="Toy",
    runtime="json",
    packages=("toy",),
    targets=("sm42", "sm75"),
    needs_gpu=False,
    predicts=True,
    check_targets=check_targets,
    build=build,
    runner=runner,
)
PROFILES = (replace(OTHERS[0], name="toy", title="Toy", backend="toy", targets=BACKEND.targets),)
'''


@pytest.mark.parametrize("backend", backends().values(), ids=list(backends()))
class TestEveryBackend:
    def test_is_described(self, backend: Backend) -> None:
        assert backends()[backend.name] is backend_named(backend.name) is backend
        assert backend.title and backend.packages and backend.targets and backend.need
        assert (predicting(backend.name) is backend) is backend.predicts

    def test_takes_its_targets_in_any_spelling_and_names_the_nearest_to_another(self, backend: Backend) -> None:
        model = graphs.identity()
        for name in backend.targets:
            spellings = [f"{name[2:-1]}.{name[-1]}", name.upper()]
            assert {backend.target(text) for text in spellings} == {name}
            assert backend.check_targets(model, spellings) == (() if backend.needs_gpu else (name,))
        with pytest.raises(UnsupportedTargetError, match=f"{backend.title} has no target 'sm899'.*mean 'sm89'"):
            backend.check_targets(model, ["sm899"])

    @pytest.mark.parametrize("model", [graphs.identity(), graphs.conv(data=None, fmt=None)], ids=["identity", "conv"])
    def test_builds_identity_and_conv(self, backend: Backend, model: onnx.ModelProto, tmp_path: Path) -> None:
        done: list[float] = []
        try:
            engine = backend.build(
                model,
                targets=backend.targets[-1:],
                shapes={},
                options=TensorRtOptions(timing_cache=str(tmp_path / "timings")),
                on_progress=lambda fraction, phase: done.append(fraction),
            )
        except MissingRuntimeError as error:
            pytest.skip(str(error))
        assert done[-1] == 1.0
        assert engine.table.backend == backend.name and engine.table.kernels >= 1
        assert engine.table.engine_bytes == len(engine.data) > 0
        engine.save(tmp_path / "m.engine")
        assert (tmp_path / "m.engine").read_bytes() == engine.data
        assert LayerTable.from_json((tmp_path / "m.engine.json").read_text()) == engine.table
        (tmp_path / "timings").unlink(missing_ok=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.engine", "m.engine.json"]  # nothing temporary is left

    def test_a_missing_runtime_or_gpu_is_said(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, backend.runtime, None)  # makes the import fail
        with pytest.raises(MissingRuntimeError):
            import_runtime(backend.runtime)
        with pytest.raises(MissingRuntimeError):
            backend.build(
                graphs.identity(), targets=["sm89"], shapes={}, options=None, directory=None, on_progress=None
            )

    def test_the_doctor_looks_for_it(self, backend: Backend) -> None:
        assert {backend.runtime, f"compile with {backend.title}"} <= {row.name for row in doctor.diagnose()}


def test_an_unknown_backend_names_the_nearest() -> None:
    assert DEFAULT in backends()
    with pytest.raises(EngineError, match=r"Unknown backend 'rxt'; there are .*Did you mean 'rtx'"):
        backend_named("rxt")


def test_a_target_of_another_backend_names_that() -> None:
    with pytest.raises(UnsupportedTargetError, match=r"sm90 needs TensorRT \(--compiler tensorrt\)"):
        backend_named("rtx").target("9.0")


def test_no_other_folder_asks_which_backend_it_is() -> None:
    names = {*backends(), *(b.runtime for b in backends().values())}
    for path in [p for package in ("engines", "qdq") for p in (ROOT / package).rglob("*.py")]:
        if path.parent.name != "backends":
            compared = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Compare)]
            words = {c.value for n in compared for c in ast.walk(n) if isinstance(c, ast.Constant)}
            assert not words & names, path


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model, and one file more among the backends."""
    (tmp_path / "file").mkdir()
    (tmp_path / "file/toy.py").write_text(TOY)
    monkeypatch.setattr(engines.backends, "__path__", [*engines.backends.__path__, str(tmp_path / "file")])
    onnx.save(graphs.identity(), tmp_path / "same.onnx")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("engines.backends.toy", None)


class TestABackendInOneFile:
    def test_compiles_saves_and_audits(self, toy: Path) -> None:
        recipe = Recipe.from_mapping({"compiler": "toy", "target": "4.2"})
        engine = compile_engine(Path("same.onnx"), recipe=recipe, shapes={})
        save_engine(engine, toy / "same.engine", toy / "same.onnx", recipe=recipe, shapes={})
        audits = [audit_model(toy / "same.onnx", recipe), audit_engine(toy / "same.engine")]
        assert [(a.backend, a.targets, a.kernels) for a in audits] == [("toy", ("sm42",), 1)] * 2
        assert json.loads((toy / "same.engine.manifest.json").read_text())["options"]["backend"] == "toy"

    def test_is_priced(self, toy: Path) -> None:
        recipe = Recipe.from_mapping({"compiler": "toy", "target": ["sm75"]})
        assert price(toy / "same.onnx", recipe, "t4").kernels[0].onnx_nodes == ("same",)
        pricer = Pricer(recipe=recipe, shapes={}, gpus=gpus_of(recipe))
        assert pricer(load(toy / "same.onnx")).kernels[0].signature.startswith("copy ")

    def test_runs(self, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
        built = ["build", "same.onnx", "-o", "same.engine", "--compiler", "toy", "--target", "sm42"]
        assert CliRunner().invoke(main, built).exit_code == 0
        here = doctor.InstalledGpu(name="Toy 42", target="sm42", memory_bytes=1)
        monkeypatch.setattr("qdq.build.machine.gpus", lambda: [here])
        runner = backend_named(engine_backend(toy / "same.engine")).runner(toy / "same.engine", name="toy")
        report = compare(toy / "same.onnx", runner, [{"x": np.ones((1, 4), np.float32)}])
        assert (report.candidate, report.outputs[0].max_abs_error) == ("candidate", 0)

    def test_is_known_to_options_help_and_errors(self, toy: Path) -> None:
        asked = " ".join(CliRunner().invoke(main, ["build", "--help"]).output.split())
        assert "toy (needs no GPU)" in asked
        wrong = CliRunner().invoke(main, ["build", "same.onnx", "-o", "x", "--compiler", "toi"])
        assert wrong.exit_code == 2 and "Did you mean 'toy'?" in wrong.stderr
        wrong = CliRunner().invoke(main, ["build", "same.onnx", "-o", "x", "--compiler", "toy", "--target", "sm43"])
        assert wrong.exit_code == 2 and "Toy has no target 'sm43'" in wrong.stderr
        detail = next(row.detail for row in doctor.diagnose() if row.name == "json")
        assert detail.endswith("engines without a GPU: --compiler toy)")
