"""Pictures, token ids, and lists of cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from image_files import OBLIQUE, ramp, write_nifti, write_series

from calib_data import DataError, InputSpec, open_samples
from calib_data.sources import case_list, form_of, pictures
from calib_data.volumes.case import keyed, told
from calib_data.volumes.spec import volume_spec

IDS = InputSpec(name="ids", dtype="int64", shape=(1, None))
MASK = InputSpec(name="mask", dtype="int64", shape=(1, None))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
@pytest.mark.parametrize("colours", [1, 3])
def test_pictures_without_loss(tmp_path: Path, name: str, colours: int) -> None:
    image = pytest.importorskip("PIL.Image", reason="pip install 'qdq[image]'")
    pixels = ramp(5, 7, colours, dtype="uint8") if colours > 1 else ramp(5, 7, dtype="uint8")
    image.fromarray(pixels).save(tmp_path / name)
    volume = pictures.read(tmp_path / name)
    assert volume.grid == (7, 5, 1)
    np.testing.assert_array_equal(volume.array[:, :, :, 0], pixels.reshape(5, 7, colours).transpose(2, 1, 0))


def test_a_folder_of_pictures_as_a_model_gets_them(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pip install 'qdq[image]'")
    pixels = [ramp(8, 6, 3, dtype="uint8"), ramp(8, 6, 3, dtype="uint8") + np.uint8(9)]
    for n, one in enumerate(pixels):
        image.fromarray(one).save(tmp_path / f"{n}.png")
    spec = volume_spec({"axes": "cyx", "intensity": {"mean": 0, "std": 255}})
    image_input = InputSpec(name="image", dtype="float32", shape=(None, 3, None, None))
    for sample, one in zip(open_samples(tmp_path, [image_input], volume=spec), pixels, strict=True):
        np.testing.assert_array_equal(sample["image"][0], (one.astype(np.float32) / np.float32(255)).transpose(2, 0, 1))


def test_pages_are_slices_and_transparency_is_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pip install 'qdq[image]'")
    pages = [image.fromarray(ramp(4, 3, dtype="uint16") + np.uint16(1000 * n)) for n in range(3)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    volume = pictures.read(tmp_path / "a.tiff")
    assert volume.grid == (3, 4, 3) and volume.array.max() == 2011
    image.fromarray(np.zeros((4, 3, 4), np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match="mode RGBA"):
        pictures.read(tmp_path / "b.png")
    (tmp_path / "c.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(DataError, match="damaged"), told("case 1 of 1"):
        pictures.read(tmp_path / "c.jpg")


def test_token_ids_a_line_a_sample(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("[1, 2, 3]\n\n[4]\n[[5, 6]]\n")
    samples = open_samples(path, [IDS])
    assert [s["ids"].tolist() for s in samples] == [[[1, 2, 3]], [[4]], [[5, 6]]]
    assert [s["ids"].tolist() for s in samples.shard(1, 2)] == [[[4]]]
    assert samples.shapes()["ids"].max == (1, 3)
    path.write_text('{"ids": [1, 2], "mask": [1, 0]}\n')
    assert [s["mask"].tolist() for s in open_samples(path, [IDS, MASK])] == [[[1, 0]]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it has no line"),
        ("[1, 2\n", "line 1: it is not JSON"),
        ('"text"\n', "neither a list nor a mapping"),
        ("[1, [2, 3]]\n", "no list of numbers"),
        ('["a"]\n', "no list of numbers"),
        ("[1.5]\n", "Wrong dtype"),
        ('{"idz": [1]}\n', "Did you mean 'ids'"),
    ],
)
def test_lines_that_are_no_tokens(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(DataError, match=words):
        list(open_samples(tmp_path / "t.jsonl", [IDS]))


def test_one_list_a_line_for_several_inputs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="the model has the inputs 'ids', 'mask'"):
        list(open_samples(tmp_path / "t.jsonl", [IDS, MASK]))


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_list_names_channels_labels_and_cases(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("nibabel", reason="pip install 'qdq[medical]'")
    pytest.importorskip("pydicom", reason="pip install 'qdq[medical]'")
    write_nifti(tmp_path / "data/t1.nii.gz", ramp(4, 5, 6), OBLIQUE)
    write_nifti(tmp_path / "data/seg.nii.gz", ramp(4, 5, 6, dtype="uint8"), OBLIQUE)
    write_series(tmp_path / "data/t2", ramp(4, 5, 6) + 1, OBLIQUE)
    row = {"image": "data/t1.nii.gz", "image2": "data/t2", "label": "data/seg.nii.gz", "case": "one"}
    path = tmp_path / f"cases.{kind}"
    path.write_text(json.dumps([row]) if kind == "json" else f"{','.join(row)}\n{','.join(row.values())}\n")
    assert form_of(str(path)) is case_list.FORM
    (case,) = keyed(case_list.cases(str(path)))
    assert case.name == "one" and case.label is not None
    np.testing.assert_array_equal(case.image().array, [ramp(4, 5, 6), ramp(4, 5, 6) + 1])
    np.testing.assert_array_equal(case.label().array[0], ramp(4, 5, 6))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("image,lable\na.nii,b.nii\n", "a column that is not known .did you mean 'label'"),
        ("doe.nii,b.nii\na.nii,b.nii\n", "^Row 1 of 1 of the list of cases has a column that is not known; it must"),
        ("label\na.nii\n", "the images none"),
        ("image,image3\na.nii,a.nii\n", "the images image, image3"),
        ("image\nb.nii\n", "a path that does not exist"),
        ("image\nc.txt\n", "a file that no form of images reads"),
        ("image,case\na.nii,x\na.nii,x\n", "Row 2 of 2 .* is there before"),
        ("image\na.nii,b.nii\n", "no list of rows with texts"),
    ],
)
def test_lists_that_are_wrong(tmp_path: Path, text: str, words: str) -> None:
    for name in ("a.nii", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "cases.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        case_list.cases(str(tmp_path / "cases.csv"))


@pytest.mark.parametrize("text", ["{}", "[1]", "nothing", '[{"image": 1}]'])
def test_json_that_is_no_list_of_cases(tmp_path: Path, text: str) -> None:
    (tmp_path / "cases.json").write_text(text)
    with pytest.raises(DataError, match=r"list of (rows|cases)"):
        case_list.cases(str(tmp_path / "cases.json"))
