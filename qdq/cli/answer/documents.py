"""What verbs print with `--json` where that is not a file of another stage. Must not print or compute."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from engines.core.documents import Document, Part


class Failure(Part, frozen=True, kw_only=True):
    """What ended a verb.

    Attributes:
        kind: usage: the command line is wrong; input: a file or value is; runtime: something must be installed, or a
            GPU is missing; fault: qdq is wrong; interrupted, terminated: Ctrl-C, SIGTERM.
        exit_code: of the process: 2, 2, 3, 70, 130, 143.
        message: the paragraph that standard error gets too.
        cause: class of the exception, "" where there is none.
        log: file with the traceback of a fault, if it could be written.
    """

    kind: Literal["usage", "input", "runtime", "fault", "interrupted", "terminated"]
    exit_code: int
    message: str
    cause: str
    log: str | None


class ErrorAnswer(Document, frozen=True, kw_only=True):
    """In place of a verb's answer: what ended it. A limit that failed is no error; its report says so."""

    FORMAT: ClassVar[str] = "qdq.error/1"
    MAKE: ClassVar[str] = "qdq VERB --json"

    error: Failure


class CalibrateAnswer(Document, frozen=True, kw_only=True):
    """What `calibrate` wrote.

    Attributes:
        table: the file.
        tensors: how many have a histogram.
        magnitudes: of how many float tensors the largest magnitude is known.
        samples: how many were measured.
        repeated: how many of them are equal to another.
        pictures: folder of the histograms, None where none were drawn.
        notes: what else a person must know.
    """

    FORMAT: ClassVar[str] = "qdq.calibrated/1"
    MAKE: ClassVar[str] = "qdq calibrate --json"

    table: str
    tensors: int
    magnitudes: int
    samples: int
    repeated: int
    pictures: str | None
    notes: tuple[str, ...]


class QuantizeAnswer(Document, frozen=True, kw_only=True):
    """What `quantize` wrote.

    Attributes:
        model: the Q/DQ model's file.
        quantized_nodes: how many.
        operands: what they hold and read, as 'INT8 weights and INT8 data'.
        notes: what else a person must know.
    """

    FORMAT: ClassVar[str] = "qdq.quantized/1"
    MAKE: ClassVar[str] = "qdq quantize --json"

    model: str
    quantized_nodes: int
    operands: str
    notes: tuple[str, ...]


class BuildAnswer(Document, frozen=True, kw_only=True):
    """What `build` wrote.

    Attributes:
        engine: its file; layers and manifest lie beside it.
        compiled: the ONNX file that it is of: the one given, or the form of it that the compiler takes.
        kernels: how many it has.
        targets: that it is for.
        notes: what else a person must know.
        warnings: what a person must not miss.
    """

    FORMAT: ClassVar[str] = "qdq.built/1"
    MAKE: ClassVar[str] = "qdq build --json"

    engine: str
    compiled: str
    kernels: int
    targets: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


class OutputApart(Part, frozen=True, kw_only=True):
    """An output of an exported file against its source, over all samples compared.

    Attributes:
        largest: difference, in the output's unit; of whole numbers the part that differs.
        relative: that over the output's largest magnitude.
        sqnr_db: signal to noise ratio; None where nothing differs.
    """

    largest: float
    relative: float
    sqnr_db: float | None


class ExportAnswer(Document, frozen=True, kw_only=True):
    """What `export` wrote.

    Attributes:
        model: the ONNX file.
        source: what it was exported from.
        exporter, framework: that wrote it, and with which version of what.
        opset: of the file.
        inputs, outputs: names.
        dynamic: input -> axis -> name of a size that is open.
        errors: by output.
        samples: how many inputs were compared: the example, others made of it, and samples.
        notes: what else a person must know.
    """

    FORMAT: ClassVar[str] = "qdq.exported/1"
    MAKE: ClassVar[str] = "qdq export --json"

    model: str
    source: str
    exporter: str
    framework: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]
    errors: dict[str, OutputApart]
    samples: int
    notes: tuple[str, ...]


class SegmentAnswer(Document, frozen=True, kw_only=True):
    """What `segment` wrote: files in a folder, by name; and what else a person must know."""

    FORMAT: ClassVar[str] = "qdq.segmented/1"
    MAKE: ClassVar[str] = "qdq segment --json"

    folder: str
    files: tuple[str, ...]
    notes: tuple[str, ...]


class PageAnswer(Document, frozen=True, kw_only=True):
    """The page that `report` wrote."""

    FORMAT: ClassVar[str] = "qdq.page/1"
    MAKE: ClassVar[str] = "qdq report --json"

    page: str


