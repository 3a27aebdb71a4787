"""A table whose figures contradict each other is refused as it is read, at once, whatever they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from engines.core.documents import replace
from qdq.core.errors import InputError
from qdq.measure.collect import collect
from qdq.measure.histogram import Histogram
from qdq.measure.table import DIGITS, CalibrationTable
from qdq.plan import placement


def table() -> CalibrationTable:
    """Of two samples."""
    model = graphs.conv()
    return collect(model, placement.plan(model), graphs.samples(model, 2))


def shifted(by: int) -> Callable[[dict[str, Any]], object]:
    return lambda t: t.update(first_bin=t["first_bin"] + by)


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "exponent far below": lambda t: t.update(exponent=-(10**9)),
    "exponent far above": lambda t: t.update(exponent=10**9),
    "exponent one below": lambda t: t.update(exponent=t["exponent"] - 1),
    "exponent one above": lambda t: t.update(exponent=t["exponent"] + 1),
    "exponent without a range": lambda t: t.update(low=0.0, high=0.0),
    "range wider than the bins": lambda t: t.update(high=t["high"] * 1.5),
    "range narrower than the bins": lambda t: t.update(low=t["low"] / 2),
    "no negative values": lambda t: t.update(low=0.0),
    "bins moved up": shifted(1),
    "bins moved down": shifted(-1),
    "last bin lost": lambda t: t["counts"].pop(),
    "fewer values than samples": lambda t: t.update(counts=[1] + [0] * (len(t["counts"]) - 1)),
    "values beyond 64 bits": lambda t: t["counts"].__setitem__(slice(0, 2), [2**62 + 2**61] * 2),
    "more samples than the table": lambda t: t.update(samples=3),
    "peaks below the largest": lambda t: t.update(peaks="0"),
    "peaks in another notation": lambda t: t.update(peaks="1e-2000000000"),
    "peaks of a million digits": lambda t: t.update(peaks="1" * 10**6 + "/" + "3" * 10**6),
    "peaks of other digits": lambda t: t.update(peaks="\u0663"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    content = json.loads(table().to_json())
    DAMAGE[name](content["tensors"][0])
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"table\.json"):
        CalibrationTable.load(path)


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.0],
        [-0.0, 5.0],
        [-3.0, 0.0],
        [-3.0, -1.0],
        [1.0, 4096.0],
        [-4096.0, 4095.999],
        [-1e-45, 1e-45],
        [1.7976931348623157e308, -1.0],
        [-1e-30, 1e30],
    ],
)
def test_every_histogram_is_read_back(values: list[float], tmp_path: Path) -> None:
    """Those of one array, and of two merged on a coarser grid."""
    one, other = Histogram.of(np.array(values)), Histogram.of(np.float32([0.1, -0.3]))
    held = replace(table(), tensors={"one": one, "both": one.merge(other)})
    held.save(tmp_path / "table.json")
    assert CalibrationTable.load(tmp_path / "table.json").to_json() == held.to_json()


def test_the_longest_sum_of_peaks_fits() -> None:
    longest = 10**12 * Fraction(1.7976931348623157e308) + Fraction(5e-324)
    assert len(str(longest)) < DIGITS


WHOLE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a range that the histogram has not": lambda t: t["ranges"].update({t["tensors"][0]["tensor"]: 1e-3}),
    "two entries of one tensor": lambda t: t["tensors"].append(t["tensors"][0]),
    "more samples than hashes": lambda t: t.update(count=600),
    "fewer hashes than samples": lambda t: t["samples"].pop(),
    "another hash of all": lambda t: t.update(samples_sha256="0" * 64),
    "hashes that are none": lambda t: t.update(samples=["zz"] * 2),
    "peaks of nothing": lambda t: t["tensors"][0].update(peaks="1/0"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_entries_that_contradict_each_other_are_refused(name: str, tmp_path: Path) -> None:
    content = json.loads(table().to_json())
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    assert CalibrationTable.load(path).count == 2
    WHOLE[name](content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"table\.json"):
        CalibrationTable.load(path)
