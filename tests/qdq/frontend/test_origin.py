"""MODEL arguments: which are no ONNX file, what other verbs say of them, and what is said without torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from qdq.cli.main import main
from qdq.cli.options.origin import dynamic_of
from qdq.core.errors import InputError
from qdq.frontend.origin import kind_of, origin_of


def test_what_a_text_names() -> None:
    assert kind_of("torch:package.module:factory") == "torch:" and kind_of("x.pt2") == ".pt2"
    assert kind_of("unet.onnx") is None and kind_of("torch.onnx") is None
    assert origin_of(Path("folder/unet.onnx")) is None


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("torch:nets:unet", "qdq export torch:nets:unet -o model.onnx"),
        ("unet.pt2", "qdq export unet.pt2 -o model.onnx"),
        ("unet.pth", "weights and no network"),
        ("model.safetensors", "weights and no network"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "explain", "calibrate", "lint", "build", "check", "quantize"])
def test_other_verbs_name_the_one_that_writes_an_onnx_file(
    verb: str, model: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = {
        "explain": ["/node"],
        "calibrate": ["--random-data", "2", "-o", "t.json"],
        "quantize": ["--random-data", "2", "-o", "q.onnx"],
        "build": ["-o", "x.engine"],
        "check": ["q.onnx", "--random-data", "2"],
    }
    done = CliRunner().invoke(main, [verb, model, *more.get(verb, [])])
    assert done.exit_code == 2 and words in done.stderr, done.output


@pytest.mark.parametrize("package", ["torch", "onnxscript"])
def test_without_torch_the_command_that_installs_it_is_said(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qdq.frontend.pytorch.libraries import torch_here

    torch_here.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    for model in ("torch:nets:unet", "unet.pt2"):
        done = CliRunner().invoke(main, ["deploy", model, "--data", "volumes", "--out", "build"])
        assert done.exit_code == 3 and "pip install 'qdq[torch]'" in done.stderr, done.output


def test_options_of_an_export_are_refused_for_an_onnx_file(tmp_path: Path) -> None:
    for options in (["--dynamic", "x:0=batch"], ["--opset", "20"]):
        done = CliRunner().invoke(main, ["deploy", "x.onnx", "--data", "d", "--out", str(tmp_path / "o"), *options])
        assert done.exit_code == 2 and "are of an export" in done.stderr


def test_dynamic_sizes_of_the_command_line() -> None:
    assert dynamic_of([]) is None and dynamic_of(["none"]) is False
    assert dynamic_of(["a:0=n,2=h", "b:1=t"]) == {"a": {0: "n", 2: "h"}, "b": {1: "t"}}
    for wrong in ("a", "a:0", "a:x=n", ":0=n", "a:0="):
        with pytest.raises(InputError, match="INPUT:AXIS=NAME"):
            dynamic_of([wrong])
