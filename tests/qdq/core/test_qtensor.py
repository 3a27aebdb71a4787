"""Every bit format holds its grid, rounds to it and saturates, as onnx.reference and ONNX Runtime do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.core import onnx_runtime as ort
from qdq.core import qtensor
from qdq.core.errors import InputError
from qdq.core.formats import FORMATS, Format
from qdq.core.qtensor import QParams, block_params, from_codes, representable, to_codes, weight_params
from qdq.plan.settings import Settings
from qdq.plan.spec import Spec
from qdq.solve.weights import quantize_weight

EPS = float(np.finfo(np.float32).eps)
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
numbers = st.floats(-1e6, 1e6, width=32)
scales = st.floats(2.0**-20, 2.0**13, width=32)


@each_format
def test_format_states_what_onnx_and_numpy_hold(fmt: Format) -> None:
    assert FORMATS[fmt.name] is fmt
    assert not fmt.integer or fmt.high - fmt.low + 1 == 2**fmt.bits
    assert np.array([fmt.low, fmt.high]).astype(fmt.dtype).astype(int).tolist() == [fmt.low, fmt.high]
    kind = f"tensor({TensorProto.DataType.Name(fmt.onnx_type).lower()})"
    for op, index in (("QuantizeLinear", 2), ("DequantizeLinear", 0)):
        schema = onnx.defs.get_schema(op, fmt.minimum_opset)
        assert kind in schema.inputs[index].types
        assert "axis" in schema.attributes


def grid(fmt: Format) -> np.ndarray:
    """Every value that a code of the format can have, ascending."""
    if fmt.integer:
        return np.arange(fmt.low, fmt.high + 1)
    every = np.arange(2**fmt.bits, dtype=np.uint8).view(fmt.dtype).astype(np.float64)
    return np.unique(every[np.isfinite(every)])


@each_format
def test_every_code_survives_a_round_trip(fmt: Format) -> None:
    codes = grid(fmt).astype(fmt.dtype)
    for zero_point in (fmt.low, -1, 0, fmt.high) if fmt.integer else (0,):
        params = QParams(scale=np.float32(0.037), zero_point=zero_point, format=fmt.name)
        assert np.array_equal(to_codes(from_codes(codes, params), params), codes)


@each_format
@given(x=numbers, scale=scales, zero_point=st.integers(-128, 127))
def test_values_in_range_come_back_within_half_a_step_and_others_saturate(
    fmt: Format, x: float, scale: float, zero_point: int
) -> None:
    zero_point = int(np.clip(zero_point, fmt.low, fmt.high)) if fmt.integer else 0
    params = QParams(scale=np.float32(scale), zero_point=zero_point, format=fmt.name)
    code = to_codes(np.float32([x]), params)
    back = float(from_codes(code, params)[0])
    low, high = ((c - zero_point) * float(np.float32(scale)) for c in (fmt.low, fmt.high))
    nearest = min(max(x, low), high)
    # half a step of the grid there, and the rounding of x / scale and of codes * scale in float32
    steps, at = np.diff(grid(fmt)), np.searchsorted(grid(fmt), min(abs(nearest) / scale, fmt.high))
    step = float(max(steps[max(at - 2, 0) : at + 1]))
    tolerance = (0.5 * step if low <= x <= high else 0) * scale + 4 * EPS * max(abs(nearest), scale)
    assert abs(back - nearest) <= tolerance
    assert code.dtype == fmt.dtype


@given(
    x=st.lists(st.floats(-(2.0**15), 2.0**15, width=32), min_size=1, max_size=8),
    scale=st.lists(st.floats(2.0**-10, 2.0**13, width=32), min_size=1, max_size=4),  # x / scale fits an int32
    zero_point=st.integers(-128, 127),
)
def test_numpy_onnx_reference_and_onnx_runtime_agree_exactly(
    sessions: dict[bool, Any], x: list[float], scale: list[float], zero_point: int
) -> None:
    """The codes of zero point 0 per axis, and of any zero point per tensor, are the same integers in all three."""
    per_axis = len(scale) > 1
    zero_point = 0 if per_axis else zero_point
    params = QParams(
        scale=np.float32(scale) if per_axis else np.float32(scale[0]),
        zero_point=zero_point,
        axis=0 if per_axis else None,
    )
    values = np.tile(np.float32(x), (len(scale), 1))
    feed = {"x": values, "s": np.asarray(params.scale), "z": np.full(np.shape(params.scale), zero_point, np.int8)}
    codes = to_codes(values, params)
    for run in sessions[per_axis]:
        q, y = run(feed)
        assert np.array_equal(q, codes)
        assert np.array_equal(y, from_codes(codes, params))


@pytest.fixture(scope="module")
def sessions() -> dict[bool, Any]:
    """Per tensor (False) and per axis (True): a model of Q and DQ in ONNX Runtime and in onnx.reference."""
    found = {}
    for per_axis in (False, True):
        shape: list[str] = ["c"] if per_axis else []
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=0),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=0),
        ]
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            nodes,
            "qdq",
            [value("x", 1, ["c", "n"]), value("s", 1, shape), value("z", TensorProto.INT8, shape)],
            [value("q", TensorProto.INT8, ["c", "n"]), value("y", 1, ["c", "n"])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        opened, reference = ort.session(model), ReferenceEvaluator(model)
        found[per_axis] = (
            lambda feed, s=opened: s.run(None, feed),
            lambda feed, r=reference: r.run(None, feed),
        )
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_scales_are_positive_and_exact_in_the_float_type(dtype: str) -> None:
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    wanted = np.float32([1e-45, 1e-9, 0.1, 1.0, 500.0])
    kept = representable(wanted, dtype)
    assert (kept > 0).all()
    assert np.array_equal(kept.astype(kind).astype(np.float32), kept)
    bits = {"float32": 24, "float16": 11, "bfloat16": 8}[dtype]
    assert np.allclose(kept[2:], wanted[2:], rtol=2.0**-bits)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_weight_scales_use_the_whole_grid_of_each_channel(axis: int) -> None:
    weight = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    params = weight_params(weight, axis=axis, fmt=FORMATS["int8"])
    codes = np.moveaxis(to_codes(weight, params).astype(int), axis, 0).reshape(weight.shape[axis], -1)
    assert params.scale.shape == (weight.shape[axis],)
    assert np.abs(codes).max(axis=1).tolist() == [127] * weight.shape[axis]


def test_dead_channels_and_an_all_zero_weight_get_a_positive_scale() -> None:
    weight = np.float32([[0, 0], [1.27, -1]])
    assert weight_params(weight, axis=0, fmt=FORMATS["int8"]).scale == pytest.approx([0.01, 0.01])
    assert weight_params(weight * 0, axis=0, fmt=FORMATS["int8"]).scale.tolist() == [1, 1]
    tiny = weight_params(np.float32([[1e-45]]), axis=0, fmt=FORMATS["int8"]).scale
    assert tiny[0] >= np.finfo(np.float32).tiny


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheme": "int9"}, "Did you mean 'int8'"),
        ({"scheme": 8}, "scheme is 8: it must be a text"),
        ({"calibrator": "msee"}, "Did you mean 'mse'"),
        ({"calibrator": None}, "calibrator is None: it must be a text"),
        ({"rounding": "gtpq"}, "Did you mean 'gptq'"),
        ({"percentile": 50}, "above 50"),
        ({"percentile": float("nan")}, "above 50"),
        ({"percentile": True}, "percentile is True: it must be a number"),
        ({"shift": "yes"}, "true or false"),
        ({"exclude": "*"}, r"exclude is '\*': it must be a list"),
        ({"exclude": 5}, "exclude is 5: it must be a list"),
        ({"exclude": None}, "exclude is None: it must be a list"),
        ({"exclude": [""]}, r"exclude is \[''\]: it must be a text of length >= 1, at \[0\]"),
        ({"calibratr": "mse"}, "Did you mean 'calibrator'"),
    ],
)
def test_bad_settings_are_refused_with_a_hint(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings.from_mapping(values)


def test_settings_survive_plain_values_and_a_spec_knows_its_formats() -> None:
    settings = Settings(calibrator="entropy", exclude=("a*", "b"))
    assert Settings.from_mapping(settings.to_mapping()) == settings
    with pytest.raises(InputError, match="Did you mean 'int8'"):
        Spec(format="int88")


def test_numpy_helper_stores_codes_in_the_format() -> None:
    for fmt in FORMATS.values():
        assert numpy_helper.from_array(np.zeros(2, fmt.dtype)).data_type == fmt.onnx_type


def roundtrip(fmt: Format, shape: tuple[int, ...], scale_shape: tuple[int, ...], axis: int, block: int) -> Any:
    """A model of Q and DQ with constant scales as inputs: x, s -> q, y."""
    extra = {"block_size": block} if block else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis, **extra),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"], axis=axis, **extra),
    ]
    value = helper.make_tensor_value_info
    zeros = numpy_helper.from_array(np.zeros(scale_shape, fmt.dtype), "z")
    graph = helper.make_graph(
        nodes,
        "qdq",
        [value("x", 1, shape), value("s", 1, scale_shape)],
        [value("q", fmt.onnx_type, shape), value("y", 1, shape)],
        [zeros],
    )
    opset = max(fmt.minimum_opset, 21)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("block", FORMATS["int4"].blocks)
def test_blocks_agree_with_onnx_reference_and_onnx_runtime(axis: int, block: int) -> None:
    shape = (2 * block, 3) if axis == 0 else (3, 2 * block)
    x = np.random.default_rng(block).normal(size=shape).astype(np.float32)
    x.flat[:4] = [0.5, 1.5, 100, -100]
    params = block_params(x, axis=axis, block=block, fmt=FORMATS["int4"])
    codes = to_codes(x, params)
    assert params.scale.shape == tuple(2 if i == axis else 3 for i in range(2))
    model = roundtrip(FORMATS["int4"], shape, params.scale.shape, axis, block)
    feed = {"x": x, "s": params.scale}
    q, y = ReferenceEvaluator(model).run(None, feed)
    assert np.array_equal(np.asarray(q).astype(np.int8), codes.astype(np.int8))
    for found in (y, ort.session(model).run(["y"], feed)[0]):  # ONNX Runtime has no NumPy type for INT4 outputs
        assert np.array_equal(np.asarray(found), from_codes(codes, params))


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_floating_point_codes_agree_with_onnx_reference(name: str) -> None:
    fmt = FORMATS[name]
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    edges = (grid(fmt)[1:] + grid(fmt)[:-1]) / 2  # ties go to the even code
    x.flat[: edges.size] = edges[: x.size]
    x[3, :2] = [1e5, -1e5]
    scale = np.float32([1, 0.5, 0.125, 2])
    params = QParams(scale=scale, axis=0, format=name)
    model = roundtrip(fmt, x.shape, scale.shape, 0, 0)
    q, y = ReferenceEvaluator(model).run(None, {"x": x, "s": scale})
    codes = to_codes(x, params)
    assert np.array_equal(np.asarray(y), from_codes(codes, params))
    assert np.array_equal(np.asarray(q).astype(np.float32), codes.astype(np.float32))
    if name == "fp8":
        session = ort.session(model)
        assert np.array_equal(session.run(["y"], {"x": x, "s": scale})[0], from_codes(codes, params))


def test_a_last_block_that_is_not_full_is_padded_with_zero_codes_and_comes_back_without() -> None:
    x = np.random.default_rng(0).normal(size=(3, 43)).astype(np.float32)
    params = block_params(x, axis=1, block=16, fmt=FORMATS["int4"])
    codes = to_codes(x, params)
    assert codes.shape == (3, 48)
    assert not codes[:, 43:].astype(int).any()
    assert from_codes(codes, params).shape == x.shape
    assert np.abs(from_codes(codes, params) - x).max() <= 0.5 * params.scale.max() * (1 + 1e-6)


def test_a_large_tensor_is_coded_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(2, 64, 33)).astype(np.float32)
    whole = block_params(x, axis=1, block=16, fmt=FORMATS["int4"])
    expected = to_codes(x, whole)
    monkeypatch.setattr(qtensor, "CHUNK", 600)
    assert np.array_equal(block_params(x, axis=1, block=16, fmt=FORMATS["int4"]).scale, whole.scale)
    assert np.array_equal(to_codes(x, whole), expected)
    assert np.array_equal(from_codes(expected, whole), from_codes(expected, whole))


# SQNR in dB on 2^21 normal and Laplace values: format, values per scale (0: all), clipped -> expected.
# Independent figures, computed from the formats' definitions.
TABLE = {
    ("int4", 16, False): (21.39, 19.91),
    ("int4", 32, False): (20.26, 18.35),
    ("int4", 64, False): (19.36, 17.04),
    ("int4", 128, False): (18.61, 15.91),
    ("int4", 32, True): (21.28, 19.27),
    ("int4", 64, True): (20.46, 18.08),
    ("int4", 128, True): (19.92, 17.19),
    ("nvfp4", 16, False): (20.44, 20.66),
    ("int8", 4096, False): (41.22, 36.75),
    ("fp8", 0, False): (31.54, 31.53),
}


@pytest.mark.parametrize(("name", "block", "clipped"), TABLE)
def test_formats_reach_their_known_signal_to_noise_ratio(name: str, block: int, clipped: bool) -> None:
    channel = block == 4096
    spec = Spec(
        format=name,
        axis=0 if channel else 1 if block else None,
        block=None if channel else block or None,
        weight_only=True,
    )
    for draw, expected in zip(("normal", "laplace"), TABLE[name, block, clipped], strict=True):
        x = getattr(np.random.default_rng(0), draw)(size=(512, 4096)).astype(np.float32)
        found = quantize_weight(x, spec, outputs=0, rounding="clip" if clipped else "nearest").values()
        noise = np.sum((found.astype(np.float64) - x) ** 2)
        assert 10 * np.log10(np.sum(x.astype(np.float64) ** 2) / noise) == pytest.approx(expected, abs=0.1)


def test_block_scales_of_nvfp4_are_fp8_codes_times_one_scale() -> None:
    x = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    params = block_params(x, axis=1, block=16, fmt=FORMATS["nvfp4"])
    assert params.second is not None
    codes = params.scale / np.float32(params.second)
    assert np.allclose(codes, codes.astype(FORMATS["fp8"].dtype).astype(np.float32), rtol=1e-6)
    assert 224 < codes.max() <= 448
    assert math.log2(params.second).is_integer()
    for dtype in ("float16", "bfloat16"):  # the same numbers in every float type: 4 bits times a power of two
        assert np.array_equal(representable(params.scale, dtype), params.scale)
