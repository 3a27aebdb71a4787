"""Models and data behind links: what ONNX Runtime opens is opened, by every verb, and what leads out is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from models import images, save_samples, segmenter
from onnx import TensorProto, helper, numpy_helper

from engines.core import onnx_runtime as ort
from engines.core.arithmetic import session
from engines.core.errors import EngineError
from engines.core.files import sha256_file
from engines.core.load import data_file
from engines.verify.manifest import sha256_model
from qdq.cli.main import main
from qdq.core.errors import ModelError
from qdq.model.storage import load, save

WEIGHT = np.arange(2048, dtype=np.float32)


def doubler(folder: Path, location: str = "m.data", *, low: bool = False) -> Path:
    """A model in a folder that adds a weight, which lies in a file of its own; FP16 inside where `low`."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = TensorProto.FLOAT16 if low else TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, kind, [2048]) for name in "xy"]
    weight = numpy_helper.from_array(WEIGHT.astype(np.float16 if low else np.float32), "w")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"], "add")], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location=location, size_threshold=0)
    return folder / "m.onnx"


def cached(model: onnx.ModelProto, repository: Path) -> Path:
    """A model with external data as Hugging Face's cache holds it: links to files named by their hashes."""
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd" / "onnx"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    onnx.save(model, blobs / "m.onnx", save_as_external_data=True, location="m.onnx_data", size_threshold=0)
    for name in ("m.onnx", "m.onnx_data"):
        blob = blobs / sha256_file(blobs / name)
        (blobs / name).rename(blob)
        (snapshot / name).symlink_to(Path("../../../blobs") / blob.name)
    return snapshot / "m.onnx"


def move(path: Path, to: Path, link: bool = True) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)
    if link:
        path.symlink_to(to)


def hugging_face(root: Path) -> Path:
    return cached(onnx.load(doubler(root / "made")), root / "models--a--b")


def within(root: Path) -> Path:
    path = doubler(root / "model")
    move(root / "model" / "m.data", root / "model" / "deep" / "bytes")
    return path


def of_folder(root: Path) -> Path:
    doubler(root / "model")
    (root / "alias").symlink_to(root / "model")
    return root / "alias" / "m.onnx"


def beside_the_link(root: Path) -> Path:
    path = doubler(root / "model")
    move(path, root / "blobs" / "a")
    return path


def chained(root: Path) -> Path:
    path = hugging_face(root)
    (root / "short").mkdir()
    for name in ("m.onnx", "m.onnx_data"):
        (root / "short" / name).symlink_to(path.with_name(name))
    return root / "short" / "m.onnx"


def below(root: Path) -> Path:
    (root / "model" / "sub").mkdir(parents=True)
    path = doubler(root / "model", "sub/m.data")
    move(path, root / "blobs" / "a")
    move(root / "model" / "sub" / "m.data", root / "blobs" / "b")
    return path


def data_elsewhere(root: Path) -> Path:
    path = doubler(root / "model")
    move(root / "model" / "m.data", root / "elsewhere" / "m.data")
    return path


def both_elsewhere(root: Path) -> Path:
    path = data_elsewhere(root)
    move(path, root / "blobs" / "a")
    return path


def half_way(root: Path) -> Path:
    """The data lie in a folder that the link goes through, neither in the first nor in the last."""
    doubler(root / "a")
    (root / "b").mkdir()
    (root / "c").mkdir()
    (root / "b" / "m.onnx").symlink_to(root / "a" / "m.onnx")
    (root / "c" / "m.onnx").symlink_to(root / "b" / "m.onnx")
    move(root / "a" / "m.data", root / "b" / "m.data", link=False)
    (root / "c" / "m.data").symlink_to(root / "b" / "m.data")
    return root / "c" / "m.onnx"


def only_beside_the_blob(root: Path) -> Path:
    doubler(root / "blobs")
    (root / "model").mkdir()
    (root / "model" / "m.onnx").symlink_to(root / "blobs" / "m.onnx")
    return root / "model" / "m.onnx"


