"""A package that only some samples need is named with its pip command where it is absent."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from places import ROOT

from calib_data.extras import MissingExtraError
from calib_data.sources import dicom, nifti, pictures
from calib_data.volume import Volume
from calib_data.volumes.case import told
from calib_data.volumes.preview import preview
from calib_data.volumes.resample import resampled
from calib_data.volumes.spec import VolumeSpec

CUBE = Volume(array=np.zeros((1, 4, 4, 4)), affine=np.eye(4))


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("nibabel", "medical", lambda: nifti.read(Path("a.nii"))),
        ("pydicom", "medical", lambda: dicom.cases("a")),
        ("scipy.ndimage", "medical", lambda: resampled(CUBE, (2, 2, 2), grid="edges", order=1)),
        ("PIL.Image", "image", lambda: pictures.read(Path("a.png"))),
        ("matplotlib.figure", "plot", lambda: preview([], VolumeSpec())),
    ],
)
def test_what_is_missing_is_named(
    module: str, extra: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    words = rf"package {package}, .* pip install 'qdq\[{extra}\]'"
    with pytest.raises(MissingExtraError, match=words) as caught, told("case 1 of 1"):
        use()
    assert caught.value.exit_code == 3


def test_what_the_readme_installs_is_what_its_commands_need() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    volumes = text[text.index("## Volumes") :].split("\n## ")[0]
    named = set(re.findall(r"pip install '\.\[([\w,-]+)\]'", volumes)[0].split(","))
    assert "--preview" in volumes and named == {"medical", "image", "plot"}
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    shown = {extra for some in re.findall(r"pip install '\.\[([\w,-]+)\]'", text) for extra in some.split(",")}
    assert "dicom-seg" in shown and shown <= extras
