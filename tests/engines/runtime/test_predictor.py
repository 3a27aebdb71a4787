"""`engines.open` on a machine without a GPU: what is refused, what runs, and from many threads."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_graphs as graphs
import numpy as np
import onnx
import pytest

import engines
from engines.backends.backend import backend_named
from engines.backends.compiler import ShapeRange
from engines.core import onnx_runtime as ort
from engines.core.documents import replace
from engines.core.errors import EngineError, MissingRuntimeError, OutOfMemoryError
from engines.core.files import sha256_file
from engines.runtime import predictor
from engines.verify.covered import SUMS, write_sums
from engines.verify.manifest import Manifest, sha256_model

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an engine that TensorRT-RTX really compiled, its papers, and SHA256SUMS."""
    folder = tmp_path_factory.mktemp("built")
    onnx.save(graphs.conv(), folder / "m.int8.onnx")
    made = backend_named("rtx").build(
        folder / "m.int8.onnx", targets=("sm89",), shapes=None, options=None, directory=None, on_progress=None
    )
    made.save(folder / "m.engine")
    manifest = Manifest(
        model="0" * 64,
        output=sha256_model(folder / "m.int8.onnx"),
        engine=sha256_file(folder / "m.engine"),
        layers=sha256_file(folder / "m.engine.json"),
        targets=("sm89",),
    )
    (folder / "m.engine.manifest.json").write_text(manifest.to_json())
    write_sums(folder)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(predictor, "gpus", list)
    return shutil.copytree(built, tmp_path / "m")


