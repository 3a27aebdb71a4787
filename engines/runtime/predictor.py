"""One object for services: what `qdq deploy` or `qdq build` wrote, verified, loaded and run.

    with engines.open("build/") as model:
        model.warm_up()
        outputs = model.run({"image": array})          # from any thread
        model.segment("scan.nii.gz").save("labels.nii.gz")

path -> files verified -> an engine on a GPU that it fits, else the Q/DQ model in ONNX Runtime -> `Predictor`.
Must not load a byte that was not verified, or choose the slower of two without saying so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, get_args

import numpy as np
import onnx

from engines.backends.backend import Running, backend_named, target_name
from engines.backends.doctor import gpus
from engines.backends.layers import LayerTable
from engines.core.errors import EngineError, MissingRuntimeError, import_runtime
from engines.core.files import Scratch
from engines.runtime.arrays import Array, TensorSpec, checked
from engines.runtime.cpu import OnCpu
from engines.runtime.gpu import OnGpuEngine
from engines.verify.covered import INFERENCE, LAYERS, SCRIPT, AlteredFileError, Covered

GROUP = "engines.segment"  # entry points: (Predictor, content of INFERENCE) -> Segments
LOG = logging.getLogger("engines")
Where = Literal["auto", "gpu", "cpu"]
_COMPATIBLE = "VERSION_COMPATIBLE"
_AMPERE = 80


class Labels(Protocol):
    """What `Predictor.segment` gives.

    Attributes:
        array: (i, j, k) labels on the image's own grid, 0 the background; of channels that overlap (i, j, k, channel).
        affine: (4, 4) voxel index to RAS+ millimetres.
        names: structure -> its label value or values; of channels that overlap, its index along the fourth axis.
    """

    array: Array
    affine: Array
    names: Mapping[str, int | list[int]]

    def save(self, path: Path | str) -> None:
        """Write a NIfTI file, .nii or .nii.gz."""

    def to_bytes(self) -> bytes:
        """The content of a .nii.gz file."""


class Segments(Protocol):
    """How images are segmented, as a package that knows images implements it."""

    said: str
    batch: int

    def __call__(self, volume: Any, affine: Any) -> Labels:
        """The labels of one image, from any thread."""

    def warm_up(self) -> None:
        """Run one window."""


class Predictor(AbstractContextManager["Predictor"]):
    """An opened model; see `open`. Methods may be called from several threads at once.

    Attributes:
        inputs: that `run` takes.
        outputs: that it gives.
        name: of the file that runs.
        title: what runs it, and on which device.
        because: why no engine runs; "" where one does.
        files: that were verified.
        sha256: of the Q/DQ model, which is what an engine was compiled from.
        graph: of that model, without external data; None of an engine without it, or of one that segments no images.
    """

    def __init__(
        self,
        runner: OnCpu | OnGpuEngine,
        *,
        name: str,
        sha256: str,
        because: str,
        files: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]],
        inference: bytes | None,
        graph: onnx.ModelProto | None,
    ) -> None:
        """For `open` alone: what runs, and what is known of it."""
        self._runner, self._lock, self._open = runner, threading.Lock(), True
        self._shapes, self._inference = shapes, inference
        self._segments: Segments | None = None
        self.inputs: tuple[TensorSpec, ...] = runner.inputs
        self.outputs: tuple[TensorSpec, ...] = runner.outputs
        self.name, self.sha256, self.title = name, sha256, runner.title
        self.because, self.files = because, tuple(files)
        self.graph = graph

    def run(self, sample: Mapping[str, Any]) -> dict[str, Array]:
        """What the model gives for one sample.

        Args:
            sample: input name -> array of exactly its type and a shape that it takes: NumPy's, or any that speaks
                DLPack (PyTorch, CuPy, JAX), on the CPU; where an engine runs also on its GPU.

        Returns:
            Output name -> array, in memory of its own.

        Raises:
            EngineError: another name, type, rank or shape; or the run fails.
            OutOfMemoryError: it needs more memory than there is.
        """
        if not self._open:
            raise EngineError(f"{self.name} was closed: open it again.")
        return self._runner.run(checked(sample, self.inputs))

    def segment(self, volume: Any, affine: Any = None) -> Labels:
        """The labels of one image on its own grid, as `qdq segment` gives them, bit for bit.

        Args:
            volume: a file (NIfTI, NRRD, MetaImage) or a folder of one DICOM series; or an array (i, j, k) or
                (channels, i, j, k) of the file's values.
            affine: of an array: (4, 4), voxel index to RAS+ millimetres.

        Raises:
            EngineError: the folder does not say how images are segmented, or a run fails.
            qdq's InputError, calib_data's DataError: the image cannot be used; both have an exit code of 2.
        """
        return self._segmenting()(volume, affine)

    def warm_up(self, sample: Mapping[str, Any] | None = None) -> float:
        """Run once, so that what is made at the first run is there; seconds that it took.

        Args:
            sample: None takes zeros of the usual shapes; where images are segmented, one window of them.

        Raises:
            EngineError: shapes are open and nothing says what is usual; or as `run`.
        """
        began = time.perf_counter()
        if sample is None and self._inference is not None:
            self._segmenting().warm_up()
        else:
            self.run(sample if sample is not None else self._zeros())
        return time.perf_counter() - began

    def describe(self) -> dict[str, Any]:
        """What runs where and why, what it takes and gives, in plain values; no path."""
        segments: dict[str, Any] | None = None
        if self._inference is not None:
            try:
                made = self._segmenting()
                segments = {"how": made.said, "windows_per_run": made.batch}
            except Exception as error:
                segments = {"not": str(error)}
        return {
            "model": self.name,
            "runs_on": self.title,
            "because": self.because,
            "inputs": [spec.to_mapping() for spec in self.inputs],
            "outputs": [spec.to_mapping() for spec in self.outputs],
            "segments": segments,
            "verified": list(self.files),
        }

    def close(self) -> None:
        """Give memory back, after runs that go on; a second time does nothing."""
        self._open = False
        self._runner.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See `close`."""
        self.close()

    def _segmenting(self) -> Segments:
        with self._lock:
            if self._segments is None:
                if self._inference is None:
                    raise EngineError(
                        f"Nothing says how {self.name} segments images: there is no {INFERENCE} beside it, which `qdq "
                        "deploy` writes where its samples are images. Prepare arrays yourself and call run()."
                    )
                self._segments = _implementation()(self, self._inference)
            return self._segments

    def _zeros(self) -> dict[str, Array]:
        found, lacking = {}, list[str]()
        for spec in self.inputs:
            usual = spec.ranges[0].opt if spec.ranges else self._shapes.get(spec.name, spec.shape)
            if None in usual or not spec.dtype:
                lacking.append(spec.name)
            else:
                found[spec.name] = np.zeros([n or 0 for n in usual], spec.dtype)
        if lacking:
            raise EngineError(
                f"Input {lacking[0]!r} has open sizes, and nothing says which are usual: give warm_up a sample."
            )
        return found


