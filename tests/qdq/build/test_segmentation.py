"""The blocks `window` and `segmentation` of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calib_data import DataError
from qdq.build.keys.window import Window
from qdq.build.recipe import Recipe
from qdq.core.errors import InputError


def test_whole_volumes_run_where_anything_asks_for_it() -> None:
    assert not Recipe.from_mapping({}).whole.asked
    for values in ({"max_hd95_mm": 1}, {"max_dice_drop": 0.01}, {"max_volume_diff_ml": 0}):
        found = Recipe.from_mapping(values)
        assert found.whole.asked and found.whole.window is None and found.limits == values
    whole = Recipe.from_mapping({"window": {"patch": [8, 8, 8], "mirror": [0]}}).whole
    text = Recipe.from_mapping({"window": "8x8x8:mirror=0"}).whole
    assert whole.asked and whole == text and whole.window and whole.window.mirror == (0,)


def test_structures_and_their_label_values() -> None:
    block: dict[str, Any] = {"structures": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    whole = Recipe.from_mapping({"segmentation": block}).whole
    assert whole.segmentation.regions == {"whole": (1, 2), "core": (2,)}
    assert whole.segmentation.overlapping is True
    plain = Recipe.from_mapping({"segmentation": {"activation": "softmax"}}).whole
    assert plain.segmentation.overlapping is False


def test_nnunet_plans_say_window_and_labels(tmp_path: Path) -> None:
    full = {
        "patch_size": [20, 32, 28],
        "spacing": [2.5, 0.8, 0.7],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    }
    plans = {
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "configurations": {"3d_fullres": full},
    }
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    dataset = {"channel_names": {"0": "MR"}, "labels": labels, "regions_class_order": [1, 2]}
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    found = Recipe.from_mapping({"preprocess": f"nnunet:{tmp_path}"}).whole
    assert not found.asked and found.window == Window(patch=(20, 32, 28), rule="nnunet")
    assert found.segmentation.regions == {"whole": (1, 2), "core": (2,)}
    assert found.segmentation.resample == "logits" and found.segmentation.overlapping
    own = Recipe.from_mapping({"preprocess": f"nnunet:{tmp_path}", "window": "20x32x28", "max_hd95_mm": 1}).whole
    assert own.asked and own.window == Window(patch=(20, 32, 28)) and own.segmentation == found.segmentation
    (tmp_path / "dataset.json").write_text(json.dumps({**dataset, "labels": {"liver": "one"}}))
    with pytest.raises(DataError, match="a label is no whole number"):
        Recipe.from_mapping({"preprocess": f"nnunet:{tmp_path}"})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"window": {"patches": [8, 8, 8]}}, "Unknown key of window 'patches'.*Did you mean 'patch'"),
        ({"window": {"patch": [8, 8, 8], "rule": "medpy"}}, "rule is 'medpy': it must be monai or nnunet"),
        ({"window": {"patch": [8]}}, "needs 3 numbers"),
        ({"window": 5}, "window is 5"),
        ({"segmentation": {"activation": "relu"}}, "it must be auto or softmax or sigmoid"),
        ({"segmentation": {"structure": {"a": 1}}}, "Did you mean 'structures'"),
        ({"segmentation": {"structures": {"a": -1}}}, "structures"),
        ({"segmentation": {"structures": {"a": 1}, "regions_class_order": [1, 2]}}, "one for each is needed"),
        ({"segmentation": {"activation": "softmax", "regions_class_order": [1]}}, "which sigmoid needs"),
        ({"max_dice_drop": 2}, "from 0 to 1"),
    ],
)
def test_a_key_that_is_not_understood_is_an_error(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Recipe.from_mapping(values)
