"""What measured times of the probes say of a GPU: starts, bandwidths, rates, how FP16 products accumulate.

readings -> `slope` each -> `engines.cost.gpus.Measured`, with a reason for everything that is missing.
Must not measure, nor fill a gap with a datasheet: what was not measured is not in `Measured`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from engines.cost.constants import CONSTANTS
from engines.cost.gpus import Accumulation, Gpu, Measured
from engines.cost.kernel import splits
from engines.timing.probes import SMALL_CONV, Probe
from engines.timing.timer import Timing, TimingError

BOOST_S = 0.05  # from the first product on: the clock has not fallen yet
SURE = 3.0  # a slope counts from this many standard errors on
FELT, WHOLE = 0.5, 0.9  # of what a sum must be: below the first FP16 loses the rest, above the second FP32 keeps it
FASTER = 1.5  # FP16 products against BF16 ones, which always accumulate in FP32; half rate against full is 2
BEYOND = 1.05  # of the dense rate with FP32 accumulation: no such product gets there


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What came of one probe: a timing for each of its engines, or why there is none.

    `kept` is the share of a sum of small values beside large ones that its FP16 product gave, None where none was made.
    """

    probe: Probe
    timings: tuple[Timing, ...] = ()
    failure: str = ""
    kept: float | None = None

    @property
    def note(self) -> str:
        """Why it was not used, or what is to be known of it; '' where nothing."""
        if self.failure:
            return f"not used: {self.failure}"
        return "" if all(t.graph for t in self.timings) else "kernels launched one by one: no graph could be captured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """Microseconds of one step, and their standard error."""

    us: float
    error_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What readings say.

    Attributes:
        measured: the figures.
        accumulation: of FP16 products: 'float16', 'float32', or None where it is not clear.
        evidence: what that was concluded from, one sentence each.
        rates: probe -> 10^12 operations a second, sustained.
        boost_rates: the same in the first 50 ms, where that is long enough.
        step_us: probe -> microseconds of a step.
        missing: sentences on what was measured and could not be used.
    """

    measured: Measured
    accumulation: Accumulation | None
    evidence: tuple[str, ...]
    rates: Mapping[str, float] = field(hash=False)
    boost_rates: Mapping[str, float] = field(hash=False)
    step_us: Mapping[str, float] = field(hash=False)
    missing: tuple[str, ...] = ()


def slope(probe: Probe, timings: Sequence[Timing]) -> Slope:
    """The time of one step: that of a single engine, or what more steps take longer.

    Raises:
        TimingError: it is within the noise.
    """
    first, last = timings[0], timings[-1]
    if len(timings) == 1:
        return Slope(us=last.median_us / probe.steps[0], error_us=last.error_us / probe.steps[0])
    more = probe.steps[-1] - probe.steps[0]
    us = (last.median_us - first.median_us) / more
    error = math.hypot(first.error_us, last.error_us) / more
    if us <= SURE * error:
        raise TimingError(f"{more} more steps take {us * more:.2f} us longer, with an error of {error * more:.2f} us")
    return Slope(us=us, error_us=error)


def fit(readings: Iterable[Reading], row: Gpu | None = None, sms: int | None = None) -> Fit:
    """The figures of a GPU.

    Args:
        readings: of `engines.timing.probes.probes`, any of them.
        row: the datasheet of that GPU, where one is known: it says what FP16 rates are possible.
        sms: streaming multiprocessors, by default those of the row: they say whether small products are split.
    """
    found = {reading.probe.name: reading for reading in readings}
    missing = [f"{name}: {reading.note}" for name, reading in found.items() if reading.note]
    steps, sustained, boost = (dict[str, float]() for _ in range(3))
    for name, reading in found.items():
        try:
            if not reading.failure:
                steps[name] = slope(reading.probe, reading.timings).us
        except TimingError as error:
            missing.append(f"{name}: not used: {error}")
    start, product_start = steps.get("start"), _product_start(steps)
    before = (start or 0.0) + (product_start or 0.0)
    for name, reading in found.items():
        if reading.probe.rate and name in steps:
            end = max(t.at_s[-1] for t in reading.timings)
            try:
                sustained[name] = _rate(reading, end / 2, end, before)
                boost[name] = _rate(reading, 0, BOOST_S, before)
            except TimingError as error:
                missing.append(f"{name}: no rate of a part of the run: {error}")
    accumulation, evidence = _accumulation(found, boost, row)
    assumed = accumulation or (row.accumulation if row else "float32")
    by_type = [_by_type(rates, found, assumed) for rates in (sustained, boost)]
    if product_start is not None and (count := sms or (row and row.sms)):
        half = max((rate for name, rate in boost.items() if found[name].probe.dtype == "float16"), default=0.0)
        product_start = _unsplit(product_start, count, half)
    measured = Measured(
        start_us=start,
        product_start_us=product_start,
        bandwidth_gb_s=_bandwidth(found, steps),
        l2_gb_s=found["l2"].probe.nbytes / steps["l2"] / 1e3 if "l2" in steps else None,
        tera_ops=by_type[0],
        boost_tera_ops=by_type[1],
    )
    return Fit(
        measured=measured,
        accumulation=accumulation,
        evidence=evidence,
        rates=sustained,
        boost_rates=boost,
        step_us=steps,
        missing=tuple(missing),
    )


