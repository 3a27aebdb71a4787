"""The figures of a simulated GPU are found again from its times; what cannot be used is said and not used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from simulated_gpu import (
    RATES,
    ROW,
    RTX4090,
    SimulatedTimer,
    compiler,
    fuse_pools,
    refuse,
    small_products,
    without_weights,
)

from engines.core.documents import replace as changed
from engines.core.errors import EngineError, MissingRuntimeError
from engines.cost.gpus import GPUS, Gpu
from engines.timing import gpu_file, measure
from engines.timing.fit import Fit, Reading, fit, slope
from engines.timing.gpu_file import MeasuredGpu, measured_gpu, row_of
from engines.timing.measure import backend_for, readings
from engines.timing.probes import Probe, pools, probes
from engines.timing.timer import Load, Timing, TimingError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_products(monkeypatch)
    without_weights(monkeypatch)
    monkeypatch.setattr(gpu_file, "row_of", lambda card: ROW if card.name == RTX4090.name else row_of(card))


def found(timer: SimulatedTimer, *, card: Any = RTX4090, backend: Any = None) -> Fit:
    made = readings(probes(card), card, backend or compiler(), timer)
    return fit(made, gpu_file.row_of(card))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_figures_of_a_gpu(seed: int) -> None:
    """1 % of noise, and 2 % of the times three times too long."""
    measured = found(SimulatedTimer(seed=seed)).measured
    assert measured.start_us == pytest.approx(3.0, rel=0.03)
    assert measured.product_start_us == pytest.approx(2.5, rel=0.15)
    assert measured.bandwidth_gb_s == pytest.approx(820, rel=0.02)
    assert measured.l2_gb_s == pytest.approx(4000, rel=0.05)
    kinds = {("float16_accumulating" if t == "float16" else t): r for t, r in RATES.items()}
    assert measured.boost_tera_ops.keys() == measured.tera_ops.keys() == kinds.keys()
    for kind, rate in kinds.items():
        assert measured.boost_tera_ops[kind] == pytest.approx(rate, rel=0.03)
        assert measured.tera_ops[kind] == pytest.approx(0.7 * rate, rel=0.03)


@pytest.mark.parametrize("slow", [0.5, 1.5])
def test_a_wrong_clock_is_not_hidden(slow: float) -> None:
    right, wrong = found(SimulatedTimer()).measured, found(SimulatedTimer(slow=slow)).measured
    assert wrong.start_us == pytest.approx(slow * (right.start_us or 0), rel=0.01)
    assert wrong.bandwidth_gb_s == pytest.approx((right.bandwidth_gb_s or 0) / slow, rel=0.01)
    assert wrong.tera_ops["int8"] == pytest.approx(right.tera_ops["int8"] / slow, rel=0.01)


@pytest.mark.parametrize("accumulates", ["float16", "float32"])
def test_how_fp16_products_accumulate(accumulates: str) -> None:
    rates = {**RATES, "float16": 0.31 if accumulates == "float16" else 0.158}
    said = found(SimulatedTimer(accumulates=accumulates, boost=rates))
    assert said.accumulation == accumulates
    assert ("float16_accumulating" in said.measured.tera_ops) is (accumulates == "float16")
    assert len(said.evidence) == 4 and "of BF16" in said.evidence[2]
    assert all(("keeps 100%" in sentence) is (accumulates == "float32") for sentence in said.evidence[:2])


def test_sums_and_rates_that_disagree_decide_nothing() -> None:
    said = found(SimulatedTimer(accumulates="float32", boost=RATES))
    assert said.accumulation is None and "float16_accumulating" in said.measured.tera_ops  # as the row assumes


def test_a_gpu_of_one_rate_for_both_is_decided_by_sums() -> None:
    card = gpu_file.Card(**{**_fields(RTX4090), "name": "Tesla T4", "target": "sm75"})
    for accumulates in ("float16", "float32"):
        said = found(SimulatedTimer(accumulates=accumulates), card=card)
        assert said.accumulation == accumulates
        assert said.measured.tera_ops.keys() & {"bfloat16", "fp8"} == set()


def _fields(card: Any) -> dict[str, Any]:
    return {name: getattr(card, name) for name in type(card).__slots__}


def test_one_part_that_fails_stops_no_other() -> None:
    class Broken(SimulatedTimer):
        def times(self, loads: Any, **kept: Any) -> list[Timing]:
            if len(loads[0].engine.table.layers) == 1 and '"Add"' in loads[0].engine.data.decode():
                raise RuntimeError("pybind said no")
            return super().times(loads, **kept)

    whole = found(SimulatedTimer())
    said = found(Broken(), backend=compiler(refuse("fp8")))
    assert said.measured.bandwidth_gb_s is None and said.measured.l2_gb_s is None
    assert said.measured.tera_ops.keys() == whole.measured.tera_ops.keys() - {"fp8"}
    assert said.measured.start_us == whole.measured.start_us
    reasons = " ".join(said.missing)
    assert "dram: not used: pybind said no" in reasons and "matmul_fp8: not used: Cannot compile" in reasons


def test_a_probe_that_is_compiled_to_something_else_is_not_used() -> None:
    said = found(SimulatedTimer(), backend=compiler(fuse_pools))
    assert said.measured.start_us is None and said.measured.product_start_us is None
    assert said.measured.tera_ops
    assert said.missing == (
        "start: not used: TensorRT-RTX compiled it to something else: 20 steps are 1 kernels of their own",
    )

    def wider(model: Any, table: Any) -> Any:
        layers = tuple(
            changed(la, inputs=tuple(changed(t, dtype=t.dtype.replace("int8", "float16")) for t in la.inputs))
            for la in table.layers
        )
        layers = tuple(changed(la, constants=la.inputs if la.constants else ()) for la in layers)
        return changed(table, layers=layers)

    said = found(SimulatedTimer(), backend=compiler(wider))
    assert "int8" not in said.measured.tera_ops
    assert sum("a product runs in float16, not in int8" in m for m in said.missing) == 2


def test_no_time_left() -> None:
    made = list(readings(probes(RTX4090), RTX4090, compiler(), SimulatedTimer(), budget_s=-1.0))
    assert {r.failure for r in made} == {"no time left of -1 s"}
    with pytest.raises(TimingError, match="Nothing could be measured on NVIDIA GeForce RTX 4090"):
        measured_gpu(RTX4090, compiler(), SimulatedTimer(), budget_s=-1.0)


def test_a_slope_within_the_noise_is_refused() -> None:
    probe = Probe(name="p", dtype="float16", multiplies=False, kind="chain", steps=(1, 2), make=pools)
    at = tuple(float(i) for i in range(9))
    noisy = [
        Timing(us=tuple(10 + i % 3 for i in range(9)), at_s=at),
        Timing(us=tuple(10.2 + i % 3 for i in range(9)), at_s=at),
    ]
    with pytest.raises(TimingError, match=r"1 more steps take 0\.20 us longer, with an error of 0\.88 us"):
        slope(probe, noisy)
    said = fit([Reading(probe=probe, timings=tuple(noisy))])
    assert not said.step_us and "p: not used: 1 more steps" in said.missing[0]


@pytest.mark.parametrize(
    ("name", "target", "row"),
    [
        ("Tesla T4", "sm75", "t4"),
        ("NVIDIA L4", "sm89", "l4"),
        ("NVIDIA GeForce RTX 4090", "sm89", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "sm89", "rtx4090-laptop"),
        ("NVIDIA A100-SXM4-40GB", "sm80", "a100"),
        ("NVIDIA A100-SXM4-80GB", "sm80", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "sm80", "a100-80gb-pcie"),
        ("NVIDIA H100 80GB HBM3", "sm90", "h100"),
        ("NVIDIA H100 PCIe", "sm90", "h100-pcie"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "sm120", "rtx-pro-6000"),
        ("NVIDIA RTX 6000 Ada Generation", "sm89", "rtx-6000-ada"),
        ("NVIDIA A10G", "sm86", None),
        ("NVIDIA GeForce RTX 4090 D", "sm89", None),
        ("NVIDIA GeForce RTX 4090", "sm120", None),
    ],
)
def test_the_row_of_a_drivers_name(name: str, target: str, row: str | None) -> None:
    got = row_of(gpu_file.Card(**{**_fields(RTX4090), "name": name, "target": target}))
    assert (got.name if got else None) == row


def whole(timer: Any, card: Any = RTX4090) -> MeasuredGpu:
    return measured_gpu(card, compiler(), timer)


def test_the_recipe_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = [gpu_file.Point(name="cnn", predicted_us=100, measured_us=120), gpu_file.Point(name="b", failure="x")]
    monkeypatch.setattr(gpu_file, "points", lambda *_: tested)
    made = whole(SimulatedTimer())
    read = yaml.safe_load(made.text())
    assert read["target"] == ["sm89"] and "backend" not in read
    gpu = Gpu.from_mapping(read["gpu"][0])
    assert gpu.name == "rtx4090-measured" and gpu.sms == 128 and gpu.accumulation == "float16"
    assert gpu.measured is not None and gpu.measured.factor is None  # one engine is too few
    assert gpu.measured.start_us == pytest.approx(made.fit.measured.start_us, rel=1e-3)
    assert gpu.measured.tera_ops["int8"] == pytest.approx(made.fit.measured.tera_ops["int8"], rel=1e-3)
    assert ("b", "not measured: x", "") in made.rows()
    assert made.to_mapping()["gpu"] == read["gpu"][0]

    monkeypatch.setattr(
        gpu_file, "points", lambda *_: [tested[0], gpu_file.Point(name="c", predicted_us=10, measured_us=13)]
    )
    made = whole(SimulatedTimer())
    factor = Gpu.from_mapping(yaml.safe_load(made.text())["gpu"][0]).measured
    assert factor is not None and factor.factor == pytest.approx(math.sqrt(1.2 * 1.3), rel=0.01)
    assert factor.start_factor is not None and 1 < factor.start_factor < factor.factor  # nothing was said of starts
    assert {"factor", "start_factor"} < {row[0] for row in made.rows()}


def test_an_unknown_gpu_borrows_the_usual_row_of_its_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_file, "points", lambda *_: [])
    card = gpu_file.Card(
        **{**_fields(RTX4090), "name": "NVIDIA Foo 9", "sms": 20, "boost_mhz": 1000.0, "l2_bytes": 8 << 20}
    )
    gpu = Gpu.from_mapping(yaml.safe_load(whole(SimulatedTimer(), card).text())["gpu"][0])
    assert (gpu.name, gpu.target, gpu.sms, gpu.l2_mb) == ("nvidia-foo-9-measured", "sm89", 20, 8)
    scale = 20 / 128 * 1000 / GPUS["rtx4090"].boost_mhz
    assert gpu.tera_ops["int8"] == pytest.approx(GPUS["rtx4090"].tera_ops["int8"] * scale, rel=0.02)
    strange = gpu_file.Card(**{**_fields(RTX4090), "name": "X", "target": "sm999"})
    with pytest.raises(EngineError, match="No GPU of target sm999 is known"):
        gpu_file.gpu_values(strange, found(SimulatedTimer()))


def test_the_compiler_is_one_that_is_installed_and_has_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "import_runtime", lambda name: None)
    assert backend_for(RTX4090).name == "rtx" and backend_for(RTX4090, "trt").name == "trt"
    h100 = gpu_file.Card(**{**_fields(RTX4090), "name": "NVIDIA H100", "target": "sm90"})
    assert backend_for(h100).name == "trt"
    with pytest.raises(EngineError, match="has no target 'sm90'"):
        backend_for(h100, "rtx")

    def missing(name: str) -> None:
        raise MissingRuntimeError(name)

    monkeypatch.setattr(measure, "import_runtime", missing)
    with pytest.raises(
        MissingRuntimeError, match=r"No compiler for NVIDIA H100 \(sm90\) is installed here. Install TensorRT"
    ):
        backend_for(h100)


def test_a_load_is_one_inference_unless_said() -> None:
    made = compiler().build(pools(3))
    assert Load(engine=made).repeats == 1
