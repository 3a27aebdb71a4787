"""Pictures of samples: only where they are asked for, and then of the slice that differs most."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from made_run import blobs, made_run, with_volumes

from calib_data.volume import Volume
from qdq.cli.main import main
from qdq.core.errors import InputError
from qdq.deploy.page.render import page
from qdq.deploy.page.volumes import contours, differences
from qdq.deploy.volumes import slices
from qdq.deploy.volumes.slices import Keeper, read_slices

AFFINE = np.diag([-1.0, -1.0, 2.5, 1.0])  # LPS already


class Image:
    """A case whose voxels are all different from black and white."""

    def __init__(self, key: str, shape: tuple[int, int, int] = (12, 10, 6)) -> None:
        self.key = key
        self._array = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)

    def image(self) -> Volume:
        return Volume(array=self._array, affine=AFFINE)


def kept(count: int = 1) -> Keeper:
    keeper = Keeper()
    for n in range(count):
        labels = blobs(n)
        other = labels.copy()
        other[: n + 2, :3, 4] = (other[: n + 2, :3, 4] + 1) % 3
        keeper.see(Image(f"key{n}"), AFFINE, labels, other)
    return keeper


def test_the_slice_that_differs_most_is_kept_of_the_worst_cases() -> None:
    keeper = kept(slices.MOST + 2)
    assert [s.differing for s in keeper.slices] == [3 * (n + 2) for n in reversed(range(2, slices.MOST + 2))]
    first = keeper.slices[0]
    assert (first.number, first.of, first.image.shape, first.pixel_mm) == (5, 6, (10, 12), (1.0, 1.0))
    assert int((first.expected != first.found).sum()) == first.differing
    same = Keeper()
    same.see(Image("a"), AFFINE, blobs(), blobs())
    assert same.slices == []


def test_a_picture_lies_as_radiologists_look_at_it() -> None:
    """A mark at the patient's right and front is at the left and top, however the file lies."""
    labels = np.zeros((4, 5, 3), np.uint8)
    other = labels.copy()
    other[3, 4, 1] = 1  # RAS: i grows to the right, j to the front
    keeper = Keeper()

    class Ras(Image):
        def image(self) -> Volume:
            return Volume(array=self._array, affine=np.diag([1.0, 1.0, 1.0, 1.0]))

    keeper.see(Ras("a", (4, 5, 3)), np.eye(4), labels, other)
    assert np.argwhere(keeper.slices[0].found == 1).tolist() == [[0, 0]]


def test_what_is_saved_is_read_and_damage_is_said(tmp_path: Path) -> None:
    path = tmp_path / "slices.npz"
    kept(2).save(path)
    found = read_slices(path)
    assert [s.case for s in found] == ["key1", "key0"]
    np.testing.assert_array_equal(found[0].image, kept(2).slices[0].image)
    for content in (b"", b"PK\x03\x04 no", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="Cannot use the pictures"):
            read_slices(path)
    np.savez(path, about=np.asarray('{"format": "qdq.slices/1", "slices": [{}]}'))
    with pytest.raises(InputError, match="Cannot use the pictures"):
        read_slices(path)


def test_pictures_are_png_of_the_slice() -> None:
    image_module = pytest.importorskip("PIL.Image", reason="pillow is not installed: pip install 'qdq[image]'")
    (piece,) = kept().slices

    def png(text: str) -> np.ndarray:
        (found,) = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)
        return np.asarray(image_module.open(io.BytesIO(base64.b64decode(found))))

    np.testing.assert_array_equal(png(contours(piece)), piece.image)
    bright = (png(differences(piece)) == (240, 228, 66)).all(axis=-1)
    np.testing.assert_array_equal(bright, piece.expected != piece.found)
    assert contours(piece).count("<path") == 2


def test_no_pixel_is_on_a_page_unless_it_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
    with_volumes(tmp_path, made_run(tmp_path), [0.9])
    refused = CliRunner().invoke(main, ["report", str(tmp_path), "--with-images"])
    assert refused.exit_code == 2 and "slices.npz is missing" in refused.stderr
    kept(2).save(tmp_path / "slices.npz")  # that it lies there is no leave to show it
    plain, shown = page(tmp_path), page(tmp_path, with_images=True)
    assert "data:" not in plain.replace("img-src data:", "") and "<image" not in plain and "key1" not in plain
    assert shown.count("data:image/png") == 4 and "no sample data but the pictures" in shown
