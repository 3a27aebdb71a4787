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
from engines.cost.constants import CONSTANTS, EXPECTED
from engines.cost.family import FAMILIES
from engines.cost.gpus import Gpu, Measured
from engines.cost.kernel import Batch, Kernel
from engines.cost.predict import FEWEST, HEADERS, predict, rows
from engines.cost.work import Work

SLOW = Gpu.from_mapping({"like": "rtx4090", "name": "slow", "bandwidth_gb_s": 10})
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


def alone(work: Work, dtype: str, gpu: Gpu = SLOW) -> float:
    batch = Batch.of([([Kernel(work=work, dtype=dtype)], gpu)])
    return float(batch.times(CONSTANTS).total[0])


def test_the_work_of_each_kernel_is_timed() -> None:
    cost = predict(graphs.conv(data=None, fmt=None, dtype=np.float16), table(CONV, COPY), SLOW)
    conv, copy = cost.kernels
    # 2 * (1024 + 2304 + 1024) bytes; 64 positions, 16 channels, sums of 144
    assert (conv.bytes, conv.macs, conv.dtype, conv.bound) == (8704, CONV_MACS, "float16", "start")
    work = Work(form="product", read=2 * 3328, written=2048, weights=0, m=64, n=16, k=144, spatial=2)
    assert conv.us == pytest.approx(alone(work, "float16"))
    # 1024 * 2 + 1024 * 4 bytes; no product: it names the node, but the other kernel multiplies
    assert (copy.bytes, copy.macs, copy.bound) == (6144, 0, "start")
    assert copy.us == pytest.approx(alone(Work(form="pointwise", read=2048, written=4096, weights=0), "float16"))
    assert cost.total_us == pytest.approx(conv.us + copy.us) and cost.bytes == 14848 and cost.unplaced_macs == 0


@pytest.mark.parametrize(
    ("measured", "bound"),
    [
        ({}, "start"),
        ({"start_us": 0.0, "l2_gb_s": 0.1}, "bandwidth"),
        ({"start_us": 0.0, "product_start_us": 0.0, "boost_tera_ops": {"float16": 1e-3}}, "compute"),
    ],
)
def test_what_bounds_a_kernel(measured: dict[str, object], bound: str) -> None:
    gpu = replace(SLOW, measured=Measured.from_mapping(measured))
    (kernel,) = predict(graphs.conv(data=None, fmt=None), table(CONV), gpu).kernels
    assert kernel.bound == bound


def test_int8_is_priced_by_the_type_that_is_consumed() -> None:
    inputs = [tensor("int8", 1, 16, 8, 8), tensor("int8", 16, 16, 3, 3)]
    int8 = replace(CONV, inputs=tuple(inputs))
    rates = Measured(boost_tera_ops={"int8": 1e-3, "float16": 1e3})
    (kernel,) = predict(graphs.conv(), table(int8), replace(SLOW, measured=rates)).kernels
    assert kernel.dtype == "int8" and kernel.us > 2 * CONV_MACS / 1e3


def test_a_product_that_the_audit_does_not_place_is_timed_by_its_tensors() -> None:
    weight = tensor("float16", 512, 512)
    gemm = replace(layer("m", "gemm", [tensor("float16", 64, 512)], [tensor("float16", 64, 512)]), constants=(weight,))
    (kernel,) = predict(graphs.conv(data=None, fmt=None), table(gemm), SLOW).kernels
    assert (kernel.macs, kernel.dtype) == (64 * 512 * 512, "float16")


def test_waiting_for_a_stream_is_no_kernel() -> None:
    wait = layer("w", "wait", [], [])
    cost = predict(graphs.conv(data=None, fmt=None), table(wait, CONV, layer("s", "signal", [], [])), SLOW)
    assert [k.name for k in cost.kernels] == ["Corr_1"]


def test_products_without_a_kernel_are_reported() -> None:
    other = replace(COPY, onnx_nodes=("other",))
    cost = predict(graphs.conv(data=None, fmt=None), table(other), SLOW)
    assert cost.unplaced_macs == CONV_MACS and cost.kernels[0].macs == 0
    told = predict(graphs.conv(data=None, fmt=None), table(replace(CONV, onnx_nodes=("other",))), SLOW)
    assert told.unplaced_macs == 0 and told.kernels[0].macs == CONV_MACS  # its tensors tell