FOLLOWED = (hugging_face, within, of_folder, beside_the_link, chained, below)
REFUSED = (data_elsewhere, both_elsewhere, half_way, only_beside_the_blob)


@pytest.mark.parametrize("layout", FOLLOWED)
def test_what_onnx_runtime_follows_is_followed(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    path = layout(tmp_path)
    found = ort.session(path).run(None, {"x": np.zeros(2048, np.float32)})[0]
    model = load(path)
    assert np.array_equal(model.array("w"), found) and np.array_equal(found, WEIGHT)
    data = ort.session(model.proto, directory=model.directory).run(None, {"x": np.zeros(2048, np.float32)})[0]
    assert np.array_equal(data, WEIGHT)  # as it is in memory
    assert model.sha256 == hashlib.sha256(path.read_bytes() + WEIGHT.tobytes()).hexdigest()
    save(model, tmp_path / "copy.onnx")
    assert np.array_equal(load(tmp_path / "copy.onnx").array("w"), WEIGHT)


@pytest.mark.parametrize("layout", REFUSED)
def test_what_onnx_runtime_refuses_is_refused(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    path = layout(tmp_path)
    with pytest.raises(EngineError, match=r"escapes|not exist"):
        ort.session(path)
    with pytest.raises(ModelError, match="is not a file in" if layout is only_beside_the_blob else "is not inside"):
        load(path)
    with pytest.raises(EngineError, match=r"Cannot read|outside the model's folder"):
        sha256_model(path)


@pytest.mark.parametrize("location", ["", "/etc/hostname", "a\0b", "../m.data"])
def test_a_location_that_leads_out_has_no_file(location: str, tmp_path: Path) -> None:
    assert data_file(tmp_path / "m.onnx", location) is None


def test_a_hash_does_not_depend_on_links(tmp_path: Path) -> None:
    path = hugging_face(tmp_path)
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("m.onnx", "m.onnx_data"):
        (flat / name).write_bytes(path.with_name(name).read_bytes())
    assert sha256_model(path) == sha256_model(flat / "m.onnx")
    assert load(path).sha256 == load(flat / "m.onnx").sha256


def test_a_half_precision_model_runs_as_one_in_memory(tmp_path: Path) -> None:
    path = cached(onnx.load(doubler(tmp_path / "made", low=True)), tmp_path / "models--a--b")
    (found,) = session(path).run(None, {"x": np.zeros(2048, np.float16)})  # of a stand-in, which is no file
    assert np.array_equal(found, WEIGHT.astype(np.float16))


def test_every_verb_opens_a_model_of_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    monkeypatch.chdir(tmp_path)
    path = str(cached(segmenter(), tmp_path / "models--a--b").relative_to(tmp_path))
    beside = str(Path(path).with_name("m.engine"))
    save_samples(tmp_path / "data", images(3))

    def done(*args: str) -> str:
        result = CliRunner().invoke(main, list(args))
        assert result.exit_code == 0, (args, result.output)
        return result.stdout

    data = ("--data", "data")
    done("plan", path, "-o", "plan.json")
    done("explain", path, "/head/Conv")
    done("lint", path)
    done("calibrate", path, *data, "-o", "table.json")
    done("quantize", path, *data, "--table", "table.json", "-o", "q.onnx")
    done("build", path, "-o", beside)
    assert json.loads(done("audit", beside, "--json"))["nodes"] == json.loads(done("audit", path, "--json"))["nodes"]
    assert json.loads(done("check", path, "q.onnx", *data, "--json"))["passed"]
    done("tune", path, *data, "-o", "variant.json", "--time-limit", "1")
    done("compare", path, *data, "--schemes", "int8", "-o", "compared.json")
    done("deploy", path, *data, "--tune", "off", "--out", "out")
    names = {p.name for p in (tmp_path / path).parent.iterdir()}
    assert names == {"m.onnx", "m.onnx_data", "m.engine", "m.engine.json", "m.engine.manifest.json"}
