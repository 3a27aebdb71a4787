"""What kind of network an engine is, from its kernels: predicted times are true to another degree in each.

Work of every kernel -> family, as in `FAMILIES`. Must not look at names of models or nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.cost.work import ATTENTION, DEPTHWISE, GROUPED, PRODUCT, Work

TRANSFORMERS, CONVOLUTIONS, DEPTHWISE_NETWORKS = "transformers", "convolutions", "depthwise convolutions"
GROUPED_NETWORKS, VOLUMES, OTHER = "grouped convolutions", "3-D convolutions", "other networks"
FAMILIES = (TRANSFORMERS, CONVOLUTIONS, DEPTHWISE_NETWORKS, GROUPED_NETWORKS, VOLUMES, OTHER)
_SOME = 0.1  # of the convolutions: a single one does not make a network another kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What predicted times of a family of networks were off on GPUs that no constant comes from.

    Attributes:
        rows: published latencies that say so.
        time: relative error that two of three keep to; None where there are fewer than 10 rows.
        pairs: of an INT8 and an FP16 latency.
        ratio: relative error of their ratios, in the same way.
    """

    rows: int
    time: float | None
    pairs: int
    ratio: float | None


def family_of(works: Sequence[Work]) -> str:
    """The family of an engine with these kernels.

    >>> family_of([Work(form="product", read=1, written=1, weights=1, m=8, n=8, k=8, spatial=2)])
    'convolutions'
    """
    convolutions = [w for w in works if w.spatial]
    slid, whole = (sum(w.macs for w in some) for some in (convolutions, works))
    mixing = [w for w in works if w.form == ATTENTION or (w.form == PRODUCT and w.batch > 1)]  # of two activations
    if len(mixing) > 1 and 2 * slid < whole:
        return TRANSFORMERS
    if not convolutions or 4 * slid < whole:  # the others may be convolutions of one position
        return OTHER
    if any(w.spatial >= 3 for w in convolutions):
        return VOLUMES
    for form, name in ((DEPTHWISE, DEPTHWISE_NETWORKS), (GROUPED, GROUPED_NETWORKS)):
        if sum(w.form == form for w in convolutions) > _SOME * len(convolutions):
            return name
    return CONVOLUTIONS
