"""Which compiler a recipe is for, as it says, in words of today and before."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engines.backends.doctor import InstalledGpu
from engines.core.errors import EngineError, UnsupportedTargetError
from qdq import Settings
from qdq.build import compiler
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


OWN = {"name": "edge", "target": "sm89", "bandwidth_gb_s": 200, "tera_ops": {"float32": 10, "float16": 40}}
LIKE = {"like": "rtx4060", "name": "mine"}
CENTRE = {"t4": "sm75", "a2": "sm86", "a10": "sm86", "a30": "sm80", "a100": "sm80", "l4": "sm89", "l40s": "sm89"}


@pytest.mark.parametrize(
    ("given", "key", "targets", "because"),
    [
        *(({"gpu": gpu}, "tensorrt:11", sm, f"{gpu} is a GPU of the data centre") for gpu, sm in CENTRE.items()),
        ({"gpu": "h100"}, "tensorrt:11", "sm90", "sm90 is a target of TensorRT 11 alone"),
        ({"gpu": "orin-nx"}, "tensorrt:11", "sm87", "sm87 is a target of TensorRT 11 alone"),
        ({"target": "8.7"}, "tensorrt:11", "8.7", "sm87 is a target of TensorRT 11 alone"),
        ({"target": ["sm89", "sm90"]}, "tensorrt:11", "sm89 sm90", "sm90 is a target"),
        ({"gpu": "a10", "target": "sm86"}, "tensorrt:11", "sm86", "a10 is a GPU of the data centre"),
        ({"gpu": "rtx4090"}, "rtx", "sm89", "rtx4090 is a GeForce GPU"),
        ({"gpu": "RTX A6000"}, "rtx", "sm86", "rtx-a6000 is an RTX workstation GPU"),
        ({"gpu": [LIKE]}, "rtx", "sm89", "mine is a GeForce GPU"),
        ({"gpu": [{**OWN, "kind": "data centre"}]}, "tensorrt:11", "sm89", "edge is a GPU of the data centre"),
        ({"gpu": [OWN]}, "rtx", "sm89", "says of no GPU .*; for TensorRT 11 give --compiler tensorrt"),
        ({"target": "sm86"}, "rtx", "sm86", "--target sm86 alone says of no GPU .* --compiler tensorrt"),
        ({}, "rtx", "sm89", "no GPU is named .* --compiler tensorrt"),
        ({"compiler": "tensorrt:10.16", "gpu": "rtx4090"}, "tensorrt:10.16", "sm89", "^$"),
        ({"compiler": "rtx", "gpu": ["a10", "rtx4090"]}, "rtx", "sm86 sm89", "^$"),
    ],
)
def test_the_gpu_and_the_target_decide_what_compiles(
    given: dict[str, object], key: str, targets: str, because: str
) -> None:
    recipe = Recipe.from_mapping(given)
    assert recipe.settings.compiler == key and " ".join(recipe.targets) == targets
    assert re.search(because, recipe.chosen_because)


def test_gpus_of_two_compilers_are_refused() -> None:
    with pytest.raises(InputError, match=r"l4 means TensorRT 11: .*rtx4090 means TensorRT-RTX: .*--compiler tensorr"):
        Recipe.from_mapping({"gpu": ["l4", "rtx4090"]})
    with pytest.raises(InputError, match=r"rtx4090 means TensorRT-RTX.*sm90 means TensorRT 11"):
        Recipe.from_mapping({"gpu": "rtx4090", "target": ["sm89", "sm90"]})


def test_what_is_asked_for_is_held_to_its_targets() -> None:
    with pytest.raises(UnsupportedTargetError, match=r"TensorRT-RTX has no target 'sm90'.*--compiler tensorrt"):
        Recipe.from_mapping({"compiler": "rtx", "target": "sm90"})
    with pytest.raises(UnsupportedTargetError, match=r"TensorRT-RTX has no target 'sm90'"):
        Recipe.from_mapping({"compiler": "rtx", "gpu": "h100"})
    with pytest.raises(UnsupportedTargetError, match=r"TensorRT 10\.3 has no target 'sm120'.*--compiler tensorrt:11"):
        Recipe.from_mapping({"compiler": "tensorrt:10.3", "target": "sm120"})


def test_a_compiler_that_needs_this_gpu_compiles_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    here = InstalledGpu(name="NVIDIA H200", target="sm90", memory_bytes=1)
    monkeypatch.setattr(compiler, "gpus_here", lambda: [here])
    assert Recipe.from_mapping({"compiler": "tensorrt"}).targets == ("sm90",)
    assert Recipe.from_mapping({"compiler": "tensorrt", "target": "sm80"}).targets == ("sm80",)
    assert Recipe.from_mapping({"compiler": "rtx"}).targets == ("sm89",)


def test_a_plan_of_before_is_for_the_usual_compiler(tmp_path: Path) -> None:
    plan = Plan(model_sha256="0" * 64, settings=Settings(), points=(), skips=())
    text = plan.to_json()
    assert '"compiler": "rtx"' in text
    (tmp_path / "plan.json").write_text(text.replace(',\n  "compiler": "rtx"', ""))
    assert "compiler" not in (tmp_path / "plan.json").read_text()
    assert Plan.load(tmp_path / "plan.json").settings.compiler == "rtx"


@pytest.mark.parametrize(("compiler", "said"), [("xyz", "Unknown compiler 'xyz'"), ("dla", "DLA is no compiler here")])
def test_a_plan_for_no_compiler_is_refused(tmp_path: Path, compiler: str, said: str) -> None:
    text = Plan(model_sha256="0" * 64, settings=Settings(), points=(), skips=()).to_json()
    (tmp_path / "plan.json").write_text(text.replace('"compiler": "rtx"', f'"compiler": "{compiler}"'))
    with pytest.raises(InputError, match=said):
        Plan.load(tmp_path / "plan.json")
