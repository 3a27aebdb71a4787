"""What covers the files of a folder: an engine's manifest, and SHA256SUMS. Every file is held to all that names it.

a folder, an engine or an ONNX file -> `Covered.of` -> `verify` hashes all; `read` gives the very bytes that it hashed.
Must not load what nothing covers. A checksum finds damage and mix-ups: who edits a file, the manifest and SHA256SUMS
alike leaves no trace, and against that SHA256SUMS is signed with a tool of the user's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from engines.backends.compiler import ShapeRange
from engines.backends.layers import LayerTable
from engines.core.documents import DocumentError
from engines.core.errors import BuildError, EngineError
from engines.core.files import read_file, regular, sha256_file, write_atomic
from engines.verify.manifest import Manifest, data_files, joined, sha256_model

SUMS, INFERENCE = "SHA256SUMS", "inference.json"
SHAPE_KEY = "shape."  # of options in a manifest
MANIFEST, LAYERS = ".manifest.json", ".json"  # behind the name of an engine
BESIDE = ("plan", "table", "report", "inference")  # what `deploy` writes beside an engine as <name>.json
# What SHA256SUMS may name and a copy of the folder lack: nothing that runs needs it.
SPARE = ("plan.json", "table.json", "report.json", "report.html", "slices.npz", "provenance.json", "measured.jsonl")
SCRIPT = "build_engine.sh"
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
_PIECE = 1 << 20


class AlteredFileError(EngineError):
    """A file is another than the manifest or SHA256SUMS of its folder says."""


def sums_text(hashes: Mapping[str, str]) -> str:
    """SHA256SUMS of name -> sha256, as `sha256sum` writes it and `sha256sum -c` reads it; a name escaped as there."""
    lines = []
    for name, held in sorted(hashes.items()):
        plain = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        lines.append(f"{chr(92) * (plain != name)}{held}  {plain}\n")
    return "".join(lines)


def read_sums(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the SHA256SUMS of a folder; {} where there is none.

    Raises:
        AlteredFileError: it has a line of another form, or names a file twice.
    """
    path, found = folder / SUMS, dict[str, str]()
    if not path.exists():
        return found
    try:
        text = read_file(path).decode(errors="surrogateescape")
    except OSError as error:
        raise EngineError(f"Cannot read {path}: {error.strerror or error}.") from error
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line and number == len(lines):
            break
        if (match := _LINE.fullmatch(line)) is None:
            raise AlteredFileError(
                f"{path} is damaged: line {number} is not a sha256, two spaces and a name, as `sha256sum` writes it. "
                "Put the file back, or make the folder again with `qdq deploy`."
            )
        name = _unescaped(match[3]) if match[1] else match[3]
        if name in found:
            raise AlteredFileError(f"{path} is damaged: it names {name} twice. Put the file back.")
        found[name] = match[2]
    return found


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS of every file in a folder but hidden ones and itself; folders in it are left out."""
    names = (p.name for p in folder.iterdir() if p.is_file() and p.name != SUMS and not p.name.startswith("."))
    write_atomic(folder / SUMS, sums_text({name: sha256_file(folder / name) for name in names}))


def refresh_sums(folder: Path, *names: str) -> None:
    """Put files that were made again into the SHA256SUMS of a folder, where it has one.

    Raises:
        AlteredFileError: it is damaged.
    """
    if sums := read_sums(folder):
        write_atomic(folder / SUMS, sums_text({**sums, **{name: sha256_file(folder / name) for name in names}}))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """A model whose bytes were hashed: without its external data, and the folder where these lie; "" without any.

    `sha256` is as of `sha256_model`.
    """

    name: str
    sha256: str
    proto: onnx.ModelProto
    directory: Path | str


@dataclass(frozen=True, kw_only=True)
class Covered:
    """The files of one deployed model, and what each must be.

    Attributes:
        folder: where they lie.
        engine: name of the engine, "" where there is none.
        onnx: name of the ONNX file that was given or that SHA256SUMS lists; "" where only the manifest tells.
        manifest: of the engine, None where there is no engine.
        sums: SHA256SUMS, {} where there is none.
    """

    folder: Path
    engine: str
    onnx: str
    manifest: Manifest | None
    sums: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> Covered:
        """Of a folder with one model, an engine, or an ONNX file.

        Raises:
            EngineError: there is nothing, or several models; a manifest or SHA256SUMS cannot be read; nothing covers
                the file.
            AlteredFileError: one of them was changed.
        """
        if not path.exists():
            raise EngineError(
                f"Cannot read {path}: there is no such file. Give an engine, an .onnx file, or what `qdq deploy` wrote."
            )
        folder = path if path.is_dir() else path.parent
        sums = read_sums(folder)
        if path.is_dir():
            return cls._of_folder(path, sums)
        if path.suffix != ".onnx":
            return cls(folder=folder, engine=path.name, onnx="", manifest=_manifest(path), sums=sums)
        own, unread = sha256_model(path), list[str]()
        for place in sorted(folder.glob(f"*{MANIFEST}")):
            engine = place.with_name(place.name.removesuffix(MANIFEST))
            try:
                manifest = _manifest(engine)
            except EngineError as error:
                unread.append(f" {error}")
                continue
            if manifest.output == own:
                return cls(folder=folder, engine=engine.name, onnx=path.name, manifest=manifest, sums=sums)
        if path.name not in sums:
            raise EngineError(
                f"Nothing says what {path} is: beside it lie neither {SUMS} with its name nor the manifest of an "
                "engine that was compiled from it. Give a folder that `qdq deploy` wrote, or an engine of `qdq build`."
                f"{''.join(unread[:3])}"
            )
        return cls(folder=folder, engine="", onnx=path.name, manifest=None, sums=sums)

    @classmethod
    def _of_folder(cls, folder: Path, sums: Mapping[str, str]) -> Covered:
        every = [path.name.removesuffix(MANIFEST) for path in sorted(folder.glob(f"*{MANIFEST}"))]
        engines = [name for name in every if name + MANIFEST in sums] or every
        models = [name for name in sums if name.endswith(".onnx")]
        if len(engines) > 1 or (not engines and len(models) != 1):
            what = f"{len(engines)} engines" if engines else f"{len(models)} models that {SUMS} names"
            raise EngineError(
                f"{folder} holds {what}, and one is needed: give the folder that `qdq deploy` wrote, or name the "
                "engine or the Q/DQ model in it."
            )
        manifest = _manifest(folder / engines[0]) if engines else None
        onnx_name = models[0] if len(models) == 1 else ""
        return cls(folder=folder, engine=engines[0] if engines else "", onnx=onnx_name, manifest=manifest, sums=sums)

    def __post_init__(self) -> None:
        """Hold the manifest, as it was read, to SHA256SUMS.

        Raises:
            AlteredFileError: it is another.
        """
        if self.manifest and (name := self.engine + MANIFEST) in self.sums:
            self._hold(name, hashlib.sha256(self.manifest.to_json().encode()).hexdigest())

    @cached_property
    def expected(self) -> dict[str, dict[str, str]]:
        """Name -> what names it -> the sha256 that it must have; ONNX files by SHA256SUMS alone."""
        found: dict[str, dict[str, str]] = {}
        if self.manifest:
            own = {self.engine: self.manifest.engine, self.engine + LAYERS: self.manifest.layers}
            own |= {f"{name}.json": held for name in BESIDE if (held := getattr(self.manifest, name))}
            for name, held in own.items():
                found.setdefault(name, {})[self.engine + MANIFEST] = held
        for name, held in self.sums.items():
            found.setdefault(name, {})[SUMS] = held
        return found

    def verify(self, *, but: Collection[str] = ()) -> tuple[str, ...]:
        """Hash every file that is named, but those that `read` and `model` will; the names of all that are there.

        Raises:
            AlteredFileError: one is another, or one that is needed is missing.
            EngineError: one cannot be read.
        """
        there = []
        for name in self.expected:
            place = self.folder / name
            if not place.exists() and name in (*SPARE, SCRIPT):
                continue
            if Path(name).name != name or not place.exists():
                raise AlteredFileError(
                    f"{' and '.join(self.expected[name])} in {self.folder} names {name}, which is not there: put the "
                    "file back, or make the folder again with `qdq deploy`."
                )
            if name not in but:
                self._hold(name, sha256_file(place))
            there.append(name)
        return tuple(there)

    def read(self, name: str) -> bytes:
        """The bytes of a file that is named, hashed after they were read.

        Raises:
            AlteredFileError: they are others.
            EngineError: the file cannot be read, or nothing names it.
        """
        try:
            content = read_file(self.folder / name)
        except OSError as error:
            raise EngineError(f"Cannot read {self.folder / name}: {error.strerror or error}.") from error
        if name not in self.expected:
            raise EngineError(f"Nothing says what {self.folder / name} must be, so it is not loaded.")
        self._hold(name, hashlib.sha256(content).hexdigest())
        return content

    def layers(self) -> LayerTable:
        """The layer table of the engine.

        Raises:
            EngineError: as `read`; or it is of another format.
        """
        return read_layers(self.read(self.engine + LAYERS), self.folder / (self.engine + LAYERS))

    def shapes(self) -> dict[str, ShapeRange]:
        """The shapes that the engine was compiled for, by the manifest; {} without one.

        Raises:
            EngineError: they cannot be read.
        """
        options = self.manifest.options if self.manifest else {}
        given = {k.removeprefix(SHAPE_KEY): str(v) for k, v in options.items() if k.startswith(SHAPE_KEY)}
        try:
            return {name: ShapeRange.parse(text) for name, text in given.items()}
        except (ValueError, BuildError) as error:
            said = ", ".join(f"{name} {text!r}" for name, text in given.items())
            raise EngineError(
                f"The manifest has shapes that cannot be read: {said}. Build the engine again."
            ) from error

    def model(self, scratch: Path | None) -> HeldModel:
        """The Q/DQ model, of the bytes that were hashed; external data are copied to `scratch` as they are hashed.

        Without a `scratch` they are hashed only: for who wants the graph.

        Raises:
            AlteredFileError: the file is another.
            EngineError: it is not in the folder, or no model.
        """
        names = [self.onnx] if self.onnx else [path.name for path in sorted(self.folder.glob("*.onnx"))]
        seen = []
        for name in names:
            found = self._copied(name, scratch)
            if self.manifest is None or found.sha256 == self.manifest.output:
                return found
            seen.append(f"; {name} has {found.sha256[:12]}…")
        wanted = self.manifest.output[:12] if self.manifest else ""
        raise AlteredFileError(
            f"No .onnx file in {self.folder} is the one that {self.engine} was compiled from (sha256 {wanted}…"
            f"{''.join(seen[:3])}). Put that file there."
        )

    def _copied(self, name: str, scratch: Path | None) -> HeldModel:
        """A model, its external data hashed, and copied where there is a `scratch`."""
        path = self.folder / name
        try:
            content = read_file(path)
            proto = onnx.load_from_string(content)
        except (OSError, DecodeError) as error:
            raise EngineError(f"Cannot read {path}: it is no ONNX file ({error}).") from error
        own = hashlib.sha256(content).hexdigest()
        if name in self.expected:
            self._hold(name, own)
        data = {}
        for location, place in data_files(path, proto).items():
            data[location] = sha256_file(place) if scratch is None else _copy(place, scratch, location)
            if location in self.expected:
                self._hold(location, data[location])
        return HeldModel(
            name=name, sha256=joined(own, data), proto=proto, directory=scratch if data and scratch else ""
        )

    def _hold(self, name: str, found: str) -> None:
        for said, held in self.expected[name].items():
            if found != held:
                what = "another engine than" if name == self.engine else "not"
                raise AlteredFileError(
                    f"{self.folder / name} is {what} the one that {self.folder / said} was written with: its sha256 is "
                    f"{found[:12]}…, and {held[:12]}… is needed. Put that file back, or build the engine again (`qdq "
                    "build`, or `qdq deploy` into a folder of its own)."
                )


def require_covered(path: Path) -> None:
    """Hold an ONNX file to the SHA256SUMS beside it, with all that this names; nothing where it does not name it.

    Raises:
        AlteredFileError, EngineError: as `Covered.verify`.
    """
    folder = path.parent
    sums = read_sums(folder) if path.exists() else {}
    if path.name in sums:
        Covered(folder=folder, engine="", onnx=path.name, manifest=None, sums=sums).verify()


def read_layers(content: bytes, path: Path) -> LayerTable:
    """A layer table.

    Raises:
        EngineError: of another format; names the file.
    """
    try:
        return LayerTable.from_json(content)
    except DocumentError as error:
        raise EngineError(f"Cannot read {path}: {error}.") from error


def _manifest(engine: Path) -> Manifest:
    path = engine.with_name(engine.name + MANIFEST)
    try:
        return Manifest.from_json(read_file(path))
    except (OSError, DocumentError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EngineError(
            f"Cannot read {path}, which belongs to the engine {engine}: {reason}. An engine that qdq built has it; "
            "build it again, or give the .onnx file."
        ) from error


def _copy(source: Path, scratch: Path, location: str) -> str:
    """Copy a file into a folder; the sha256 of what was copied."""
    target = (scratch / location).resolve()
    if not target.is_relative_to(scratch.resolve()):
        raise EngineError(f"External data {location!r} lie outside the model's folder: move them inside.")
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with regular(source).open("rb") as file, target.open("wb") as copy:
            while piece := file.read(_PIECE):
                digest.update(piece)
                copy.write(piece)
    except OSError as error:
        raise EngineError(f"Cannot read or copy external data {location!r}: {error.strerror or error}.") from error
    return digest.hexdigest()


def _unescaped(name: str) -> str:
    return re.sub(r"\\([\\nr])", lambda match: {"\\": "\\", "n": "\n", "r": "\r"}[match[1]], name)