def open(
    path: Path | str,
    *,
    on: Where = "auto",
    running: Running | None = None,
    custom_ops: Sequence[Path | str] = (),
    threads: int = 0,
) -> Predictor:
    """Open what `qdq deploy` or `qdq build` wrote, once every file of it is verified.

    An engine runs on a GPU of this machine that it fits. Elsewhere the Q/DQ model that it was compiled from runs in
    ONNX Runtime: `Predictor.describe` and the log (logger "engines") say so.

    Args:
        path: a folder of `qdq deploy`, an engine, or a Q/DQ model; beside it its manifest, or SHA256SUMS.
        on: gpu refuses where the engine does not run; cpu takes the Q/DQ model.
        running: what an engine needs beside it.
        custom_ops: libraries of custom operators for ONNX Runtime, which are code.
        threads: of ONNX Runtime inside one operator; 0 lets it choose.

    Raises:
        AlteredFileError: a file is another than the manifest or SHA256SUMS says, or is missing.
        EngineError: nothing covers it; it is of another format or version; an engine that was named is for another GPU;
            `on` is another word.
        MissingRuntimeError: a package is missing, or with gpu, the GPU.
    """
    if on not in (places := get_args(Where)):
        raise EngineError(f"on is {on!r}; {', '.join(places)} are known.")
    path = Path(path)
    held = Covered.of(path)
    table = held.layers() if held.engine else None
    if table is not None:
        device, because = _device(held, table, named=path.name == held.engine, on=on)
    else:
        built = f": `sh {SCRIPT}` builds it on a machine with its GPU" if SCRIPT in held.expected else ""
        device, because = None, f"there is no engine{built}"
        if on == "gpu":
            raise EngineError(f"Cannot run {path} on a GPU: {because}.")
    shapes = {name: shape.opt for name, shape in held.shapes().items()}
    later = {INFERENCE, held.engine + LAYERS, held.onnx if device is None else held.engine}  # hashed as they are read
    with Scratch() as scratch:
        files = held.verify(but=later)
        inference = held.read(INFERENCE) if INFERENCE in held.expected else None
        runner: OnCpu | OnGpuEngine
        graph: onnx.ModelProto | None = None
        if device is None or table is None:
            model = held.model(scratch)
            name, sha256, graph = model.name, model.sha256, model.proto
            runner = OnCpu(model, custom_ops=custom_ops, threads=threads)
        else:
            assert held.manifest is not None  # of an engine
            name, sha256 = held.engine, held.manifest.output
            if inference is not None:
                with suppress(AlteredFileError):  # it need not be there
                    graph = held.model(None).proto
            runner = OnGpuEngine(
                held.read(name),
                backend=table.backend,
                device=device,
                running=running or Running(),
                host_code=_COMPATIBLE in _flags(held),
                where=name,
            )
    files = tuple(sorted({*files, name}))
    made = Predictor(
        runner,
        name=name,
        sha256=sha256,
        because=because,
        files=files,
        shapes=shapes,
        inference=inference,
        graph=graph,
    )
    LOG.info("%s runs in %s%s", name, made.title, f": {because}" if because else "")
    return made


