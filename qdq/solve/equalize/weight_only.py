"""Channel scales for weight-only blocks: AWQ's, which multiply the weights that meet large inputs, or of weights alone.

weights that read one tensor + second moments of it -> the exponent of `formulas.awq` with the least error at the
outputs of all of them -> divisors of the tensor's channels, or nothing where no exponent beats none. `levelled` takes
those of a formula from the weights alone where they have a smaller error so; `balance` goes over a whole model.
It must not run a model or change a graph.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Container, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats, Singles
from qdq.core.formats import FORMATS
from qdq.core.qtensor import block_params, from_codes, to_codes
from qdq.core.resources import cores
from qdq.measure.second_moments import Grams
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.plan.weighted_node import WeightedNode, by_data, by_weight
from qdq.solve.equalize.formulas import awq, formula
from qdq.solve.rounding.awq import block_loss

ROWS = 1024  # output channels of a weight looked at while searching, spread over all of them


def balance(
    model: Model, plan: Plan, nodes: Collection[WeightedNode], grams: Grams, divided: Container[str]
) -> tuple[dict[str, Singles], tuple[str, ...]]:
    """Divisors of the tensors that weight-only blocks read, and nothing quantized does, where they pay.

    Nothing is divided where the settings name no formula, nor a tensor in `divided`, which has divisors already, nor
    one whose second moments are not in `grams`, unless the formula looks at the weights alone.

    Returns:
        Tensor -> (channels,) float32, and what a person should know, one line each.
    """
    found = dict[str, Singles]()
    method = formula(plan.settings.equalize)
    by_weights = method.by_weights if method else None
    wanted = candidates(plan, nodes, None if by_weights else grams, divided) if method else {}
    for tensor, readers in wanted.items():
        rows = [np.moveaxis(model.array(n.weight), n.input_axis, -1) for n in readers]
        blocks, fmt = [n.spec.block for n in readers if n.spec.block], readers[0].spec.format
        if by_weights:
            divisor = levelled(rows, blocks, fmt=fmt, by_weights=by_weights)
        else:
            divisor = balanced(rows, blocks, grams[readers[0].key][0], fmt=fmt)
        if divisor is not None:
            found[tensor] = divisor
    note = f"the channels of {len(found)} of {len(wanted)} tensors are balanced for their 4-bit readers"
    return found, (note,) if wanted else ()


def candidates(
    plan: Plan, nodes: Collection[WeightedNode], grams: Grams | None, divided: Container[str]
) -> dict[str, list[WeightedNode]]:
    """Tensors that may be divided -> the nodes that read them: whole matrices in blocks that nothing else reads."""
    mixed = {p.tensor for p in plan.activations}
    for key, readers in by_weight(nodes).items():
        first, tensors = readers[0], {n.data for n in readers}
        known = grams is None or key in grams
        alone = first.spec.weight_only and first.spec.block and known and len(first.shape) == 2
        if not alone or len(tensors) > 1 or any(n.data_transposed for n in readers):
            mixed |= tensors
    return {
        tensor: readers for tensor, readers in by_data(nodes).items() if tensor not in mixed and tensor not in divided
    }


def balanced(
    weights: Sequence[npt.NDArray[np.floating]], blocks: Sequence[int], moment: Floats, *, fmt: str
) -> Singles | None:
    """(input channels,) float32 divisors of the channels of one tensor, or None where the error is least without.

    The error is that of nearest codes over all output channels, each block's by itself: rounding errors of different
    blocks have nothing in common, and only 1 / blocks of the products is left.

    Args:
        weights: (output channels, input channels) each, all that read the tensor.
        blocks: of each weight.
        moment: (input channels, input channels) second moment of the tensor.
        fmt: the weights' format.
    """
    typical = np.sqrt(np.maximum(np.diag(moment), 0))
    found: Singles | None = None
    least = np.inf
    some = _some(weights)
    for s in awq.candidates(typical, typical):
        divisor = s.astype(np.float32)
        error = _error(some, blocks, moment, divisor, fmt)
        if error < least:
            least, found = error, divisor
    ones = np.ones(moment.shape[0], dtype=np.float32)
    if found is None or np.array_equal(found, ones):
        return None
    if all(len(s) == len(w) for s, w in zip(some, weights, strict=True)):
        return found
    return found if _error(weights, blocks, moment, found, fmt) < _error(weights, blocks, moment, ones, fmt) else None


def levelled(
    weights: Sequence[npt.NDArray[np.floating]],
    blocks: Sequence[int],
    *,
    fmt: str,
    by_weights: Callable[[npt.NDArray[np.floating]], Floats],
) -> Singles | None:
    """As `balanced`, by a formula of the weights alone; None where their own squared error is no smaller with it."""
    some = np.concatenate([w.astype(np.float32) for w in _some(weights)])
    divisor = by_weights(some).astype(np.float32)
    error, plain = (_error(weights, blocks, None, s, fmt) for s in (divisor, np.ones_like(divisor)))
    return divisor if error < plain else None


def _some(weights: Sequence[npt.NDArray[np.floating]]) -> list[npt.NDArray[np.floating]]:
    """About ROWS output channels of each weight."""
    return [w[:: max(1, -(-w.shape[0] // ROWS))] for w in weights]


def _error(
    weights: Sequence[npt.NDArray[np.floating]],
    blocks: Sequence[int],
    moment: Floats | None,
    divisor: Singles,
    fmt: str,
) -> float:
    """Squared error at all outputs for channels divided by `divisor`; that of the weights where no moment is given."""
    total = 0.0
    for weight, block in zip(weights, blocks, strict=True):

        def lost(piece: tuple[int, int], weight: npt.NDArray[np.floating] = weight, block: int = block) -> float:
            rows, part = slice(piece[0], piece[0] + ROWS), slice(piece[1], piece[1] + block)
            scaled = np.ascontiguousarray(weight[rows, part] * divisor[part], dtype=np.float32)
            params = block_params(scaled, axis=1, block=block, fmt=FORMATS[fmt])
            error = from_codes(to_codes(scaled, params), params)
            error -= scaled
            error = np.ascontiguousarray(error / divisor[part])
            if moment is None:
                loss = np.einsum("ij,ij->i", error, error)
            else:
                loss = block_loss(error, moment[part, part].astype(np.float32))
            return float(loss.sum(dtype=np.float64))

        # One block of some channels at a time stays in the cache. A format that shares a scale among all blocks is
        # judged with one per piece: that moves the grid of its scales by less than half a step.
        pieces = itertools.product(range(0, weight.shape[0], ROWS), range(0, weight.shape[1], block))
        with ThreadPoolExecutor(cores()) as pool:
            total += math.fsum(pool.map(lost, pieces))
    return total
