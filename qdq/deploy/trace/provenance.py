"""provenance.json: where a deployed model comes from and what it is worth, in one file, for a technical file.

recipe, samples, report, files of the folder -> `provenance_of` -> `Provenance` -> provenance.json. Only hashes tell of
data. It holds a date, so no manifest covers it: SHA256SUMS does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from msgspec import field

from engines.backends.backend import backend_named
from engines.core.documents import Document, Measured, Part, replace
from engines.core.files import sha256_file
from qdq.build.recipe import Recipe
from qdq.deploy.report.report import DeployReport
from qdq.deploy.trace.host import Host, moment, packages
from qdq.frontend.exported import Exported
from qdq.model.model import Model

NAME = "provenance.json"


class File(Part, frozen=True, kw_only=True):
    """A file, by its name alone, and the sha256 of its bytes; of a model with external data, as of `Model.sha256`."""

    name: str
    sha256: str


class DataSet(Part, frozen=True, kw_only=True):
    """Samples as the model saw them.

    Attributes:
        samples: how many; None where that was not counted.
        sha256: over the sorted sha256 of each sample's values; None where it is not known.
    """

    samples: int | None
    sha256: str | None


class ExportedFrom(Part, frozen=True, kw_only=True):
    """What the float model was exported from.

    Attributes:
        source: as the command names it, without folders.
        exporter: that wrote the file: torch.export or TorchScript; "" where there was none.
        framework: with its version.
        opset: of the file.
        samples: how many inputs the file was compared on with its source.
        relative_error: by output, the largest difference over its largest magnitude; of whole numbers the part that
            differs.
    """

    source: str
    exporter: str
    framework: str
    opset: int
    samples: int
    relative_error: dict[str, float]

    @classmethod
    def of(cls, exported: Exported) -> ExportedFrom:
        """The record of an export."""
        return cls(
            source=exported.source,
            exporter=exported.exporter,
            framework=exported.framework,
            opset=exported.opset,
            samples=exported.samples,
            relative_error={error.name: error.relative for error in exported.errors},
        )


class CompilerUsed(Part, frozen=True, kw_only=True):
    """Whose engine the model is for.

    Attributes:
        title: its name.
        version: that compiled the engine; None where no engine was built.
        targets: GPU generations.
        chosen_because: why that compiler; "" where the user said so.
    """

    title: str
    version: str | None
    targets: tuple[str, ...]
    chosen_because: str


class Results(Part, frozen=True, kw_only=True):
    """The headline figures; report.json has all.

    Attributes:
        measured_on: 'engine', or 'Q/DQ model' where that stood for the engine.
        output: the worst one.
        sqnr_db: of it, against the float model.
        cosine: of it.
        top1: of it.
        dice: of it, by class.
        volume_dice: structure -> mean Dice to the float model, in whole volumes.
        int8_share: of the multiply-adds, as compiled; None without an engine.
        quantized_nodes: of the plan.
        float_file_bytes: of the float model.
        file_bytes: of the model that is deployed.
        engine_bytes: of the engine.
        predicted_us: of one inference; None where it was not predicted.
        measured_us: median of one inference on this machine's GPU.
    """

    measured_on: str
    output: str
    sqnr_db: Measured | None
    cosine: Measured | None
    top1: Measured | None
    dice: dict[int, float]
    volume_dice: dict[str, float | None] = field(default_factory=dict)
    int8_share: float | None
    quantized_nodes: int
    float_file_bytes: int
    file_bytes: int
    engine_bytes: int | None
    predicted_us: float | None
    measured_us: float | None


class Provenance(Document, frozen=True, kw_only=True):
    """Where a deployed model comes from.

    Attributes:
        created: UTC, ISO 8601; SOURCE_DATE_EPOCH replaces the clock.
        command: words of the command line, files by name, data and folders hidden; empty from Python.
        model: the float model.
        exported: what that was exported from; None where it was given as an ONNX file.
        calibration: samples.
        evaluation: samples; None where those of the calibration were used.
        overlap: evaluation samples that are calibration samples too.
        options: the recipe as it was in force, but for the limits.
        limits: that decide `passed`.
        passed: whether every limit was kept.
        failures: one sentence for each that was not.
        results: headline figures.
        compiler: whose engine.
        packages: distribution -> version, of qdq, what it may call and what these need, where installed.
        host: the machine.
        files: that were written, but for this one and those made after it.
    """

    FORMAT: ClassVar[str] = "qdq.provenance/1"
    MAKE: ClassVar[str] = "qdq deploy"

    created: str
    command: tuple[str, ...]
    model: File
    exported: ExportedFrom | None = None
    calibration: DataSet
    evaluation: DataSet | None
    overlap: int
    options: dict[str, Any]
    limits: dict[str, float]
    passed: bool
    failures: tuple[str, ...]
    results: Results
    compiler: CompilerUsed
    packages: dict[str, str]
    host: Host
    files: tuple[File, ...]


def provenance_of(
    folder: Path,
    *,
    model: Model,
    name: str,
    report: DeployReport,
    recipe: Recipe,
    calibration: DataSet,
    evaluation: DataSet | None,
    command: Sequence[str],
    exported: Exported | None = None,
) -> Provenance:
    """Of a folder that holds all other results.

    Args:
        folder: with the results.
        model: the float model.
        name: of its file.
        report: of the run.
        recipe: in force.
        calibration: samples.
        evaluation: samples; None: those of the calibration.
        command: as of `command_of`.
        exported: where the float model was exported.

    Raises:
        InputError: SOURCE_DATE_EPOCH is no time.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    names = ("min_int8_share", "max_size_mib", "max_memory_mib", "max_latency_us")
    others = {name: value for name in names if (value := getattr(recipe, name)) is not None}
    limits = {**recipe.limits, **others, **{f"min_metric {name}": value for name, value in recipe.min_metrics.items()}}
    return Provenance(
        created=moment(),
        command=tuple(command),
        model=File(name=name, sha256=model.sha256),
        exported=ExportedFrom.of(exported) if exported else None,
        calibration=calibration,
        evaluation=evaluation,
        overlap=report.overlap,
        options=options_of(recipe),
        limits={key: float(value) for key, value in limits.items()},
        passed=report.passed,
        failures=tuple(report.failures),
        results=_results(report),
        compiler=CompilerUsed(
            title=report.compiler,
            version=report.audit.version if report.audit else None,
            targets=report.targets,
            chosen_because=report.chosen_because,
        ),
        packages=packages(),
        host=Host.here(),
        files=tuple(File(name=path.name, sha256=sha256_file(path)) for path in files),
    )


