"""The check of a GPU: on fake ones behind the real names, and on a machine without any."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from fake_gpu import ATTRIBUTES, FakeCuda, install
from fake_torch import fake_torch
from loadable_engines import fake_clock, rtx_engines
from places import ROOT
from simulated_gpu import RTX4090, SimulatedTimer, compiler, small_products, without_weights

from engines.backends.backend import backend_named
from engines.core import onnx_runtime as ort
from engines.core.errors import MissingRuntimeError
from engines.cost.constants import CONSTANTS
from engines.cost.gpus import GPUS, Gpu
from engines.timing import gpu_file
from engines.timing.driver import Driver
from qdq.build.measured.forms import TimedKernel

pytest.importorskip("onnxruntime")


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The three modules of the tool."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return SimpleNamespace(**{name: importlib.import_module(f"gpu_{name}") for name in ("check", "networks", "torch")})


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A fake driver, and clocks that are its own."""
    return fake_clock(monkeypatch, FakeCuda())


def parts(printed: str) -> dict[str, dict[str, Any]]:
    """The parts in the last line of a page."""
    return {part["name"]: part for part in json.loads(printed.strip().splitlines()[-1])["parts"]}


def test_without_a_gpu_every_part_says_why(
    tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, None)
    assert tools.check.main([]) == 3
    printed = capsys.readouterr().out
    found = parts(printed)
    assert found["environment"]["state"] == "ran" and "onnxruntime" in found["environment"]["values"]["packages"]
    others = {name: part for name, part in found.items() if name != "environment"}
    assert {"GPU", "measured by engines", "measured by torch", "networks", "clocks and power"} == set(others)
    assert all(p["state"] == "not run" and "No NVIDIA driver found here" in p["why"] for p in others.values())
    assert len(printed.splitlines()) < 30


def test_a_part_that_fails_stops_no_other(tools: SimpleNamespace) -> None:
    check = tools.check.Check(1.0)

    def broken(part: Any) -> None:
        raise ZeroDivisionError("oh")

    def absent(part: Any) -> None:
        raise MissingRuntimeError("not installed")

    states = [check.part(name, work) for name, work in (("environment", lambda p: None), ("GPU", lambda p: None))]
    states += [check.part("a", broken), check.part("b", absent), check.part("c", lambda part: None)]
    assert [p.state for p in states] == ["ran", "ran", "failed", "not run", "ran"]
    assert states[2].why == "ZeroDivisionError: oh" and check.exit_code == 1
    check.ends_s = time.monotonic() - 1
    assert check.part("late", lambda part: None).why == "no time left"
    *_, last = check.page()
    assert json.loads(last)["exit_code"] == 1


