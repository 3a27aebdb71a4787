"""`engines.open` on a GPU that is not there: a fake runtime behind the real names, on the real engine's papers."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_gpu import FakeCuda, FakeEngine, FakeKernel, fake_runtime, install
from onnx import TensorProto, helper

import engines
from engines.backends.backend import Running
from engines.backends.compiler import Engine
from engines.backends.layers import LayerTable
from engines.core.documents import replace
from engines.core.errors import EngineError, OutOfMemoryError
from engines.core.files import sha256_file
from engines.runtime.arrays import OnGpu
from engines.verify.covered import write_sums
from engines.verify.manifest import Manifest, sha256_model

DATA = b"an engine"
KERNELS = [FakeKernel("double", lambda _: 10.0)]


def doubling(**changes: Any) -> FakeEngine:
    """y = 2 x for (n, 4), n from 1 to 8 or from 16 to 32."""
    values: dict[str, Any] = {
        "tensors": {"x": ((-1, 4), "FLOAT", True), "y": ((-1, 4), "FLOAT", False)},
        "profiles": [{"x": ((a, 4), (a, 4), (b, 4))} for a, b in ((1, 8), (16, 32))],
        "sizes": lambda shapes: {"y": shapes["x"]} if "x" in shapes else {},
        "compute": lambda arrays: {"y": 2 * arrays["x"]},
        **changes,
    }
    return FakeEngine(KERNELS, **values)


def deployed(folder: Path, *, backend: str = "rtx", options: dict[str, Any] | None = None) -> Path:
    """The papers of such an engine."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [value("x", TensorProto.FLOAT, ["n", 4])],
        [value("y", TensorProto.FLOAT, ["n", 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")
    sizes = {"engine_bytes": len(DATA), "weight_bytes": 0, "activation_bytes": 0}
    table = LayerTable(layers=(), backend=backend, version="1.7.1", targets=("sm89",), **sizes)
    Engine(data=DATA, table=table).save(folder / "m.engine")
    manifest = Manifest(
        model="0" * 64,
        output=sha256_model(folder / "m.onnx"),
        engine=sha256_file(folder / "m.engine"),
        layers=sha256_file(folder / "m.engine.json"),
        targets=("sm89",),
        options=options or {},
    )
    (folder / "m.engine.manifest.json").write_text(manifest.to_json())
    write_sums(folder)
    return folder


@pytest.fixture
def held() -> dict[bytes, FakeEngine]:
    return {DATA: doubling()}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, held: dict[bytes, FakeEngine]) -> FakeCuda:
    fake = FakeCuda()
    install(monkeypatch, fake)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_runtime(fake, held))
    runtime = fake_runtime(fake, held, rtx=False)
    monkeypatch.setitem(sys.modules, "tensorrt", runtime)
    return fake


def rows(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)}


@pytest.mark.parametrize("backend", ["rtx", "trt"])
def test_the_engine_runs_where_it_fits(cuda: FakeCuda, tmp_path: Path, backend: str) -> None:
    with engines.open(deployed(tmp_path, backend=backend)) as model:
        said = model.describe()
        for n in (1, 8, 16, 32, 3):
            np.testing.assert_array_equal(model.run(rows(n))["y"], 2 * rows(n)["x"])
        assert model.warm_up() >= 0
    title = {"rtx": "TensorRT-RTX", "trt": "TensorRT"}[backend]
    assert said["runs_on"] == f"{title} 1.7.1 on NVIDIA GeForce RTX 4090 (sm89)" and said["because"] == ""
    assert said["model"] == "m.engine" and said["inputs"][0]["ranges"] == ["1x4:1x4:8x4", "16x4:16x4:32x4"]
    assert json.dumps(said) and not cuda.memory  # everything is given back


def test_eight_threads_take_turns(cuda: FakeCuda, tmp_path: Path) -> None:
    attached = set()
    real = cuda.cuCtxSetCurrent

    def attach(context: Any) -> int:
        attached.add(threading.get_ident())
        return real(context)

    cuda.cuCtxSetCurrent = attach  # type: ignore[method-assign]
    with engines.open(deployed(tmp_path)) as model, ThreadPoolExecutor(8) as pool:
        together = threading.Barrier(8)

        def one(n: int) -> dict[str, Any]:
            if n < 8:
                together.wait(60)  # so that every thread has one
            return model.run(rows(1 + n % 8, n))

        found = list(pool.map(one, range(160)))
        assert len(pool._threads) == 8 and attached >= {t.ident for t in pool._threads}
    for n, outputs in enumerate(found):
        np.testing.assert_array_equal(outputs["y"], 2 * rows(1 + n % 8, n)["x"])


def test_memory_grows_with_what_is_run_and_is_used_again(cuda: FakeCuda, tmp_path: Path) -> None:
    with engines.open(deployed(tmp_path)) as model:
        model.run(rows(2))
        small = dict(cuda.taken)
        model.run(rows(1))
        assert cuda.taken == small
        model.run(rows(8))
        assert sorted(cuda.taken.values()) == [128, 128]


def test_too_little_memory_is_said_and_all_of_it_given_back(
    cuda: FakeCuda, tmp_path: Path, held: dict[bytes, FakeEngine]
) -> None:
    with engines.open(deployed(tmp_path)) as model:
        cuda.limit_bytes = 200
        with pytest.raises(OutOfMemoryError, match="out of memory"):
            model.run(rows(8))
        assert not cuda.memory
        np.testing.assert_array_equal(model.run(rows(6))["y"], 2 * rows(6)["x"])
        held[DATA].says = lambda shapes: "[defaultAllocator.cpp] Error Code 2: OutOfMemory (Requested size was 9)"
        with pytest.raises(OutOfMemoryError, match=r"refuses to run m\.engine: .*OutOfMemory"):
            model.run(rows(2))
        held[DATA].says = lambda shapes: "Error Code 1: Cask"
        with pytest.raises(EngineError, match="Error Code 1: Cask") as caught:
            model.run(rows(2))
        assert not isinstance(caught.value, OutOfMemoryError)


