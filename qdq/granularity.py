"""How coarse the blocks of one weight may be: FineQuant's question, answered by the weight's own error.

weight -> SQNR of each block length on sampled blocks -> the coarsest that loses little against the finest.
It must not know nodes or plans, and needs no data.

Source: Kim et al., FineQuant, arXiv 2308.09723, which halves a matrix's groups while their ranges fall by more than a
threshold; here the error itself is bounded, which has a unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qdq.formats import Format
from qdq.qtensor import block_params, from_codes, to_codes

SAMPLED = 1 << 20  # elements looked at: enough for 0.05 dB on normal values


def coarsest(weight: npt.NDArray[np.floating], axis: int, blocks: Sequence[int], fmt: Format, loss_db: float) -> int:
    """The longest block whose error is within a bound of the shortest one's.

    Args:
        weight: any shape of rank 2 or more, float.
        axis: the axis that is cut into blocks.
        blocks: lengths to choose from.
        fmt: the bit format.
        loss_db: how much less SQNR the weight may have than with the shortest of them.

    Returns:
        One of `blocks`.
    """
    others = [i for i in range(weight.ndim) if i != axis]
    rows = np.transpose(weight, [*others, axis]).reshape(-1, weight.shape[axis])
    step = max(1, rows.size // SAMPLED)
    rows = np.ascontiguousarray(rows[::step], dtype=np.float32)
    signal = float(np.sum(rows.astype(np.float64) ** 2))
    noise = {}
    for block in blocks:
        params = block_params(rows, axis=1, block=block, fmt=fmt)
        noise[block] = float(np.sum((rows - from_codes(to_codes(rows, params), params)).astype(np.float64) ** 2))
    if signal == 0:
        return max(blocks)
    bound = noise[min(blocks)] * 10 ** (loss_db / 10)
    return max(block for block in blocks if noise[block] <= bound or block == min(blocks))
