"""Networks whose answer is known, and images and labels as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from image_files import write_nifti
from models import assemble, constant
from onnx import helper

Array = npt.NDArray[Any]
AFFINE = np.array([[-1.0, 0, 0, 30], [0, 1.5, 0, -20], [0, 0, 2.0, 5], [0, 0, 0, 1]])


def thresholds(
    *above: float, shape: Sequence[int | str] = ("x", "y", "z"), sigmoid: bool = False, batch: int | str = 1
) -> onnx.ModelProto:
    """Class n where a voxel is above the n-th threshold, ascending; with `sigmoid` every channel for itself."""
    slopes, offsets = [], []
    if not sigmoid:
        slopes, offsets = [0.0], [0.0]
    for n, value in enumerate(above, 1):
        slope = 1.0 if sigmoid else float(n)
        slopes.append(slope)
        offsets.append(-value if sigmoid else offsets[-1] - value)
    channels = len(slopes)
    tensors = [
        constant("weight", np.float32(slopes).reshape(channels, *[1] * (1 + len(shape)))),
        constant("bias", np.float32(offsets)),
    ]
    nodes = [helper.make_node("Conv", ["image", "weight", "bias"], ["logits"], name="/head/Conv")]
    if sigmoid:
        nodes.append(helper.make_node("Sigmoid", ["logits"], ["found"], name="/head/Sigmoid"))
    name = "found" if sigmoid else "logits"
    return assemble(nodes, {"image": (batch, 1, *shape)}, {name: (batch, channels, *shape)}, tensors)


def classes_of(image: Array, *above: float) -> Array:
    """What `thresholds` finds."""
    return np.sum([image > value for value in above], axis=0).astype(np.uint8)


def image(seed: int, shape: Sequence[int] = (20, 17, 12)) -> Array:
    """Blocks of even values from 0 to 4."""
    coarse = np.random.default_rng(seed).uniform(0, 4, [-(-n // 3) for n in shape])
    fine = coarse.repeat(3, 0).repeat(3, 1).repeat(3, 2)
    return np.asarray(fine[tuple(slice(n) for n in shape)].astype(np.float32))


def save(folder: Path, images: Sequence[Array], labels: Sequence[Array | None] = (), affine: Array = AFFINE) -> Path:
    """NIfTI files as nnU-Net has them: imagesTr, and labelsTr of those that have one."""
    for n, array in enumerate(images):
        write_nifti(folder / "imagesTr" / f"doe_{n}_0000.nii.gz", array, affine)
    for n, label in enumerate(labels):
        if label is not None:
            write_nifti(folder / "labelsTr" / f"doe_{n}.nii.gz", label, affine)
    return folder
