"""`qdq segment`, `check` and `deploy` on images, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from clinic import AFFINE, classes_of, image, save, thresholds
from image_files import write_nifti

from qdq.cli.main import main

RECIPE = """
volume: {orientation: RAS}
window: {patch: [8, 8, 8], overlap: 0.25}
segmentation:
  structures: {background: 0, grey: 1, white: 2}
"""


def qdq(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    onnx.save(thresholds(1, 2), tmp_path / "float.onnx")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_labels_lie_on_the_grid_of_the_image(place: Path) -> None:
    images = [image(0), image(1)]
    data = save(place / "data", images)
    done = qdq("segment", place / "float.onnx", "--data", data, "--recipe", place / "recipe.yaml", "-o", place / "out")
    assert done.exit_code == 0, done.output
    assert "doe" not in done.output and "overlap 0.25" in done.stderr
    first, second, names = sorted((place / "out").iterdir())
    assert json.loads(names.read_text()) == {"background": 0, "grey": 1, "white": 2}
    for path, picture in zip((first, second), images, strict=True):
        found = nib.load(path)
        np.testing.assert_array_equal(np.asarray(found.dataobj), classes_of(picture, 1, 2))
        np.testing.assert_allclose(found.affine, AFFINE)
        assert found.header["sform_code"] == 1 and found.header.get_intent()[0] == "label"
        (comment,) = found.header.extensions
        assert json.loads(comment.get_content()) == json.loads(names.read_text())
        assert b"doe" not in path.read_bytes()


def test_the_same_key_gives_the_same_bytes_and_names(place: Path) -> None:
    data = save(place / "data", [image(0)])
    (place / "key").write_bytes(b"k" * 32)
    made = []
    for out in ("a", "b"):
        words = ("--data", data, "--recipe", place / "recipe.yaml", "--case-key", place / "key", "-o", place / out)
        assert qdq("segment", place / "float.onnx", *words).exit_code == 0
        made.append({path.name: path.read_bytes() for path in (place / out).iterdir()})
    assert made[0] == made[1] and len(made[0]) == 2


def test_labels_of_another_run_are_not_mixed_with_these(place: Path) -> None:
    data = save(place / "data", [image(0)])
    words = ("segment", place / "float.onnx", "--data", data, "--recipe", place / "recipe.yaml", "-o", place / "out")
    (place / "key").write_bytes(b"k" * 32)
    assert [qdq(*words, "--case-key", place / "key").exit_code for _ in range(2)] == [0, 0]
    kept = {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    done = qdq(*words)  # with a key of its own
    assert done.exit_code == 2 and "holds 1 label file of other images" in done.stderr
    assert "of a run with another key" in done.stderr
    assert {path.name: path.read_bytes() for path in (place / "out").iterdir()} == kept


@pytest.mark.parametrize("words", [("segment",), ("check",)])
def test_an_image_of_other_channels_than_the_model_takes(place: Path, words: tuple[str, ...]) -> None:
    data = save(place / "data", [np.stack([image(0)] * 2, -1)])
    models = [place / "float.onnx"] * (2 if words == ("check",) else 1)
    more = ("-o", place / "out") if words == ("segment",) else ("--max-dice-drop", 0.5)
    done = qdq(*words, *models, "--data", data, "--recipe", place / "recipe.yaml", *more)
    assert done.exit_code == 2 and "ONNXRuntimeError" not in done.stderr
    assert "case 1 of 1" in done.stderr and "2 channels" in done.stderr and "takes 1" in done.stderr


def test_channels_that_overlap_are_written_beside_each_other(place: Path) -> None:
    onnx.save(thresholds(1, 2, sigmoid=True), place / "sigmoid.onnx")
    data = save(place / "data", [image(0)])
    done = qdq("segment", place / "sigmoid.onnx", "--data", data, "--window", "8x8x8", "-o", place / "out")
    assert done.exit_code == 0, done.output
    path, names = sorted((place / "out").iterdir())
    found = np.asarray(nib.load(path).dataobj)
    expected = np.stack([image(0) > 1, image(0) > 2], -1)
    np.testing.assert_array_equal(found, expected)
    assert json.loads(names.read_text()) == {"channel 0": 0, "channel 1": 1}


def test_nothing_is_written_where_one_image_is_bad(place: Path) -> None:
    bad = image(1)
    bad[3, 3, 3] = np.nan
    data = save(place / "data", [image(0), bad])
    done = qdq("segment", place / "float.onnx", "--data", data, "--recipe", place / "recipe.yaml", "-o", place / "out")
    assert done.exit_code == 2 and "case 2 of 2" in done.stderr and "1 of its 4080 voxels are NaN" in done.stderr
    assert not (place / "out").exists()


def test_check_holds_to_the_limits_of_volumes(place: Path) -> None:
    onnx.save(thresholds(1.3, 2), place / "other.onnx")
    pictures = [image(n) for n in range(3)]
    data = save(place / "data", pictures, [classes_of(p, 1, 2) for p in pictures])
    words = ("check", place / "float.onnx", place / "other.onnx", "--data", data, "--recipe", place / "recipe.yaml")
    kept = qdq(
        *words, "--max-dice-drop", 0.9, "--max-hd95-mm", 100, "--max-volume-diff-ml", 100, "-o", place / "r.json"
    )
    assert kept.exit_code == 0, kept.output
    report = json.loads((place / "r.json").read_text())["volumes"]
    assert [s["name"] for s in report["to_float"]["structures"]] == ["grey", "white"]
    assert [side["found"] for side in report["to_labels"]] == ["float model", "Q/DQ model"]
    assert "Q/DQ model against float model, 3 whole volumes" in kept.output and "missed" in kept.output
    broken = qdq(*words, "--max-dice-drop", 0.01)
    assert broken.exit_code == 1 and "grey: Dice drops by" in broken.stderr and "white" not in broken.stderr
    assert qdq(*words, "--max-volume-diff-ml", 0.01).exit_code == 1


def test_limits_of_volumes_need_images(place: Path) -> None:
    np.savez(place / "a.npz", image=image(0)[None, None])
    done = qdq("check", place / "float.onnx", place / "float.onnx", "--data", place / "a.npz", "--max-hd95-mm", 1)
    assert done.exit_code == 2 and "whole volumes need images" in done.stderr


def test_deploy_refuses_arrays_before_it_calibrates(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    monkeypatch.setattr("qdq.deploy.deploy.written", lambda *_, **__: pytest.fail("it calibrated"))
    np.savez(place / "a.npz", image=image(0)[None, None])
    words = ("deploy", place / "float.onnx", "--data", place / "a.npz", "--max-hd95-mm", 1, "--out", place / "out")
    done = qdq(*words)
    assert done.exit_code == 2 and "whole volumes need images" in done.stderr


def test_deploy_reports_whole_volumes(place: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    recipe = RECIPE.replace("RAS}", "RAS, patch: [8, 8, 8]}")
    (place / "recipe.yaml").write_text(recipe + "tune: off\n")
    data = save(place / "data", [image(n) for n in range(2)])
    words = ("--data", data, "--recipe", place / "recipe.yaml", "--max-dice-drop", 0.5, "--out", place / "out")
    done = qdq("deploy", place / "float.onnx", *words)
    assert done.exit_code == 0, done.output
    report = json.loads((place / "out" / "report.json").read_text())
    assert report["check"]["volumes"]["cases"] == 2 and report["failures"] == []
    assert report["as_compiled"]["volumes"] is None and report["as_compiled"]["failures"] == []
    assert "against float model, 2 whole volumes" in done.output


def test_deploy_keeps_slices_of_images_only_where_it_is_told_to(place: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    (place / "recipe.yaml").write_text(RECIPE.replace("RAS}", "RAS, patch: [8, 8, 8]}") + "tune: off\n")
    data, out = save(place / "data", [image(n) for n in range(2)]), place / "out"
    words = ("deploy", place / "float.onnx", "--data", data, "--recipe", place / "recipe.yaml", "--out", out)
    assert qdq(*words, "--with-images").exit_code == 0
    shown = (out / "report.html").read_text(encoding="utf-8")
    assert (out / "slices.npz").exists() and "no sample data but the pictures" in shown and "doe" not in shown
    assert qdq("report", out, "--with-images", "-o", place / "again.html").exit_code == 0
    assert (place / "again.html").read_text(encoding="utf-8") == shown
    assert qdq(*words).exit_code == 0  # the same place: what the first run kept is gone
    plain = (out / "report.html").read_text(encoding="utf-8")
    assert not (out / "slices.npz").exists() and "image/png" not in plain and "Whole volumes" in plain
    np.savez(place / "a.npz", image=image(0)[None, None])
    refused = qdq("deploy", place / "float.onnx", "--data", place / "a.npz", "--with-images", "--out", place / "none")
    assert refused.exit_code == 2 and "none are run" in refused.stderr and not (place / "none").exists()


def test_compare_scores_whole_volumes(place: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    (place / "recipe.yaml").write_text(RECIPE.replace("RAS}", "RAS, patch: [8, 8, 8]}"))
    pictures = [image(n) for n in range(2)]
    data = save(place / "data", pictures, [classes_of(p, 1, 2) for p in pictures])
    words = ("compare", place / "float.onnx", "--data", data, "--recipe", place / "recipe.yaml", "--schemes", "int8")
    values = {}
    for metric in ("volume-dice", "volume-hd95", "volume-ml"):
        done = qdq(*words, "--metric", metric, "--json")
        assert done.exit_code == 0, done.output
        made = json.loads(done.stdout)
        values[metric] = [row["value"] for row in made["rows"]]
        assert made["rows"][0]["scheme"] == "FP32" and "classes of output of whole volumes" in str(made["notes"])
    assert values["volume-dice"][0] == 1 and values["volume-hd95"][0] == values["volume-ml"][0] == 0
    assert 0.5 < values["volume-dice"][-1] <= 1
    labelled = json.loads(qdq(*words, "--metric", "volume-dice", "--labels", "label", "--json").stdout)
    assert labelled["rows"][0]["value"] == 1 and labelled["task"]["labels"] == "label"


def test_a_label_whose_axes_run_otherwise_is_the_same_label(place: Path) -> None:
    """As dcm2niix writes it beside the DICOM series: rows the other way round."""
    pictures = [image(n) for n in range(2)]
    labels = [classes_of(p, 1, 2) for p in pictures]
    plain, turned = save(place / "plain", pictures, labels), save(place / "turned", pictures)
    way = np.eye(4)
    way[1, 1], way[1, 3] = -1, labels[0].shape[1] - 1
    for n, label in enumerate(labels):
        write_nifti(turned / "labelsTr" / f"doe_{n}.nii.gz", label[:, ::-1].transpose(2, 0, 1), _moved(AFFINE @ way))
    reports = []
    for data in (plain, turned):
        words = ("--data", data, "--recipe", place / "recipe.yaml", "--max-dice-drop", 0.5, "-o", place / "r.json")
        done = qdq("check", place / "float.onnx", place / "float.onnx", *words)
        assert done.exit_code == 0, done.output
        reports.append(json.loads((place / "r.json").read_text())["volumes"]["to_labels"][0]["structures"])
        assert "label 0, 1, 2" in " ".join(
            qdq("data", data, "--recipe", place / "recipe.yaml", "--json").output.split()
        )
    assert reports[0] == reports[1] and [s["dice"]["mean"] for s in reports[0]] == [1, 1]


def _moved(affine: np.ndarray) -> np.ndarray:
    """Of (i, j, k) as that of (k, i, j)."""
    return affine[:, [2, 0, 1, 3]]
