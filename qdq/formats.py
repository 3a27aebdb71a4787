"""Bit formats: one frozen row each, the only place that states a format's limits.

A format is data. Placement asks whether a target has it, `qtensor` asks for its code range, `insert` asks for the ONNX
type that stores it. This module must not do arithmetic on tensors and must not know operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One integer bit format.

    Invariants: `low <= 0 < high`; a code is an integer in [low, high]; TensorRT reads zero point 0 only.

    Attributes:
        name: the name used in plans, recipes and reports.
        bits: bits of one code.
        low: smallest code.
        high: largest code.
        onnx_type: the ONNX tensor type that stores codes (`onnx.TensorProto` enum value).
        minimum_opset: first ONNX opset in which QuantizeLinear / DequantizeLinear accept the type.
        minimum_sm: lowest compute capability (major * 10 + minor) that TensorRT-RTX compiles the type for.
    """

    name: str
    bits: int
    low: int
    high: int
    onnx_type: int
    minimum_opset: int
    minimum_sm: int

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The NumPy dtype that holds one code."""
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.onnx_type))


# Source: opsets from onnx.defs (QuantizeLinear 10 and 13); SM75 compiles INT8 MatMul and falls back to FP16 for INT8
# Conv, measured on tensorrt_rtx 1.7.1.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        f.name: f
        for f in (
            Format(
                name="int8",
                bits=8,
                low=-128,
                high=127,
                onnx_type=onnx.TensorProto.INT8,
                minimum_opset=13,
                minimum_sm=75,
            ),
        )
    }
)
