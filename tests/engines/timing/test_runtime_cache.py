"""What TensorRT-RTX compiles at run time, kept in a file: by the timer of engines and by Polygraphy's runner."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeCuda, FakeEngine, FakeKernel, fake_runtime, install

from engines.backends import trt
from engines.backends.backend import Running, backend_named
from engines.backends.compiler import Engine
from engines.backends.doctor import InstalledGpu
from engines.backends.layers import LayerTable
from engines.core.errors import EngineError
from engines.timing.driver import Driver
from engines.timing.events import EventTimer
from engines.timing.loaded import LoadedEngine
from engines.timing.timer import Load


def engine(data: bytes, backend: str = "rtx") -> Engine:
    sizes = {"engine_bytes": 1, "weight_bytes": 0, "activation_bytes": 0}
    return Engine(data=data, table=LayerTable(layers=(), backend=backend, version="1", targets=("sm89",), **sizes))


def kernels(*names: str) -> list[FakeKernel]:
    return [FakeKernel(name, lambda _: 10.0) for name in names]


@pytest.fixture(params=[True, False], ids=["captured", "graph of the runtime"])
def cuda(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeCuda:
    fake = FakeCuda()
    install(monkeypatch, fake)
    engines = {
        b"a": FakeEngine(kernels("conv", "pool"), capturable=request.param),
        b"b": FakeEngine(kernels("conv", "gemm"), capturable=request.param),
    }
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_runtime(fake, engines))
    monkeypatch.setitem(sys.modules, "tensorrt", fake_runtime(fake, engines, rtx=False))
    return fake


def time_them(file: Path | None, *data: bytes) -> None:
    with Driver() as driver:
        timer = EventTimer(driver, Running(runtime_cache=file))
        timer.times([Load(engine=engine(d)) for d in data], seconds=0.001)


class TestTheTimer:
    def test_writes_one_cache_for_all_engines_and_reads_it_again(self, cuda: FakeCuda, tmp_path: Path) -> None:
        file = tmp_path / "rtx.cache"
        time_them(file, b"a", b"b")
        assert file.read_bytes() == b"rtx:conv,pool,gemm"
        store = trt.RuntimeCache(file)
        with Driver() as driver, LoadedEngine(driver, engine(b"b"), cache=store) as loaded:
            loaded.run()
            assert store._cache is not None and store._cache.compiled == 0 and not store.note
        time_them(file, b"a")
        assert file.read_bytes() == b"rtx:conv,pool,gemm"  # what was held stays
        assert sorted(p.name for p in tmp_path.iterdir()) == ["rtx.cache"]

    def test_writes_nothing_where_none_is_asked_for(self, cuda: FakeCuda, tmp_path: Path) -> None:
        time_them(None, b"a")
        assert not list(tmp_path.iterdir())

    def test_streams_weights_within_the_budget(self, cuda: FakeCuda) -> None:
        with Driver() as driver:
            for budget, held in ((None, 0), (1 << 20, 1 << 20), (-1, 4096)):
                with LoadedEngine(driver, engine(b"a"), running=Running(weight_streaming_budget=budget)) as loaded:
                    assert loaded._engine.weight_streaming_budget_v2 == held


class TestTheFile:
    def test_of_another_gpu_is_replaced_and_that_is_said(self, cuda: FakeCuda, tmp_path: Path) -> None:
        file = tmp_path / "rtx.cache"
        file.write_bytes(b"of another driver")
        store = trt.RuntimeCache(file)
        with Driver() as driver, LoadedEngine(driver, engine(b"a"), cache=store) as loaded:
            loaded.run()
        store.save()
        assert "is of another GPU, driver or version: it was made anew" in store.note
        assert file.read_bytes() == b"rtx:conv,pool"

    def test_that_cannot_be_read_or_written_is_refused_first(self, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match=r"Cannot write the runtime cache .*choose a folder that exists"):
            trt.RuntimeCache(tmp_path / "absent/rtx.cache")
        with pytest.raises(EngineError, match="Cannot read the runtime cache"):
            trt.RuntimeCache(tmp_path)

    def test_is_not_for_tensorrt(self, cuda: FakeCuda, tmp_path: Path) -> None:
        store = trt.RuntimeCache(tmp_path / "rtx.cache")
        with (
            Driver() as driver,
            pytest.raises(EngineError, match=r"of TensorRT-RTX.*Leave .*rtx\.cache out"),
        ):
            LoadedEngine(driver, engine(b"a", "trt"), cache=store)
        store.save()
        assert not list(tmp_path.iterdir())  # nothing ran


class FakeRunner:
    """The members of Polygraphy's `TrtRunner` that ours uses, with an engine or a context that a callable gives."""

    def __init__(self, opened: Any, name: str, weight_streaming_budget: int | None) -> None:
        self.opened, self.name, self.budget, self.profiles = opened, name, weight_streaming_budget, list[int]()

    def __enter__(self) -> FakeRunner:
        made = self.opened()
        self.engine = made if hasattr(made, "num_optimization_profiles") else made.engine
        self.context = made
        return self

    def __exit__(self, *_: object) -> None:
        self.deactivate()

    def set_profile(self, index: int) -> None:
        self.profiles.append(index)

    def infer(self, feed_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return feed_dict

    def deactivate(self) -> None:
        del self.context


@pytest.fixture
def polygraphy(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, Any]:
    """Polygraphy and both runtimes; data -> what loading an engine gives."""
    engines: dict[bytes, Any] = {}
    modules = {
        "polygraphy.config": SimpleNamespace(USE_TENSORRT_RTX=True),
        "polygraphy.backend.trt": SimpleNamespace(
            TrtRunner=FakeRunner, EngineFromBytes=lambda data: lambda: engines[data]
        ),
        "tensorrt_rtx": SimpleNamespace(__name__="tensorrt_rtx"),
    }
    monkeypatch.setattr(trt, "import_runtime", modules.__getitem__)
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")
    monkeypatch.setattr(trt, "gpus", lambda: [InstalledGpu(name="RTX 4090", target="sm89", memory_bytes=1)])
    return engines


def loaded_engine(*ranges: tuple[int, int]) -> Any:
    """An engine with an input x (N, 4) of these batches, one range for each profile, and an input of values."""

    def shape(name: str, profile: int) -> tuple[tuple[int, int], ...]:
        assert name == "x"
        low, high = ranges[profile]
        return ((low, 4), (low, 4), (high, 4))

    return SimpleNamespace(
        num_optimization_profiles=len(ranges),
        get_tensor_profile_shape=shape,
        is_shape_inference_io=lambda name: name == "sizes",
    )


class TestTheRunner:
    def test_takes_the_first_profile_that_fits(self, polygraphy: dict[bytes, Any]) -> None:
        polygraphy[b"e"] = loaded_engine((1, 1), (2, 8), (8, 32))
        runner = backend_named("rtx").runner(b"e", name="n")
        sizes = np.zeros(2, np.int64)
        with runner:
            for batch in (1, 8, 8, 9, 1):
                runner.infer({"x": np.zeros((batch, 4)), "sizes": sizes})
            assert runner.profiles == [1, 2, 0]
            with pytest.raises(EngineError, match=r"None of the engine's 3 optimization profiles takes x \(33, 4\)"):
                runner.infer({"x": np.zeros((33, 4)), "sizes": sizes})
        assert runner.budget is None and runner.name == "n"

    def test_leaves_an_engine_of_one_profile_alone(self, polygraphy: dict[bytes, Any]) -> None:
        polygraphy[b"e"] = loaded_engine((1, 1))
        with backend_named("rtx").runner(b"e", running=Running(weight_streaming_budget=-1)) as runner:
            runner.infer({"x": np.zeros((9, 4))})
            assert runner.profiles == [] and runner.budget == -1

    def test_keeps_the_runtime_cache(
        self, polygraphy: dict[bytes, Any], cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = sys.modules["tensorrt_rtx"].Runtime(None).deserialize_cuda_engine(b"a")
        found.num_optimization_profiles, found.is_shape_inference_io = 1, lambda name: False
        make = found.create_execution_context

        def context(settings: Any) -> Any:
            made = make(settings)
            made.engine, made.store = found, settings.store
            made.store.compile(kernels("conv", "pool"))
            return made

        monkeypatch.setattr(found, "create_execution_context", context)
        polygraphy[b"e"] = found
        file = tmp_path / "rtx.cache"
        with backend_named("rtx").runner(b"e", running=Running(runtime_cache=file)) as runner:
            runner.infer({"x": np.zeros((4,))})
            assert not file.exists()
        assert file.read_bytes() == b"rtx:conv,pool" and runner.runtime_cache.note == ""
