"""How far each quantized weight is from what was rounded.

Solution -> each weight as it was rounded, equalized where it is, beside its codes -> dB by tensor.
"""

from __future__ import annotations

import numpy as np

from engines.verify.sums import decibels
from qdq.assemble.quantize import Quantized
from qdq.core.arrays import Singles
from qdq.core.qtensor import from_codes
from qdq.model.external import is_large
from qdq.plan.weighted_node import by_weight
from qdq.solve.equalize.carriers import scaled


def weight_errors(done: Quantized) -> dict[str, float]:
    """Weight or table -> 10 log10(sum w^2 / sum (w - w')^2), the lowest of its readers; of a large model none."""
    if is_large(done.model.graph.initializer):
        return {}
    solution, factors = done.solution, done.solution.factors
    found: dict[str, float] = {}
    for readers in by_weight(solution.nodes.values()).values():
        reader = readers[0]
        values = np.asarray(done.prepared.array(reader.weight), np.float32)
        values = scaled(values, reader, solution.divisors.get(reader.data), factors.get(reader.name))
        coded = solution.weights[reader.key]
        rounded = from_codes(coded.codes, coded.params)[tuple(slice(size) for size in values.shape)]
        db = _db(values, rounded)
        found[reader.weight] = (
            db if reader.weight not in found or not found[reader.weight] < db else found[reader.weight]
        )
    for point in done.plan.tables:
        values = np.asarray(done.prepared.array(point.tensor), np.float32)
        db = _db(values, solution.tables.codes[point.tensor].values())
        found[point.tensor] = min(db, found.get(point.tensor, db))
    return found


def _db(values: Singles, rounded: Singles) -> float:
    error = values.astype(np.float64) - rounded
    return decibels(float(np.square(values, dtype=np.float64).sum()), float((error * error).sum()))
