"""The window that goes over a volume too large for one run: its size, its steps, and what results weigh at each place.

MONAI and nnU-Net define all three otherwise, and "overlap 0.5, Gaussian" alone does not say which: `rule` does.

    rule     starts along an axis                       Gaussian
    monai    whole steps, the last one moved back       centre (n - 1) / 2, nothing below 1e-3
    nnunet   as many steps, spread evenly               centre n // 2, cut off at 4 sigma, times 10, rounded to FP16

Both put a volume that is smaller than the patch into the middle, an odd voxel at the end. Must not run anything.

Sources: MONAI 1.6.1, inferers/utils.py and data/utils.py; nnU-Net 2.8.1, inference/sliding_window_prediction.py.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from calib_data.volumes.patches import steps
from engines.core.documents import Part
from qdq.core.choices import checked, converted
from qdq.core.errors import InputError

Floats = npt.NDArray[np.float32]
FLOOR = 1e-3  # of MONAI's Gaussian
NNUNET_SCALE = 10.0  # the largest weight of nnU-Net's Gaussian; in FP16 it decides which weights become 0
PADDINGS = {"constant": "constant", "replicate": "edge", "reflect": "reflect", "circular": "wrap"}  # to numpy's names


class Window(Part, frozen=True, kw_only=True):
    """How a network is run over a whole volume.

    Attributes:
        patch: what the network gets, in voxels along i, j, k; two numbers: of every slice of axis i alone; 0: the whole
            axis.
        overlap: of two neighbours, from 0 to below 1; nnU-Net's step size is 1 - overlap.
        rule: whose steps and whose Gaussian.
        weights: of a voxel in the mean over windows: a Gaussian around the patch's centre, or the same everywhere.
        sigma: of the Gaussian, in patch lengths.
        padding: of a volume smaller than the patch, with the names that MONAI has.
        pad_value: for constant padding, in units of the network's input.
        mirror: spatial axes (0, 1, 2) along which patches are also run flipped; the mean of all combinations counts.
        batch: patches in one run, at most.

    Raises:
        InputError: a value that is not possible.
    """

    patch: tuple[Annotated[int, msgspec.Meta(ge=0, le=1 << 16)], ...]
    overlap: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.5
    rule: Literal["monai", "nnunet"] = "monai"
    weights: Literal["gaussian", "constant"] = "gaussian"
    sigma: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.125
    padding: Literal["constant", "replicate", "reflect", "circular"] = "constant"
    pad_value: float = 0.0
    mirror: tuple[Annotated[int, msgspec.Meta(ge=0, le=2)], ...] = ()
    batch: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1

    def __post_init__(self) -> None:
        """Validate."""
        checked(self)
        if len(self.patch) not in (2, 3):
            raise InputError(f"The window's patch is {list(self.patch)}: it needs 3 numbers, or 2 for slices.")
        if not math.isfinite(self.pad_value):
            raise InputError(f"The window's pad_value is {self.pad_value}: it must be finite.")
        flat = tuple(axis for axis in self.mirror if axis >= len(self.patch))
        if flat or len(set(self.mirror)) < len(self.mirror):
            raise InputError(f"The window mirrors along {list(self.mirror)}: each axis of the patch once at most.")

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read 'PATCH[:key=value...]', as --window takes it.

        >>> Window.parse("96x96x64:overlap=0.25:weights=constant").overlap
        0.25

        Raises:
            InputError: another form, an unknown key or value.
        """
        patch, *rest = text.split(":")
        pairs = dict((key, value) for key, _, value in (part.partition("=") for part in rest))
        try:
            given: dict[str, object] = {"patch": tuple(int(n) for n in patch.split("x"))}
            kinds = {"overlap": float, "sigma": float, "pad_value": float, "batch": int}
            given |= {key: kinds.get(key, str)(value) for key, value in pairs.items()}
            if "mirror" in pairs:
                given["mirror"] = tuple(int(axis) for axis in pairs["mirror"].split(","))
        except ValueError:
            raise InputError(
                f"Cannot read the window {text!r}: it must be a patch with options behind it, such as "
                "96x96x96:overlap=0.5:rule=nnunet:mirror=0,1,2."
            ) from None
        return converted(given, cls, "window option")

    @property
    def said(self) -> str:
        """In words, for reports."""
        flips = f", mirrored along {', '.join(map(str, self.mirror))}" if self.mirror else ", not mirrored"
        gaussian = f"Gaussian of {self.sigma:g} patch lengths" if self.weights == "gaussian" else "constant weights"
        size = " x ".join(str(n or "all") for n in self.patch)
        return f"patches of {size}, overlap {self.overlap:g}, {gaussian}, as {_NAMES[self.rule]} has them{flips}"

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The patch along i, j, k for a volume of this shape."""
        three = (1, *self.patch) if len(self.patch) == 2 else self.patch
        i, j, k = (size or whole for size, whole in zip(three, shape, strict=True))
        return i, j, k

    def starts(self, length: int, size: int) -> list[int]:
        """Where windows of a size begin along an axis of a length, which is no shorter.

        >>> Window(patch=(64,) * 3).starts(110, 64), Window(patch=(64,) * 3, rule="nnunet").starts(110, 64)
        ([0, 32, 46], [0, 23, 46])
        """
        if self.rule == "nnunet":
            return steps(length, size, 1 - self.overlap)
        if length <= size:
            return [0]
        step = max(int(size * (1 - self.overlap)), 1)
        return [*range(0, length - size, step), length - size]

    def map(self, sizes: tuple[int, ...]) -> Floats:
        """The weight of each voxel of a patch of these sizes, above 0."""
        if self.weights == "constant":
            return np.ones(sizes, np.float32)
        axes = [self._gaussian(size) for size in sizes]
        whole = reduce(np.multiply.outer, axes)
        if self.rule == "monai":
            return np.maximum(whole, FLOOR).astype(np.float32)
        half = (whole * NNUNET_SCALE).astype(np.float16)
        half[half == 0] = half[half > 0].min()
        return half.astype(np.float32)

    def _gaussian(self, size: int) -> npt.NDArray[np.float64]:
        """Along one axis, 1 at the centre."""
        sigma = self.sigma * size
        centre = (size - 1) / 2 if self.rule == "monai" else size // 2
        away = np.arange(size) - centre
        values = np.exp(-0.5 * (away / sigma) ** 2)
        if self.rule == "nnunet":
            values[np.abs(away) > int(4 * sigma + 0.5)] = 0
        return np.asarray(values)


_NAMES = {"monai": "MONAI", "nnunet": "nnU-Net"}
