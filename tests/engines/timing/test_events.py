"""Times between events on a fake GPU behind the driver's real names: what the host does must not be in them."""

from __future__ import annotations

import ast
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import FakeCuda, FakeEngine, FakeKernel, fake_runtime, install
from places import ROOT

from engines.backends.compiler import Engine
from engines.backends.layers import LayerTable
from engines.core.errors import MissingRuntimeError
from engines.timing import events as events_module, machine
from engines.timing.driver import Driver
from engines.timing.events import EventTimer
from engines.timing.loaded import LoadedEngine
from engines.timing.timer import Load, Timing, TimingError

API = json.loads((Path(__file__).parent / "driver_api.json").read_text())


def engine(data: bytes) -> Engine:
    table = LayerTable(
        layers=(), backend="rtx", version="1", targets=("sm89",), engine_bytes=1, weight_bytes=0, activation_bytes=0
    )
    return Engine(data=data, table=table)


def steady(us: float, count: int = 1) -> list[FakeKernel]:
    return [FakeKernel(f"k{i}", lambda _: us / count) for i in range(count)]


@pytest.fixture
def engines() -> dict[bytes, FakeEngine]:
    return {}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, engines: dict[bytes, FakeEngine]) -> FakeCuda:
    fake = FakeCuda()
    install(monkeypatch, fake)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_runtime(fake, engines))

    def sleep(seconds: float) -> None:
        fake.host_us += seconds * 1e6

    clock = SimpleNamespace(perf_counter=lambda: fake.host_us / 1e6, sleep=sleep)
    monkeypatch.setattr(events_module, "time", clock)
    return fake


def timed(*loads: Load, seconds: float = 0.05, rest_s: float = 0.0) -> list[Timing]:
    with Driver() as driver:
        return EventTimer(driver).times(loads, seconds=seconds, rest_s=rest_s)


@pytest.mark.parametrize("us", [3.0, 80.0, 5000.0])
@pytest.mark.parametrize("call_us", [1.0, 50.0])
def test_the_host_is_not_in_the_times(
    cuda: FakeCuda, engines: dict[bytes, FakeEngine], us: float, call_us: float
) -> None:
    """Even where one call of the driver takes longer than the inference."""
    cuda.call_us = call_us
    engines[b"a"] = FakeEngine(steady(us, 3))
    (timing,) = timed(Load(engine=engine(b"a")))
    assert timing.graph and len(timing.us) > 5
    assert timing.median_us == pytest.approx(us, rel=0.01) and max(timing.us) == pytest.approx(us, rel=0.01)


def test_kernels_launched_one_by_one_are_timed_too_and_said(cuda: FakeCuda, engines: dict[bytes, FakeEngine]) -> None:
    engines[b"a"] = FakeEngine(steady(90, 30), capturable=False)
    (timing,) = timed(Load(engine=engine(b"a")))
    assert timing.graph and timing.median_us == pytest.approx(90, rel=0.01)  # TensorRT-RTX captures it itself
    assert not cuda.graphs


