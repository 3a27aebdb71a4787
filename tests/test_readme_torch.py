"""What README.md shows of PyTorch works as written, in order, in one folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[torch]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'qdq[torch]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
pytestmark = pytest.mark.torch

from readme_blocks import blocks, commands, of_torch  # noqa: E402

from qdq.cli.main import main  # noqa: E402


def test_commands_and_python_of_the_readme_that_need_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    files = [block for block in blocks("python") if of_torch(block) and block.startswith("# ")]
    for block in files:
        Path(block.partition("\n")[0].removeprefix("# ")).write_text(block)
    run = [command for command in commands() if of_torch(command)]
    assert files and {shlex.split(command)[1] for command in run} == {"deploy", "export"}
    for command in run:
        result = CliRunner().invoke(main, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}{result.exception!r}"
    traced = json.loads(Path("from_torch/provenance.json").read_text())
    assert traced["exported"]["source"] == "torch:nets:unet" and Path("from_torch/unet.onnx").is_file()
    assert traced["calibration"]["samples"] == 4 and Path("float.onnx").is_file()
    for block in blocks("python"):
        if of_torch(block) and block not in files:
            exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert Path("conv.int8.onnx").is_file()