def test_what_hangs_is_ended_with_what_there_is(
    tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(tools.check.os, "_exit", ended.append)
    check = tools.check.Check(1.0)
    check.part("environment", lambda part: None)
    check.part("GPU", lambda part: None)
    check.part("hangs", lambda part: check.finish_late())
    assert ended == [1] and parts(capsys.readouterr().out)["hangs"]["state"] == "running"


RATES = {"float32": 0.4, "float16": 0.8, "bfloat16": 0.8, "int8": 1.6, "fp8": 1.6, "float16_accumulating": 0.8}


def test_torch_alone_measures_the_gpu(
    tools: SimpleNamespace,
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """An H200 for which no compiler is installed."""
    cuda.name = "NVIDIA H200"
    monkeypatch.setitem(ATTRIBUTES, 75, 9)
    monkeypatch.setitem(ATTRIBUTES, 76, 0)
    small_products(monkeypatch)
    monkeypatch.setattr(tools.torch.probe_sizes, "IMAGE", (1, 256, 16, 16))
    monkeypatch.setattr(tools.check, "SECONDS", 0.2)

    def none(card: Any, name: Any) -> None:
        raise MissingRuntimeError(f"No compiler for {card.name} is installed here")

    monkeypatch.setattr(tools.check, "backend_for", none)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(cuda, RATES, start_us=3, product_us=2, gb_s=4000))
    assert tools.check.main(["-o", str(tmp_path / "gpu.yaml")]) == 0
    found = parts(capsys.readouterr().out)
    states = {name: part["state"] for name, part in found.items()}
    assert states["measured by engines"] == states["networks"] == "not run" and states["measured by torch"] == "ran"
    gpu = Gpu.from_mapping(yaml.safe_load((tmp_path / "gpu.yaml").read_text())["gpu"][0])
    assert gpu.name == "h200-measured" and gpu.target == "sm90" and gpu.measured is not None
    assert gpu.measured.start_us == pytest.approx(3, rel=0.02)
    assert gpu.measured.product_start_us == pytest.approx(2 / CONSTANTS.split, rel=0.05)  # so small a one is split
    assert gpu.measured.bandwidth_gb_s == pytest.approx(4000, rel=0.02)
    for kind, rate in RATES.items():
        assert gpu.measured.tera_ops[kind] == pytest.approx(rate, rel=0.03), kind
    assert gpu.accumulation == GPUS["h200"].accumulation  # what cuBLAS does is not what TensorRT does
    missing = found["measured by torch"]["values"]["missing"]
    assert any("torch has no int8 convolution" in sentence for sentence in missing)


def test_engines_on_a_simulated_gpu(
    tools: SimpleNamespace, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_products(monkeypatch)
    without_weights(monkeypatch)
    monkeypatch.setattr(tools.check, "backend_for", lambda card, name: compiler())
    monkeypatch.setattr(tools.check, "EventTimer", lambda driver: SimulatedTimer())
    monkeypatch.setattr(gpu_file, "points", lambda *_: [])
    monkeypatch.setattr(tools.check, "networks", lambda *_: None)
    assert tools.check.main([]) == 0
    found = parts(capsys.readouterr().out)
    assert found["measured by engines"]["state"] == "ran" and found["measured by torch"]["why"] == "engines measured it"
    assert found["measured by engines"]["values"]["accumulation"] == "float16"


def test_each_network_is_a_part(tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Ran, pair = tools.networks.Ran, TimedKernel(kernel="conv", predicted_us=2.0, measured_us=9.0)
    good = Ran(network="good", form="FP32", predicted_us=10.0, measured_us=12.0, of_file=90.0, pairs=(pair,))
    wrong = dataclasses.replace(good, network="wrong", form="INT8", of_file=3.0)

    def absent() -> None:
        raise FileNotFoundError("no such file")

    made = [lambda name=name: SimpleNamespace(name=name) for name in ("good", "wrong")]
    monkeypatch.setattr(tools.networks, "cases", lambda *_: [*made, absent])
    results = {"good": [good], "wrong": [dataclasses.replace(good, network="wrong"), wrong]}
    monkeypatch.setattr(tools.networks, "ran", lambda case, *_: iter(results[case.name]))
    check = tools.check.Check(1.0)
    tools.check.networks(check, SimpleNamespace(folder=tmp_path), SimpleNamespace(models=None, model=[]))
    states = [(part.name, part.state, part.why) for part in check.parts]
    assert states == [
        ("network good", "ran", ""),
        ("network wrong", "failed", "INT8; see below"),  # 3 dB from what ONNX Runtime computes of the same file
        ("network 3", "failed", "FileNotFoundError: no such file"),
        ("worst predicted kernels", "ran", ""),
    ]
    assert check.parts[3].lines[0] == "predicted      2.0, measured      9.0 us  good FP32 conv"


@pytest.fixture
def bench(tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What networks run on, each kernel twice as long as predicted."""
    rtx_engines(monkeypatch, lambda layer, predicted_us: 2.0 * predicted_us)
    gpu = GPUS["rtx4090"].to_mapping()
    with Driver() as opened:
        yield tools.networks.Bench(driver=opened, card=RTX4090, backend=backend_named("rtx"), gpu=gpu, folder=tmp_path)


def small_network(folder: Path) -> Path:
    g = importlib.import_module("engines.timing.probes").Graph()
    w = g.weight("w", [32, 16, 3, 3], "float32")
    y = g.add("Conv", ["x", w], "conv", kernel_shape=[3, 3], pads=[1] * 4)
    y = g.add(
        "Conv",
        [g.add("Relu", [y], "relu"), g.weight("v", [16, 32, 3, 3], "float32")],
        "last",
        kernel_shape=[3, 3],
        pads=[1] * 4,
    )
    onnx.save(g.model(["x"], [1, 16, 32, 32], y, "float32"), folder / "net.onnx")
    return folder / "net.onnx"


def test_a_network_in_every_form(
    tools: SimpleNamespace, bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tools.networks, "TUNING_S", 2.0)
    case = tools.networks.user_case("net", small_network(tmp_path))
    found = {r.form: r for r in tools.networks.ran(case, bench, math.inf)}
    assert list(found) == ["FP32", "FP16", "INT8", "tuned"] and not [r.why for r in found.values() if r.why]
    for r in found.values():
        assert r.measured_us == pytest.approx(2 * r.predicted_us, rel=0.01) and r.graph
        assert r.of_file == math.inf and r.unmatched == 0 and r.kernels > 0
        assert all(p.measured_us == pytest.approx(2 * p.predicted_us, rel=0.01) for p in r.pairs) and r.pairs
    assert found["FP32"].of_float == math.inf and 25 < found["INT8"].of_float < found["FP16"].of_float < math.inf

    part = tools.check.Part(name="worst")
    tools.check.worst(part, list(found.values()))
    assert 2 < len(part.lines) <= 11 and "measured" in part.lines[0]
    assert "ratio 2.00; inf dB against the file" in tools.check.line(found["FP32"])


def test_networks_that_fail_or_have_no_time_are_said(
    tools: SimpleNamespace, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = tools.networks.user_case("net", small_network(tmp_path))
    assert {r.why for r in tools.networks.ran(case, bench, -math.inf)} == {"no time left"}

    def broken(form: str, *_: Any) -> None:
        raise RuntimeError(f"{form} is broken")

    monkeypatch.setattr(tools.networks, "model_of", broken)
    whys = [r.why for r in tools.networks.ran(case, bench, math.inf)]
    assert whys[0] == "RuntimeError: FP32 is broken" and len(whys) == 4


def test_the_networks_are_there_without_files(tools: SimpleNamespace, tmp_path: Path) -> None:
    made = [make() for make in tools.networks.cases(None, tmp_path)]
    assert [c.name for c in made] == [
        "demo",
        "resnet20 (random weights)",
        "unet (random weights)",
        "minilm (random weights)",
    ]
    for case in made[1:]:
        (outputs,) = ort.run(ort.session(case.path), case.samples[-1:])
        assert all(np.isfinite(a).all() and np.std(a) > 0 for a in outputs.values()), case.name


def test_the_worst_output_counts(tools: SimpleNamespace) -> None:
    one, other = np.array([1.0, 1.0]), np.array([1.0, np.nan])
    assert tools.networks.worst_sqnr_db({"a": one, "b": one}, {"a": one, "b": one * 1.1}) == pytest.approx(20)
    assert tools.networks.worst_sqnr_db({"a": one}, {"a": other}) == -math.inf
