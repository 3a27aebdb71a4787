"""The demo's network and samples, as the package ships them: what ``qdq demo`` runs on a fresh machine.

Flow: demo_data/demo_volume.npz (2 mm MNI152 T1, uint8) -> normalize as in training -> patches of the left hemisphere to
calibrate with, patches of the right one to evaluate on; demo_data/demo_unet.onnx segments grey and white matter.
It must need nothing but numpy; the files are made by tools/train_demo.py, and demo_data/NOTICE says whose they are.

Training saw the left hemisphere behind y = 16 mm. The template is nearly symmetric, so the Dice of the right hemisphere
says that the network works, not how well it would do on a new brain.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

PATCH = (40, 48, 40)
"""Shape of each sample: one hemisphere of the (80, 96, 80) volume wide, half of it deep and high."""

_THIRDS = tuple((y, z) for y in (0, 24, 48) for z in (0, 20, 40))
_QUARTERS = tuple((y, z) for y in (0, 48) for z in (0, 40))

Sample = dict[str, npt.NDArray[np.float32]]

_T = TypeVar("_T", bound=np.generic)


def demo_model() -> Path:
    """The trained 3-D U-Net: ``image`` (1, 1, x, y, z) float32 in [0, 1] -> ``logits`` (1, 3, x, y, z) float32.

    x, y and z are dynamic, multiples of 4. Classes: 0 background, 1 grey matter, 2 white matter.
    """
    return _data("demo_unet.onnx")


def demo_samples() -> tuple[list[Sample], list[Sample]]:
    """Samples of the demo volume, normalized exactly as in training: uint8 / 255.

    Returns:
        Calibration: 9 overlapping patches of the left hemisphere; evaluation: the 4 quarters of the right hemisphere,
        in the order of ``demo_labels``. Each a dict with ``image`` (1, 1, 40, 48, 40) float32 in [0, 1].
    """
    with np.load(_data("demo_volume.npz"), allow_pickle=False) as stored:
        image = stored["volume"].astype(np.float32) / 255
    calibration = _patches(image[: PATCH[0]], _THIRDS)
    evaluation = _patches(image[PATCH[0] :], _QUARTERS)
    return [{"image": patch[None]} for patch in calibration], [{"image": patch[None]} for patch in evaluation]


def demo_labels() -> list[npt.NDArray[np.uint8]]:
    """The atlas's labels of the evaluation samples, in order: each (1, 40, 48, 40) uint8, like logits.argmax(1)."""
    with np.load(_data("demo_volume.npz"), allow_pickle=False) as stored:
        return _patches(stored["labels"], _QUARTERS)


def _patches(hemisphere: npt.NDArray[_T], starts: tuple[tuple[int, int], ...]) -> list[npt.NDArray[_T]]:
    """Patches with a leading axis of 1, at these (y, z)."""
    _, depth, height = PATCH
    return [np.ascontiguousarray(hemisphere[None, :, y : y + depth, z : z + height]) for y, z in starts]


def _data(name: str) -> Path:
    return Path(str(files("qdq") / "demo_data" / name))