def test_shapes_of_no_profile_are_refused_before_the_run(cuda: FakeCuda, tmp_path: Path) -> None:
    with engines.open(deployed(tmp_path)) as model:
        with pytest.raises(EngineError, match=r"from \(1, 4\) to \(8, 4\) or \(16, 4\) to \(32, 4\)"):
            model.run(rows(12))
        with pytest.raises(EngineError, match="'x' is float64"):
            model.run({"x": np.zeros((1, 4))})


def test_an_output_whose_size_the_data_decide(cuda: FakeCuda, tmp_path: Path, held: dict[bytes, FakeEngine]) -> None:
    held[DATA] = doubling(
        sizes=lambda shapes: {"y": (-1, 4)},
        most={"y": 512},
        compute=lambda arrays: {"y": arrays["x"][arrays["x"][:, 0] > 0]},
    )
    with engines.open(deployed(tmp_path)) as model:
        for n in (8, 3):
            x = rows(n)["x"]
            np.testing.assert_array_equal(model.run({"x": x})["y"], x[x[:, 0] > 0])


def test_arrays_on_the_gpu_are_copied_there(cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(2)["x"]
    with engines.open(deployed(tmp_path)) as model:
        cuda.memory[999_999] = x.view(np.uint8).reshape(-1)
        there = OnGpu(address=999_999, shape=x.shape, dtype=x.dtype, device=0, owner=None)
        monkeypatch.setattr("engines.runtime.predictor.checked", lambda sample, specs: {"x": there})
        np.testing.assert_array_equal(model.run({})["y"], 2 * x)
        elsewhere = OnGpu(address=999_999, shape=x.shape, dtype=x.dtype, device=1, owner=None)
        monkeypatch.setattr("engines.runtime.predictor.checked", lambda sample, specs: {"x": elsewhere})
        with pytest.raises(EngineError, match="lies on GPU 1, and the engine runs on GPU 0"):
            model.run({})
        del cuda.memory[999_999]


def test_what_the_runtime_does_not_load_is_refused_with_its_words(
    cuda: FakeCuda, tmp_path: Path, held: dict[bytes, FakeEngine]
) -> None:
    held.clear()
    with pytest.raises(EngineError, match=r"TensorRT-RTX 1\.7\.1 does not load m\.engine on this GPU: it gives no rea"):
        engines.open(deployed(tmp_path))
    with engines.open(tmp_path, on="cpu") as model:
        np.testing.assert_array_equal(model.run(rows(3))["y"], 2 * rows(3)["x"])


@pytest.mark.parametrize("flags", ["", '["VERSION_COMPATIBLE"]'])
def test_another_version_loads_only_what_was_built_for_it(cuda: FakeCuda, tmp_path: Path, flags: str) -> None:
    sys.modules["tensorrt"].__version__ = "1.8.0"  # type: ignore[attr-defined]
    folder = deployed(tmp_path, backend="trt", options={"tensorrt.flags": flags} if flags else None)
    if flags:
        engines.open(folder).close()
        return
    with pytest.raises(EngineError, match=r"TensorRT 1\.7\.1 compiled it, and 1\.8\.0 is installed"):
        engines.open(folder)


def test_an_engine_for_later_gpus_runs_on_one(cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("fake_gpu").ATTRIBUTES, 75, 12)
    monkeypatch.setitem(__import__("fake_gpu").ATTRIBUTES, 76, 0)
    options = {"tensorrt.hardware_compatibility_level": "AMPERE_PLUS"}
    with engines.open(deployed(tmp_path, backend="trt", options=options)) as model:
        assert "(sm120)" in model.title


def test_a_runtime_cache_is_kept(cuda: FakeCuda, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    file = tmp_path / "rtx.cache"
    with engines.open(deployed(tmp_path / "m"), running=Running(runtime_cache=file)) as model:
        model.run(rows(1))
    assert file.read_bytes() == b"rtx:double"


def test_an_engine_that_segments_brings_the_graph_of_its_model(cuda: FakeCuda, tmp_path: Path) -> None:
    """The graph tells what channels are; the model need not be there."""
    path = deployed(tmp_path) / "m.engine.manifest.json"
    (tmp_path / "inference.json").write_text("{}")
    held = Manifest.from_json(path.read_bytes())
    path.write_text(replace(held, inference=sha256_file(tmp_path / "inference.json")).to_json())
    write_sums(tmp_path)
    with engines.open(tmp_path) as model:
        assert model.graph is not None and model.graph.graph.name == "double" and model.name == "m.engine"
    for name in ("m.onnx", "SHA256SUMS"):
        (tmp_path / name).unlink()
    with engines.open(tmp_path) as model:
        assert model.graph is None and model.run(rows(1))


def test_a_closed_engine_says_so(cuda: FakeCuda, tmp_path: Path) -> None:
    model = engines.open(deployed(tmp_path))
    runner = model._runner
    model.close()
    with pytest.raises(EngineError, match=r"m\.engine was closed"):
        model.run(rows(1))
    with pytest.raises(EngineError, match=r"m\.engine was closed"):
        runner.run(rows(1))
