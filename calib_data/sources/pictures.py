"""Pictures: PNG, JPEG, TIFF, BMP. Channels grey or red, green, blue; i runs right, j down, k over the pages of a TIFF.

They have no place in a patient's space: one voxel counts as one millimetre. EXIF is not read, so nothing is turned.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calib_data.extras import need
from calib_data.validation import DataError
from calib_data.volume import Affine, Volume
from calib_data.volumes.files import form_of_files

_MODES = {"1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}  # what is not stored as grey or colours
_READ = ("L", "RGB", "I;16", "I;16B", "I;16L", "I", "F")


def read(path: Path) -> Volume:
    """The picture of a file.

    Raises:
        DataError: it has transparency, or pages of several sizes.
    """
    image = need("PIL.Image", install="qdq[image]", for_what="A picture")
    with image.open(path) as opened:
        pages = []
        for page in range(getattr(opened, "n_frames", 1)):
            opened.seek(page)
            mode = _MODES.get(opened.mode, opened.mode)
            if mode not in _READ or "transparency" in opened.info:
                raise DataError(f"it is a picture of mode {opened.mode}; grey or RGB without transparency is needed.")
            array = np.asarray(opened if mode == opened.mode else opened.convert(mode))
            pages.append(array.reshape(*array.shape[:2], -1).transpose(2, 1, 0))
    if len({page.shape for page in pages}) > 1:
        raise DataError("its pages have several sizes or modes. Save each as a picture of its own.")
    return Volume(array=np.stack(pages, axis=3), affine=np.eye(4))


def affine_of(path: Path) -> Affine:
    """Pixels have no place."""
    return np.eye(4)


KINDS = ("picture",)
FORM = form_of_files("pictures (PNG, JPEG, TIFF)", KINDS, read, affine_of)
