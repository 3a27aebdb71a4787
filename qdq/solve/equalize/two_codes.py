"""Divisors of data that have two codes, for the sake of the weights that read them. See `formulas.rms`.

It must not look at weights' values or change a graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from qdq.core.arrays import Singles
from qdq.core.qtensor import QParams
from qdq.model.model import Model
from qdq.solve.activations import coarse_scale
from qdq.solve.equalize.channels import Channels
from qdq.solve.equalize.formulas import rms


def divided(
    model: Model, tensors: Collection[str], seen: Mapping[str, Channels]
) -> tuple[dict[str, Singles], dict[str, QParams]]:
    """Tensor -> (channels,) divisors and the parameters of the divided tensor; of those tensors that were seen."""
    divisors, params = dict[str, Singles](), dict[str, QParams]()
    for tensor in sorted(set(tensors) & seen.keys()):
        shown = seen[tensor]
        squares = sum((rows**2).sum(axis=0) for rows in shown.rows())
        size = np.sqrt(np.asarray(squares) / max(shown.count, 1))
        divisors[tensor] = rms.scales(size, np.ones_like(size)).astype(np.float32)
        limits = np.maximum(-shown.limits.low, shown.limits.high)
        params[tensor] = QParams(scale=coarse_scale(float((limits / divisors[tensor]).max()), model.dtype(tensor)))
    return divisors, params
