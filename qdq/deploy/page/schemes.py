"""What the page of `qdq compare` says: a row for each scheme, and error against time and size.

`Comparison` -> dict -> schemes.html.j2.
"""

from __future__ import annotations

import math
from typing import Any

from qdq.deploy.compare.result import Comparison, SchemeRow, value_text
from qdq.deploy.compare.task import Task
from qdq.deploy.page import words
from qdq.deploy.page.svg import Dot, points
from qdq.deploy.report.report import size

FLOATS = ("FP32", "FP16", "BF16")


def schemes(made: Comparison) -> dict[str, Any]:
    """The page of a comparison.

    Keys: `title`, `kind`, `heading`, `asked`, `metric`, `better`, `rows` (figures in words, with values to sort by),
    `plots` (`title`, `picture`), `problems` and `remarks` by scheme, `notes`.
    """
    return {
        "title": f"{made.model}: schemes compared",
        "kind": "Schemes compared",
        "heading": made.model,
        "volumes": None,
        "asked": _asked(made),
        "metric": made.task.title,
        "better": "higher is better" if made.higher_is_better else "lower is better",
        "gpus": ", ".join(made.gpus),
        "several": made.outputs > 1,
        "rows": [_row(row, made.task) for row in made.rows],
        "plots": _plots(made),
        "problems": [(row.scheme, row.problem) for row in made.rows if row.problem],
        "remarks": [(row.scheme, row.notes) for row in made.rows if row.notes],
        "notes": made.notes,
    }


def _asked(made: Comparison) -> list[tuple[str, str]]:
    shapes = "; ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in made.shapes.items())
    rows = [
        ("GPU generation", ", ".join(made.targets)),
        ("GPU that times are predicted for", ", ".join(made.gpus) or "none"),
        ("Scored on", f"{made.samples} {made.evaluated_on}"),
        ("Metric", made.task.title),
        ("Shapes", shapes or "as the model has them"),
        ("Sha256 of the model", made.model_sha256),
    ]
    return [*rows, ("Calibration samples among these", str(made.overlap))] if made.overlap else rows


def _row(row: SchemeRow, task: Task) -> dict[str, Any]:
    shares = ", ".join(f"{words.kind(k)} {words.share(v)}" for k, v in (row.shares or {}).items() if v >= 0.005)
    return {
        "scheme": row.scheme,
        "float": row.scheme in FLOATS,
        "precision": row.precision,
        "weights_per": row.weights_per,
        "data_per": row.data_per,
        "nodes": row.quantized_nodes,
        "model": ("" if row.model_bytes is None else size(row.model_bytes), words.number(row.model_bytes)),
        "weights": ("" if row.weight_bytes is None else size(row.weight_bytes), words.number(row.weight_bytes)),
        "shares": shares,
        "sqnr": ("identical" if row.sqnr_db == math.inf else words.decibels(row.sqnr_db), words.number(row.sqnr_db)),
        "worst": row.worst_output,
        "value": (value_text(row, task), words.number(row.value)),
        "us": ("" if row.predicted_us is None else words.time(row.predicted_us), words.number(row.predicted_us)),
    }


def _plots(made: Comparison) -> list[dict[str, Any]]:
    """SQNR, or the metric where outputs are no numbers, against predicted time and against size."""
    numeric = any(row.sqnr_db is not None and math.isfinite(row.sqnr_db) for row in made.rows)
    found = []
    for what, across in (("time", "predicted time, µs"), ("size", "model file, MB (10⁶ bytes)")):
        dots = []
        for row in made.rows:
            y = row.sqnr_db if numeric else row.value
            x = row.predicted_us if what == "time" else None if row.model_bytes is None else row.model_bytes / 1e6
            if y is not None and x is not None and math.isfinite(y) and math.isfinite(x):
                dots.append(Dot(label=row.scheme, x=x, y=y, kind="float" if row.scheme in FLOATS else "low"))
        up = "SQNR, dB (higher is closer to float)" if numeric else made.task.title
        title = f"{'SQNR' if numeric else made.task.title} against {'predicted time' if what == 'time' else 'size'}"
        if len(dots) > 1:
            found.append({"title": title, "picture": points(dots, title=title, across=across, up=up)})
    return found
