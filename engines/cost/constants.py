"""Constants of `engines.cost.kernel`, and how true predicted times are.

Made by `python tools/bench_cost.py ../shared/data --write`; edit the tool, not this file. Fitted on the clean rows of
published_latencies.csv there; an error is that which two of three rows keep to on GPUs that were left out of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from engines.cost.family import Expected
from engines.cost.kernel import Constants

CONSTANTS = Constants(
    start_us=2.837,
    product_start_us=2.403,
    split=1.532,
    bandwidth=0.8192,
    l2_bytes=15.62,
    kept=0.2348,
    grouped=0.4869,
    pointwise=0.6784,
    rate=0.9793,
    attention=0.6486,
    fp32_rate=0.17,
    small_tiles=2.003,
    fill=0.3746,
    clock=0.6325,
    saturation=1.93,
    int8=1.09,
    halved=1.122,
    grouped_int8=1.407,
    turing=1.557,
)

EXPECTED: Mapping[str, Expected] = MappingProxyType(
    {
        "transformers": Expected(rows=110, time=0.14, pairs=54, ratio=0.09),
        "convolutions": Expected(rows=54, time=0.14, pairs=19, ratio=0.04),
        "depthwise convolutions": Expected(rows=47, time=0.26, pairs=15, ratio=0.24),
        "grouped convolutions": Expected(rows=9, time=None, pairs=3, ratio=None),
        "3-D convolutions": Expected(rows=0, time=None, pairs=0, ratio=None),
        "other networks": Expected(rows=0, time=None, pairs=0, ratio=None),
    }
)
