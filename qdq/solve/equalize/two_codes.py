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

# The scale of the second code, 1/256 of this, is FP16's least normal number. With a smaller one it would be FP32 beside
# an FP16 product, which TensorRT-RTX 1.7.1 fails on ("Invalid binary pointwise types").
LEAST = 2.0**-6


def divided(
    model: Model, tensors: Collection[str], seen: Mapping[str, Channels]
) -> tuple[dict[str, Singles], dict[str, QParams]]:
    """Tensor -> (channels,) divisors and the parameters of the divided tensor; of those tensors that were seen."""
    divisors, params = dict[str, Singles](), dict[str, QParams]()
    for tensor in sorted(set(tensors) & seen.keys()):
        shown = seen[tensor]
        squares = sum((rows**2).sum(axis=0) for rows in shown.rows())
        size = np.sqrt(np.asarray(squares) / max(shown.count, 1))
        divisor = rms.scales(size, np.ones_like(size)).astype(np.float32)
        amax = float((np.maximum(-shown.limits.low, shown.limits.high) / divisor).max())
        scale = coarse_scale(amax, model.dtype(tensor))
        up = min(1.0, float(scale) / LEAST)  # a power of two, exact in the weights' scales
        divisors[tensor], params[tensor] = divisor * np.float32(up), QParams(scale=scale / np.asarray(up, scale.dtype))
    return divisors, params
