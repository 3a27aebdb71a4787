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
    start_us=2.854,
    product_start_us=2.391,
    split=1.53,
    bandwidth=0.8233,
    l2_bytes=15.14,
    kept=0.2377,
    grouped=0.4757,
    pointwise=0.6843,
    rate=0.9858,
    attention=0.6181,
    fp32_rate=0.1734,
    small_tiles=2.212,
    fill=0.3501,
    clock=0.6475,
    saturation=1.884,
    int8=1.112,
    halved=1.124,
    grouped_int8=1.423,
    turing=1.577,
)

EXPECTED: Mapping[str, Expected] = MappingProxyType(
    {
        "transformers": Expected(rows=110, time=0.13, pairs=54, ratio=0.10),
        "convolutions": Expected(rows=54, time=0.14, pairs=19, ratio=0.06),
        "depthwise convolutions": Expected(rows=47, time=0.26, pairs=15, ratio=0.23),
        "grouped convolutions": Expected(rows=9, time=None, pairs=3, ratio=None),
        "3-D convolutions": Expected(rows=0, time=None, pairs=0, ratio=None),
        "other networks": Expected(rows=0, time=None, pairs=0, ratio=None),
    }
)