def test_what_is_not_in_the_time_is_said() -> None:
    lost = predict(graphs.conv(data=None, fmt=None), table(replace(COPY, onnx_nodes=("other",))), SLOW)
    assert "not in the time" in rows(lost)[-1][6] and rows(lost)[-1][5] == "0.000"
    open_size = predict(graphs.conv(data=None, fmt=None, batch="n"), table(CONV), SLOW)
    assert open_size.uncounted == () and open_size.kernels[0].macs == CONV_MACS  # the kernel knows its sizes
    other = predict(graphs.conv(data=None, fmt=None, batch="n"), table(COPY), SLOW)
    assert other.uncounted == ("conv",) and other.kernels[0].macs == 0
    assert rows(other)[-1][5:] == ("unknown", "sizes are not known: not in the time", "conv")


def test_two_products_in_one_kernel_add_up() -> None:
    fused = layer("_gemm_mha_v2_1", "kgen", [tensor("float16", 1, 4, 64, 64)], [tensor("float16", 1, 4, 64, 64)])
    cost = predict(graphs.attention(dtype=np.float16), table(replace(fused, onnx_nodes=("scores", "mix"))), SLOW)
    assert cost.kernels[0].macs == 2 * 4 * 64 * 64 * 64


def test_the_dearest_kernels_and_their_rows() -> None:
    big = replace(COPY, name="kgen_2", onnx_nodes=("a", "b", "c", "d", "e"), outputs=(tensor("float32", 10**8),))
    cost = predict(graphs.conv(data=None, fmt=None), table(CONV, big, COPY), SLOW)
    assert [k.name for k in cost.dearest(2)] == ["kgen_2", "Corr_1"] and len(cost.dearest(9)) == 3
    found = rows(cost, 1)
    assert all(len(row) == len(HEADERS) for row in found) and len(found) == 3
    assert found[0][:5] == (f"{cost.dearest(1)[0].us:.1f}", "100%", "bandwidth", "float16", "400.00")
    assert found[0][-1] == "a, b, c and 2 more" and found[1][-2] == "2 others"
    assert found[2][0] == f"{cost.total_us:.1f}" and found[2][-2] == "3 kernels on slow"
    assert len(rows(cost, 3)) == 4  # no row for others


def test_how_true_a_prediction_is() -> None:
    small, known = (predict(graphs.conv(data=None, fmt=None), table(*[CONV] * n), SLOW) for n in (FEWEST - 1, FEWEST))
    assert small.error is None and small.ratio_error is None and "as few kernels as 14" in small.notes[0]
    expected = EXPECTED["convolutions"]
    assert (known.family, known.error, known.ratio_error) == ("convolutions", expected.time, expected.ratio)
    assert expected.time is not None and known.text.endswith(f" us, within {expected.time * 100:.0f} %")
    assert "keep to" in known.notes[0] and "accumulate in FP16" in known.notes[1]
    long = replace(COPY, outputs=(tensor("float32", 10**8),))
    other = predict(graphs.conv(data=None, fmt=None), table(long), "l4")
    assert other.error is None and re.fullmatch(r"[\d.]+ ms, error unknown", other.text)
    assert "unknown" in other.notes[0] and len(other.notes) == 1


def test_kernels_that_no_one_measured_are_named() -> None:
    int8 = replace(CONV, inputs=(tensor("int8", 1, 16, 8, 8), tensor("int8", 16, 16, 3, 3)))
    notes = [predict(graphs.conv(), table(kernel), "l4").notes for kernel in (int8, CONV)]
    assert [any("below 16 bits" in line for line in lines) for lines in notes] == [True, False]


def test_a_family_with_few_published_latencies_has_no_error() -> None:
    assert EXPECTED.keys() == set(FAMILIES)
    for known in EXPECTED.values():
        assert (known.time is None) == (known.rows < 10) and (known.ratio is None) == (known.pairs < 10)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: predict(graphs.conv(), table(CONV), "rtx409"), "Unknown GPU 'rtx409'.*Did you mean 'rtx4090'"),
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
    # every kernel moves under 1 MB and multiplies under 3e6 times, so the starts dominate: 3 to 5 us each
    assert 2 * built.kernels < cost.total_us < 8 * built.kernels
    assert {k.bound for k in cost.kernels} == {"start"}


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
    work = Work(form="product", read=2.0 * 4 * 64**2, written=4.0 * 64**2, weights=0.0, m=64.0, n=64.0, k=64.0)
    assert looped.us == pytest.approx(5 * alone(work, "float32"))
