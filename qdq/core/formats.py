"""Bit formats: one frozen row each, the only place that states a format's limits.

A format is data. Placement asks whether a target has it and which blocks it allows, `qtensor` asks for its code range,
`insert` asks for the ONNX type that stores it. This module must not do arithmetic on tensors and must not know
operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx
from onnx import TensorProto


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One bit format.

    Invariants: `low <= 0 < high`; an integer format holds every integer in [low, high], a float format its own grid
    between them; TensorRT reads zero point 0 only.

    Attributes:
        name: the name used in plans, recipes and reports.
        bits: bits of one code.
        low: smallest value of a code.
        high: largest value of a code.
        onnx_type: the ONNX tensor type that stores codes (`onnx.TensorProto` enum value).
        minimum_opset: first ONNX opset in which QuantizeLinear / DequantizeLinear accept the type.
        integer: codes are integers; else floating-point numbers.
        blocks: lengths of a block that shares one scale; () where scales are per tensor or per axis only.
        scale_format: the format that block scales are quantized to themselves, "" where they stay float.
    """

    name: str
    bits: int
    low: int
    high: int
    onnx_type: int
    minimum_opset: int
    integer: bool = True
    blocks: tuple[int, ...] = ()
    scale_format: str = ""

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The NumPy dtype that holds one code."""
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.onnx_type))


# Source: opsets from onnx.defs (QuantizeLinear 13, 19, 21 and 23). GPUs measured on tensorrt_rtx 1.7.1: SM75 compiles
# INT8 MatMul and falls back to FP16 for INT8 Conv; INT4 compiles from SM86 on (SM80 is the same generation), FP8 from
# SM89, FP4 from SM120 (SM121 too). INT4 blocks of 16 to 128 fuse into the product on either axis of a matrix; NVFP4 has
# 16 only: with quantized data one FP4 product, with float data a kernel of its own dequantizes the weight first.
_BLOCKS = (128, 64, 32, 16)  # of INT4
_ROWS = (
    Format(name="int8", bits=8, low=-128, high=127, onnx_type=TensorProto.INT8, minimum_opset=13),
    Format(name="int4", bits=4, low=-8, high=7, onnx_type=TensorProto.INT4, minimum_opset=21, blocks=_BLOCKS),
    Format(
        name="fp8",
        bits=8,
        low=-448,
        high=448,
        onnx_type=TensorProto.FLOAT8E4M3FN,
        minimum_opset=19,
        integer=False,
    ),
    Format(
        name="nvfp4",
        bits=4,
        low=-6,
        high=6,
        onnx_type=TensorProto.FLOAT4E2M1,
        minimum_opset=23,
        integer=False,
        blocks=(16,),
        scale_format="fp8",
    ),
)
FORMATS: Mapping[str, Format] = MappingProxyType({row.name: row for row in _ROWS})
