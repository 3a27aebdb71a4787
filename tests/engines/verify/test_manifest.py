"""Manifests and hashes: stable, complete, and free of paths."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import engine_graphs as graphs
import onnx
import pytest

from engines.core.errors import EngineError
from engines.core.files import sha256_file
from engines.verify.manifest import Manifest, sha256_model


def save_external(folder: Path) -> Path:
    """A model with its weights in a file beside it."""
    folder.mkdir()
    path = folder / "m.onnx"
    onnx.save(graphs.conv(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    return path


def test_the_manifest_survives_its_file_and_is_stable() -> None:
    manifest = Manifest(model="a", output="b", engine="c", layers="d", targets=("sm89",), options={"calibrator": "mse"})
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert "onnx" in manifest.versions and manifest.to_json() == manifest.to_json()
    with pytest.raises(EngineError, match="another file"):
        Manifest.from_json("{}")
    with pytest.raises(EngineError, match="made by another version of qdq"):
        Manifest.from_json(manifest.to_json().replace(Manifest.FORMAT, "qdq.manifest/2"))


def test_a_file_hash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(EngineError, match="Cannot read"):
        sha256_file(tmp_path / "absent")


def test_a_model_without_external_data_is_its_file(tmp_path: Path) -> None:
    onnx.save(graphs.conv(), tmp_path / "m.onnx")
    assert sha256_model(tmp_path / "m.onnx") == sha256_file(tmp_path / "m.onnx")


def test_external_data_counts_and_the_folder_does_not(tmp_path: Path) -> None:
    path = save_external(tmp_path / "a")
    before = sha256_model(path)
    copy = shutil.copytree(tmp_path / "a", tmp_path / "b") / "m.onnx"
    assert sha256_model(copy) == before != sha256_file(path)
    data = bytearray((path.parent / "m.data").read_bytes())
    data[0] ^= 1
    (path.parent / "m.data").write_bytes(data)
    assert sha256_model(path) != before == sha256_model(copy)


def test_missing_or_outside_external_data_is_an_error(tmp_path: Path) -> None:
    path = save_external(tmp_path / "a")
    (path.parent / "m.data").unlink()
    with pytest.raises(EngineError, match=r"Cannot read .*m\.data"):
        sha256_model(path)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../m.data"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="outside the model's folder"):
        sha256_model(path)
