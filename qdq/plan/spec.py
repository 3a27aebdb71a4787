"""`Spec`: how one tensor is quantized. Must not look at a model."""

from __future__ import annotations

from engines.core.documents import Part
from qdq.core.choices import checked, choose
from qdq.core.errors import InputError
from qdq.core.formats import FORMATS

BY_RANGE = "fptq"
TOKENS: tuple[str, ...] = ("always", BY_RANGE)


class Spec(Part, frozen=True, kw_only=True, omit_defaults=True):
    """How one tensor is quantized.

    Attributes:
        format: a name in `qdq.core.formats.FORMATS`.
        axis: None for one scale per tensor, else the axis that has one scale per index, or per block of indices.
        shift: the tensor may be moved by a constant before it is quantized, so that an asymmetric range uses all codes.
        block: indices of `axis` that share a scale; None for one.
        compute_format: of a blocked weight: the format, with one scale per output channel, that its values are made
            exact in before the product reads them. Without it no quantized data may meet the blocks: block scales
            cannot be applied behind the sum over blocks.
        weight_only: the product reads the weight as floats, and its data are not quantized.
        token: of an activation: 'always' for one scale per token, computed as the engine runs; 'fptq' for whatever
            FPTQ's rule says of its range.
        residual: of an activation: what its codes leave is quantized once more and multiplied by the same codes of the
            weight, so that the data have 16 bits in two INT8 products.
    """

    format: str
    axis: int | None = None
    shift: bool = False
    block: int | None = None
    compute_format: str | None = None
    weight_only: bool = False
    token: str | None = None
    residual: bool = False

    def __post_init__(self) -> None:
        """Refuse an unknown format, and blocks that no product can read."""
        checked(self)
        choose(self.format, tuple(FORMATS), "format")
        if self.token is not None:
            choose(self.token, TOKENS, "token")
        fmt = FORMATS[self.format]
        if self.block is not None and (self.block not in fmt.blocks or self.axis is None):
            allowed = ", ".join(map(str, fmt.blocks)) or "no blocks at all"
            raise InputError(
                f"block is {self.block!r} along axis {self.axis!r}: {self.format} has {allowed}, along an axis."
            )
        if self.compute_format is not None and (
            FORMATS[choose(self.compute_format, tuple(FORMATS), "compute_format")].bits <= fmt.bits
            or not fmt.blocks
            or not fmt.integer
        ):
            raise InputError(
                f"compute_format is {self.compute_format!r}: it must have more bits than {self.format}, which must "
                "have blocks of integers."
            )
        if self.compute_format is not None and (self.block is None or self.weight_only):
            raise InputError(
                "compute_format makes blocks readable for an integer product: it needs a block, and no weight_only."
            )
        if self.block is not None and fmt.integer and not self.compute_format and not self.weight_only:
            raise InputError(
                f"A weight of {self.format} blocks is read by an integer product: TensorRT multiplies such block "
                "scales in behind the sum, which is wrong. Set compute_format to int8, or weight_only with float data."
            )