def _device(held: Covered, table: LayerTable, *, named: bool, on: Where) -> tuple[int | None, str]:
    """The GPU that runs an engine, None for ONNX Runtime; and why not the engine.

    Raises:
        EngineError: see `open`.
    """
    backend = backend_named(table.backend)
    if on == "cpu":
        return None, "the CPU was asked for"
    found = gpus()
    fits = [n for n, gpu in enumerate(found) if _fits(gpu.target, table, held)]
    if not fits:
        have = f"this machine has {found[0].name} ({found[0].target})" if found else "no NVIDIA GPU was found here"
        why = f"{have}, and {held.engine} is for {', '.join(table.targets)}"
        if on == "gpu" or (named and found):
            kind = EngineError if found else MissingRuntimeError
            raise kind(f"Cannot run {held.engine}: {why}. Build it for this GPU, or open the folder or the Q/DQ model.")
        return None, why
    trt = import_runtime(backend.runtime)
    if not _same(table.version, str(trt.__version__)) and _COMPATIBLE not in _flags(held):
        raise EngineError(
            f"Cannot run {held.engine}: {backend.title} {table.version} compiled it, and {trt.__version__} is "
            "installed here, which does not load it. Install that version, or build the engine again; on='cpu' runs "
            "the Q/DQ model meanwhile."
        )
    return fits[0], ""


def _fits(target: str, table: LayerTable, held: Covered) -> bool:
    """Whether a GPU of a generation runs an engine."""
    own = tuple(map(target_name, table.targets))
    options = held.manifest.options if held.manifest else {}
    later = str(options.get("tensorrt.hardware_compatibility_level", "")) == "AMPERE_PLUS"
    return target in own or (later and int(target[2:]) >= _AMPERE)


def _flags(held: Covered) -> str:
    return str(held.manifest.options.get("tensorrt.flags", "")) if held.manifest else ""


def _same(compiled: str, installed: str) -> bool:
    """Whether two versions are one as far as both say."""
    return all(a == b for a, b in zip(compiled.split("."), installed.split("."), strict=False))


def _implementation() -> Any:
    """What knows images, of the installed packages.

    Raises:
        EngineError: none does.
    """
    for point in metadata.entry_points(group=GROUP):
        return point.load()
    raise EngineError(
        f"No installed package registers itself for {GROUP!r}, so nothing here knows images: pip install "
        "'qdq[medical]' (a checkout: pip install -e '.[medical]')."
    )