def test_a_capture_that_fails_leaves_it_to_the_runtime(
    cuda: FakeCuda, engines: dict[bytes, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "cuStreamBeginCapture_v2", lambda *_: 900, raising=False)
    engines[b"a"] = FakeEngine(steady(90, 30))
    (timing,) = timed(Load(engine=engine(b"a")))
    assert timing.graph and not cuda.graphs and timing.median_us == pytest.approx(90, rel=0.01)


def test_without_any_graph(cuda: FakeCuda, engines: dict[bytes, FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT, which has none of its own."""
    monkeypatch.setattr(cuda, "cuStreamBeginCapture_v2", lambda *_: 900, raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_runtime(cuda, engines, rtx=False))
    engines[b"a"] = FakeEngine(steady(90, 30))
    (timing,) = timed(Load(engine=engine(b"a")))
    assert not timing.graph and timing.median_us == pytest.approx(90, rel=0.01)


def test_engines_take_turns(cuda: FakeCuda, engines: dict[bytes, FakeEngine]) -> None:
    """A clock that falls disturbs both alike: a slope between them stays what it is."""
    slower = lambda base: [FakeKernel("k", lambda s: base * (1 + 2 * s))]  # noqa: E731
    engines[b"a"], engines[b"b"] = FakeEngine(slower(100)), FakeEngine(slower(300))
    first, second = timed(Load(engine=engine(b"a")), Load(engine=engine(b"b")), seconds=1.0)
    assert second.median_us / first.median_us == pytest.approx(3, rel=0.05)
    assert first.at_s[0] != second.at_s[0] and list(first.at_s) == sorted(first.at_s)
    late, early = first.between(0.8, 1.0), first.between(0, 0.1)
    assert late.median_us > 1.3 * early.median_us


def test_repeats_are_inferences_of_one_interval(cuda: FakeCuda, engines: dict[bytes, FakeEngine]) -> None:
    engines[b"a"] = FakeEngine(steady(2))
    (timing,) = timed(Load(engine=engine(b"a"), repeats=50))
    assert timing.median_us == pytest.approx(2, rel=0.01)


def test_a_rest_comes_before_the_first_interval(cuda: FakeCuda, engines: dict[bytes, FakeEngine]) -> None:
    engines[b"a"] = FakeEngine(steady(100))
    (timing,) = timed(Load(engine=engine(b"a")), rest_s=2.0)
    assert timing.at_s[0] < 0.01 and cuda.gpu_us > 2e6


def test_outputs_are_those_of_the_inputs_and_memory_is_given_back(
    cuda: FakeCuda, engines: dict[bytes, FakeEngine]
) -> None:
    engines[b"a"] = FakeEngine(steady(1), compute=lambda arrays: {"y": arrays["x"] * np.float16(2)})
    with Driver() as driver:
        given = np.arange(4, dtype=np.float16)
        found = EventTimer(driver).outputs(engine(b"a"), {"x": given})
    assert np.array_equal(found["y"], given * 2) and found["y"].dtype == np.float16
    timed(Load(engine=engine(b"a")))
    assert not cuda.memory and not cuda.events and not cuda.graphs


def test_kernels_one_by_one(cuda: FakeCuda, engines: dict[bytes, FakeEngine]) -> None:
    engines[b"a"] = FakeEngine([FakeKernel("conv", lambda _: 30), FakeKernel("pool", lambda _: 4)])
    with Driver() as driver, LoadedEngine(driver, engine(b"a")) as loaded:
        assert [(k.name, k.us) for k in loaded.kernel_times(5)] == [
            ("conv", pytest.approx(30)),
            ("pool", pytest.approx(4)),
        ]


def test_refusals(cuda: FakeCuda, engines: dict[bytes, FakeEngine]) -> None:
    engines[b"a"] = FakeEngine(steady(1))
    with Driver() as driver:
        timer = EventTimer(driver)
        with pytest.raises(TimingError, match="does not load the engine for sm89"):
            timer.times([Load(engine=engine(b"other"))], seconds=0.1)
        with pytest.raises(TimingError, match="no input 'z'"):
            timer.outputs(engine(b"a"), {"z": np.zeros(4, np.float16)})
        with pytest.raises(TimingError, match="Input x is float32"):
            timer.outputs(engine(b"a"), {"x": np.zeros(4, np.float32)})
        engines[b"b"] = FakeEngine(steady(1), tensors={"x": ((4,), "FP4", True)})
        with pytest.raises(TimingError, match="x of the engine is FP4"):
            timer.outputs(engine(b"b"), {})
        cuda.limit_bytes = 4
        with pytest.raises(TimingError, match="cuMemAlloc_v2: out of memory"):
            timer.outputs(engine(b"a"), {})
    with pytest.raises(TimingError, match="no timing"):
        Timing(us=(), at_s=())


def test_no_driver_and_no_gpu(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.devices = 0
    with pytest.raises(MissingRuntimeError, match="shows 0 GPUs"):
        Driver()
    install(monkeypatch, None)
    with pytest.raises(MissingRuntimeError, match="No NVIDIA driver"):
        Driver()


def test_the_card(cuda: FakeCuda) -> None:
    with Driver() as driver:
        card = driver.card()
    assert (card.name, card.target, card.sms, card.boost_mhz) == ("NVIDIA GeForce RTX 4090", "sm89", 128, 2520)
    assert card.bandwidth_gb_s == pytest.approx(1008.1, abs=0.1) and card.l2_bytes == 72 << 20 and card.cuda == "13.0"


def test_clocks_and_power_are_watched(cuda: FakeCuda) -> None:
    with machine.Monitor("00000000:65:00.0") as monitor:
        time.sleep(3 * machine.EVERY_S)
    watched = monitor.watched()
    assert watched.driver == "580.10" and len(watched.states) >= 4
    clocks = "SM clock 2520 before, 2220 during (lowest 2220), 2220 after MHz"
    power = "power 30, 130 (most 130 of 450), 130 W; 61 C; held down by power cap"
    assert watched.summary() == f"{clocks}; {power}"
    with machine.Monitor("other") as monitor:
        pass
    assert monitor.watched().summary() == "not known: the management library does not show this GPU"


def calls(path: Path, prefix: str) -> dict[str, set[int]]:
    """Name of a library's function -> numbers of arguments that a file calls it with."""
    found: dict[str, set[int]] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or any(isinstance(a, ast.Starred) for a in node.args):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr.startswith(prefix):
            found.setdefault(node.func.attr, set()).add(len(node.args))
        elif node.args and isinstance(first := node.args[0], ast.Constant) and str(first.value).startswith(prefix):
            found.setdefault(str(first.value), set()).add(len(node.args) - 1)
    return found


@pytest.mark.parametrize("version", ["cuda.h 12.8", "cuda.h 13.0"])
def test_the_driver_has_every_function_that_is_called(version: str) -> None:
    used = calls(ROOT / "engines/timing/driver.py", "cu")
    assert len(used) > 25 and {name: {API[version].get(name)} for name in used} == used


def test_the_management_library_has_every_function_that_is_called() -> None:
    used = calls(ROOT / "engines/timing/machine.py", "nvml")
    own = {"nvmlDeviceGetPowerUsage": 2, "nvmlDeviceGetClockInfo": 3, "nvmlDeviceGetTemperature": 3}
    assert own.items() <= API["nvml.h 12.9"].items() and own.keys() <= used.keys()
    assert {n: {API["nvml.h 12.9"].get(n)} for n in used if n not in own} == {
        n: c for n, c in used.items() if n not in own
    }
