"""What pages say of things side by side: a row for each, and error against time and size.

`Comparison` of schemes -> dict -> schemes.html.j2. `Allocation`, the plans of a search -> dict -> front.html.j2: a
point leads to its row, which has the command that makes its plan.
"""

from __future__ import annotations

import math
from typing import Any

from qdq.deploy.compare.result import Comparison, SchemeRow, value_text
from qdq.deploy.compare.task import Task
from qdq.deploy.page import words
from qdq.deploy.page.svg import Dot, points
from qdq.deploy.report.report import size
from qdq.tune.sensitivity.mixed.front import Allocation, front

FLOATS = ("FP32", "FP16", "BF16")
PLOTS = {"size_mib": ("size", "weights in the engine, MiB"), "time_us": ("predicted time", "predicted time, µs")}


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


def plans(made: Allocation | None) -> dict[str, Any] | None:
    """The section; None without a search.

    Keys: `asked` rows of (what, value), `plots` (`title`, `picture`), `rows` (figures in words, with values to sort
    by), `metrics` names, `timed` where times are known, `steps`.
    """
    if made is None:
        return None
    fronts = {cost: front(made.tried, cost) for cost in PLOTS}
    on = {number: [PLOTS[cost][0] for cost in PLOTS if number in fronts[cost]] for number in range(len(made.tried))}
    metrics = list(made.best.values)
    return {
        "asked": _plan_asked(made),
        "plots": [_plot(made, cost, fronts[cost]) for cost in PLOTS if fronts[cost] and len(made.tried) > 1],
        "metrics": metrics,
        "timed": made.time_us is not None,
        "rows": [_plan_row(made, number, on[number], metrics) for number in range(len(made.tried))],
        "steps": made.steps,
    }


def anchor(number: int) -> str:
    """The id of a plan's row."""
    return f"plan-{number}"


def _plan_asked(made: Allocation) -> list[tuple[str, str]]:
    aim = f"least {made.minimize}" + (f"; of the front the {made.pick}" if made.pick else "")
    rows = [("Chosen for", aim), *((option, value) for option, value in made.limits.items())]
    rows += [("Candidates", ", ".join(made.texts)), ("Groups of nodes", str(len(made.groups)))]
    rows += [("Sizes by", made.compiled_by), ("Times predicted for", ", ".join(made.gpus) or "none")]
    return rows


def _plot(made: Allocation, cost: str, line: list[int]) -> dict[str, Any]:
    what, across = PLOTS[cost]
    dots = [
        Dot(
            label=str(number) if number in line or number == made.chosen else "",
            x=getattr(tried, cost),
            y=tried.drawn_db,
            kind="chosen" if number == made.chosen else "low" if tried.keeps else "beyond",
            leads_to=f"#{anchor(number)}",
            said=f"plan {number}: {words.decibels(tried.sqnr_db)}, {made.words(number)}",
        )
        for number, tried in enumerate(made.tried)
        if getattr(tried, cost) is not None
    ]
    path = [(getattr(made.tried[i], cost), made.tried[i].drawn_db) for i in line]
    title = f"Error against {what}"
    up = "SQNR, dB (higher is closer to float)"
    picture = points(dots, title=title, across=across, up=up, line=path, from_zero=False)
    return {"title": title, "picture": picture}


def _plan_row(made: Allocation, number: int, on: list[str], metrics: list[str]) -> dict[str, Any]:
    tried = made.tried[number]
    us = tried.time_us
    return {
        "number": number,
        "anchor": anchor(number),
        "chosen": number == made.chosen,
        "how": tried.how,
        "nodes": made.words(number),
        "sqnr": (
            "identical" if tried.sqnr_db == math.inf else words.decibels(tried.sqnr_db),
            words.number(tried.sqnr_db),
        ),
        "size": (f"{tried.size_mib:.3f} MiB", words.number(tried.size_mib)),
        "us": ("" if us is None else words.time(us), words.number(us)),
        "values": [f"{tried.values[name]:.4f}" if name in tried.values else "" for name in metrics],
        "front": ", ".join(on),
        "keeps": tried.keeps,
        "command": f"qdq tune MODEL --front front.json --pick {number} -o plan-{number}.json",
    }
