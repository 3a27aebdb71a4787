"""`qdq measure-gpu` on a simulated GPU: its recipe is read back, and predicts what it measured."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import onnx
import pytest
from click.testing import CliRunner, Result
from fake_gpu import install
from models import segmenter
from simulated_gpu import RTX4090, SimulatedTimer, compiler, small_products, without_weights

from engines.timing import driver, events, gpu_file, machine, measure
from qdq.build.keys.recipe_file import read_recipe
from qdq.build.pricing.pricer import gpus_of
from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.deploy.report.schemas import schema


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimulatedTimer:
    """A simulated GPU in the place of this machine's, with matrices small enough to build."""
    timer = SimulatedTimer()
    small_products(monkeypatch)
    without_weights(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "Driver", lambda: nullcontext(SimpleNamespace(card=lambda: RTX4090)))
    monkeypatch.setattr(events, "EventTimer", lambda _: timer)
    monkeypatch.setattr(measure, "backend_for", lambda card, name: compiler())
    monkeypatch.setattr(gpu_file, "points", lambda *_: [])
    return timer


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def test_the_recipe_predicts_with_what_was_measured(gpu: SimulatedTimer) -> None:
    done = run("measure-gpu", "-o", "gpu.yaml")
    assert done.exit_code == 0, done.output
    assert "accumulate in FLOAT16" in done.stdout and "Recipe: gpu.yaml" in done.stdout
    assert "not known: " in done.stderr  # clocks and power: there is no management library
    recipe = Recipe.from_mapping(read_recipe("gpu.yaml"))
    (found,) = gpus_of(recipe)
    assert recipe.targets == ("sm89",) and found.name == "rtx4090-measured" and found.measured is not None
    assert found.measured.start_us == pytest.approx(3.0, rel=0.03)


def test_tune_takes_the_recipe(gpu: SimulatedTimer) -> None:
    pytest.importorskip("tensorrt_rtx")
    onnx.save(segmenter(), "net.onnx")

    gpu.start_us = 3000.0
    assert run("measure-gpu", "-o", "gpu.yaml").exit_code == 0
    done = run("tune", "net.onnx", "-o", "plan.json", "--recipe", "gpu.yaml", "--tune", "rewrites")
    assert done.exit_code == 0 and "predicted on rtx4090-measured" in done.stdout, done.output
    numbers = [float(w) for w in done.stdout.split() if w.replace(".", "").isdigit()]
    assert numbers[0] > 3000  # microseconds: no kernel starts earlier


def test_json(gpu: SimulatedTimer) -> None:
    said: dict[str, Any] = json.loads(run("measure-gpu", "-o", "gpu.yaml", "--json").stdout)
    jsonschema.Draft202012Validator(schema("gpu")).validate(said)
    assert said["accumulation"] == "float16" and said["card"]["sms"] == 128
    assert said["probes"]["start"]["step_us"] == pytest.approx(3.0, rel=0.03)
    assert len(said["probes"]["start"]["engines"]) == 2 and said["watched"]["why_not"]


def test_without_a_gpu_the_exit_code_is_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    done = run("measure-gpu", "-o", str(tmp_path / "gpu.yaml"))
    assert done.exit_code == 3 and "No NVIDIA driver found here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused_before_the_work(gpu: SimulatedTimer) -> None:
    done = run("measure-gpu", "-o", "absent/gpu.yaml")
    assert done.exit_code == 2 and "its folder does not exist" in done.stderr


def test_the_monitor_says_why_it_saw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine.Monitor(RTX4090.bus) as monitor:
        pass
    assert monitor.watched().summary().startswith("not known: no management library")
