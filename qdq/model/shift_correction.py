"""What a product lacks once its data are shifted: c * sum(W) per output channel, put into its bias or behind it.

(x - c) W + c * sum(W) = x W. The sum goes into a constant bias of one value per channel (or where there is none), so
that the product needs no other kernel; else an Add follows. This module must not choose what is shifted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, helper

from engines.core.nodes import factor, label, weight_axis
from qdq.core.arrays import Floats
from qdq.core.qtensor import QTensor
from qdq.model.external import release

SUMMED = 1 << 22  # weights whose values are summed at a time


def channel_sums(node: NodeProto, weight: Floats, index: int = 1) -> Floats:
    """Sum of a weight per output channel, as it stands in the output of a Conv, Gemm or MatMul.

    `weight` are the values of operand `index`, or those of some output channels. The sums are (channels,), of a MatMul
    what broadcasts with its output.
    """
    if node.op_type == "MatMul":
        return np.asarray(weight.sum(axis=-2 if index else -1, keepdims=weight.ndim > 2 or not index))
    outputs = weight_axis(node, weight.ndim)
    values = weight * factor(node, "alpha") if node.op_type == "Gemm" else weight
    return np.asarray(values.sum(axis=tuple(i for i in range(weight.ndim) if i != outputs)))


def correct(
    node: NodeProto,
    lacking: Floats,
    rank: int,
    *,
    stored: Callable[[str], npt.NDArray[np.generic] | None],
    constant: Callable[[str, Floats], str],
    fresh: Callable[[str], str],
) -> NodeProto | None:
    """Let a product whose data are shifted give what it gave before.

    Args:
        node: a Conv, Gemm or MatMul, which is changed: its bias, or the name of its output.
        lacking: c * sum(W), of `channel_sums`.
        rank: of the weight.
        stored: the values of a constant by its name, None of a computed tensor.
        constant: writes values under a name like the one given; returns the name.
        fresh: a name of a tensor or node that is not taken, like the one given.

    Returns:
        The Add to put behind the node; None where its bias holds the sum.
    """
    bias = node.input[2] if len(node.input) > 2 else ""
    old = stored(bias) if bias else lacking
    fits = old is not None and all(size == 1 for size in old.shape[:-1])  # one value per channel, not one per row
    if node.op_type != "MatMul" and factor(node, "beta") == 1.0 and old is not None and fits:
        merged = old.astype(np.float64) + lacking if bias else lacking
        del node.input[2:]
        node.input.append(constant(f"{label(node)}_bias", merged))
        return None
    if node.op_type == "Conv":
        lacking = lacking.reshape(-1, *(1,) * (rank - 2))
    output, name = node.output[0], label(node)
    node.output[0] = fresh(f"{output}_uncorrected")
    added = constant(f"{name}_correction", lacking)
    return helper.make_node("Add", [node.output[0], added], [output], name=fresh(f"{name}_correction_Add"))


def weight_sums(quantized: QTensor, node: NodeProto) -> npt.NDArray[np.float64]:
    """Sum of a weight per output channel, float64: some channels at a time, for the values take eight bytes each."""
    shape = quantized.codes.shape
    outputs = weight_axis(node, len(shape))
    step = max(1, SUMMED * shape[outputs] // max(quantized.codes.size, 1))
    sums = [
        channel_sums(node, quantized.part(outputs, slice(start, start + step)).values().astype(np.float64))
        for start in range(0, shape[outputs], step)
    ]
    release(quantized.codes)
    return np.concatenate(sums, axis=-1 if node.op_type == "MatMul" else 0)
