"""Two models on whole volumes: the figures are those of the labels that both are known to find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from clinic import AFFINE, Array, classes_of, image, save, thresholds

from calib_data import open_samples
from calib_data.volumes.spec import volume_spec
from engines.core.onnx_runtime import session
from engines.verify.volumes import VolumeReport
from qdq.build.keys.segmentation import Segmentation, WholeVolumes
from qdq.build.keys.window import Window
from qdq.core.errors import InputError
from qdq.deploy.volumes.evaluate import compare_volumes
from qdq.deploy.volumes.measures import measured
from qdq.measure.inference.inputs import input_specs
from qdq.model.storage import load

MM = (1.0, 1.5, 2.0)
WHOLE = WholeVolumes(window=Window(patch=(8, 8, 8)))


def compared(
    place: Path,
    data: Path,
    float_model: onnx.ModelProto,
    candidate: onnx.ModelProto,
    whole: WholeVolumes = WHOLE,
    spec: dict[str, Any] | None = None,
) -> VolumeReport:
    path = place / "float.onnx"
    onnx.save(float_model, path)
    samples = open_samples(data, input_specs(load(path)), volume=volume_spec(spec or {"orientation": "stored"}))
    return compare_volumes(session(float_model), session(candidate), samples, whole, graph=float_model)


@pytest.mark.parametrize(
    "spec",
    [
        {"orientation": "stored"},
        {"orientation": "RAS"},
        {"orientation": "SPL", "axes": "czyx"},
        {"orientation": "RAS", "crop": "nonzero"},
    ],
)
@pytest.mark.parametrize("resample", ["labels", "logits"])
def test_against_the_float_model(tmp_path: Path, spec: dict[str, Any], resample: Any) -> None:
    images = [image(n) for n in range(4)]
    images[3][:, :5] = 0
    data = save(tmp_path / "data", images)
    whole = WholeVolumes(window=WHOLE.window, segmentation=Segmentation(resample=resample))
    found = compared(tmp_path, data, thresholds(1, 2), thresholds(1.3, 2), whole, spec)
    assert (found.cases, found.to_labels) == (4, ())
    first, second = found.to_float.structures
    assert second.dice and second.dice.mean == 1 and second.worst_hd95_mm == 0
    expected = [measured(classes_of(i, 1.3, 2) == 1, classes_of(i, 1, 2) == 1, MM) for i in images]
    assert first.dice and first.dice.mean == pytest.approx(np.mean([m.dice for m in expected]))  # type: ignore[arg-type]
    for case, wanted in zip(found.to_float.cases, expected, strict=True):
        assert case.structures["class 1"] == wanted
    assert first.worst_difference_ml == min(m.difference_ml for m in expected)


def test_against_labels_and_the_limits(tmp_path: Path) -> None:
    images = [image(n) for n in range(3)]
    truth: list[Array | None] = [classes_of(i, 1.2, 2) for i in images]
    truth[2] = None
    data = save(tmp_path / "data", images, truth)
    found = compared(tmp_path, data, thresholds(1.2, 2), thresholds(1.3, 2.2))
    before, after = found.to_labels
    assert (before.true, before.without_truth, len(before.cases)) == ("labels", 1, 2)
    assert all(s.dice and s.dice.mean == 1 for s in before.structures)
    drops = found.dice_drops()
    for s in after.structures:
        assert s.dice and drops[s.name] == pytest.approx(1 - s.dice.mean) and drops[s.name] > 0.01
    none = {"max_dice_drop": None, "max_hd95_mm": None, "max_volume_diff_ml": None}
    assert found.failures(**none) == []
    assert found.failures(**{**none, "max_dice_drop": max(drops.values())}) == []
    (one,) = found.failures(**{**none, "max_dice_drop": (drops["class 1"] + drops["class 2"]) / 2})
    assert one.startswith(f"{max(drops, key=lambda k: drops[k])}: Dice drops by")
    worst = max(s.worst_hd95_mm or 0 for s in found.to_float.structures)
    assert found.failures(**{**none, "max_hd95_mm": worst}) == []
    assert found.failures(**{**none, "max_hd95_mm": worst - 0.1})
    assert found.failures(**{**none, "max_volume_diff_ml": 0.0})


def test_resampled_images_are_measured_on_their_own_grid(tmp_path: Path) -> None:
    """Every second voxel is run; the labels of blocks of two come back whole."""
    fine = image(0, (10, 9, 6)).repeat(2, 0).repeat(2, 1).repeat(2, 2)
    data = save(tmp_path / "data", [fine], [classes_of(fine, 1, 2)])
    spec = {"orientation": "stored", "spacing_mm": [2, 3, 4], "grid": "edges", "order": 0}
    found = compared(tmp_path, data, thresholds(1, 2), thresholds(1, 2), spec=spec)
    assert [s.dice.mean for s in found.to_labels[0].structures if s.dice] == [1, 1]


def test_structures_that_are_empty_are_counted(tmp_path: Path) -> None:
    images = [image(0), image(1) * 0, np.clip(image(2), 0, 1.1)]
    found = compared(tmp_path, save(tmp_path / "data", images), thresholds(1, 2), thresholds(1.2, 2))
    first, second = found.to_float.structures
    assert (first.empty, first.only_true, first.only_found) == (1, 1, 0)
    assert first.dice and first.dice.cases == 2 and first.worst_dice == 0
    assert first.hd95_mm and first.hd95_mm.cases == 1
    assert (second.empty, second.dice and second.dice.cases) == (2, 1)
    said = found.failures(max_dice_drop=None, max_hd95_mm=100, max_volume_diff_ml=None)
    assert said == ["class 1: no HD95 in 1 case, where only one of both models finds it: max_hd95_mm cannot be kept."]


def test_overlapping_channels_have_names_and_label_values(tmp_path: Path) -> None:
    picture = image(0)
    truth = classes_of(picture, 1, 2)  # 1: edema, 2: core, which is part of the whole
    asked = Segmentation(structures={"background": 0, "whole": (1, 2), "core": 2})
    whole = WholeVolumes(window=WHOLE.window, segmentation=asked)
    model = thresholds(1, 2, sigmoid=True)
    found = compared(tmp_path, save(tmp_path / "data", [picture], [truth]), model, model, whole)
    assert "may overlap, each above 0.5" in found.decoded
    for side in (found.to_float, *found.to_labels):
        assert [(s.name, s.dice and s.dice.mean) for s in side.structures] == [("whole", 1), ("core", 1)]


def test_regions_are_painted_in_their_order(tmp_path: Path) -> None:
    picture = image(0)
    asked = Segmentation(structures={"whole": (1, 2), "core": 2}, regions_class_order=(1, 2))
    whole = WholeVolumes(window=WHOLE.window, segmentation=asked)
    model = thresholds(1, 2, sigmoid=True)
    data = save(tmp_path / "data", [picture], [classes_of(picture, 1, 2)])
    found = compared(tmp_path, data, model, model, whole)
    assert "painted as 1, 2" in found.decoded
    assert [s.dice and s.dice.mean for s in found.to_labels[0].structures] == [1, 1]


@pytest.mark.parametrize("shape", [(20, 17, 1), (5, 4, 3)])
def test_one_slice_and_volumes_smaller_than_the_patch_are_padded(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    picture = image(0, shape)
    found = compared(tmp_path, save(tmp_path / "data", [picture], [classes_of(picture, 1, 2)]), *[thresholds(1, 2)] * 2)
    assert all(s.dice and s.dice.mean == 1 for s in found.to_labels[0].structures)
    assert found.window.endswith("1 volume smaller than that, padded (constant 0) on both sides")


@pytest.mark.parametrize(("model", "given"), [("static", None), ("slices", Window(patch=(8, 8))), ("batch", None)])
def test_models_of_one_size_of_slices_and_of_batches(tmp_path: Path, model: str, given: Window | None) -> None:
    made = {
        "static": thresholds(1, 2, shape=(8, 8, 8)),
        "slices": thresholds(1, 2, shape=("y", "z")),
        "batch": thresholds(1, 2, shape=(8, 8, 8), batch=3),
    }[model]
    picture = image(0)
    data = save(tmp_path / "data", [picture], [classes_of(picture, 1, 2)])
    found = compared(tmp_path, data, made, made, WholeVolumes(window=given))
    assert all(s.dice and s.dice.mean == 1 for s in found.to_labels[0].structures)
    assert "8 x 8" in found.window


def test_without_any_size_the_whole_volume_runs_at_once(tmp_path: Path) -> None:
    found = compared(tmp_path, save(tmp_path / "data", [image(0)]), *[thresholds(1, 2)] * 2, WholeVolumes())
    assert found.windows == 1 and found.window.startswith("patches of all x all x all")


@pytest.mark.parametrize(
    ("window", "shape", "said"),
    [
        ((16, 16, 16), (8, 8, 8), "the model takes 8 x 8 x 8"),
        ((16, 16, 16), ("y", "z"), "the model takes 1 x 0 x 0"),
    ],
)
def test_a_window_that_the_model_does_not_take(tmp_path: Path, window: Any, shape: Any, said: str) -> None:
    model = thresholds(1, 2, shape=shape)
    with pytest.raises(InputError, match=said):
        compared(tmp_path, save(tmp_path / "d", [image(0)]), model, model, WholeVolumes(window=Window(patch=window)))


def test_structures_must_fit_the_channels(tmp_path: Path) -> None:
    data = save(tmp_path / "d", [image(0)])
    too_many = WholeVolumes(window=WHOLE.window, segmentation=Segmentation(structures={"liver": 3}))
    with pytest.raises(InputError, match="'liver' has a label beyond the 3 channels"):
        compared(tmp_path, data, *[thresholds(1, 2)] * 2, too_many)
    other = WholeVolumes(window=WHOLE.window, segmentation=Segmentation(structures={"whole": 1}))
    with pytest.raises(InputError, match="1 structures, and output found 2 channels"):
        compared(tmp_path, data, *[thresholds(1, 2, sigmoid=True)] * 2, other)


def test_arrays_have_no_place_in_space(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((1, 1, 8, 8, 8), np.float32))
    model = thresholds(1, 2)
    onnx.save(model, tmp_path / "m.onnx")
    samples = open_samples(tmp_path / "a.npz", input_specs(load(tmp_path / "m.onnx")))
    with pytest.raises(InputError, match="whole volumes need images"):
        compare_volumes(session(model), session(model), samples, WHOLE, graph=model)


def test_no_name_reaches_the_report(tmp_path: Path) -> None:
    found = compared(tmp_path, save(tmp_path / "data", [image(0)]), *[thresholds(1, 2)] * 2)
    assert "doe" not in repr(found) and len(found.to_float.cases[0].case) == 12
    assert np.allclose(np.abs(np.diag(AFFINE))[:3], MM)
