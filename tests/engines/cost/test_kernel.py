"""Kernel times against figures worked out by hand, and what must hold of any constants."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from engines.cost.constants import CONSTANTS
from engines.cost.gpus import GPUS, Gpu, Measured, gpu_named
from engines.cost.kernel import Batch, Constants, Kernel, Times
from engines.cost.work import Work

MB = 2**20
# 10 SMs at 1410 MHz; 10 GB/s: 10^4 bytes a microsecond; float16 10^6 operations a microsecond, 10^5 on each SM
PLAIN = Gpu(
    name="plain",
    target="sm89",
    sms=10,
    boost_mhz=1410,
    base_mhz=705,
    l2_mb=8,
    bandwidth_gb_s=10,
    tera_ops={"float32": 0.5, "float16": 1, "int8": 2, "fp32_cores": 0.1},
)
# every share 1, no clock under load, no fill
ROUND = Constants(
    start_us=4,
    product_start_us=2,
    split=1.5,
    bandwidth=1,
    l2_bytes=100,
    kept=0.25,
    grouped=0.5,
    pointwise=0.8,
    rate=1,
    attention=0.5,
    fp32_rate=1,
    small_tiles=1,
    fill=0,
    clock=0,
    saturation=1,
    int8=1,
    halved=1,
    grouped_int8=1,
    turing=2,
)
POINTWISE = Work(form="pointwise", read=0, written=0, weights=0)


def times(
    work: Work, gpu: Gpu = PLAIN, constants: Constants = ROUND, dtype: str = "float16", beside: tuple[Work, ...] = ()
) -> Times:
    return Batch.of([([Kernel(work=w, dtype=dtype) for w in (work, *beside)], gpu)]).times(constants)


def us(work: Work, gpu: Gpu = PLAIN, constants: Constants = ROUND, dtype: str = "float16") -> float:
    return float(times(work, gpu, constants, dtype).total[0])


def product(m: float, n: float, k: float, **values: float | str) -> Work:
    return Work(**{"form": "product", "read": 0, "written": 0, "weights": 0, "m": m, "n": n, "k": k, **values})  # type: ignore[arg-type]


def test_an_empty_kernel_costs_its_start() -> None:
    assert us(POINTWISE) == pytest.approx(4)
    # sqrt(1410 / 5640) = 1/2
    assert us(POINTWISE, replace(PLAIN, boost_mhz=5640)) == pytest.approx(2)


def test_memory_is_that_which_does_not_fit_the_l2() -> None:
    # 12 MiB of activations: all of it leaves the 8 MiB L2; 12 * 2^20 bytes / 10^4 / .8
    assert us(replace(POINTWISE, read=8 * MB, written=4 * MB)) == pytest.approx(4 + 12 * MB / 1e4 / 0.8)
    # 5 MiB: (5 - 2) of the (8 - 2) MiB above a quarter: half
    assert us(replace(POINTWISE, read=5 * MB)) == pytest.approx(4 + 2.5 * MB / 1e4 / 0.8)
    # 1 MiB stays: 100 bytes * 10 SMs * 1410 a microsecond
    assert us(replace(POINTWISE, read=MB)) == pytest.approx(4 + MB / 1.41e6 / 0.8)


def test_weights_stay_in_the_l2_while_those_of_the_engine_fit_half_of_it() -> None:
    table = replace(POINTWISE, weights=MB)
    assert us(table) == pytest.approx(4 + MB / 1.41e6 / 0.8)
    # beside 5 MiB more, 6 in all: 1.5 - 6 / 4 = 0 stay
    heavy = replace(POINTWISE, weights=5 * MB)
    assert times(table, beside=(heavy,)).total[0] == pytest.approx(4 + MB / 1e4 / 0.8)
    # beside 4 MiB more, 5 in all: 1.5 - 5 / 4 = a quarter stays
    most = replace(POINTWISE, weights=4 * MB)
    assert times(table, beside=(most,)).total[0] == pytest.approx(4 + 0.75 * MB / 1e4 / 0.8)


def test_a_product_takes_waves_of_its_best_tile() -> None:
    # 1280 x 128: ten tiles of 128 x 128, one on each SM: 2 * 128 * 128 * 64 operations at 10^5 and .95 of it
    expected = 2 * 128 * 128 * 64 / 1e5 / 0.95
    assert us(product(1280, 128, 64)) == pytest.approx(4 + 2 + expected)
    # one row more: 22 tiles of 128 x 64, three waves at .8 of the rate, are cheaper than two of 128 x 128
    assert us(product(1281, 128, 64)) == pytest.approx(4 + 2 + 3 * 2 * 128 * 64 * 64 / 1e5 / 0.8)


def test_a_small_output_splits_its_sum() -> None:
    # 32 x 32 with k 1024: one tile in eight parts (of 128) on eight SMs, the start half as dear again
    assert us(product(32, 32, 1024)) == pytest.approx(4 + 3 + 2 * 32 * 32 * 128 / 1e5 / 0.22)
    # with k 64 a part would cost as much as the whole
    assert us(product(32, 32, 64)) == pytest.approx(4 + 2 + 2 * 32 * 32 * 64 / 1e5 / 0.22)


def test_memory_and_product_overlap() -> None:
    found = times(product(1280, 128, 64, read=12.0 * MB))
    assert found.memory[0] == pytest.approx(12 * MB / 1e4)
    assert found.total[0] == pytest.approx(4 + (found.memory[0] ** 3 + (2 + found.compute[0]) ** 3) ** (1 / 3))
    assert found.start[0] == pytest.approx(4 + 2)


def test_grouped_convolutions_run_on_the_fp32_cores_or_in_tiles_of_each_group() -> None:
    depthwise = product(1000, 64, 9, form="depthwise", groups=64.0, spatial=2, read=1.0 * MB)
    found = times(depthwise)
    assert found.total[0] == pytest.approx(4 + ((2 * 1000 * 64 * 9 / 1e5) ** 3 + found.memory[0] ** 3) ** (1 / 3))
    assert found.memory[0] == pytest.approx(MB / 1.41e6 / 0.5)
    # two groups of 64 columns: ten tiles of 128 x 64 in each group, two waves, .8 of the rate
    wide = product(1280, 128, 640, form="grouped", groups=2.0, spatial=2)
    assert us(wide) == pytest.approx(4 + 2 + 2 * 2 * 128 * 64 * 640 / 1e5 / 0.8)


def test_fused_attention_computes_a_head_on_each_sm() -> None:
    # 20 heads of 128 x 64, twice 128 keys: two waves at half the rate
    heads = product(20 * 128, 64, 256, form="attention", batch=20.0)
    assert us(heads) == pytest.approx(4 + 2 + 2 * 2 * 128 * 64 * 256 / 1e5 / 0.5)
    # 768 queries: two parts of 384
    longer = product(10 * 768, 64, 1536, form="attention", batch=10.0)
    assert us(longer) == pytest.approx(4 + 2 + 2 * 2 * 384 * 64 * 1536 / 1e5 / 0.5)


def test_products_side_by_side_share_no_tile() -> None:
    # 16 products of 8 rows: 16 tiles of 32 x 32, two waves
    assert us(product(128, 32, 32, batch=16.0)) == pytest.approx(4 + 2 + 2 * 2 * 32 * 32 * 32 / 1e5 / 0.22)


def test_the_clock_falls_with_the_duty_of_the_whole_engine() -> None:
    loaded = replace(ROUND, clock=1.0, saturation=100.0)
    work = product(12800, 1280, 4096)
    assert times(work, constants=loaded).compute[0] == pytest.approx(2 * (us(work) - 6), rel=1e-6)
    alone = times(POINTWISE, constants=loaded, beside=(work,))
    assert alone.total[0] == pytest.approx(4)  # the start is that of the boost clock


def test_types_have_their_own_rates() -> None:
    work = product(1280, 128, 64)
    for dtype, factor in (("float16", 1), ("int8", 0.5), ("float32", 2)):
        assert us(work, dtype=dtype) - 6 == pytest.approx(factor * (us(work) - 6))
    better = replace(ROUND, int8=1.25)
    assert us(work, constants=better, dtype="int8") - 6 == pytest.approx((us(work, dtype="int8") - 6) / 1.25)
    assert us(work, constants=better) == us(work)


def test_half_rates_keep_their_operands_coming() -> None:
    halved = replace(ROUND, halved=1.25)
    geforce = gpu_named("rtx4090")
    wide = geforce.other_accumulation()
    assert wide is not None
    work = product(128 * 256, 256, 4096)
    for gpu, dtype, better in (
        (wide, "float16", True),
        (geforce, "float16", False),
        (geforce, "float32", True),
        (geforce, "int8", False),
        (gpu_named("l4"), "float32", False),
        (gpu_named("rtx2080-ti"), "float32", False),  # FP32 cores
    ):
        faster = us(work, gpu, halved, dtype) < us(work, gpu, ROUND, dtype)
        assert faster == better, (gpu.name, dtype)


def test_sm75_is_slower_by_its_factor() -> None:
    work = product(1280, 128, 64)
    old = replace(PLAIN, target="sm75")
    assert us(work, old) == pytest.approx(2 * us(work))
    assert us(work, old, dtype="float32") == pytest.approx(us(work, dtype="float32") + 6)  # FP32 cores: starts alone


def test_what_was_measured_takes_the_place_of_what_is_predicted() -> None:
    def with_(**values: object) -> Gpu:
        return replace(PLAIN, measured=Measured(**values))  # type: ignore[arg-type]

    big, work = replace(POINTWISE, read=12 * MB), product(1280, 128, 64)
    assert us(POINTWISE, with_(start_us=1.0)) == pytest.approx(1)
    assert us(work, with_(product_start_us=0.5)) == pytest.approx(us(work) - 1.5)
    # bandwidths are measured by a pointwise kernel, and contain what such a kernel reaches of them
    assert us(big, with_(bandwidth_gb_s=20.0)) == pytest.approx(4 + 12 * MB / 2e4)
    assert us(replace(POINTWISE, read=MB), with_(l2_gb_s=141.0)) == pytest.approx(4 + MB / 1.41e5)
    assert us(big, with_(factor=1.5)) == pytest.approx(1.5 * us(big))
    assert us(big, with_(factor=1.5, start_factor=2.0)) == pytest.approx(1.5 * us(big) + 0.5 * 4)
    assert us(work, with_(start_factor=2.0)) == pytest.approx(us(work) + 6)
    large = 512 / 520  # of their rate that 10 SMs reach where 512 tiles are 52 waves
    assert us(work, with_(boost_tera_ops={"float16": 0.5 * large})) - 6 == pytest.approx(2 * (us(work) - 6))
    # sustained rates hold where the engine is busy, those of boost where it is not
    busy = product(12800, 1280, 4096)
    sustained = with_(tera_ops={"float16": 0.5 * large}, boost_tera_ops={"float16": large})
    full = us(busy, sustained, replace(ROUND, saturation=100.0))
    assert full - 6 == pytest.approx(2 * (us(busy) - 6))
    rates = {"float16": 0.1, "float16_accumulating": 0.5 * large}
    narrow = replace(PLAIN, tera_ops={**PLAIN.tera_ops, "float16": 0.5, "float16_accumulating": 1.0})
    own = replace(narrow, measured=Measured(boost_tera_ops=rates))
    assert us(work, own) - 6 == pytest.approx(2 * (us(work) - 6))


@pytest.mark.parametrize(("measured", "reached"), [(6.0, 7.5), (8.0, 10.0), (9.0, 10.0), (12.0, 12.0)])
def test_products_reach_what_a_measured_pointwise_kernel_lets_expect(measured: float, reached: float) -> None:
    """1 / .8 of what it reached, but no more than is predicted of them (10 GB/s), unless it reached more itself."""
    big = product(4096, 64, 64, read=12 * MB)
    assert us(big, replace(PLAIN, measured=Measured(bandwidth_gb_s=measured))) == pytest.approx(
        us(big, replace(PLAIN, bandwidth_gb_s=reached))
    )


@pytest.mark.parametrize("name", ["t4", "rtx4090", "l4", "h100", "orin-nano", "rtx5090"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_more_work_is_never_faster(name: str, dtype: str) -> None:
    gpu = GPUS[name]
    works = [
        replace(POINTWISE, read=1e5, weights=1e4),
        product(300, 64, 576, spatial=2, read=1e5, written=1e5, weights=7e4),
        product(300, 64, 9, form="depthwise", groups=64.0, spatial=2, read=1e5, written=1e5),
        product(300, 64, 72, form="grouped", groups=8.0, spatial=2, read=1e5, written=1e5),
        product(12 * 128, 64, 256, form="attention", batch=12, read=1e5),
    ]
    for work in works:
        for grown in ({"read": 8 * work.read}, {"written": work.written + 1e8}, {"weights": work.weights + 1e7}):
            assert us(replace(work, **grown), gpu, CONSTANTS, dtype) >= us(work, gpu, CONSTANTS, dtype) - 1e-9
        if not work.k:
            continue
        for axis in "mnk":
            sizes = [getattr(work, axis) * factor for factor in (1, 2, 3, 5, 8, 13, 40, 200)]
            found = [us(replace(work, **{axis: size}), gpu, CONSTANTS, dtype) for size in sizes]
            assert found == sorted(found), (work, axis)


def test_int8_and_float16_of_one_product_keep_their_order() -> None:
    work = product(4096, 1024, 1024, read=8e6, written=8e6, weights=2e6)
    light = replace(work, read=4e6, written=4e6, weights=1e6)
    for gpu in GPUS.values():
        if gpu.target not in ("sm103",):  # B300 has hardly any INT8
            assert us(light, gpu, CONSTANTS, "int8") < us(work, gpu, CONSTANTS, "float16"), gpu.name


def test_several_engines_are_those_alone() -> None:
    first = [Kernel(work=product(1280, 128, 640, read=1e6), dtype="float16"), Kernel(work=POINTWISE, dtype="float16")]
    second = [Kernel(work=product(900, 64, 64), dtype="int8", count=3)]
    gpus = gpu_named("l4"), gpu_named("t4")
    both = Batch.of([(first, gpus[0]), (second, gpus[1])])
    alone = [Batch.of([pair]) for pair in zip((first, second), gpus, strict=True)]
    expected = [batch.sums(batch.times(CONSTANTS).total)[0] for batch in alone]
    assert both.sums(both.times(CONSTANTS).total) == pytest.approx(expected)
    triple = Batch.of([([replace(second[0], count=1)] * 3, gpus[1])])
    assert triple.sums(triple.times(CONSTANTS).total)[0] == pytest.approx(expected[1])


def test_no_kernels_take_no_time() -> None:
    empty = Batch.of([([], PLAIN)])
    assert empty.sums(empty.times(CONSTANTS).total).tolist() == [0.0]
    assert np.isfinite(us(product(1, 1, 1))) and not math.isnan(us(product(0, 0, 0)))
