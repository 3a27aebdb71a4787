"""Schemes: one row each, what becomes of the operands of a weighted node. Must not look at a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What one scheme does to the operands of a weighted node, and the defaults that go with it.

    Attributes:
        name: the option's value.
        data: format of the data operand; None leaves it float (weight-only).
        weight: format of the weight of Gemm and MatMul.
        unblocked: format, with one scale per output channel, of a weight that no block of `weight` fits.
        compute_format: format that the product reads the weight's blocks as; None where it reads them themselves.
        convolution: format of both operands of Conv; None leaves Conv in float.
        token: when the data operand has one scale per token: a name in TOKENS, or None for never.
        rounding: default of `Settings.rounding`.
        equalize: default of `Settings.equalize`.
    """

    name: str
    data: str | None = "int8"
    weight: str = "int8"
    unblocked: str = "int8"
    compute_format: str | None = None
    convolution: str | None = "int8"
    token: str | None = None
    rounding: str = "gptq"
    equalize: str = "smoothquant"


# 4-bit weights are refined by coordinate descent: at 15 levels it is worth a third of what GPTQ is.
_ROWS = (
    Scheme(name="int8", equalize="auto"),
    Scheme(name="int8-smooth", equalize="smooth"),
    Scheme(name="int8-weight", data=None, convolution=None, equalize="none"),
    Scheme(name="int4", data=None, weight="int4", convolution=None, rounding="descent", equalize="awq"),
    Scheme(name="w4a8", weight="int4", compute_format="int8", rounding="descent"),
    Scheme(name="fptq", weight="int4", compute_format="int8", token="fptq", rounding="descent", equalize="lae"),
    Scheme(name="fp8", data="fp8", weight="fp8", convolution="fp8", rounding="nearest", equalize="none"),
    Scheme(name="nvfp4", data="nvfp4", weight="nvfp4", convolution=None, rounding="descent", equalize="none"),
    Scheme(name="nvfp4-weight", data=None, weight="nvfp4", convolution=None, rounding="descent", equalize="awq"),
)
SCHEMES: Mapping[str, Scheme] = MappingProxyType({row.name: row for row in _ROWS})
