"""Histograms are the same for every order, batching and split; each calibrator finds a range worth having."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdq.core.formats import FORMATS
from qdq.core.qtensor import QParams, from_codes, to_codes
from qdq.measure.calibrators import CALIBRATORS
from qdq.measure.histogram import BINS, Histogram
from qdq.measure.ranges import HEADROOMS, choose, squared_error
from qdq.measure.second_moments import Moment
from qdq.measure.statistics import ChannelRange
from qdq.plan.settings import choices

INT8 = FORMATS["int8"]
LARGEST = float(np.finfo(np.float32).max)
special = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, LARGEST, -LARGEST, 1.0, -1.0, 4096.0, -(2.0**-126)])
floats = st.one_of(special, st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(-4, 4, width=32))
each_calibrator = pytest.mark.parametrize("method", CALIBRATORS)


def same(a: Histogram, b: Histogram) -> bool:
    """Equal to the last bit, the sign of a zero included."""
    ends = [np.float64([h.low, h.high]).tobytes() for h in (a, b)]
    sums = (a.samples, a.peaks) == (b.samples, b.peaks)
    return a.exponent == b.exponent and np.array_equal(a.counts, b.counts) and ends[0] == ends[1] and sums


def pick(hist: Histogram, method: str = "mse", *, shift: bool = True, dtype: str = "float32") -> QParams:
    return choose(hist, method=method, percentile=99.99, shift=shift, fmt_name="int8", dtype=dtype)


def noise(x: np.ndarray, params: QParams) -> float:
    """Mean squared error of a round trip."""
    return float(np.mean((x - from_codes(to_codes(x, params), params)).astype(np.float64) ** 2))


@settings(max_examples=60, deadline=None)
@given(values=st.lists(floats, min_size=1, max_size=30), data=st.data())
def test_merging_any_split_in_any_order_is_bit_identical_to_counting_at_once(
    values: list[float], data: st.DataObject
) -> None:
    whole = Histogram.of(np.float32(values), len(values))
    shuffled = data.draw(st.permutations(values))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(values) - 1), max_size=4))) if len(values) > 1 else []
    parts = [Histogram.of(part, part.size) for part in np.split(np.float32(shuffled), cuts)]
    assert same(functools.reduce(Histogram.merge, parts), whole)
    assert same(functools.reduce(lambda a, b: b.merge(a), reversed(parts)), whole)
    assert whole.counts.sum() == len(values)


@given(values=st.lists(floats, min_size=1, max_size=12))
def test_the_average_is_the_mean_of_each_samples_largest_magnitude(values: list[float]) -> None:
    x = np.float32(values)
    hist = Histogram.of(x, x.size)
    exact = sum(Fraction(abs(v)) for v in x.astype(np.float64).tolist()) / x.size
    assert hist.peaks == exact * x.size
    assert CALIBRATORS["average"].limit(hist, INT8, 99.99) == float(exact)
    both = Histogram.of(np.concatenate([x, np.zeros_like(x)]), 2)
    assert both.peaks == max(Fraction(abs(v)) for v in x.astype(np.float64).tolist())


@given(
    values=st.lists(st.tuples(floats, floats, floats), min_size=2, max_size=8),
    cut=st.integers(1, 7),
    axis=st.booleans(),
)
def test_channel_ranges_merge_exactly(values: list[tuple[float, ...]], cut: int, axis: bool) -> None:
    x = np.float32(values)
    parts = [part for part in (x[:cut], x[cut:]) if part.size]
    found = functools.reduce(
        ChannelRange.merge, (ChannelRange.of(p.T if axis else p, axis=0 if axis else -1) for p in reversed(parts))
    )
    assert np.array_equal(found.low, x.min(axis=0)) and np.array_equal(found.high, x.max(axis=0))


@settings(deadline=None)
@given(rows=st.lists(st.lists(st.integers(-255, 255), min_size=4, max_size=4), min_size=2, max_size=9), data=st.data())
def test_second_moments_are_exact_for_every_order_and_split(rows: list[list[int]], data: st.DataObject) -> None:
    exact = np.array(rows, dtype=object).T @ np.array(rows, dtype=object)  # Python's integers
    shuffled = np.float32(data.draw(st.permutations(rows)))
    cut = data.draw(st.integers(1, len(rows) - 1))
    found = Moment(sums=np.zeros((1, 4, 4)))
    for part in (shuffled[cut:], shuffled[:cut]):
        found.add(part[None])
    assert found.rows == len(rows)
    assert found.sums[0].astype(np.int64).tolist() == exact.tolist()


@given(values=st.lists(floats, min_size=1, max_size=12))
def test_every_value_is_counted_in_the_bin_that_holds_it(values: list[float]) -> None:
    x = np.float32(values).astype(np.float64)
    hist = Histogram.of(np.float32(values))
    assert (hist.low, hist.high) == (min(x.min(), 0), max(x.max(), 0))
    if hist.exponent is None:
        assert hist.amax == 0
        return
    # the exponent is the smallest that holds all values: one less would leave out the largest magnitude
    assert BINS * 2.0 ** (hist.exponent - 1) <= hist.amax < BINS * 2.0**hist.exponent
    bins = np.floor(np.ldexp(x, -hist.exponent)).astype(int)
    assert np.array_equal(hist.counts, np.bincount(bins + BINS, minlength=2 * BINS))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=["fp16", "bf16", "fp32"])
def test_low_precision_floats_count_like_their_float32_values(dtype: type) -> None:
    x = np.random.default_rng(0).normal(size=1000).astype(dtype)
    assert same(Histogram.of(x), Histogram.of(x.astype(np.float32)))


def test_no_values_are_no_sample() -> None:
    some = Histogram.of(np.float32([1, -2]))
    assert same(some.merge(Histogram.of(np.float32([]))), some)


@pytest.mark.parametrize("bad", [[np.nan], [1, np.inf], [-np.inf]], ids=["nan", "inf", "-inf"])
def test_values_that_are_not_finite_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Histogram.of(np.float32(bad))


def test_settings_and_observers_know_the_same_calibrators() -> None:
    assert set(choices("calibrator")) == {*CALIBRATORS, "auto"}


SHAPES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.normal(size=20_000),
    "relu": lambda rng: np.maximum(rng.normal(size=20_000), 0),
    "laplace": lambda rng: rng.laplace(size=20_000),
    "uniform": lambda rng: rng.uniform(-1, 1, 20_000),
    "sparse": lambda rng: rng.normal(size=20_000) * (rng.random(20_000) < 0.05),
    "offset": lambda rng: rng.uniform(-0.2, 3, 20_000),
}
samples = {name: make(np.random.default_rng(0)).astype(np.float32) for name, make in SHAPES.items()}


@each_calibrator
@pytest.mark.parametrize("shape", samples)
def test_a_calibrator_keeps_a_range_inside_what_was_seen_and_follows_the_unit(method: str, shape: str) -> None:
    hist = Histogram.of(samples[shape])
    limit = CALIBRATORS[method].limit(hist, INT8, 99.99)
    assert 0.05 * hist.amax < limit <= hist.amax
    doubled = CALIBRATORS[method].limit(Histogram.of(samples[shape] * 4), INT8, 99.99)
    assert doubled == pytest.approx(4 * limit, rel=1e-12)  # a power of two moves the grid with the values


@each_calibrator
@pytest.mark.parametrize("shape", ["normal", "relu", "uniform", "offset"])
@pytest.mark.parametrize("shift", [True, False])
def test_light_tails_keep_32_db_with_every_calibrator(method: str, shape: str, shift: bool) -> None:
    """Uniform noise of one step at 128 levels is 42 dB below a full-scale tone; a normal's peak costs about 9 dB."""
    x = samples[shape]
    params = pick(Histogram.of(x), method, shift=shift)
    assert params.scale > 0
    assert shift or params.zero_point == 0
    assert 10 * np.log10(np.mean(x.astype(np.float64) ** 2) / noise(x, params)) > 32


