"""Every file that qdq writes is held to its schema, and every declared file has a name."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest
import yaml
from click.testing import CliRunner
from models import images, save_samples, segmenter

import engines
import qdq
from engines.core.documents import Document
from qdq.cli.main import main
from qdq.deploy.report.schemas import FILES, schema

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")


def check(name: str, content: object) -> None:
    """Hold a file to its schema, and the schema to the standard; a key that no file has must be refused."""
    validator = jsonschema.Draft202012Validator(schema(name))
    validator.check_schema(schema(name))
    validator.validate(content)
    assert isinstance(content, dict) and not validator.is_valid({**content, "no_such_key": 1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, samples, and everything that the verbs write of them."""
    place = tmp_path_factory.mktemp("files")
    onnx.save(segmenter(), place / "net.onnx")
    save_samples(place / "data", images(4))
    yield place


def run(*arguments: object) -> str:
    """A verb's standard output."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    return result.stdout


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_deploy_writes(folder: Path) -> None:
    net, data, out = folder / "net.onnx", folder / "data", folder / "out"
    run("deploy", net, "--data", data, "--out", out, "--time-limit", 2, "--tune", "placement", "--scheme", "int8")
    check("plan", read(out / "plan.json"))
    check("table", read(out / "table.json"))
    check("report", read(out / "report.json"))
    check("layers", read(out / "net.engine.json"))
    check("manifest", read(out / "net.engine.manifest.json"))
    check("provenance", read(out / "provenance.json"))


def test_what_verbs_print_or_write(folder: Path) -> None:
    net, data = folder / "net.onnx", folder / "data"
    run("quantize", net, "--data", data, "--scheme", "int8", "--rest", "fp32", "-o", folder / "q.onnx")
    check("audit", json.loads(run("audit", folder / "q.onnx", "--json")))
    run("check", net, folder / "q.onnx", "--data", data, "-o", folder / "check.json")
    check("check", read(folder / "check.json"))
    check("lint", json.loads(run("lint", folder / "q.onnx", "--json")))
    run("compare", net, "--data", data, "--schemes", "int8,fp8:rounding=nearest", "-o", folder / "compared.json")
    check("compare", read(folder / "compared.json"))
    run("sensitivity", net, "--data", data, "--candidates", "int8,int4", "-o", folder / "s.json")
    check("sensitivity", read(folder / "s.json"))
    tuned = run("tune", net, "--data", data, "--time-limit", 1, "-o", folder / "tuned.json", "--json")
    check("tuning", json.loads(tuned))
    check("plan", read(folder / "tuned.json"))


@pytest.mark.parametrize(
    "text",
    [
        "scheme: int8\nexclude: ['/head/*']\ntarget: sm89\nmin_sqnr_db: 20",
        "gpu: [a10, {name: edge, target: sm89, bandwidth_gb_s: 288, tera_ops: {float32: 22, float16: 88}}]",
        "overrides: {'*/mlp/*': int4}\nblock: 64\nv0: auto\ntime_limit: 3.5",
    ],
)
def test_a_recipe_that_is_read_is_one_of_the_schema(text: str, tmp_path: Path) -> None:
    from qdq.build.recipe import Recipe

    values = yaml.safe_load(text)
    Recipe.from_mapping(values)
    check("recipe", values)


def test_a_checkpoint(tmp_path: Path) -> None:
    from qdq.measure.checkpoint import Checkpoint
    from qdq.measure.table import CalibrationTable

    kept = Checkpoint(tmp_path / "c", {"model": "a"})
    kept.write([CalibrationTable(model_sha256="a", samples_sha256="", count=0, tensors={})], {"done": [1]})
    check("checkpoint", read(tmp_path / "c"))
    assert Checkpoint(tmp_path / "c", {"model": "a"}).load()[0].model_sha256 == "a"


def test_every_declared_file_has_a_name_and_a_wrong_name_is_refused() -> None:
    for package in (engines, qdq):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                import_module(module.name)
    kinds = {kind for kind in Document.__subclasses__() if kind.__module__.split(".")[0] in ("engines", "qdq")}
    assert {(kind.__module__, kind.__name__) for kind in kinds} <= set(FILES.values())
    result = CliRunner().invoke(main, ["schema", "plam"])
    assert result.exit_code == 2 and "Did you mean 'plan'" in result.output
