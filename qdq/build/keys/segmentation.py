"""What a network's channels stand for in whole volumes: the block `segmentation:` of a recipe, and its window.

    window: {patch: [96, 96, 96], overlap: 0.5, rule: nnunet, mirror: [0, 1, 2]}
    segmentation:
      activation: sigmoid                     # channels overlap; softmax: each voxel has one
      structures: {whole tumour: [1, 2, 3], core: [2, 3], enhancing: 3}
      regions_class_order: [1, 2, 3]
      resample: logits

`structures` and `regions_class_order` are what nnU-Net's dataset.json calls `labels` and `regions_class_order`. Must
not look at a model or an image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from engines.core.documents import Part
from qdq.build.keys.window import Window
from qdq.core.choices import checked
from qdq.core.errors import InputError

Value = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class Segmentation(Part, frozen=True, kw_only=True):
    """What channels stand for, and how results come to an image's own grid.

    Attributes:
        activation: softmax, each voxel has the class of the largest channel; sigmoid, channels overlap; auto, as the
            graph ends.
        structures: name -> the label value, or values, that it has in label files. With softmax channel 0 is the
            background and a value is its channel; with sigmoid the structures stand in the order of the channels.
            Value 0 alone, the background, is not measured. None: numbers for names.
        regions_class_order: with sigmoid: the label that each channel paints, later ones over earlier ones. None: what
            overlaps is kept apart.
        resample: labels, the nearest voxel's; or logits, interpolated and decoded on the image's grid, as nnU-Net does
            it, which needs all channels of a volume in memory.

    Raises:
        InputError: an order without sigmoid, or of another length than the structures.
    """

    activation: Literal["auto", "softmax", "sigmoid"] = "auto"
    structures: dict[str, Value | tuple[Value, ...]] = msgspec.field(default_factory=dict)
    regions_class_order: tuple[Annotated[int, msgspec.Meta(ge=1, le=65535)], ...] = ()
    resample: Literal["labels", "logits"] = "labels"

    def __post_init__(self) -> None:
        """Validate."""
        checked(self)
        regions = len(self.regions)
        if self.regions_class_order and self.activation == "softmax":
            raise InputError("The recipe's segmentation has softmax, and regions_class_order, which sigmoid needs.")
        if self.regions_class_order and regions and regions != len(self.regions_class_order):
            raise InputError(
                f"The recipe's segmentation has {regions} structures beside the background and "
                f"{len(self.regions_class_order)} labels in regions_class_order: one for each is needed."
            )

    @property
    def regions(self) -> dict[str, tuple[int, ...]]:
        """The structures that are measured, each with its label values."""
        each = {name: (v,) if isinstance(v, int) else v for name, v in self.structures.items()}
        return {name: values for name, values in each.items() if any(values)}

    @property
    def overlapping(self) -> bool | None:
        """Whether channels overlap; None where the graph has to tell."""
        if self.activation == "auto":
            return True if self.regions_class_order else None
        return self.activation == "sigmoid"


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeVolumes:
    """How whole volumes are run and read.

    Attributes:
        window: over a volume; None takes the model's fixed sizes, else the samples' patch, else the whole volume.
        segmentation: what channels are.
        asked: a window, a segmentation or a limit on volumes was given: checks run them too.
    """

    window: Window | None = None
    segmentation: Segmentation = field(default_factory=Segmentation)
    asked: bool = False