@each_calibrator
def test_a_tensor_that_was_always_zero_has_scale_one(method: str) -> None:
    params = pick(Histogram.of(np.zeros(5, np.float32)), method)
    assert (float(params.scale), params.zero_point) == (1, 0)


@each_calibrator
@pytest.mark.parametrize("value", [3.7, -3.7, 1e-30, -1e30, 1e-44])
@pytest.mark.parametrize("shift", [True, False])
def test_samples_of_one_value_come_back_within_half_a_step(method: str, value: float, shift: bool) -> None:
    x = np.full(7, value, np.float32)
    params = pick(Histogram.of(x), method, shift=shift)
    back = from_codes(to_codes(x, params), params)[0]
    # 255 codes on the range at best, 127 at worst; the smallest normal number bounds the scale from below
    step = max(abs(value) / 127, float(np.finfo(np.float32).tiny))
    widest = max(HEADROOMS) if CALIBRATORS[method].spare else 1
    assert abs(float(back) - float(x[0])) <= 0.51 * step * widest


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_scale_is_exact_in_the_tensors_float_type(dtype: str) -> None:
    params = pick(Histogram.of(samples["offset"]), dtype=dtype)
    kind = np.dtype(dtype) if dtype == "float16" else np.dtype(ml_dtypes.bfloat16)
    assert params.scale.astype(kind).astype(np.float32) == params.scale


def test_max_takes_the_largest_magnitude_and_percentile_the_one_numpy_finds() -> None:
    x = samples["laplace"]
    hist = Histogram.of(x)
    assert CALIBRATORS["max"].limit(hist, INT8, 99.99) == np.abs(x).max()
    assert hist.exponent is not None
    for percent in (60, 99, 99.9, 100):
        exact = np.percentile(np.abs(x), percent, method="inverted_cdf")
        found = CALIBRATORS["percentile"].limit(hist, INT8, percent)
        assert exact <= found <= exact + 2.0**hist.exponent  # the upper edge of the exact value's bin


