"""The block length of each weight, from its own values.

values -> squared error of each block length on sampled blocks -> the block that is worth its scales.
It must not know nodes or plans, and needs no data.

Source: Kim et al., FineQuant, arXiv 2308.09723, which halves a matrix's groups while their ranges fall by more than a
threshold. Here the error itself is compared, and the threshold follows from what else bits could be spent on: giving a
share f of the weights 8 bits takes away the share f of the noise for f (8 - bits) bits per weight. A budget spent first
on blocks and then so ends with a noise in proportion to noise / (8 - bits) of the block, whatever the budget: the block
of least noise / (8 - bits) is best. From normal values 16 (5 bits with FP16 scales) is 0.5 dB better than 32 by that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from qdq.core.formats import FORMATS, Format
from qdq.core.qtensor import block_params, from_codes, to_codes

SAMPLED = 1 << 18  # elements looked at: enough for 0.05 dB on normal values
GROUPS = 16  # places along the blocked axis that they are taken from
WIDER_BITS = 8  # of the format that a weight would have otherwise
SCALE_BITS = 16  # of a scale that stays float, in the FP16 engine

Floats = npt.NDArray[np.floating]


def bits_per_weight(size: int, block: int, fmt: Format) -> float:
    """Bits of codes and scales per real element of an axis that is filled up to whole blocks.

    >>> bits_per_weight(64, 16, FORMATS["int4"]), bits_per_weight(60, 64, FORMATS["int4"])
    (5.0, 4.533333333333333)
    """
    scale = FORMATS[fmt.scale_format].bits if fmt.scale_format else SCALE_BITS
    return -(-size // block) * (block * fmt.bits + scale) / size


def best(weight: Floats, axis: int, blocks: Sequence[int], fmt: Format) -> int:
    """The block of least squared error per bit that it saves against WIDER_BITS.

    Args:
        weight: any shape of rank 2 or more, float.
        axis: the axis that is cut into blocks.
        blocks: lengths to choose from.
        fmt: the bit format, of fewer than WIDER_BITS.

    Returns:
        One of `blocks`; the longest where there is no error at all.
    """
    noise = _errors(weight, axis, blocks, fmt)
    saved = {block: WIDER_BITS - bits_per_weight(weight.shape[axis], block, fmt) for block in blocks}
    return min(blocks, key=lambda block: (noise[block] / max(saved[block], 1e-9), -block))


def _errors(weight: Floats, axis: int, blocks: Sequence[int], fmt: Format) -> dict[int, float]:
    """Sum of squares of the errors of sampled elements for each block length."""
    noise = dict.fromkeys(blocks, 0.0)
    for rows in _sampled(weight, axis, max(blocks)):
        for block in blocks:
            params = block_params(rows, axis=1, block=block, fmt=fmt)
            noise[block] += float(np.sum((rows - from_codes(to_codes(rows, params), params)).astype(np.float64) ** 2))
    return noise


def _sampled(weight: Floats, axis: int, longest: int) -> Iterator[npt.NDArray[np.float32]]:
    """About SAMPLED elements, (others, consecutive indices of the axis): whole blocks of every length but at the end.

    Each place along the axis has outputs of its own that lie next to each other: little is read of a weight on disk.
    """
    moved = np.moveaxis(weight, axis, -1)
    size, outputs = moved.shape[-1], moved.shape[-2]
    if weight.size <= SAMPLED:
        yield np.ascontiguousarray(moved.reshape(-1, size), dtype=np.float32)
        return
    starts = range(0, size, longest)
    starts = starts[:: -(-len(starts) // GROUPS)]
    batch = max(1, weight.size // max(size * outputs, 1))
    each = min(outputs, max(1, SAMPLED // (batch * longest * len(starts))))
    for number, start in enumerate(starts):
        low = (outputs - each) * number // max(len(starts) - 1, 1)
        piece = moved[..., low : low + each, start : start + longest]
        yield np.ascontiguousarray(piece.reshape(-1, piece.shape[-1]), dtype=np.float32)