def sample(seed: int = 0, spec: Any = None) -> dict[str, np.ndarray]:
    shape = tuple(d.dim_value for d in graphs.conv().graph.input[0].type.tensor_type.shape.dim)
    name = graphs.conv().graph.input[0].name
    return {name: np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


@pytest.mark.parametrize("given", ["", "m.engine", "m.int8.onnx"])
def test_without_a_gpu_the_model_runs_and_that_is_said(
    folder: Path, given: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engines")
    with engines.open(folder / given) as model:
        found = model.run(sample())
        said = model.describe()
    (expected,) = ort.run(str(folder / "m.int8.onnx"), [sample()])
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert said["model"] == "m.int8.onnx" and said["runs_on"].startswith("ONNX Runtime")
    assert said["because"] == "no NVIDIA GPU was found here, and m.engine is for sm89"
    assert said["because"] in caplog.text and str(folder) not in str(said)
    assert {"m.engine", "m.engine.json", "m.int8.onnx"} <= set(said["verified"])
    assert said["inputs"][0]["dtype"] == "float32" and said["segments"] is None


def test_eight_threads_get_the_answers_of_one(folder: Path) -> None:
    with engines.open(folder) as model:
        expected = [model.run(sample(n)) for n in range(16)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda n: model.run(sample(n % 16)), range(160)))
    for n, outputs in enumerate(found):
        for name, array in outputs.items():
            np.testing.assert_array_equal(array, expected[n % 16][name])


def test_every_altered_byte_is_refused(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        before = path.read_bytes()
        for at in (0, len(before) // 2, len(before) - 2):
            path.write_bytes(before[:at] + bytes([before[at] ^ 4]) + before[at + 1 :])
            for given in (folder, folder / "m.engine", folder / "m.int8.onnx"):
                with pytest.raises(EngineError):
                    engines.open(given)
                    pytest.fail(f"{path.name}, byte {at}")
        path.write_bytes(before)
    engines.open(folder).close()


def test_what_was_verified_is_what_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file changes between the check and the load: the bytes that were checked are loaded."""
    real = predictor.OnCpu

    def late(model: Any, **options: Any) -> Any:
        (folder / "m.int8.onnx").write_bytes(b"changed meanwhile")
        return real(model, **options)

    expected = next(ort.run(str(folder / "m.int8.onnx"), [sample()]))
    monkeypatch.setattr(predictor, "OnCpu", late)
    with engines.open(folder) as model:
        found = model.run(sample())
    assert all((found[name] == expected[name]).all() for name in expected)


def test_external_data_run_from_a_copy_that_was_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "gpus", list)
    path = tmp_path / "m.onnx"
    onnx.save(graphs.conv(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    write_sums(tmp_path)
    expected = next(ort.run(str(path), [sample()]))
    with engines.open(tmp_path) as model:
        (tmp_path / "m.data").unlink()
        found = model.run(sample())
    assert all((found[name] == expected[name]).all() for name in expected)


def test_what_cannot_run_is_refused_with_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = type("Gpu", (), {"name": "NVIDIA A10", "target": "sm86", "memory_bytes": 1})
    fitting = type("Gpu", (), {"name": "NVIDIA L4", "target": "sm89", "memory_bytes": 1})
    with pytest.raises(MissingRuntimeError, match=r"no NVIDIA GPU was found here, and m\.engine is for sm89"):
        engines.open(folder, on="gpu")
    monkeypatch.setattr(predictor, "gpus", lambda: [other])
    for given, on in (("", "gpu"), ("m.engine", "auto")):
        with pytest.raises(EngineError, match=r"this machine has NVIDIA A10 \(sm86\), and m\.engine is for sm89"):
            engines.open(folder / given, on=on)  # type: ignore[arg-type]
    with engines.open(folder) as model:
        assert "NVIDIA A10 (sm86)" in model.because
    monkeypatch.setattr(predictor, "gpus", lambda: [fitting])
    monkeypatch.setattr("tensorrt_rtx.__version__", "1.6.0.7")
    with pytest.raises(EngineError, match=r"TensorRT-RTX 1\.7\.\S+ compiled it, and 1\.6\.0\.7 is installed here"):
        engines.open(folder)
    with engines.open(folder, on="cpu") as model:
        assert model.because == "the CPU was asked for"


def test_a_folder_without_an_engine_says_so(folder: Path) -> None:
    for path in folder.glob("m.engine*"):
        path.unlink()
    write_sums(folder)
    with engines.open(folder) as model:
        assert model.describe()["because"] == "there is no engine"
    (folder / "build_engine.sh").write_text("exit 1")
    write_sums(folder)
    with engines.open(folder) as model:
        assert model.because.endswith("`sh build_engine.sh` builds it on a machine with its GPU")
    with pytest.raises(EngineError, match=r"on a GPU: there is no engine: `sh build_engine\.sh`"):
        engines.open(folder, on="gpu")
    with pytest.raises(EngineError, match="on is 'cuda'; auto, gpu, cpu are known"):
        engines.open(folder, on="cuda")  # type: ignore[arg-type]


def test_an_engine_without_its_model_is_refused_where_nothing_runs_it(folder: Path) -> None:
    (folder / "m.int8.onnx").unlink()
    with pytest.raises(EngineError, match=r"names m\.int8\.onnx, which is not there"):
        engines.open(folder)
    (folder / SUMS).unlink()
    with pytest.raises(EngineError, match=r"No \.onnx file in .* is the one that m\.engine was compiled from"):
        engines.open(folder)


def test_a_format_that_is_not_known_is_refused(folder: Path) -> None:
    path = folder / "m.engine.json"
    path.write_text(path.read_text().replace("qdq.layers/3", "qdq.layers/9"))
    manifest = Manifest.from_json((folder / "m.engine.manifest.json").read_text())
    (folder / "m.engine.manifest.json").write_text(replace(manifest, layers=sha256_file(path)).to_json())
    write_sums(folder)
    with pytest.raises(EngineError, match=r"m\.engine\.json: its schema is 'qdq\.layers/9'.*another version of qdq"):
        engines.open(folder)


def test_a_closed_model_says_so(folder: Path) -> None:
    model = engines.open(folder)
    model.close()
    model.close()
    with pytest.raises(EngineError, match=r"m\.int8\.onnx was closed"):
        model.run(sample())


def test_warm_up_takes_the_usual_shapes(folder: Path) -> None:
    with engines.open(folder) as model:
        assert model.warm_up() > 0 and model.warm_up(sample()) > 0
        model._shapes = {model.inputs[0].name: ShapeRange.fixed((1,)).opt}
        with pytest.raises(EngineError, match="has the shape"):
            model.warm_up()
        model._shapes, open_sizes = {}, replace(model.inputs[0], shape=(None,))
        model.inputs = (open_sizes,)
        with pytest.raises(EngineError, match="has open sizes, and nothing says which are usual"):
            model.warm_up()


def test_too_little_memory_is_an_error_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engines.open(folder) as model:
        for error in (MemoryError(), EngineError("ONNX Runtime failed: bad allocation")):

            def short(*_: Any, error: Exception = error) -> Any:
                raise error

            monkeypatch.setattr("engines.core.onnx_runtime.run", short)
            with pytest.raises(OutOfMemoryError):
                model.run(sample())


def test_nothing_says_how_to_segment(folder: Path) -> None:
    with engines.open(folder) as model, pytest.raises(EngineError, match=r"there is no inference\.json beside it"):
        model.segment("x.nii")


def test_import_engines_does_not_import_what_runs() -> None:
    assert "open" in engines.__all__ and engines.open.__doc__ and engines.Predictor.__doc__
    with pytest.raises(AttributeError, match="no attribute 'opn'"):
        _ = engines.opn
