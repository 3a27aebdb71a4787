"""The blocks `window` and `segmentation` of a recipe."""

from __future__ import annotations

from typing import Any

import pytest

from qdq.build.recipe import Recipe
from qdq.core.errors import InputError


def test_whole_volumes_run_where_anything_asks_for_it() -> None:
    assert Recipe.from_mapping({}).whole is None
    for values in ({"max_hd95_mm": 1}, {"max_dice_drop": 0.01}, {"max_volume_diff_ml": 0}):
        found = Recipe.from_mapping(values)
        assert found.whole and found.whole.window is None and found.limits == values
    whole = Recipe.from_mapping({"window": {"patch": [8, 8, 8], "mirror": [0]}}).whole
    text = Recipe.from_mapping({"window": "8x8x8:mirror=0"}).whole
    assert whole and whole == text and whole.window and whole.window.mirror == (0,)


def test_structures_and_their_label_values() -> None:
    block: dict[str, Any] = {"structures": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    whole = Recipe.from_mapping({"segmentation": block}).whole
    assert whole and whole.segmentation.regions == {"whole": (1, 2), "core": (2,)}
    assert whole.segmentation.overlapping is True
    plain = Recipe.from_mapping({"segmentation": {"activation": "softmax"}}).whole
    assert plain and plain.segmentation.overlapping is False


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
