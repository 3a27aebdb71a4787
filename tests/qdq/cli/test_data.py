"""The verb `data`, and images where a verb takes --data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from click.testing import CliRunner, Result
from image_files import OBLIQUE, ramp, write_nifti, write_series
from models import segmenter

from qdq.cli.main import main
from qdq.measure.table import CalibrationTable

pytest.importorskip("nibabel", reason="pip install 'qdq[medical]'")
SHARED_BLOCK = {"orientation": "RAS", "spacing_mm": [1, 1, 1], "grid": "centers", "intensity": {"zscore": "nonzero"}}


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def write_recipe(path: Path, **volume: object) -> Path:
    path.write_text(yaml.safe_dump({"volume": volume}))
    return path


def test_arrays_are_described_and_not_drawn(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((1, 2, 4), np.float32))
    done = run("data", tmp_path, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["arrays"] == {
        "image": {"shape": [1, 2, 4], "dtype": "float32"}
    }
    np.save(tmp_path / "x.npy", np.zeros((3, 4)))
    assert "arrays without names" in run("data", tmp_path / "x.npy").output
    for more in (("--preview", tmp_path / "p.png"), ("--write-recipe", "-")):
        done = run("data", tmp_path, *more)
        assert done.exit_code == 2 and "no image in them" in done.stderr


def test_a_folder_without_samples_is_no_folder_of_arrays(tmp_path: Path) -> None:
    write_series(tmp_path / "doe", ramp(4, 5, 2), OBLIQUE)
    for path in (tmp_path / "doe").iterdir():
        path.write_bytes(path.read_bytes()[132:])  # as old devices write it
    done = run("data", tmp_path / "doe")
    assert done.exit_code == 2 and "it holds 2 files, without an ending" in done.stderr
    assert "DICOM with its preamble" in done.stderr and "doe" not in done.stderr


def test_images_are_described_with_what_a_recipe_makes_of_them(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="pip install 'qdq[medical]'")
    write_nifti(tmp_path / "in/imagesTr/a_0000.nii.gz", ramp(4, 5, 6), OBLIQUE)
    write_nifti(tmp_path / "in/labelsTr/a.nii.gz", ramp(4, 5, 6, dtype="uint8") % 3, OBLIQUE)
    recipe = write_recipe(tmp_path / "r.yaml", **SHARED_BLOCK)
    done = run("data", tmp_path / "in", "--recipe", recipe, "--json")
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["images"]
    assert re.fullmatch(r"case 1 of 1 \(key [0-9a-f]{12}\)", found.pop("case"))
    assert found["stored"] == "1 channel of 4x5x6 voxels of 0.8062 x 0.8062 x 2.5 mm, LPS, int16 0 to 119"
    assert found["seen"].startswith("1 channel of 3x4x14 voxels of 1 x 1 x 1 mm, RAS, float32 ")
    assert found["label"] == "label 0, 1, 2" and found["samples"] == "the whole image"
    write_nifti(tmp_path / "in/labelsTr/a.nii.gz", np.zeros((4, 5, 6), np.uint8), OBLIQUE)
    how = {"patch": [4, 4, 8], "patches": {"kind": "foreground", "per_volume": 2}}
    done = run("data", tmp_path / "in", "--recipe", write_recipe(tmp_path / "r.yaml", **SHARED_BLOCK, **how), "--json")
    (found,) = json.loads(done.stdout)["images"]
    assert found["samples"] == (
        "2 foreground patches of 4x4x8; the image is smaller and padded with 0; there is no foreground, so they are "
        "random"
    )


def test_the_block_that_is_written_is_read_again(tmp_path: Path) -> None:
    image = write_nifti(tmp_path / "a.nii", ramp(4, 5, 6))
    recipe = write_recipe(tmp_path / "r.yaml", **SHARED_BLOCK)
    done = run("data", image, "--recipe", recipe, "--write-recipe", tmp_path / "w.yaml")
    assert done.exit_code == 0, done.output
    shown = run("data", image, "--recipe", tmp_path / "w.yaml", "--write-recipe", "-").stdout
    assert (tmp_path / "w.yaml").read_text() in shown
    assert yaml.safe_load((tmp_path / "w.yaml").read_text())["volume"]["grid"] == "centers"


def test_a_preview_is_a_picture_of_every_channel(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'qdq[plot]'")
    pillow = pytest.importorskip("PIL.Image", reason="pip install 'qdq[image]'")
    sizes = []
    for channels in (1, 2):
        image = write_nifti(tmp_path / f"{channels}.nii", ramp(9, 8, 7, channels))
        recipe = write_recipe(tmp_path / "r.yaml", intensity="stored", patch=[4] * 3, patches={"kind": "foreground"})
        done = run("data", image, "--recipe", recipe, "--preview", tmp_path / "p.png")
        assert done.exit_code == 0, done.output
        with pillow.open(tmp_path / "p.png") as picture:
            sizes.append(picture.size)
            assert len(set(picture.convert("L").tobytes())) > 50 and not set(picture.info) - {"Software", "dpi"}
    assert sizes[1] == (sizes[0][0], 2 * sizes[0][1])


def test_a_key_that_is_not_understood(tmp_path: Path) -> None:
    image = write_nifti(tmp_path / "a.nii", ramp(4, 5, 6))
    done = run("data", image, "--recipe", write_recipe(tmp_path / "r.yaml", orientaton="RAS"))
    assert done.exit_code == 2 and "did you mean `orientation`" in done.stderr
    both = write_recipe(tmp_path / "r.yaml", orientation="RAS")
    done = run("data", image, "--recipe", both, "--preprocess", "nnunet:x")
    assert done.exit_code == 2
    done = run("data", image, "--preprocess", "monai:x.json")
    assert done.exit_code == 2 and "--trust" in done.stderr


def test_calibrate_on_images_by_any_number_of_workers(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'qdq[cpu]'")
    onnx.save(segmenter(spatial=("x", "y", "z")), tmp_path / "m.onnx")
    for name in "abc":
        image = np.random.default_rng(ord(name)).integers(0, 99, (18, 16, 20)).astype(np.int16)
        write_nifti(tmp_path / "in" / f"{name}.nii", image)
    recipe = write_recipe(
        tmp_path / "r.yaml", intensity={"zscore": "all"}, patch=[16, 16, 16], patches={"per_volume": 2, "seed": 3}
    )
    common = ("calibrate", tmp_path / "m.onnx", "--data", tmp_path / "in", "--recipe", recipe)
    one = run(*common, "-o", tmp_path / "1.json")
    assert one.exit_code == 0, one.output
    two = run(*common, "-o", tmp_path / "2.json", "--workers", "2")
    assert two.exit_code == 0, two.output
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    assert CalibrationTable.load(tmp_path / "1.json").count == 6


def test_a_series_gives_the_table_of_the_nifti_file_byte_for_byte(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'qdq[cpu]'")
    pytest.importorskip("pydicom", reason="pip install 'qdq[medical]'")
    onnx.save(segmenter(spatial=("x", "y", "z")), tmp_path / "m.onnx")
    lia = np.array([[-1.0, 0, 0, 9], [0, 0, 1, -8], [0, -1, 0, 7], [0, 0, 0, 1]])
    for seed in range(2):
        image = np.random.default_rng(seed).integers(0, 255, (20, 18, 16)).astype(np.uint8)
        write_nifti(tmp_path / "nifti" / f"{seed}.nii.gz", image, lia)
        write_series(tmp_path / "dicom", image, lia, seed=seed)
    write_series(tmp_path / "dicom", image[:, :, :1], lia, seed=2)
    recipe = write_recipe(
        tmp_path / "r.yaml", orientation="LIA", intensity={"percentile": [0, 100]}, patch=[16, 16, 16]
    )
    for form in ("nifti", "dicom"):
        source, table = tmp_path / form, tmp_path / f"{form}.json"
        done = run("calibrate", tmp_path / "m.onnx", "--data", source, "--recipe", recipe, "-o", table)
        assert done.exit_code == 0, done.output
        assert ("2 DICOM series are taken, and beside them left out: 1 file" in done.stderr) == (form == "dicom")
        assert ("left out" in run("data", source, "--recipe", recipe).stderr) == (form == "dicom")
    assert (tmp_path / "nifti.json").read_bytes() == (tmp_path / "dicom.json").read_bytes()


def test_what_a_model_does_not_take_is_said_before_anything_is_written(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'qdq[cpu]'")
    onnx.save(segmenter(spatial=("x", "y", "z")), tmp_path / "m.onnx")
    image = write_nifti(tmp_path / "doe.nii", ramp(16, 16, 16, 3, dtype="float32"))
    done = run("calibrate", tmp_path / "m.onnx", "--data", image, "-o", tmp_path / "t.json")
    assert done.exit_code == 2 and "axis 1 is 3 and must be 1" in done.stderr and "doe" not in done.stderr
    assert not (tmp_path / "t.json").exists()


def test_labels_of_images_are_scored(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'qdq[cpu]'")
    pytest.importorskip("tensorrt_rtx", reason="pip install 'qdq[cpu]'")
    onnx.save(segmenter(spatial=("x", "y", "z")), tmp_path / "m.onnx")
    for name in "ab":
        image = np.random.default_rng(ord(name)).normal(size=(16, 16, 16)).astype(np.float32)
        write_nifti(tmp_path / "in/imagesTr" / f"{name}_0000.nii", image)
        write_nifti(tmp_path / "in/labelsTr" / f"{name}.nii", (image > 0).astype(np.uint8))
    words = ("--schemes", "int8", "--metric", "dice", "--labels", "label", "--json")
    done = run("compare", tmp_path / "m.onnx", "--data", tmp_path / "in", *words)
    assert done.exit_code == 0, done.output
    done = run("compare", tmp_path / "m.onnx", "--data", tmp_path / "in", *words[:-2], "seg")
    assert done.exit_code == 2 and "its samples hold label" in done.stderr