class ExplainAnswer(Document, frozen=True, kw_only=True):
    """What is known of a node, in lines for a person."""

    FORMAT: ClassVar[str] = "qdq.explained/1"
    MAKE: ClassVar[str] = "qdq explain --json"

    node: str
    lines: tuple[str, ...]


class ArrayOf(Part, frozen=True, kw_only=True):
    """An array of a sample: its shape and NumPy's name of its type."""

    shape: tuple[int, ...]
    dtype: str


class SeenImage(Part, frozen=True, kw_only=True):
    """An image, in words without a name.

    Attributes:
        case: how it is called.
        stored: what the file holds.
        seen: what a model gets.
        label: values of its label, "" where there is none.
        samples: which parts are samples.
    """

    case: str
    stored: str
    seen: str
    label: str
    samples: str


class DataAnswer(Document, frozen=True, kw_only=True):
    """What samples hold.

    Attributes:
        form: of the source, in words.
        arrays: of one of the samples, by name; empty where samples are images.
        images: each of them; empty where samples are arrays.
        recipe: the `volume:` block, where `--write-recipe` asked for it.
        notes: what else a person must know.
    """

    FORMAT: ClassVar[str] = "qdq.data/1"
    MAKE: ClassVar[str] = "qdq data --json"

    form: str
    arrays: dict[str, ArrayOf]
    images: tuple[SeenImage, ...]
    recipe: str | None
    notes: tuple[str, ...]


class PredictedKernel(Part, frozen=True, kw_only=True):
    """A kernel, as `engines.cost.predict.KernelCost`: microseconds, bytes moved, multiply-adds and what bounds it."""

    name: str
    kind: str
    us: float
    start_us: float
    bytes: int
    macs: int
    dtype: str
    bound: str
    onnx_nodes: tuple[str, ...]


class PredictAnswer(Document, frozen=True, kw_only=True):
    """The predicted time of an engine, kernel by kernel.

    Attributes:
        gpu: that it is predicted for.
        predicted_us: microseconds of one inference.
        family: kind of network.
        error: relative error that two of three predictions keep to; None where it is not known.
        notes: what is assumed.
        kernels: in the order of the engine.
    """

    FORMAT: ClassVar[str] = "qdq.predicted/1"
    MAKE: ClassVar[str] = "qdq audit --gpu GPU --json"

    gpu: str
    predicted_us: float
    family: str
    error: float | None
    notes: tuple[str, ...]
    kernels: tuple[PredictedKernel, ...]


class GpuAnswer(Document, frozen=True, kw_only=True):
    """What `measure-gpu` measured.

    Attributes:
        card: the GPU as its driver describes it.
        backend, version: of the compiler of the probes.
        gpu: what a recipe's `gpu` takes.
        accumulation: type in which FP16 products accumulate, None where that is not clear.
        evidence, missing: what that was read from, and what could not be measured.
        probes: name -> its times in microseconds.
        points: whole engines, predicted and measured.
        watched: clocks and power meanwhile.
        recipe: the file written.
    """

    FORMAT: ClassVar[str] = "qdq.gpu/1"
    MAKE: ClassVar[str] = "qdq measure-gpu --json"

    card: dict[str, Any]
    backend: str
    version: str
    gpu: dict[str, Any]
    accumulation: str | None
    evidence: tuple[str, ...]
    missing: tuple[str, ...]
    probes: dict[str, dict[str, Any]]
    points: tuple[dict[str, Any], ...]
    watched: dict[str, Any]
    recipe: str


class KnownSchema(Part, frozen=True, kw_only=True):
    """A form of file or answer: its name for `qdq schema NAME`, its value of "schema", what it is and who makes it."""

    name: str
    version: str
    what: str
    made_by: str


class SchemasAnswer(Document, frozen=True, kw_only=True):
    """Every form of file that qdq reads or writes, and of every answer."""

    FORMAT: ClassVar[str] = "qdq.schemas/1"
    MAKE: ClassVar[str] = "qdq schema --json"

    schemas: tuple[KnownSchema, ...]


class HelpAnswer(Document, frozen=True, kw_only=True):
    """A topic of `qdq help`, or the list of them where none was named."""

    FORMAT: ClassVar[str] = "qdq.help/1"
    MAKE: ClassVar[str] = "qdq help --json"

    topic: str
    text: str


class CompletionAnswer(Document, frozen=True, kw_only=True):
    """The script that completes qdq's words in a shell."""

    FORMAT: ClassVar[str] = "qdq.completion/1"
    MAKE: ClassVar[str] = "qdq completion --json"

    shell: str
    script: str