def options_of(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, by its keys; of a path the name alone."""
    found: dict[str, Any] = {
        **recipe.settings.to_mapping(),
        "unquantized_type": recipe.unquantized_type,
        "tune": recipe.tune,
        "tune_compiles": recipe.tune_compiles,
        "time_limit": recipe.time_limit_s,
        "judge": recipe.judge,
        "gpu": [gpu if isinstance(gpu, str) else dict(gpu) for gpu in recipe.gpus],
        "target": list(recipe.targets),
        "shape": [str(shape) for shape in recipe.shapes],
        "hold": {name: int(value) for name, value in recipe.held_inputs.items()},
        "task": recipe.task,
        "class_axis": recipe.class_axis,
    }
    if not backend_named(recipe.backend).no_options:
        libraries = [{"file": Path(x.path).name, "sha256": x.known()} for x in recipe.tensorrt.libraries]
        found["tensorrt"] = {**replace(recipe.tensorrt, plugins=()).recorded(), "plugins": libraries}
    if recipe.volume:
        volume = recipe.volume.to_mapping()
        found["volume"] = {**volume, **({"bundle": Path(volume["bundle"]).name} if "bundle" in volume else {})}
    if recipe.whole.asked:
        window = recipe.whole.window
        found["window"] = None if window is None else msgspec.to_builtins(window)
        found["segmentation"] = msgspec.to_builtins(recipe.whole.segmentation)
    return found


def _results(report: DeployReport) -> Results:
    check, audit, tuning = report.check, report.audit, report.tuning
    worst, volumes = check.worst, check.volumes
    means = {s.name: s.dice.mean if s.dice else None for s in volumes.to_float.structures} if volumes else {}
    return Results(
        measured_on="Q/DQ model" if check.stood_for_engine else "engine",
        output=worst.name,
        sqnr_db=worst.sqnr_db,
        cosine=worst.cosine,
        top1=worst.top1,
        dice=worst.dice,
        volume_dice=means,
        int8_share=audit.int8_share if audit else None,
        quantized_nodes=report.quantized_nodes,
        float_file_bytes=report.float_file_bytes,
        file_bytes=report.int8_file_bytes,
        engine_bytes=audit.engine_bytes if audit else None,
        predicted_us=tuning.predicted_us if tuning else None,
        measured_us=tuning.measured.shipped.measured_us if tuning and tuning.measured else None,
    )
