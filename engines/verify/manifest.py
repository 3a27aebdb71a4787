"""What an engine was made from: hashes, versions, options and targets, so that a result can be reproduced.

Files and samples -> sha256 -> `Manifest` -> JSON beside the engine, with a checksum of itself.
Must not hold a path of the machine or any sample data: only hashes of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from msgspec import field

from engines.backends.backend import backends
from engines.core.documents import Document, DocumentError
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
        inference: of what says how images are segmented.
        targets: it was compiled for.
        options: it was made with.
        versions: of the packages that shape a result.
    """

    FORMAT: ClassVar[str] = "qdq.manifest/4"
    MAKE: ClassVar[str] = "qdq build"
    COMPUTED: ClassVar[Mapping[str, str]] = {"checksum": "checksum"}

    model: str
    output: str
    engine: str
    layers: str
    samples: str | None = None
    plan: str | None = None
    table: str | None = None
    report: str | None = None
    inference: str | None = None
    targets: tuple[str, ...] = ()
    options: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=package_versions)

    @property
    def checksum(self) -> str:
        """The sha256 of the other fields, as JSON without spaces in the order of their names."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """See `Document.from_json`.

        Raises:
            DocumentError: also where a byte is another than `to_json` wrote.
        """
        found = super().from_json(text)
        if (text if isinstance(text, bytes) else text.encode()) != found.to_json().encode():
            raise DocumentError(
                "it was changed after it was written: its checksum, or its form, is not that of its content"
            )
        return found


def sha256_model(path: Path | str) -> str:
    """The sha256 of an ONNX file and its external data.

    Without external data it equals `sha256_file`. With it: the sha256 of the lines '<sha256> <location>' of the
    model file (location empty) and of each data file, sorted by location. A copy elsewhere has the same hash.

    Raises:
        EngineError: a file cannot be read, or a data file lies outside the model's folder.
    """
    path = Path(path)
    data = {location: sha256_file(place) for location, place in data_files(path, load_graph(path)).items()}
    return joined(sha256_file(path), data)


def data_files(path: Path, graph: Any) -> dict[str, Path]:
    """Location -> file, of the external data of a model.

    Raises:
        EngineError: one lies outside the model's folder.
    """
    found = {}
    for location in sorted(external_files(graph)):
        place = data_file(path, location)
        if place is None:
            raise EngineError(f"External data {location!r} of {path} lies outside the model's folder: move it inside.")
        found[location] = place
    return found


def joined(file: str, data: Mapping[str, str]) -> str:
    """The sha256 of a model, of that of its file and those of its external data by location; see `sha256_model`."""
    lines: Iterable[str] = [f"{file} ", *(f"{held} {location}" for location, held in sorted(data.items()))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if data else file
