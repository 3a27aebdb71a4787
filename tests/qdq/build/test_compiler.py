"""Which compiler a recipe is for, as it says, in words of today and before."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.core.errors import EngineError
from qdq import Settings
from qdq.build.recipe import Recipe
from qdq.core.errors import InputError
from qdq.plan.plan import Plan


def test_a_recipe_and_its_settings_hold_the_compiler() -> None:
    recipe = Recipe.from_mapping({"compiler": "tensorrt"})
    assert recipe.settings.compiler == recipe.profile.key == "tensorrt:11" and recipe.backend == "trt"
    assert Recipe().backend == Recipe.from_mapping({}).settings.compiler == "rtx"
    assert Settings.from_mapping(recipe.settings.to_mapping()) == recipe.settings


@pytest.mark.parametrize(("older", "now"), [("rtx", "rtx"), ("trt", "tensorrt:11")])
def test_the_older_key_is_still_read(older: str, now: str) -> None:
    assert Recipe.from_mapping({"backend": older}).settings.compiler == now
    with pytest.raises(InputError, match="both backend and compiler"):
        Recipe.from_mapping({"backend": older, "compiler": "rtx"})


def test_an_unknown_compiler_is_refused_by_each_key() -> None:
    with pytest.raises(EngineError, match=r"Unknown compiler 'rxt'.*Did you mean 'rtx'"):
        Recipe.from_mapping({"compiler": "rxt"})
    with pytest.raises(EngineError, match=r"Unknown backend 'rxt'.*Did you mean 'rtx'"):
        Recipe.from_mapping({"backend": "rxt"})


def test_a_plan_of_before_is_for_the_usual_compiler(tmp_path: Path) -> None:
    plan = Plan(model_sha256="0" * 64, settings=Settings(), points=(), skips=())
    text = plan.to_json()
    assert '"compiler": "rtx"' in text
    (tmp_path / "plan.json").write_text(text.replace(',\n  "compiler": "rtx"', ""))
    assert "compiler" not in (tmp_path / "plan.json").read_text()
    assert Plan.load(tmp_path / "plan.json").settings.compiler == "rtx"
