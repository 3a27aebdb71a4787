"""Values of an image into those that a model was trained on, in float32.

Source: nnU-Net v2, preprocessing/normalization; MONAI, transforms/intensity/array.py (population standard deviation,
percentiles with linear interpolation).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from calib_data.extras import need
from calib_data.validation import Array, DataError
from calib_data.volumes.spec import Intensity

LEAST = 1e-8  # by which nothing is divided: a constant becomes 0
Floats = npt.NDArray[np.float32]


def normalized(channels: Array, how: str | Intensity | Sequence[Intensity] | None) -> Floats:
    """All channels (c, i, j, k) in float32, normalized; a text or None: as they are.

    Raises:
        DataError: there are as many recipes as no image has channels.
    """
    values = channels.astype(np.float32)
    if how is None or isinstance(how, str):
        return values
    each = [how] * len(values) if isinstance(how, Intensity) else list(how)
    if len(each) != len(values):
        raise DataError(
            f"it has {len(values)} channels, and `intensity` is a list of {len(each)}. Give one for all, or one each."
        )
    filled = _filled(channels) if any(one.zscore == "filled" for one in each) else None
    return np.stack([_channel(channel, one, filled) for channel, one in zip(values, each, strict=True)])


def _channel(x: Floats, how: Intensity, filled: npt.NDArray[np.bool_] | None) -> Floats:
    if how.zscore is not None:
        return _zscored(x, {"all": None, "nonzero": x != 0, "filled": filled}[how.zscore])
    if how.mean is not None and how.std is not None:
        clipped = np.clip(x, *how.clip) if how.clip else x
        return ((clipped - np.float32(how.mean)) / np.float32(max(how.std, LEAST))).astype(np.float32)
    if how.percentile:
        low, high = (float(edge) for edge in np.percentile(x, how.percentile))
    else:
        low, high = how.window_hu or (0.0, 1.0)
    share = (np.clip(x, low, high) - np.float32(low)) / np.float32(max(high - low, LEAST))
    return (share * np.float32(how.to[1] - how.to[0]) + np.float32(how.to[0])).astype(np.float32)


def _zscored(x: Floats, where: npt.NDArray[np.bool_] | None) -> Floats:
    """Less the mean, by the deviation, of these voxels (None: all), which alone change."""
    if where is None:
        whole: Floats = ((x - x.mean()) / np.float32(max(float(x.std()), LEAST))).astype(np.float32)
        return whole
    if not where.any():
        return x
    found = x.copy()
    found[where] = (x[where] - x[where].mean()) / max(float(x[where].std()), LEAST)
    return found


def _filled(channels: Array) -> npt.NDArray[np.bool_]:
    """Voxels that are not 0 in some channel, and the holes that they enclose; all, where none is."""
    ndimage = need("scipy.ndimage", install="qdq[medical]", for_what="zscore: filled")
    mask = (channels != 0).any(axis=0)
    found: npt.NDArray[np.bool_] = ndimage.binary_fill_holes(mask) if mask.any() else np.ones_like(mask)
    return found
