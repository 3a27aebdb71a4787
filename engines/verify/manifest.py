"""What an engine was made from: hashes, versions, options and targets, so that a result can be reproduced.

Files and samples -> sha256 -> `Manifest` -> JSON beside the engine.
Must not hold a path of the machine or any sample data: only hashes of them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

from msgspec import field

from engines.backends.backend import backends
from engines.core.documents import Document
from engines.core.errors import EngineError
from engines.core.files import sha256_file
from engines.core.load import data_file, load_graph
from engines.core.nodes import external_files

PACKAGES = ("qdq", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "polygraphy")


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that shape a result; reads metadata, imports nothing."""
    from importlib import metadata  # takes 20 ms

    found = {}
    for name in (*PACKAGES, *(backend.packages[0] for backend in backends().values())):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Manifest(Document, frozen=True, kw_only=True):
    """Hashes are hexadecimal sha256, of every file that belongs to the engine; None where the job had no such thing.

    Attributes:
        model: of the float model, with its external data.
        output: of the ONNX file that was compiled, with its external data.
        engine: of the engine.
        layers: of its layer table.
        samples: of all calibration samples together.
        plan: of the plan.
        table: of the calibration table.
        report: of the report.
        targets: it was compiled for.
        options: it was made with.
        versions: of the packages that shape a result.
    """

    FORMAT: ClassVar[str] = "qdq.manifest/3"
    MAKE: ClassVar[str] = "qdq build"

    model: str
    output: str
    engine: str
    layers: str
    samples: str | None = None
    plan: str | None = None
    table: str | None = None
    report: str | None = None
    targets: tuple[str, ...] = ()
    options: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=package_versions)


def sha256_model(path: Path | str) -> str:
    """The sha256 of an ONNX file and its external data.

    Without external data it equals `sha256_file`. With it: the sha256 of the lines '<sha256> <location>' of the
    model file (location empty) and of each data file, sorted by location. A copy elsewhere has the same hash.

    Raises:
        EngineError: a file cannot be read, or a data file lies outside the model's folder.
    """
    path = Path(path)
    lines = [f"{sha256_file(path)} "]
    for location in sorted(external_files(load_graph(path))):
        place = data_file(path, location)
        if place is None:
            raise EngineError(f"External data {location!r} of {path} lies outside the model's folder: move it inside.")
        lines.append(f"{sha256_file(place)} {location}")
    if len(lines) == 1:
        return lines[0].strip()
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
