"""The files that qdq writes, what its verbs print with --json, and the JSON Schema of each.

Must not read or write any."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from engines.core.documents import Document, Part
from qdq.core.choices import choose

ANSWERS = {
    "built": "BuildAnswer",
    "calibrated": "CalibrateAnswer",
    "completion": "CompletionAnswer",
    "data": "DataAnswer",
    "error": "ErrorAnswer",  # of any verb
    "explained": "ExplainAnswer",
    "exported": "ExportAnswer",
    "gpu": "GpuAnswer",
    "help": "HelpAnswer",
    "page": "PageAnswer",
    "predicted": "PredictAnswer",
    "quantized": "QuantizeAnswer",
    "schemas": "SchemasAnswer",
    "segmented": "SegmentAnswer",
}
# name -> module and class of the declared model; imported when it is asked for
FILES = {
    "allocation": ("qdq.tune.sensitivity.mixed.front", "Allocation"),
    **{name: ("qdq.cli.answer.documents", kind) for name, kind in ANSWERS.items()},
    "audit": ("engines.verify.audit", "Audit"),
    "check": ("engines.verify.report", "Report"),
    "checkpoint": ("qdq.measure.checkpoint", "CheckpointFile"),
    "compare": ("qdq.deploy.compare.result", "Comparison"),
    "doctor": ("engines.backends.doctor", "Doctor"),
    "inference": ("qdq.deploy.volumes.inference", "InferenceFile"),
    "layers": ("engines.backends.layers", "LayerTable"),
    "lint": ("qdq.lint.report", "LintReport"),
    "manifest": ("engines.verify.manifest", "Manifest"),
    "measured": ("qdq.build.measured.forms", "TimedForm"),  # a line of measured.jsonl
    "noise-correction": ("qdq.deploy.diffusion.correction", "NoiseCorrection"),
    "plan": ("qdq.plan.plan", "Plan"),
    "provenance": ("qdq.deploy.trace.provenance", "Provenance"),
    "recipe": ("qdq.build.recipe", "RecipeFile"),
    "report": ("qdq.deploy.report.report", "DeployReport"),
    "sensitivity": ("qdq.tune.sensitivity.table", "Sensitivity"),
    "sensitivity-part": ("qdq.tune.sensitivity.run", "SensitivityPart"),
    "table": ("qdq.measure.table", "TableFile"),
    "timings": ("qdq.build.measured.forms", "Timings"),  # of a report or a tuning
    "tuning": ("qdq.tune.tuned", "TuningOutcome"),
}


def declared(name: str) -> type[Part]:
    """The declared model of one of `FILES`.

    Raises:
        InputError: there is no such file; names the nearest.
    """
    module, kind = FILES[choose(name, tuple(FILES), "file")]
    found: type[Part] = getattr(import_module(module), kind)
    return found


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of one of `FILES`.

    Raises:
        InputError: as `declared`.
    """
    return declared(name).schema()


def versions() -> list[tuple[str, str, str, str]]:
    """Of each of `FILES` its name, its value of "schema" and who makes it, "" where it has none, and what it is."""
    found = []
    for name in sorted(FILES):
        kind = declared(name)
        version, maker = (kind.FORMAT, kind.MAKE) if issubclass(kind, Document) else ("", "")
        found.append((name, version, (kind.__doc__ or "").split("\n\n")[0].replace("\n", " "), maker))
    return found
