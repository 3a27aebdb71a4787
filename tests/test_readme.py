"""What README.md shows works as written: every `qdq` command and every Python block, in order, in one folder."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from clinic import image
from denoisers import denoising
from image_files import write_nifti
from models import images, save_samples, segmenter
from places import ROOT
from readme_blocks import README, blocks, commands, of_folder, of_torch

from engines.backends.doctor import gpus
from engines.verify.covered import SUMS
from qdq.build.cost import TIE, TIE_US
from qdq.build.keys.recipe_file import read_recipe
from qdq.build.recipe import Recipe
from qdq.cli.main import main

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("nibabel", reason="nibabel is not installed: pip install 'qdq[medical]'")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'qdq[plot]'")


CUBE = (1, 1, 16, 16, 16)
LOADER = """
import numpy as np

def samples():
    for path in ("volumes/000.npz", "volumes/001.npz"):
        yield dict(np.load(path))
"""


def write_recipes(folder: Path) -> list[Path]:
    """Each YAML block of README.md, in the file that its first line names."""
    found = []
    for block in blocks("yaml"):
        found.append(folder / block.partition("\n")[0].removeprefix("# "))
        found[-1].write_text(block)
    return found


def write_inputs(folder: Path) -> None:
    """The user's files: a model, samples, images and recipes."""
    onnx.save(denoising(shape=(3, 32, 32)), folder / "ddpm.onnx")
    onnx.save(segmenter(spatial=("x", "y", "z")), folder / "unet.onnx")
    save_samples(folder / "volumes", images(3, CUBE))
    save_samples(folder / "held_out", images(2, CUBE, seed=7))
    write_recipes(folder)
    for seed in range(2):
        scan = (250 * image(seed, (20, 18, 16))).astype(np.int16)
        write_nifti(folder / f"scans/{seed}.nii.gz", scan, np.diag([-1.0, 1.0, 1.2, 1.0]))


def test_every_recipe_of_the_readme_is_read(tmp_path: Path) -> None:
    for path in write_recipes(tmp_path):
        assert Recipe.from_mapping(read_recipe(path)) != Recipe(), path


def test_every_command_of_the_readme_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    Path("loader.py").write_text(LOADER)
    assert {shlex.split(c)[1] for c in commands()} == set(main.commands)  # every verb is shown
    for command in commands():
        if of_torch(command) or of_folder(command):
            continue
        result = CliRunner().invoke(main, shlex.split(command)[1:])
        no_gpu = 3 if command.startswith("qdq measure-gpu") and not gpus() else 0
        assert result.exit_code == no_gpu, f"{command}\n{result.output}{result.exception!r}"
        if "--json" in command:
            json.loads(result.stdout)
    listed = re.findall(r"^\| `(\S+)` \|", README, flags=re.MULTILINE)
    shown = {name for name in listed if "." in name or name == SUMS}
    made = json.loads((tmp_path / "build/report.json").read_text())["model_file"]
    assert made in ("unet.int8.onnx", "unet.fp16.onnx")  # so small a network may be left in float
    assert {p.name for p in (tmp_path / "build").iterdir()} == shown - {"unet.int8.onnx"} | {made}
    shipped = json.loads((tmp_path / "qdq-demo/report.json").read_text())
    least = shipped["tuning"]["decision"]["unquantized_us"]
    assert shipped["tuning"]["predicted_us"] <= least * (1 + TIE) + TIE_US  # what is shown first is not the slower form
    everywhere = tmp_path / "qdq-demo/int8/report.json"  # where INT8 gains no time
    small = json.loads(everywhere.read_text()) if everywhere.exists() else shipped
    for report in (shipped, small):
        for dice in (report["check"]["outputs"][0]["dice"], report["label_dice"]["shipped model"]):
            assert min(dice.values()) > 0.9  # against the float model, and against the atlas
    assert small["audit"]["missed"] == [] and (small["audit"]["int8_share"] > 0.9 or not everywhere.exists())
    assert everywhere.exists() == (not shipped["tuning"]["quantized_nodes"])


def test_python_of_the_readme_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    (clinic,) = (command for command in commands() if "--out clinic/" in command)
    assert CliRunner().invoke(main, [*shlex.split(clinic)[1:], "--tune", "off"]).exit_code == 0
    for block in blocks("python"):
        if of_torch(block):
            continue
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert Path("unet.int8.onnx").is_file() and Path("ddpm.noise.json").is_file() and Path("labels.nii.gz").is_file()


def test_extras_of_the_readme_exist() -> None:
    extras = {e for group in re.findall(r"\.\[([a-z,]+)\]", README) for e in group.split(",")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extras and extras <= project["optional-dependencies"].keys()
