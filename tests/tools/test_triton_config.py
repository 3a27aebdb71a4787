"""config.pbtxt: its fields, read from the text by a parser of the protobuf text format's small part that it uses."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import engine_graphs as graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from places import ROOT

from engines.backends.compiler import Engine
from engines.backends.layers import LayerTable
from engines.core.errors import EngineError
from engines.core.files import sha256_file
from engines.verify.covered import write_sums
from engines.verify.manifest import Manifest, sha256_model

Fields = dict[str, Any]


def parsed(text: str) -> Fields:
    """Fields of a message; a list of messages as a list, numbers as numbers."""
    words = re.findall(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:]+', text)

    def value() -> Any:
        word = words.pop(0)
        if word == "{":
            return message("}")
        if word == "[":
            found = []
            while words[0] != "]":
                if words[0] == ",":
                    words.pop(0)
                found.append(value())
            words.pop(0)
            return found
        return word[1:-1] if word[0] == '"' else int(word) if re.fullmatch(r"-?\d+", word) else word

    def message(end: str) -> Fields:
        found: Fields = {}
        while words and words[0] != end:
            name = words.pop(0)
            assert name not in found, f"{name} stands twice"
            if words[0] == ":":
                words.pop(0)
            found[name] = value()
        if end:
            assert words.pop(0) == end
        return found

    return message("")


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools/service"))
    return importlib.import_module("triton_config")


def model(first: int | str = "n", kind: int = TensorProto.FLOAT, out: list[Any] | None = None) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["logits"])],
        "net",
        [value("image", kind, [first, 1, "x", 16])],
        [value("logits", kind, [first, 3, "x", 16] if out is None else out)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def deployed(folder: Path, net: onnx.ModelProto, backend: str = "", **options: Any) -> Path:
    """A model, with an engine of a backend."""
    folder.mkdir()
    onnx.save(net, folder / "net.int8.onnx")
    if backend:
        sizes = {"engine_bytes": 1, "weight_bytes": 0, "activation_bytes": 0}
        table = LayerTable(layers=(), backend=backend, version="11.4.0", targets=("sm89",), **sizes)
        Engine(data=b"plan", table=table).save(folder / "net.engine")
        manifest = Manifest(
            model="0" * 64,
            output=sha256_model(folder / "net.int8.onnx"),
            engine=sha256_file(folder / "net.engine"),
            layers=sha256_file(folder / "net.engine.json"),
            options=options,
        )
        (folder / "net.engine.manifest.json").write_text(manifest.to_json())
    write_sums(folder)
    return folder


def test_a_tensorrt_engine(triton: ModuleType, tmp_path: Path) -> None:
    shapes = {"shape.image": "1x1x8x16:4x1x16x16:6x1x32x16"}
    said = triton.repository(deployed(tmp_path / "d", model(), "trt", **shapes), tmp_path / "repo/unet")
    found = parsed((tmp_path / "repo/unet/config.pbtxt").read_text())
    assert found == {
        "name": "unet",
        "platform": "tensorrt_plan",
        "max_batch_size": 6,
        "input": [{"name": "image", "data_type": "TYPE_FP32", "dims": [1, -1, 16]}],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": [3, -1, 16]}],
        "dynamic_batching": {"preferred_batch_size": [3, 6], "max_queue_delay_microseconds": 100},
    }
    assert (tmp_path / "repo/unet/1/model.plan").read_bytes() == b"plan" and said == (
        "unet: tensorrt_plan, max_batch_size 6"
    )
    assert sorted(p.name for p in (tmp_path / "repo/unet").rglob("*")) == ["1", "config.pbtxt", "model.plan"]
    assert [p.name for p in (tmp_path / "repo").iterdir()] == ["unet"]


def test_profiles_of_an_engine_decide_the_batch(triton: ModuleType, tmp_path: Path) -> None:
    profiles = (
        '[{"image": "1x1x8x16:1x1x8x16:2x1x8x16"}, {"image": "1x1x8x16:4x1x8x16:12x1x8x16"}, {"image": "16x1x8x16"}]'
    )
    folder = deployed(tmp_path / "d", model(), "trt", **{"tensorrt.profiles": profiles})
    triton.repository(folder, tmp_path / "a")
    assert parsed((tmp_path / "a/config.pbtxt").read_text())["max_batch_size"] == 12
    with pytest.raises(EngineError, match="from 0 to 12 is possible"):
        triton.repository(folder, tmp_path / "b", max_batch=13)
    triton.repository(folder, tmp_path / "b", max_batch=0)
    found = parsed((tmp_path / "b/config.pbtxt").read_text())
    assert found["max_batch_size"] == 0 and found["input"][0]["dims"] == [-1, 1, -1, 16]
    assert "dynamic_batching" not in found


@pytest.mark.parametrize("backend", ["", "rtx"])
def test_elsewhere_the_model_in_onnx_runtime(triton: ModuleType, tmp_path: Path, backend: str) -> None:
    folder = deployed(tmp_path / "d", model(kind=TensorProto.FLOAT16), backend)
    said = triton.repository(folder, tmp_path / "net", delay_us=7)
    found = parsed((tmp_path / "net/config.pbtxt").read_text())
    assert found["platform"] == "onnxruntime_onnx" and found["max_batch_size"] == 8
    assert found["input"] == [{"name": "image", "data_type": "TYPE_FP16", "dims": [1, -1, 16]}]
    assert found["dynamic_batching"] == {"preferred_batch_size": [4, 8], "max_queue_delay_microseconds": 7}
    assert ("no backend for net.engine" in said) == bool(backend)
    assert onnx.load(tmp_path / "net/1/model.onnx") == onnx.load(folder / "net.int8.onnx")


def test_a_fixed_batch_is_no_batching(triton: ModuleType, tmp_path: Path) -> None:
    for n, net in enumerate((model(1), model("n", out=[1, 3, "x", 16]), model("n", out=[]))):
        triton.repository(deployed(tmp_path / f"d{n}", net), tmp_path / f"m{n}")
        found = parsed((tmp_path / f"m{n}/config.pbtxt").read_text())
        assert found["max_batch_size"] == 0 and "dynamic_batching" not in found
        assert len(found["input"][0]["dims"]) == 4
    assert found["output"] == [
        {"name": "logits", "data_type": "TYPE_FP32", "dims": [1], "reshape": {"shape": []}}
    ]  # no `dims` may be empty


def test_external_data_go_along(triton: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    onnx.save(graphs.conv(), tmp_path / "d/m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    write_sums(tmp_path / "d")
    triton.repository(tmp_path / "d", tmp_path / "m")
    here, there = onnx.load(tmp_path / "m/1/model.onnx"), onnx.load(tmp_path / "d/m.onnx")
    for a, b in zip(here.graph.initializer, there.graph.initializer, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b))


def test_what_is_refused(triton: ModuleType, tmp_path: Path) -> None:
    folder = deployed(tmp_path / "d", model(kind=TensorProto.BFLOAT16))
    with pytest.raises(EngineError, match="image is TYPE_BF16, which Triton's onnxruntime_onnx does not take"):
        triton.repository(folder, tmp_path / "m")
    (tmp_path / "there").mkdir()
    with pytest.raises(EngineError, match="there exists"):
        triton.repository(folder, tmp_path / "there")
    path = folder / "net.int8.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/service/triton_config.py"), str(folder), "-o", str(tmp_path / "m")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "SHA256SUMS" in done.stderr and not (tmp_path / "m").exists()
