"""What TensorRT-RTX makes of the probes: the kernels that each claims, and no others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from simulated_gpu import RTX4090, SimulatedTimer, small_products

from engines.backends import rtx
from engines.backends.backend import backend_named
from engines.core.errors import BuildError
from engines.cost.gpus import GPUS
from engines.cost.predict import predict
from engines.timing import gpu_file
from engines.timing.gpu_file import factors_of
from engines.timing.networks import networks
from engines.timing.probes import Graph, Probe, claim_failure, pools, probes
from engines.timing.timer import Timing

pytest.importorskip("tensorrt_rtx")

# What 1.7.1 does not make of a probe -> why it is not used. TensorRT-RTX has no FP32 product on Turing.
NOT_USED = {
    ("sm75", "conv_int8"): "a product runs in float16, not in int8",
    ("sm75", "depthwise_float16"): "4 more steps are 8 more kernels",
    ("sm89", "conv_fp8"): "steps run beside each other",
    ("sm120", "conv_fp8"): "steps run beside each other",
}


# All of one generation; of the others, what differs. All of all of them were compiled once, at full size.
SOME = {
    "sm75": ("matmul", "conv_int8", "depthwise"),
    "sm86": ("start", "conv_int8", "matmul_int8", "matmul_bfloat16"),
    "sm120": ("matmul_fp8",),
}


@pytest.mark.parametrize("target", ["sm75", "sm86", "sm89", "sm120"])
def test_compiled_probes_are_what_they_claim(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_products(monkeypatch, 256)
    card = dataclasses.replace(RTX4090, target=target)
    names = []
    for probe in (p for p in probes(card) if p.name.startswith(SOME.get(target, ""))):
        try:
            tables = [rtx.build(probe.make(steps), targets=[target]).table for steps in probe.steps]
        except BuildError as error:
            assert (target, probe.name) == ("sm75", "matmul_float32") and "FP32 GEMM" in str(error)
            continue
        said = claim_failure(probe, tables)
        expected = NOT_USED.get((target, probe.name), "")
        assert said.startswith(expected) and bool(said) == bool(expected), (probe.name, said)
        names.append(probe.name)
    if target == "sm89":
        assert {"start", "dram", "l2", "conv_float16", "matmul_int8", "matmul_fp8", "conv3d_float16"} <= set(names)
    assert ("matmul_bfloat16" in names) is (target in ("sm86", "sm89"))


def test_kernels_that_fuse_are_found_out() -> None:
    def relus(steps: int) -> object:
        g, y = Graph(), "x"
        for i in range(steps):
            y = g.add("Relu", [g.add("Add", [y, "x"], f"add{i}")], f"step{i}")
        return g.model(["x"], [1, 32, 14, 14], y, "float16")

    probe = Probe(name="p", dtype="float16", multiplies=False, kind="chain", steps=(2, 6), make=relus)  # type: ignore[arg-type]
    tables = [rtx.build(probe.make(steps), targets=["sm89"]).table for steps in probe.steps]
    assert "steps are" in claim_failure(probe, tables)
    single = dataclasses.replace(probe, kind="single", steps=(1,))
    two = [rtx.build(pools(2), targets=["sm89"]).table]
    assert claim_failure(single, two) == "the engine has 4 kernels, not one"


def test_whole_engines_correct_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real engines of TensorRT-RTX, and a clock that says each takes three times what was predicted."""
    gpu = GPUS["rtx4090"]
    some = networks()[:2]
    monkeypatch.setattr(gpu_file, "networks", lambda: some)

    class Threefold(SimulatedTimer):
        def times(self, loads: Any, **_: Any) -> list[Timing]:
            model = some[len(calls)].model
            calls.append(model)
            us = 3 * predict(model, loads[0].engine.table, gpu).total_us
            return [Timing(us=(us,), at_s=(0.0,))]

    calls: list[Any] = []
    tested = gpu_file.points(RTX4090, gpu, backend_named("rtx"), Threefold())
    assert [p.name for p in tested] == ["cnn_float16", "transformer_float16"] and not any(p.failure for p in tested)
    assert all(0.2 < p.start_us / p.predicted_us < 0.8 for p in tested)
    found = factors_of(tested)
    assert found is not None and (found.work, found.start) == pytest.approx((3, 3), rel=0.05)
