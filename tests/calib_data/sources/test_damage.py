"""Files with bytes changed, cut out, put in or cut off: an image, or one paragraph without the file's name."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_files import OBLIQUE, ramp, write_mha, write_nifti, write_nrrd, write_series

from calib_data import DataError
from calib_data.sources import ImageForm, form_of
from calib_data.volumes.case import told
from calib_data.volumes.samples import cases_of

TRIALS = 150


def write_picture(path: Path) -> None:
    from PIL import Image

    Image.fromarray(ramp(9, 8, 3, dtype="uint8")).save(path)


FORMS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "zaph.nii": ("nibabel", lambda path: write_nifti(path, ramp(6, 5, 4), OBLIQUE)),
    "zaph.nii.gz": ("nibabel", lambda path: write_nifti(path, ramp(6, 5, 4), OBLIQUE)),
    "zaph.nrrd": ("numpy", lambda path: write_nrrd(path, ramp(6, 5, 4), encoding="gzip")),
    "zaph.mha": ("numpy", lambda path: write_mha(path, ramp(6, 5, 4), compressed=True)),
    "zaph.png": ("PIL", write_picture),
    "zaph.jpg": ("PIL", write_picture),
    "zaph": ("pydicom", lambda path: write_series(path, ramp(6, 5, 4), OBLIQUE)),
}


def damaged(data: bytes, draw: random.Random) -> bytes:
    """A few changes, most of them in the header."""
    found = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(min(len(found), 700)) if found else 0
        kind = draw.randrange(4)
        if kind == 0:
            found[at : at + 1] = bytes([draw.choice([0, 45, 57, 255, draw.randrange(256)])])
        elif kind == 1:
            del found[at : at + draw.randrange(1, 30)]
        elif kind == 2:
            found[at:at] = draw.randbytes(draw.randrange(1, 9))
        else:
            del found[draw.randrange(len(found) + 1) :]
    return bytes(found)


@pytest.mark.parametrize("name", FORMS)
def test_whatever_happened_to_a_file(tmp_path: Path, name: str) -> None:
    package, write = FORMS[name]
    pytest.importorskip(package, reason="pip install 'qdq[medical,image]'")
    write(tmp_path / "whole" / name if name == "zaph" else tmp_path / name)
    draw, refused = random.Random(name), 0
    for _ in range(TRIALS):
        source = tmp_path / "damaged" / name
        if name == "zaph":
            shutil.copytree(tmp_path / "whole" / name, source, dirs_exist_ok=True)
            victim = draw.choice(sorted(source.iterdir()))
        else:
            source.parent.mkdir(exist_ok=True)
            shutil.copy(tmp_path / name, source)
            victim = source
        victim.write_bytes(damaged(victim.read_bytes(), draw))
        form = form_of(str(source))
        assert isinstance(form, ImageForm)
        try:
            for case in cases_of(form, str(source), None):
                with told(case.where):
                    assert np.isfinite(case.affine()).all() and case.image().array.ndim == 4
        except DataError as error:
            refused += 1
            assert "zaph" not in str(error) and "\n" not in str(error)
    assert TRIALS // 4 < refused <= TRIALS
