"""The files that qdq writes, and the JSON Schema of each. Must not read or write any."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qdq.core.choices import choose

# name -> module and class of the declared model; imported when it is asked for
FILES = {
    "audit": ("engines.verify.audit", "Audit"),
    "check": ("engines.verify.report", "Report"),
    "checkpoint": ("qdq.measure.checkpoint", "CheckpointFile"),
    "compare": ("qdq.deploy.compare.result", "Comparison"),
    "inference": ("qdq.deploy.volumes.inference", "InferenceFile"),
    "layers": ("engines.backends.layers", "LayerTable"),
    "lint": ("qdq.lint.report", "LintReport"),
    "manifest": ("engines.verify.manifest", "Manifest"),
    "measured": ("qdq.build.measured.forms", "TimedForm"),  # a line of measured.jsonl
    "plan": ("qdq.plan.plan", "Plan"),
    "provenance": ("qdq.deploy.trace.provenance", "Provenance"),
    "recipe": ("qdq.build.recipe", "RecipeFile"),
    "report": ("qdq.deploy.report.report", "DeployReport"),
    "table": ("qdq.measure.table", "TableFile"),
    "timings": ("qdq.build.measured.forms", "Timings"),  # of a report or a tuning
    "tuning": ("qdq.tune.tuned", "TuningOutcome"),
}


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of one of `FILES`.

    Raises:
        InputError: there is no such file; names the nearest.
    """
    module, kind = FILES[choose(name, tuple(FILES), "file")]
    found: dict[str, Any] = getattr(import_module(module), kind).schema()
    return found
