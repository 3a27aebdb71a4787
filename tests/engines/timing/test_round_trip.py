"""A GPU whose times are those that the model predicts for it: what is measured of it predicts them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from engines.cost.constants import CONSTANTS
from engines.cost.gpus import GPUS, Gpu
from engines.cost.kernel import Batch, Kernel
from engines.cost.work import ATTENTION, DEPTHWISE, GROUPED, POINTWISE, PRODUCT, Work
from engines.timing import gpu_file
from engines.timing.driver import Card
from engines.timing.fit import BOOST_S, Reading, fit
from engines.timing.probes import CHANNELS, IMAGE, SMALL_CONV, Probe, probes
from engines.timing.timer import Timing

SIZES = {"float32": 4, "int8": 1}  # bytes; others 2


def kernel_of(probe: Probe) -> Kernel:
    """A step of a probe."""
    wide = SIZES.get(probe.dtype, 2)
    if probe.name == "start":
        work = Work(form=POINTWISE, read=12544, written=12544, weights=0)
    elif probe.name in ("dram", "l2"):
        work = Work(form=POINTWISE, read=probe.nbytes * 2 / 3, written=probe.nbytes / 3, weights=0)
    elif probe.name.startswith("product_start"):
        work = replace(SMALL_CONV, k=64.0 * int(probe.name[-1]) ** 2)
    elif probe.name.startswith("matmul"):
        work = _matrix(4096, 4096, 4096, wide)
    else:
        m = IMAGE[0] * IMAGE[2] * IMAGE[3]
        work = replace(_matrix(m, CHANNELS, 9 * CHANNELS, wide), read=float(m * CHANNELS * wide), spatial=2)
    return Kernel(work=work, dtype=probe.dtype)


def _matrix(m: float, n: float, k: float, wide: float = 2, **values: float) -> Work:
    fields = {"read": m * k * wide, "written": m * n * max(wide, 2), "weights": n * k * wide, **values}
    return Work(form=PRODUCT, m=m, n=n, k=k, **fields)  # type: ignore[arg-type]


def us(kernels: Sequence[Kernel], gpu: Gpu) -> float:
    return float(Batch.of([(kernels, gpu)]).times(CONSTANTS).total.sum())


def reading(probe: Probe, gpu: Gpu) -> Reading:
    """What a probe would measure: the boost clock at first, then that of its own load."""
    fast = replace(gpu, base_mhz=gpu.boost_mhz)
    step, timings = kernel_of(probe), []
    at = [probe.seconds * i / 200 for i in range(201)]
    for steps in probe.steps:
        engine = [replace(step, work=step.work.scaled(steps))] if probe.kind == "single" else [step] * steps
        slow, quick = us(engine, gpu), us(engine, fast)
        timings.append(Timing(us=tuple(quick if t <= BOOST_S else slow for t in at), at_s=tuple(at)))
    return Reading(probe=probe, timings=tuple(timings), kept=None)


def measured(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The GPU as `qdq measure-gpu` writes it, without factors."""
    card = Card(
        name=gpu.name,
        target=gpu.target,
        sms=gpu.sms,
        boost_mhz=gpu.boost_mhz,
        l2_bytes=int(gpu.l2_mb * 2**20),
        bandwidth_gb_s=gpu.bandwidth_gb_s,
        memory_bytes=24 << 30,
        bus="",
        cuda="13.0",
    )
    monkeypatch.setattr(gpu_file, "row_of", lambda card: gpu)
    found = [p for p in probes(card) if not p.name.startswith(("depthwise", "conv3d"))]
    said = fit([reading(probe, gpu) for probe in found], gpu)
    assert not said.missing
    return Gpu.from_mapping(gpu_file.gpu_values(card, replace(said, accumulation=gpu.accumulation)))


def networks() -> dict[str, list[Kernel]]:
    """Residual blocks, a transformer and an inverted bottleneck, at one image or 128 tokens and at eight."""
    found = {}
    for batch in (1, 8):
        conv = [
            Kernel(
                work=replace(_matrix(batch * s * s, c, 9 * c), read=2.0 * batch * s * s * c, spatial=2), dtype="float16"
            )
            for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))
            for _ in range(4)
        ]
        sums = [_pointwise(batch * c * s * s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))]
        found[f"cnn {batch}"] = conv + sums
        rows = 128.0 * batch
        layer = [_matrix(rows, 2304, 768), _matrix(rows, 768, 768), _matrix(rows, 3072, 768), _matrix(rows, 768, 3072)]
        heads = Work(
            form=ATTENTION, read=6 * 768 * rows, written=2 * 768 * rows, weights=0, m=12 * rows, n=64, k=256, batch=12
        )
        one = [Kernel(work=w, dtype="float16") for w in (*layer, heads)] + [_pointwise(768 * rows)] * 3
        found[f"transformer {batch}"] = 6 * one
        wide = [
            Kernel(work=replace(k.work, form=form, groups=g, k=9 * 256 / g), dtype="float16")
            for form, g in ((DEPTHWISE, 256.0), (GROUPED, 8.0))
            for k in [Kernel(work=replace(_matrix(batch * 784, 256, 9), spatial=2), dtype="float16")]
        ]
        found[f"bottleneck {batch}"] = 4 * [*wide, *conv[:2], sums[0]]
    return found | {f"{name} {t}": [replace(k, dtype=t) for k in v] for name, v in found.items() for t in SIZES}


def _pointwise(elements: float) -> Kernel:
    return Kernel(work=Work(form=POINTWISE, read=4 * elements, written=2 * elements, weights=0), dtype="float16")


@pytest.mark.parametrize("name", ["t4", "a100", "a2", "rtx3090", "l4", "rtx4090", "rtx5090", "h100", "orin-nano"])
def test_what_the_probes_measure_is_what_the_model_means(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = GPUS[name]
    found = measured(gpu, monkeypatch)
    assert found.measured is not None and found.measured.factor is None
    off = {what: us(kernels, found) / us(kernels, gpu) - 1 for what, kernels in networks().items()}
    assert max(map(abs, off.values())) < 0.03, off
