"""Predicted times against figures worked out by hand, on tables written by hand and on real compiler dumps."""

from __future__ import annotations

import importlib.util
import re

import engine_graphs as graphs
import numpy as np
import onnx
import pytest

from engines.backends.layers import KernelTensor, Layer, LayerTable
from engines.core.documents import replace
from engines.core.errors import EngineError
from engines.cost.gpus import GPUS, Gpu, gpu_named
from engines.cost.predict import HEADERS, predict, rows

# 10 GB/s: a byte takes 0.1 ns. float16: 2 * 10^6 operations a microsecond. Round numbers, so that a person can check.
SLOW = Gpu(name="slow", target="sm89", bandwidth_gb_s=10, tera_ops={"float32": 1, "float16": 2, "int8": 4}, launch_us=3)
CONV_MACS = 16 * 16 * 9 * 64  # engine_graphs.conv: 147456


def tensor(dtype: str, *shape: int) -> KernelTensor:
    return KernelTensor(name="t", dtype=dtype, shape=shape)


def layer(
    name: str, kind: str, inputs: list[KernelTensor], outputs: list[KernelTensor], nodes: tuple[str, ...] = ()
) -> Layer:
    return Layer(
        name=name, kind=kind, inputs=tuple(inputs), constants=(), outputs=tuple(outputs), tactic="", onnx_nodes=nodes
    )


def table(*layers: Layer, targets: tuple[str, ...] = ("sm89",)) -> LayerTable:
    return LayerTable(
        layers=layers, backend="rtx", version="1", targets=targets, engine_bytes=0, weight_bytes=0, activation_bytes=0
    )


CONV = layer(
    "Corr_1",
    "correlation",
    [tensor("float16", 1, 16, 8, 8), tensor("float16", 16, 16, 3, 3)],
    [tensor("float16", 1, 16, 8, 8)],
    ("conv",),
)
COPY = layer("kgen_1", "kgen", [tensor("float16", 1, 16, 8, 8)], [tensor("float32", 1, 16, 8, 8)], ("conv", "cast"))


def test_a_kernel_costs_the_dearer_of_transfer_and_arithmetic_and_its_launch() -> None:
    cost = predict(graphs.conv(data=None, fmt=None, dtype=np.float16), table(CONV, COPY), SLOW)
    conv, copy = cost.kernels
    # 2 * (1024 + 2304 + 1024) bytes = 8704: 0.8704 us; 2 * 147456 operations at 2e6 a us: 0.147456 us; launch 3 us
    assert (conv.bytes, conv.macs, conv.dtype, conv.bound) == (8704, CONV_MACS, "float16", "launch")
    assert conv.us == pytest.approx(3.8704)
    # 1024 * 2 + 1024 * 4 bytes = 6144: 0.6144 us; no product: it names the node, but the other kernel multiplies
    assert (copy.bytes, copy.macs, copy.bound) == (6144, 0, "launch")
    assert copy.us == pytest.approx(3.6144)
    assert cost.total_us == pytest.approx(7.4848) and cost.bytes == 14848 and cost.unplaced_macs == 0


@pytest.mark.parametrize(
    ("changes", "bound", "us"),
    [
        ({"launch_us": 0.0}, "bandwidth", 0.8704),
        ({"launch_us": 0.0, "bandwidth_gb_s": 1000.0}, "compute", 0.147456),
        ({"launch_us": 0.1, "bandwidth_gb_s": 1000.0}, "compute", 0.247456),
    ],
)
def test_what_bounds_a_kernel(changes: dict[str, float], bound: str, us: float) -> None:
    (kernel,) = predict(graphs.conv(data=None, fmt=None), table(CONV), replace(SLOW, **changes)).kernels
    assert (kernel.bound, kernel.us) == (bound, pytest.approx(us))


