"""Half-quadratic quantization without zero points: block scales that minimise |W - s q|^p, p < 1, robust to outliers.

Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023, alternate between codes, the part
of the error that counts as outliers (a shrinkage of |e|), and the zero point in closed form. TensorRT reads zero point
0 only, so the closed form is used for the scale instead: s = <q, W - e> / <q, q> per block. Needs no data.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qdq.core.qtensor import in_chunks
from qdq.solve.rounding import Kind, Rounding, View, clip, nearest

P, BETA, BETA_GROWTH, ITERATIONS = 0.7, 10.0, 1.01, 20  # of the authors' code

Floats = npt.NDArray[np.float32]


def block_scales(view: View, H: npt.NDArray[np.float64] | None, *, low: int, high: int, kind: Kind = None) -> Floats:
    """Scales of small |error|^P, starting from those of least squared error.

    No block gets a larger sum than with these, or with the scale that clips nothing.

    Args:
        view: (outer, blocks, block, inner).
        H: unused.
        low: smallest code.
        high: largest code.
        kind: as of `nearest.snap`.

    Returns:
        (outer, blocks, 1, inner) float32, zero where a block holds zeros only.
    """
    start = clip.block_scales(view, None, low=low, high=high, kind=kind)
    whole = nearest.block_scales(view, None, low=low, high=high)
    best = start.copy()
    deviation = float(np.sqrt(np.mean(np.square(view, dtype=np.float64)))) or 1.0  # BETA is for weights of this size

    def work(part: tuple[slice, slice]) -> None:
        x = view[part] / np.float32(deviation)
        scale = np.where(start[part] > 0, start[part] / np.float32(deviation), 1)
        chosen, beta = best[part], BETA
        first = np.where(whole[part] > 0, whole[part] / np.float32(deviation), 1)
        least = (np.abs(x - nearest.snap(x / first, low, high, kind) * first) ** P).sum(axis=2, keepdims=True)
        chosen[...] = whole[part]
        for iteration in range(ITERATIONS):
            q = nearest.snap(x / scale, low, high, kind)
            e = x - q * scale
            size = np.abs(e)
            loss = (size**P).sum(axis=2, keepdims=True)
            better = loss < least
            if iteration and not better.any():
                break
            least[better] = loss[better]
            chosen[better] = scale[better] * np.float32(deviation)
            kept = np.sign(e) * np.maximum(size - np.maximum(size, 1e-8) ** (P - 1) / np.float32(beta), 0)
            energy = (q * q).sum(axis=2, keepdims=True)
            fitted = (q * (x - kept)).sum(axis=2, keepdims=True) / np.maximum(energy, 1)
            scale = np.where(fitted > 0, fitted, scale).astype(np.float32)
            beta *= BETA_GROWTH
        chosen[start[part] == 0] = 0

    in_chunks(work, view)
    return best


ROUNDING = Rounding(block_scales=block_scales, for_blocks=True)
