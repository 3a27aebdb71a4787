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
        residual: the data operand of Gemm and MatMul has a second code, as of `Spec`.
        roundings: what `Settings.rounding` "auto" is chosen from; the first where nothing can be compared.
        equalizations: the same of `Settings.equalize`.
    """

    name: str
    data: str | None = "int8"
    weight: str = "int8"
    unblocked: str = "int8"
    compute_format: str | None = None
    convolution: str | None = "int8"
    token: str | None = None
    residual: bool = False
    roundings: tuple[str, ...] = ("gptq", "nearest")
    equalizations: tuple[str, ...] = ("smoothquant", "none")


# 4-bit weights are refined by coordinate descent: at 15 levels it is worth a third of what GPTQ is.
_BLOCKS = ("descent", "clip", "nearest")
_CHANNELS = ("awq", "sinq", "none")
_ROWS = (
    Scheme(name="int8", equalizations=("smoothquant", "validated", "none")),
    Scheme(name="w8a16", residual=True, equalizations=("rms", "none")),
    Scheme(name="int8-smooth", equalizations=("smooth",)),
    Scheme(name="int8-weight", data=None, convolution=None, equalizations=("none",)),
    Scheme(name="int4", data=None, weight="int4", convolution=None, roundings=_BLOCKS, equalizations=_CHANNELS),
    Scheme(
        name="w4a8",
        weight="int4",
        compute_format="int8",
        roundings=_BLOCKS,
        equalizations=("none", "smoothquant"),  # 15 levels have no range to spare for what the data give up
    ),
    Scheme(
        name="fptq",
        weight="int4",
        compute_format="int8",
        token="fptq",
        roundings=_BLOCKS,
        equalizations=("lae", "none"),
    ),
    Scheme(name="fp8", data="fp8", weight="fp8", convolution="fp8", roundings=("nearest",), equalizations=("none",)),
    Scheme(name="nvfp4", data="nvfp4", weight="nvfp4", convolution=None, roundings=_BLOCKS, equalizations=("none",)),
    Scheme(
        name="nvfp4-weight", data=None, weight="nvfp4", convolution=None, roundings=_BLOCKS, equalizations=_CHANNELS
    ),
)
SCHEMES: Mapping[str, Scheme] = MappingProxyType({row.name: row for row in _ROWS})
