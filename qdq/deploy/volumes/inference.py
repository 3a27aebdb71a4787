"""How a deployed network segments images, kept beside it: inference.json, from the recipe and the samples.

recipe, samples of images -> `inference_of` -> `InferenceFile` -> what `engines.open(...).segment` does to an image.
Must not hold a path, nor anything of a single image.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from msgspec import field

from calib_data import Samples
from calib_data.volumes.case import Case
from calib_data.volumes.prepare import SAME_MM, geometry
from calib_data.volumes.samples import CaseSamples
from calib_data.volumes.spec import VolumeSpec, volume_spec
from engines.core.documents import Document
from engines.verify.manifest import sha256_model
from qdq.build.keys.segmentation import Segmentation, WholeVolumes
from qdq.build.keys.window import Window
from qdq.build.recipe import Recipe
from qdq.core.errors import InputError

Spacing = tuple[float, float, float]


class InferenceFile(Document, frozen=True, kw_only=True):
    """What an image becomes before the network sees it, how the network goes over it, and what its channels are.

    Attributes:
        model: sha256 of the Q/DQ model, with its external data.
        volume: what is done to an image.
        window: that goes over it; None takes the model's sizes, else the patch of `volume`, else the whole image.
        segmentation: what channels are, and how labels come to the image's grid.
        task: what the output is taken for.
        class_axis: axis of its classes.
        orientation: of all images that were deployed with, where `volume` leaves it open; others are refused then.
        spacing_mm: of these images, in the order of the axes of `volume`, where that leaves it open.
    """

    FORMAT: ClassVar[str] = "qdq.inference/1"
    MAKE: ClassVar[str] = "qdq deploy"

    model: str
    volume: VolumeSpec
    window: Window | None = None
    segmentation: Segmentation = field(default_factory=Segmentation)
    task: str = "auto"
    class_axis: int | None = None
    orientation: str | None = None
    spacing_mm: Spacing | None = None

    @property
    def spec(self) -> VolumeSpec:
        """What is done to an image, checked.

        Raises:
            DataError: keys that do not go together.
        """
        return volume_spec(self.volume.to_mapping())

    @property
    def whole(self) -> WholeVolumes:
        """Window, and what channels are."""
        return WholeVolumes(window=self.window, segmentation=self.segmentation, asked=True)

    def require_alike(self, case: Case) -> None:
        """Refuse an image whose axes or voxels are others than those that the recipe took as they came.

        Raises:
            InputError: says what is there and what is needed.
            DataError: its header cannot be read.
        """
        letters, spacing = geometry(case, self.volume)
        if self.orientation is not None and letters != self.orientation:
            raise InputError(
                f"The orientation of {case.where} is {letters}, and all images that the model was deployed with are "
                f"{self.orientation}: the recipe does not say which one the model was trained on. Deploy again with "
                "`orientation:` under `volume:`, which turns images."
            )
        if self.spacing_mm is not None and not np.allclose(spacing, self.spacing_mm, rtol=SAME_MM, atol=0):
            said, needed = (" x ".join(f"{n:.4g}" for n in some) for some in (spacing, self.spacing_mm))
            raise InputError(
                f"The voxels of {case.where} are {said} mm, and those of all images that the model was deployed with "
                f"{needed} mm. Resample it, or deploy again with `spacing_mm:` under `volume:`, which resamples images."
            )


def inference_of(recipe: Recipe, model: Path, *some: Samples | None) -> InferenceFile | None:
    """How images are segmented, by the first of some samples that are images; None where none is.

    None also where a MONAI bundle prepares them, whose code no file of ours holds.

    Args:
        recipe: window, and what channels are.
        model: file of the Q/DQ model, which is hashed where some samples are images.
        some: samples; None is passed over.

    Raises:
        DataError: the header of an image cannot be read.
    """
    source = next((s.source for s in some if s is not None and isinstance(s.source, CaseSamples)), None)
    if source is None or source.spec.bundle:
        return None
    letters, spacing = geometry(source.cases[0], source.spec)
    return InferenceFile(
        model=sha256_model(model),
        volume=source.spec,
        window=recipe.whole.window,
        segmentation=recipe.whole.segmentation,
        task=recipe.task,
        class_axis=recipe.class_axis,
        orientation=letters if source.spec.orientation is None else None,
        spacing_mm=spacing if source.spec.spacing_mm is None else None,
    )