def _rate(reading: Reading, first_s: float, last_s: float, before_us: float) -> float:
    """10^12 operations a second in a part of the run, without what a product takes before it multiplies."""
    part = slope(reading.probe, [t.between(first_s, last_s) for t in reading.timings])
    return 2 * reading.probe.macs / 1e6 / _without(part.us, before_us)


def _without(us: float, start_us: float) -> float:
    """The time without a start, which is at most a tenth of what is long enough to be measured so."""
    return us - min(start_us, 0.1 * us)


def _product_start(steps: Mapping[str, float]) -> float | None:
    """What a small product takes beyond a small kernel.

    3x3 and 5x5 convolutions of the same tensor differ by their work alone, 9 against 25 taps: without work is the line
    through both at 0 taps.
    """
    if not {"start", "product_start_3x3", "product_start_5x5"} <= steps.keys():
        return None
    small, large = steps["product_start_3x3"], steps["product_start_5x5"]
    return max(small - max(large - small, 0.0) * 9 / 16 - steps["start"], 0.0)


def _unsplit(start_us: float, sms: int, tera_ops: float) -> float:
    """The start of a product whose sum is not split, where `engines.cost.kernel` has it that the small ones' are."""
    whole = start_us / CONSTANTS.split
    return whole if tera_ops and splits(SMALL_CONV, sms, tera_ops, whole, CONSTANTS) else start_us


def _bandwidth(found: Mapping[str, Reading], steps: Mapping[str, float]) -> float | None:
    """10^9 bytes a second of the large sum, without its start."""
    if "dram" not in steps:
        return None
    return found["dram"].probe.nbytes / _without(steps["dram"], steps.get("start", 0.0)) / 1e3


def _by_type(rates: Mapping[str, float], found: Mapping[str, Reading], accumulation: str) -> dict[str, float]:
    """Data type -> the best rate of its products; that of FP16 under the name of its accumulation."""
    best: dict[str, float] = {}
    for name, rate in rates.items():
        dtype = found[name].probe.dtype
        dtype = "float16_accumulating" if dtype == "float16" and accumulation == "float16" else dtype
        best[dtype] = max(best.get(dtype, 0.0), rate)
    return best


def _accumulation(
    found: Mapping[str, Reading], boost: Mapping[str, float], row: Gpu | None
) -> tuple[Accumulation | None, tuple[str, ...]]:
    """How FP16 products accumulate, by their sums and by their rate; None where these disagree or say nothing."""
    said: list[Accumulation | None] = []
    evidence = []
    for name, reading in found.items():
        if reading.kept is not None and not reading.failure:
            said.append("float16" if reading.kept < FELT else "float32" if reading.kept > WHOLE else None)
            what = {"float16": "as in FP16", "float32": "as in FP32", None: "as in neither"}[said[-1]]
            evidence.append(f"{name} keeps {reading.kept:.0%} of small values beside large ones, {what}")
    half, brain = (max((boost[n] for n in boost if found[n].probe.dtype == t), default=0.0) for t in _HALVES)
    if half and brain:
        evidence.append(f"FP16 products run at {half / brain:.2f} times the rate of BF16, which accumulates in FP32")
        if half > FASTER * brain:
            said.append("float16")
    if half and row is not None and row.tera_ops["float16_accumulating"] > row.tera_ops["float16"]:
        peak = row.tera_ops["float16"]
        evidence.append(f"FP16 products reach {half / peak:.0%} of the dense rate with FP32 accumulation, {peak:g}")
        if half > BEYOND * peak:
            said.append("float16")
    agreed = said[0] if said and all(s == said[0] for s in said) else None
    return agreed, tuple(evidence)


_HALVES = ("float16", "bfloat16")