@pytest.mark.parametrize("shape", samples)
def test_mse_has_no_more_error_than_any_other_calibrator(shape: str) -> None:
    hist = Histogram.of(samples[shape])

    def error(method: str) -> float:
        params = pick(hist, method, shift=False)
        return squared_error(hist, float(params.scale), 0, INT8)

    others = min(error(method) for method in CALIBRATORS)
    assert error("mse") <= 1.01 * others  # its grid has steps of 1/512 to 1/128 of the range


def reach(hist: Histogram, *, shift: bool = False) -> float:
    """How far the codes of `ample` reach, over the largest magnitude seen."""
    params = pick(hist, "ample", shift=shift)
    low, high = ((code - params.zero_point) * float(params.scale) for code in (INT8.low, INT8.high))
    return max(-low / max(-hist.low, 1e-30), high / max(hist.high, 1e-30)) if shift else high / hist.amax


def test_ample_goes_beyond_what_was_seen_where_values_are_near_the_largest() -> None:
    means = np.random.default_rng(0).uniform(0.5, 1, 4096).astype(np.float32)
    assert reach(Histogram.of(means)) == pytest.approx(max(HEADROOMS), rel=0.02)


def test_ample_is_mse_where_the_largest_values_are_rare() -> None:
    x = np.random.default_rng(0).standard_t(3, size=1 << 16).astype(np.float32)
    hist = Histogram.of(x)
    assert pick(hist, "ample") == pick(hist, "mse")
    assert reach(hist) < 1


def test_ample_costs_no_more_than_its_share_of_the_energy() -> None:
    for shape, x in samples.items():
        hist = Histogram.of(x)
        params = pick(hist, "ample")
        if params != pick(hist, "mse"):
            error = squared_error(hist, float(params.scale), params.zero_point, INT8)
            assert error <= CALIBRATORS["ample"].spare * np.sum(hist.centres**2 * hist.counts), shape


def test_mse_and_entropy_cut_rare_outliers_that_max_keeps() -> None:
    x = np.concatenate([samples["normal"], np.float32([60.0])])
    hist = Histogram.of(x)
    assert CALIBRATORS["max"].limit(hist, INT8, 99.99) == 60
    # (60 - T)^2 of the outlier + 20000 T^2 / (12 * 127^2) of the rest is least at T = 60 / 1.103
    assert CALIBRATORS["mse"].limit(hist, INT8, 99.99) == pytest.approx(60 / 1.103, rel=1 / 128)
    assert 3 < CALIBRATORS["entropy"].limit(hist, INT8, 99.99) < 8


def test_entropy_keeps_all_of_a_uniform_distribution() -> None:
    hist = Histogram.of(samples["uniform"])
    assert CALIBRATORS["entropy"].limit(hist, INT8, 99.99) > 0.98 * hist.amax


def plain_divergence(folded: np.ndarray, edge: int) -> float:
    """KL(P || Q) of slides 38-40 with loops: P cut at `edge`, the tail in its last bin; Q merged into 128 levels."""
    p = folded[:edge].copy()
    p[-1] += folded[edge:].sum()
    q = np.zeros(edge)
    for level in range(128):
        inside = [i for i in range(edge) if i * 128 // edge == level]
        filled = [i for i in inside if folded[i]]
        for i in filled:
            q[i] = sum(folded[j] for j in inside) / len(filled)
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * np.log(a / max(b, 1e-12)) for a, b in zip(p, q, strict=True) if a))


def test_entropy_beats_or_equals_a_plain_search_over_a_sample_of_candidates() -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.laplace(0, 0.02, 3000), rng.uniform(-1, 1, 12)]).astype(np.float32)
    hist = Histogram.of(x)
    assert hist.exponent is not None
    folded = (hist.counts[BINS:] + hist.counts[:BINS][::-1]).astype(float)
    folded[0] = folded[1]  # as TensorRT's calibrator does
    top = int(np.ceil(hist.amax * 2.0**-hist.exponent))
    edge = round(CALIBRATORS["entropy"].limit(hist, INT8, 99.99) * 2.0**-hist.exponent)
    found = plain_divergence(folded, edge)
    tried = {e: plain_divergence(folded, e) for e in range(128, top, 97)}
    assert found <= min(tried.values()) + 1e-9
    assert max(tried.values()) > 2 * found  # the choice matters on this data


def test_a_shift_is_taken_only_where_it_pays() -> None:
    assert pick(Histogram.of(samples["normal"])).zero_point == 0
    relu, plain = (pick(Histogram.of(samples["relu"]), shift=s) for s in (True, False))
    assert relu.zero_point == INT8.low
    # twice the codes on the same range: a quarter of the error, less where the range was cut anyway
    assert noise(samples["relu"], relu) < 0.4 * noise(samples["relu"], plain)
    assert relu.offset == pytest.approx(128 * float(relu.scale))
