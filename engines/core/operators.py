"""Families of ONNX operators, by what they do to their tensors; where a module needs another set, it says so as a sum.

Must not say what a compiler or a format does with a family.
"""

from __future__ import annotations


def family(text: str) -> frozenset[str]:
    """The set of the names in a text."""
    return frozenset(text.split())


# Products whose second operand may be a weight that is quantized; in the order in which messages list them.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CONVOLUTIONS = frozenset(WEIGHTED[:2])
# Products of two tensors along fixed axes: one operand may hold the weights, whose output channels are one axis of it.
PRODUCTS = frozenset(WEIGHTED)
# Every operator of two operands that multiplies and adds. DeformConv is none of them: its sampling costs more.
CONTRACTIONS = PRODUCTS | {"Einsum"}
# Operators that multiply and add inside, and have no two operands to quantize.
RECURRENCES = family("GRU LSTM RNN")
COMPOUNDS = RECURRENCES | {"Attention"}

# One tensor in, the same elements out (or copies, or some of them), in another shape or order.
MOVERS = family("Expand Flatten Identity Reshape Slice Squeeze Tile Transpose Unsqueeze")
# As MOVERS, and those that cut a tensor apart or join several: each element is still one of the input's.
ARRANGERS = MOVERS | family("Concat DepthToSpace Gather SpaceToDepth Split")
# As ARRANGERS, and those that choose among elements by value or index, or put constants beside them.
PICKERS = ARRANGERS | family("GatherElements GatherND GlobalMaxPool MaxPool Pad ScatterND Where")

# Values divided by a statistic of them.
AXIS_1_NORMS = family("BatchNormalization InstanceNormalization")
NORMS = AXIS_1_NORMS | family(
    "GroupNormalization LayerNormalization LRN LpNormalization MeanVarianceNormalization RMSNormalization"
)
# Those along the last axis; SimplifiedLayerNormalization is ONNX Runtime's name of RMSNormalization, unknown to onnx.
LAST_AXIS_NORMS = family("LayerNormalization RMSNormalization SimplifiedLayerNormalization")
SOFTMAXES = family("LogSoftmax Softmax")
# Means and maxima of neighbours, channel by channel on axis 1.
MEAN_POOLS = family("AveragePool GlobalAveragePool")
POOLS = MEAN_POOLS | family("GlobalMaxPool MaxPool")

# Curves of one tensor, value by value.
CURVES = family(
    "Celu Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Log Mish PRelu Pow Reciprocal Selu Sigmoid Softplus "
    "Softsign Sqrt Tanh"
)
# Straight lines and limits of one tensor, value by value.
RAMPS = family("Abs Clip Neg Relu")
# f(a x) = a f(x) for every a > 0, value by value.
HOMOGENEOUS = family("Dropout Identity LeakyRelu PRelu Relu")
ARITHMETIC = family("Add Div Mul Sub")
# How many elements the outputs have depends on the values of the inputs.
SIZED_BY_VALUES = family("Compress NonMaxSuppression NonZero Unique")
COMPARISONS = family("Equal Greater GreaterOrEqual Less LessOrEqual")