def test_int8_is_priced_by_the_type_that_is_consumed() -> None:
    inputs = [tensor("int8", 1, 16, 8, 8), tensor("int8", 16, 16, 3, 3)]
    int8 = replace(CONV, inputs=tuple(inputs))
    (kernel,) = predict(graphs.conv(), table(int8), replace(SLOW, launch_us=0.0, bandwidth_gb_s=1e6)).kernels
    assert kernel.dtype == "int8" and kernel.us == pytest.approx(2 * CONV_MACS / 4e6)


def test_a_type_without_a_rate_runs_in_the_float_type_that_replaces_it() -> None:
    assert SLOW.peak("fp8") == SLOW.peak("int4") == SLOW.peak("float16") == 2e6
    assert SLOW.peak("bfloat16") == SLOW.peak("int32") == SLOW.peak("float32") == 1e6


def test_waiting_for_a_stream_is_no_kernel() -> None:
    wait = layer("w", "wait", [], [])
    cost = predict(graphs.conv(data=None, fmt=None), table(wait, CONV, layer("s", "signal", [], [])), SLOW)
    assert [k.name for k in cost.kernels] == ["Corr_1"]


def test_products_without_a_kernel_are_reported() -> None:
    cost = predict(graphs.conv(data=None, fmt=None), table(replace(CONV, onnx_nodes=("other",))), SLOW)
    assert cost.unplaced_macs == CONV_MACS and cost.kernels[0].macs == 0


def test_what_is_not_in_the_time_is_said() -> None:
    lost = predict(graphs.conv(data=None, fmt=None), table(replace(CONV, onnx_nodes=("other",))), SLOW)
    assert "not in the time" in rows(lost)[-1][6] and rows(lost)[-1][5] == "0.000"
    open_size = predict(graphs.conv(data=None, fmt=None, batch="n"), table(CONV), SLOW)
    assert open_size.uncounted == ("conv",) and open_size.kernels[0].macs == 0
    assert rows(open_size)[-1][5:] == ("unknown", "sizes are not known: not in the time", "conv")


def test_two_products_in_one_kernel_add_up() -> None:
    fused = layer("_gemm_mha_v2_1", "kgen", [tensor("float16", 1, 4, 64, 64)], [tensor("float16", 1, 4, 64, 64)])
    cost = predict(graphs.attention(dtype=np.float16), table(replace(fused, onnx_nodes=("scores", "mix"))), SLOW)
    assert cost.kernels[0].macs == 2 * 4 * 64 * 64 * 64


def test_the_dearest_kernels_and_their_rows() -> None:
    big = replace(COPY, name="kgen_2", onnx_nodes=("a", "b", "c", "d", "e"), outputs=(tensor("float32", 10**6),))
    cost = predict(graphs.conv(data=None, fmt=None), table(CONV, big, COPY), SLOW)
    assert [k.name for k in cost.dearest(2)] == ["kgen_2", "Corr_1"] and len(cost.dearest(9)) == 3
    found = rows(cost, 1)
    assert all(len(row) == len(HEADERS) for row in found) and len(found) == 3
    # 2048 + 4e6 bytes: 400.2048 us + 3 = 403.2 of 410.7 us
    assert found[0][:5] == ("403.2", "98%", "bandwidth", "float16", "4.00")
    assert found[0][-1] == "a, b, c and 2 more" and found[1][-2] == "2 others"
    assert found[2][0] == f"{cost.total_us:.1f}" and found[2][-2] == "3 kernels on slow"
    assert len(rows(cost, 3)) == 4  # no row for others


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: gpu_named("rtx4080"), "Unknown GPU 'rtx4080'.*Did you mean 'rtx4090'"),
        (lambda: Gpu.from_mapping({"name": "x", "bandwith_gb_s": 1}), "Did you mean 'bandwidth_gb_s'"),
        (lambda: Gpu.from_mapping({"name": "x", "target": "sm89"}), "Cannot read a GPU.*tera_ops"),
        (lambda: replace(SLOW, tera_ops={"float32": 1, "float16": 2, "half": 2}), "unknown data type 'half'"),
        (lambda: replace(SLOW, tera_ops={"float32": 1}), "lacks float16"),
        (lambda: replace(SLOW, bandwidth_gb_s=0), "must be above 0"),
        (lambda: replace(SLOW, launch_us=-1), "0 or more"),
        (lambda: Gpu.from_mapping({**USERS, "bandwidth_gb_s": "fast"}), "'fast' is no number"),
        (lambda: predict(graphs.conv(), table(CONV), "rtx5090"), "compiled for sm89, but rtx5090 is sm120"),
        (
            lambda: predict(graphs.conv(), table(replace(CONV, inputs=(tensor("int8", -1),))), SLOW),
            "dynamic shapes",
        ),
    ],
)
def test_bad_requests_say_what_to_do(make: object, text: str) -> None:
    with pytest.raises(EngineError) as caught:
        make()  # type: ignore[operator]
    assert re.search(text, str(caught.value))


