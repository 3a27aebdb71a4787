"""The second moments are those of what the operator multiplies: seen through ONNX Runtime's own convolutions."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from types import SimpleNamespace

import graphs
import numpy as np
import pytest
from graphs import Sample, build, node, normal
from onnx import helper, numpy_helper

from engines.core import onnx_runtime as ort
from engines.core.documents import replace
from qdq.core.disk import spill
from qdq.core.errors import InputError
from qdq.core.qtensor import QParams, to_codes
from qdq.core.resources import within
from qdq.measure import second_moments
from qdq.measure.second_moments import Moment
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.settings import Settings
from qdq.plan.weighted_node import WeightedNode, weighted_nodes
from qdq.solve.rounding import gptq

PARAMS = QParams(scale=np.float32(0.03), zero_point=-20)


def automatic(mode: str) -> Model:
    """Stride 2 on sizes that only a sample decides (here 3): `prepare` cannot write the pads."""
    return graphs.conv((6, 4, 4, 3), ("h", "w"), auto_pad=mode, strides=[2, 2])


CASES: dict[str, Callable[[], Model]] = {
    "Conv1d": lambda: graphs.conv((6, 3, 3), (9,), pads=[1, 2], strides=[2]),
    "Conv2d": lambda: graphs.conv((6, 3, 3, 2), (7, 8), pads=[1, 0, 2, 1], strides=[2, 3]),
    "Conv3d": lambda: graphs.conv((4, 2, 3, 2, 1), (5, 4, 6), pads=[1, 1, 0, 0, 1, 0], strides=[1, 2, 1]),
    "dilated": lambda: graphs.conv((5, 2, 3, 3), (9, 9), pads=[2, 2, 2, 2], dilations=[2, 3]),
    "grouped": lambda: graphs.conv((6, 2, 3, 3), group=3, pads=[1] * 4),
    "depthwise": lambda: graphs.conv((8, 1, 3, 3), group=4),
    "batch": lambda: graphs.conv((6, 3, 3, 3), batch=3),
    "SAME_UPPER of a dynamic size": lambda: automatic("SAME_UPPER"),
    "SAME_LOWER of a dynamic size": lambda: automatic("SAME_LOWER"),
    "MatMul": graphs.product,
    "MatMul 4-D data": lambda: graphs.product(data=(2, 3, 5, 6)),
    "Gemm": lambda: graphs.product("Gemm", bias=(8,)),
    "Gemm transB": lambda: graphs.product("Gemm", (8, 6), transB=1),
    "Gemm transA": lambda: graphs.product("Gemm", data=(6, 5), transA=1),
}


def weighted(model: Model) -> list[WeightedNode]:
    return list(weighted_nodes(model, placement.plan(model)).values())


def moments(model: Model, data: list[Sample], params: QParams = PARAMS) -> second_moments.Grams:
    return second_moments.collect(model, weighted(model), {"x": params}, data)


def outputs(model: Model, weight: np.ndarray, data: list[Sample]) -> list[np.ndarray]:
    """The first node alone, without bias, in float64: with another weight and with integer codes as data."""
    kernel = type(model.graph.node[0])()
    kernel.CopyFrom(model.graph.node[0])
    del kernel.input[2:]
    graph = helper.make_graph(
        [kernel],
        "oracle",
        [helper.make_tensor_value_info("x", 1, None)],
        [helper.make_tensor_value_info("a", 1, None)],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    oracle = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    codes = [{"x": to_codes(s["x"], PARAMS).astype(np.float32) - PARAMS.zero_point} for s in data]
    return [found["a"].astype(np.float64) for found in ort.run(oracle, codes)]


@pytest.mark.parametrize("name", CASES)
def test_loss_is_the_squared_output_difference_that_onnx_runtime_sees(name: str) -> None:
    """sum over outputs of (E x)^2 = sum over rows of E H E^T; integer E and x make both sides exact."""
    model = CASES[name]()
    data = graphs.samples(model, 3)
    shape = model.array("w").shape
    (key, H), *unquantized_type = moments(model, data).items()
    axis = key[1]
    assert not unquantized_type
    assert axis is not None
    error = np.random.default_rng(5).integers(-3, 4, shape)
    rows = np.moveaxis(error, axis, 0).reshape(shape[axis], -1).astype(np.float64)
    predicted = sum(gptq.loss(part, h).sum() for part, h in zip(np.split(rows, len(H)), H, strict=True))
    seen = sum((found**2).sum() for found in outputs(model, error, data))
    assert predicted == seen > 0


def test_the_moments_are_bit_identical_for_every_order_of_the_samples() -> None:
    model = graphs.conv((8, 4, 3, 3), (12, 12))
    data = graphs.samples(model, 5)
    first, other = moments(model, data), moments(model, data[::-1])
    assert first.keys() == other.keys()
    assert all(np.array_equal(first[k], other[k]) for k in first)


def test_rows_beyond_the_limit_are_sampled_evenly_and_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphs.conv((8, 4, 3, 3), (20, 20))
    data = graphs.samples(model, 4)
    (whole,) = moments(model, data).values()
    monkeypatch.setattr(second_moments, "MIN_ROWS", 400)
    (part,), (again,) = moments(model, data).values(), moments(model, data[::-1]).values()
    assert np.array_equal(part, again)
    taken = 4 * 100 / (4 * 18 * 18)  # 400 rows over 4 samples of 18 x 18 positions
    # the diagonal is a mean of 400 squares of roughly normal codes: relative deviation sqrt(2 / 400) = 7 %, four of it
    assert np.allclose(np.diag(part[0]), taken * np.diag(whole[0]), rtol=0.28)


@pytest.mark.parametrize("listed", [True, False])
def test_of_many_samples_the_same_64_are_taken_in_every_order(listed: bool) -> None:
    model = graphs.product()
    data = graphs.samples(model, 70)

    class Stream:
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(self.data)

        def __init__(self, data: list[Sample]) -> None:
            self.data = data

    def found(order: list[Sample]) -> np.ndarray:
        (H,) = second_moments.collect(
            model, weighted(model), {"x": PARAMS}, order if listed else Stream(order)
        ).values()
        return H

    shuffled = [data[i] for i in np.random.default_rng(0).permutation(70)]
    assert np.array_equal(found(data), found(shuffled))
    every = sum(moments(model, [s])["w", 1] for s in data)
    assert 0 < np.trace(found(data)[0]) < np.trace(np.asarray(every)[0])


def test_samples_of_different_shapes_are_summed() -> None:
    model = graphs.conv(spatial=("h", "w"))
    data = [{"x": normal(1, 4, h, w, seed=h)} for h, w in ((6, 6), (3, 9), (12, 4))]
    parts = [moments(model, [s])["w", 0] for s in data]
    assert np.array_equal(moments(model, data)["w", 0], sum(parts))


def test_a_weight_read_along_both_axes_has_a_matrix_for_each() -> None:
    nodes = [node("MatMul", "x w", "a"), node("Gemm", "a w", "y", transB=1)]
    model = build(nodes, {"x": (3, 6)}, {"w": normal(6, 4)})
    params = {"x": PARAMS, "a": replace(PARAMS, zero_point=0)}
    found = second_moments.collect(model, weighted(model), params, graphs.samples(model))
    assert {key: H.shape for key, H in found.items()} == {("w", 1): (1, 6, 6), ("w", 0): (1, 4, 4)}


def test_a_weight_that_several_nodes_read_sums_over_them() -> None:
    nodes = [node("MatMul", "x w", "a", name="one"), node("MatMul", "z w", "y", name="two")]
    model = build(nodes, {"x": (3, 6), "z": (2, 6)}, {"w": normal(6, 4)}, outputs=("a", "y"))
    data = graphs.samples(model)
    both = second_moments.collect(model, weighted(model), {"x": PARAMS, "z": PARAMS}, data)["w", 1]
    rows = [to_codes(s[i], PARAMS).astype(np.float64) - PARAMS.zero_point for s in data for i in "xz"]
    assert np.array_equal(both[0], sum(r.T @ r for r in rows))


def test_weights_that_nodes_of_different_groups_share_are_left_out() -> None:
    nodes = [node("Conv", "x w", "a", name="one"), node("Conv", "z w", "y", name="two", group=2)]
    sizes = {"x": (1, 4, 5, 5), "z": (1, 8, 5, 5)}
    model = build(nodes, sizes, {"w": normal(8, 4, 1, 1)}, outputs=("a", "y"))
    assert second_moments.collect(model, weighted(model), {"x": PARAMS, "z": PARAMS}, graphs.samples(model)) == {}


def test_weights_that_are_too_wide_or_batched_are_left_out() -> None:
    assert moments(graphs.product(weight=(3, 6, 8), data=(3, 5, 6)), [{"x": normal(3, 5, 6)}]) == {}
    model = graphs.conv()  # 36 inputs per output
    for limit, found in ((36, 1), (35, 0)):
        grams = second_moments.collect(model, weighted(model), {"x": PARAMS}, graphs.samples(model), most_columns=limit)
        assert len(grams) == found


def test_a_small_budget_takes_more_passes_and_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphs.attention()
    data = graphs.samples(model)
    whole, passes = moments(model, data), []
    monkeypatch.setattr(second_moments, "BUDGET_BYTES", 8 * 8 * 8)
    parts = second_moments.collect(
        model, weighted(model), {"x": PARAMS}, data, on_progress=lambda done, total, _: passes.append(done)
    )
    assert passes == [1, 2, 3, 4] * 3
    assert all(np.array_equal(whole[k], parts[k]) for k in whole)


def summed(*parts: np.ndarray) -> Moment:
    """Of (groups, rows, columns) whole numbers."""
    found = Moment(sums=np.zeros((parts[0].shape[0], parts[0].shape[2], parts[0].shape[2])))
    for rows in parts:
        found.add(rows)
    return found


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_columns_at_a_time_change_no_sum(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moments, "CHUNK", chunk)
    rows = np.random.default_rng(0).integers(-255, 256, (2, 30, 7)).astype(np.float32)
    wide = rows.astype(np.int64)
    assert np.array_equal(summed(rows[:, :13], rows[:, 13:]).sums, wide.transpose(0, 2, 1) @ wide)


def test_few_rows_leave_no_direction_free_and_many_change_little() -> None:
    """(columns / (rows + columns))^2 of the mean diagonal: 1/4 for as many rows as columns, 1/81 for eight times."""
    rng = np.random.default_rng(3)
    for rows, share in ((16, 1 / 4), (128, 1 / 81)):
        moment = summed(rng.integers(-9, 9, (2, rows, 16)))
        plain = moment.sums.copy()
        H = second_moments.shrunk(moment)
        mean = np.einsum("gii->g", plain) / 16
        np.testing.assert_allclose(H, (1 - share) * plain + share * mean[:, None, None] * np.eye(16), rtol=1e-12)
    few = summed(rng.integers(-9, 9, (1, 4, 16)))
    assert np.linalg.eigvalsh(few.sums[0])[0] < 1e-9
    assert np.linalg.eigvalsh(second_moments.shrunk(few)[0])[0] > 0.6 * np.diag(few.sums[0]).mean()


@pytest.mark.parametrize(("scheme", "pulled"), [("int4", True), ("int8-weight", False)])
def test_only_codes_of_few_bits_need_it(scheme: str, pulled: bool) -> None:
    model = graphs.product(weight=(32, 8), data=(5, 32))
    nodes = list(weighted_nodes(model, placement.plan(model, Settings(scheme=scheme))).values())
    data = graphs.samples(model, 2)
    (plain,), (found,) = (
        second_moments.collect(model, nodes, {}, data, shrink=shrink).values() for shrink in (False, True)
    )
    assert np.array_equal(plain, found) != pulled


def test_matrices_beyond_their_share_of_the_memory_lie_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("MatMul", "x w", "a"), node("Gemm", "a w", "y", transB=1)]
    model = build(nodes, {"x": (3, 6)}, {"w": normal(6, 4)})
    data, params = graphs.samples(model), {"x": PARAMS, "a": replace(PARAMS, zero_point=0)}
    kept = second_moments.collect(model, weighted(model), params, data)
    with within(4 * 8 * 6 * 6 + 3):  # one of the two at a time
        found = second_moments.collect(model, weighted(model), params, data)
    assert all(H.flags.writeable for H in kept.values())
    assert not any(H.flags.writeable for H in found.values())
    assert {key: H.tobytes() for key, H in kept.items()} == {key: H.tobytes() for key, H in found.items()}
    missing = full_disk(monkeypatch)
    with within(4 * 8 * 6 * 6 + 3), pytest.raises(InputError, match=f"of second moments to .*: {missing}"):
        second_moments.collect(model, weighted(model), params, data)


def full_disk(monkeypatch: pytest.MonkeyPatch) -> str:
    """A disk that is full; what the system says of it."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spill.tempfile, "TemporaryFile", full)
    return os.strerror(errno.ENOSPC)


