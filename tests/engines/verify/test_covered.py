"""A file that is another than the manifest or SHA256SUMS says is refused, and what is read is what was hashed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import engine_graphs as graphs
import onnx
import pytest

from engines.backends.compiler import Engine
from engines.backends.layers import LayerTable
from engines.core.documents import replace
from engines.core.errors import EngineError
from engines.core.files import sha256_file
from engines.verify.covered import SUMS, AlteredFileError, Covered, read_sums, refresh_sums, require_covered, write_sums
from engines.verify.manifest import Manifest, sha256_model

TABLE = LayerTable(
    layers=(), backend="rtx", version="1.7.1", targets=("sm89",), engine_bytes=6, weight_bytes=0, activation_bytes=0
)


def made(folder: Path, *, external: bool = False) -> Path:
    """A model, an engine with its papers, a plan and SHA256SUMS."""
    folder.mkdir()
    path, engine = folder / "m.int8.onnx", folder / "m.engine"
    if external:
        onnx.save(graphs.conv(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    else:
        onnx.save(graphs.conv(), path)
    Engine(data=b"engine", table=TABLE).save(engine)
    (folder / "plan.json").write_text("{}\n")
    manifest = Manifest(
        model="0" * 64,
        output=sha256_model(path),
        engine=sha256_file(engine),
        layers=sha256_file(folder / "m.engine.json"),
        plan=sha256_file(folder / "plan.json"),
        targets=("sm89",),
    )
    (folder / "m.engine.manifest.json").write_text(manifest.to_json())
    write_sums(folder)
    return folder


@pytest.fixture(params=[False, True], ids=["one file", "external data"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return made(tmp_path / "m", external=request.param)


def used(path: Path, scratch: Path) -> None:
    """Everything that a runtime reads of it."""
    held = Covered.of(path)
    held.verify()
    if held.engine:
        held.read(held.engine)
        held.layers()
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    held.model(scratch)


def altered(path: Path) -> Iterator[str]:
    """A file with one bit of one byte turned, at several offsets; as it was afterwards."""
    before = path.read_bytes()
    for at in sorted({0, 1, len(before) // 3, len(before) // 2, len(before) - 2, len(before) - 1}):
        for bit in (1, 32):
            path.write_bytes(before[:at] + bytes([before[at] ^ bit]) + before[at + 1 :])
            yield f"{path.name}, byte {at} of {len(before)}, bit {bit}"
    path.write_bytes(before)


def test_every_altered_byte_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in sorted(folder.iterdir()):
        for what in altered(path):
            for given in (folder, folder / "m.engine", folder / "m.int8.onnx"):
                with pytest.raises(EngineError):
                    used(given, tmp_path / "scratch")
                    pytest.fail(f"{what} passed, by {given.name}")
    for given in (folder, folder / "m.engine", folder / "m.int8.onnx"):
        used(given, tmp_path / "scratch")


def test_the_manifest_alone_covers_engine_layers_model_and_itself(folder: Path, tmp_path: Path) -> None:
    (folder / SUMS).unlink()
    for name in ("m.engine", "m.engine.json", "m.engine.manifest.json", "m.int8.onnx", "plan.json"):
        for what in altered(folder / name):
            with pytest.raises(EngineError):
                used(folder / "m.engine", tmp_path / "scratch")
                pytest.fail(what)
    used(folder / "m.int8.onnx", tmp_path / "scratch")


def test_sums_are_those_of_sha256sum(folder: Path) -> None:
    for name in ("a b.txt", "back\\slash", "line\nend", "ümlaut"):
        (folder / name).write_text(name)
    write_sums(folder)
    done = subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(read_sums(folder)) == {p.name for p in folder.iterdir()} - {SUMS}
    own = subprocess.run(["sha256sum", *sorted(read_sums(folder))], cwd=folder, capture_output=True, check=True).stdout
    assert own == (folder / SUMS).read_bytes()


def test_a_file_made_again_is_put_into_the_sums(folder: Path) -> None:
    before = read_sums(folder)
    (folder / "report.html").write_text("<p>")
    refresh_sums(folder, "report.html")
    assert read_sums(folder) == before | {"report.html": sha256_file(folder / "report.html")}
    (folder / SUMS).unlink()
    refresh_sums(folder, "report.html")
    assert not (folder / SUMS).exists()


def test_what_is_missing(folder: Path, tmp_path: Path) -> None:
    (folder / "plan.json").unlink()
    used(folder, tmp_path / "scratch")  # nothing that runs needs it
    (folder / "m.engine").unlink()
    with pytest.raises(AlteredFileError, match=r"SHA256SUMS .*names m\.engine, which is not there"):
        used(folder, tmp_path / "scratch")


def test_a_name_leads_to_no_other_folder(folder: Path) -> None:
    (folder.parent / "beside").write_text("x")
    (folder / SUMS).write_text(f"{sha256_file(folder.parent / 'beside')}  ../beside\n")
    with pytest.raises(AlteredFileError, match=r"\.\./beside, which is not there"):
        Covered.of(folder / "m.engine").verify()


@pytest.mark.parametrize("text", ["x\n", "0" * 64 + " a\n", "\n\n", ("0" * 64 + "  a\n") * 2, "G" * 64 + "  a\n"])
def test_damaged_sums(folder: Path, text: str) -> None:
    (folder / SUMS).write_text(text)
    with pytest.raises(AlteredFileError, match="is damaged"):
        Covered.of(folder)


def test_nothing_covers_it(tmp_path: Path) -> None:
    onnx.save(graphs.conv(), tmp_path / "m.onnx")
    with pytest.raises(EngineError, match="Nothing says what"):
        Covered.of(tmp_path / "m.onnx")
    with pytest.raises(EngineError, match="no such file"):
        Covered.of(tmp_path / "none.engine")
    with pytest.raises(EngineError, match="holds 0 models that SHA256SUMS names, and one is needed"):
        Covered.of(tmp_path)
    require_covered(tmp_path / "m.onnx")  # a model of the user's own


def test_two_engines_in_a_folder_are_told_apart_by_name(folder: Path) -> None:
    for end in ("", ".json", ".manifest.json"):
        shutil.copy(folder / f"m.engine{end}", folder / f"n.engine{end}")
    assert Covered.of(folder).engine == "m.engine"  # the one that SHA256SUMS names
    (folder / SUMS).unlink()
    with pytest.raises(EngineError, match="holds 2 engines"):
        Covered.of(folder)
    assert Covered.of(folder / "n.engine").engine == "n.engine"


def test_the_engine_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.from_json((folder / "m.engine.manifest.json").read_text())
    (folder / "m.engine.manifest.json").write_text(replace(manifest, output="1" * 64).to_json())
    write_sums(folder)
    with pytest.raises(AlteredFileError, match=r"compiled from \(sha256 111111111111…; m\.int8\.onnx has"):
        used(folder / "m.engine", tmp_path / "scratch")


def test_another_version_is_said(folder: Path) -> None:
    path = folder / "m.engine.manifest.json"
    path.write_text(path.read_text().replace(Manifest.FORMAT, "qdq.manifest/99"))
    with pytest.raises(EngineError, match=r"manifest/99.*made by another version of qdq"):
        Covered.of(folder)


def test_what_is_read_is_what_was_hashed(folder: Path, tmp_path: Path) -> None:
    """A file that changes after it was verified does not get through."""
    held = Covered.of(folder)
    held.verify()
    (folder / "m.engine").write_bytes(b"changed")
    with pytest.raises(AlteredFileError):
        held.read("m.engine")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    model = held.model(scratch)
    for path in folder.iterdir():
        path.unlink()
    onnx.load_external_data_for_model(model.proto, str(model.directory))  # from copies of the bytes that were hashed