USERS = {
    "name": "mine",
    "target": "sm86",
    "bandwidth_gb_s": 448,
    "tera_ops": {"float32": 15, "float16": 60, "int8": 120},
}


def test_a_gpu_of_ones_own() -> None:
    own = Gpu.from_mapping(USERS)
    assert (own.peak("int8"), own.launch_us, own.target) == (120e6, 2.0, "sm86")
    assert gpu_named("RTX 4090") is GPUS["rtx4090"] and {g.name for g in GPUS.values()} == GPUS.keys()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize(
    ("model", "dtype", "macs"),
    [
        (graphs.conv(), "int8", CONV_MACS),
        (graphs.conv(data=None, fmt=None, dtype=np.float16), "float16", CONV_MACS),
        (graphs.matmul(), "int8", 32 * 128 * 64),
        (graphs.attention(dtype=np.float16), "float16", 2 * 4 * 64 * 64 * 64),
    ],
    ids=["int8 conv", "fp16 conv", "int8 matmul", "attention"],
)
def test_real_engines(model: onnx.ModelProto, dtype: str, macs: int) -> None:
    from engines.backends import rtx

    built = rtx.build(model, targets=["sm89"]).table
    cost = predict(model, built, "rtx4090")
    assert sum(k.macs for k in cost.kernels) == macs and cost.unplaced_macs == 0
    assert {k.dtype for k in cost.kernels if k.macs} == {dtype}
    assert cost.bytes == built.bytes_moved and len(cost.kernels) == built.kernels
    # every kernel moves under 1 MB and multiplies under 3e6 times, so the launches dominate: 2 us each and a little
    assert 2 * built.kernels < cost.total_us < 3 * built.kernels


def test_a_kernel_in_a_loop_takes_its_time_in_every_turn() -> None:
    """The product of a Loop of five turns; without a jump in the table, the turns are kernels each."""
    node = onnx.helper.make_node
    ends = [graphs.value("i", [], 7), graphs.value("c", [], 9), graphs.value("h", [64, 64])]
    inner = [node("MatMul", ["h", "w"], ["h2"], "product"), node("Identity", ["c"], ["on"])]
    body = onnx.helper.make_graph(inner, "body", ends, [graphs.value("on", [], 9), graphs.value("h2", [64, 64])])
    stored = [graphs.const("w", np.zeros((64, 64), np.float32)), graphs.const("five", np.array(5))]
    loop = node("Loop", ["five", "", "x"], ["y"], body=body)
    model = graphs.model([loop], [graphs.value("x", [64, 64])], [graphs.value("y", [64, 64])], stored)
    square = tensor("float32", 64, 64)
    gemm = layer("product_myl0_1", "gemm", [square, square], [square], ("product",))
    jump = layer("back", "cjmp", [], [])
    unrolled, looped = (predict(model, table(*layers), SLOW).kernels[0] for layers in ((gemm,), (gemm, jump)))
    assert unrolled.macs == looped.macs == 5 * 64**3
    assert looped.bytes == 5 * unrolled.bytes == 5 * 3 * 4 * 64**2
    assert looped.us == pytest.approx(max(looped.bytes / 10e3, 2 * looped.macs / 1e6) + 5 * 3)