@pytest.mark.parametrize("floats", [False, True])
def test_rows_at_a_time_change_no_sum(floats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded, strided, dilated convolution of two groups whose channels are divided, some rows at a time."""
    window = second_moments.Window(strides=(2, 1), dilations=(1, 2), pads=(1, 2, 0, 1), auto_pad="NOTSET")
    weight = np.zeros((6, 2, 3, 2), np.float32)
    node = SimpleNamespace(window=window, shape=weight.shape, groups=2, columns=12, data_transposed=False)
    rng = np.random.default_rng(0)
    values, divisor = rng.normal(size=(2, 4, 9, 7)).astype(np.float32), (rng.random(4) + 0.5).astype(np.float32)
    params = None if floats else QParams(scale=np.float32(0.02), zero_point=5)

    def sums() -> tuple[np.ndarray, int]:
        found = summed(*second_moments._rows(node, values, 50, params, divisor))
        return found.sums, found.rows

    whole, rows = sums()
    monkeypatch.setattr(second_moments, "CHUNK", 1)
    monkeypatch.setattr(second_moments, "LEAST_ROWS", 7)
    again, count = sums()
    assert count == rows == 50 and np.array_equal(whole, again)
    # by im2col of the padded tensor
    padded = np.pad(values / divisor[:, None, None], [(0, 0), (0, 0), (1, 0), (2, 1)])
    patches = [padded[b, :, 2 * i : 2 * i + 3, j : j + 3 : 2] for b in range(2) for i in range(4) for j in range(8)]
    flat = np.stack(patches)[np.sort(np.random.default_rng(64).choice(64, 50, replace=False))].reshape(50, 2, 12)
    if params is not None:
        flat = np.clip(np.rint(flat / params.scale) + 5, -128, 127) - 5
    wanted = np.einsum("rgi,rgj->gij", flat.astype(np.float64), flat.astype(np.float64))
    assert np.allclose(whole, wanted, rtol=0, atol=0.05 if floats else 0)
