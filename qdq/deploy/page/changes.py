"""What differs between two runs: outcome, limits, figures, nodes whose type changed, options.

two folders -> two `Run` -> dict -> changes.html.j2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qdq.core.errors import InputError
from qdq.deploy.page import words
from qdq.deploy.page.folder import Run, read
from qdq.deploy.page.network import nodes
from qdq.deploy.page.view import flat, view
from qdq.deploy.report.report import size

SAME = 0.0005  # relative: a smaller difference is none that a reader sees


def changes(before: Path, after: Path) -> dict[str, Any]:
    """The page of two runs.

    Keys: `title`, `kind`, `heading`, `names`, `verdicts` (both, as of `view`), `limits` (`limit`, `option`, then
    `needed`, `got`, `kept` of both or None), `figures` (`what`, `before`, `after`, `change`, `sense`), `nodes` (`node`,
    `op`, `before`, `after`), `same_nodes`, `only` (nodes in one run alone), `options` (`key`, `before`, `after`),
    `models` (whether both are of one model; None where that is not known).

    Raises:
        InputError: see `folder.read`, or one of them is a comparison of schemes.
    """
    runs = [_run(path) for path in (before, after)]
    views = [view(run) for run in runs]
    names = [run.name for run in runs]
    if names[0] == names[1]:
        names = [f"{name} ({which})" for name, which in zip(names, ("first", "second"), strict=True)]
    rows = [{row["node"]: row for row in nodes(run)} for run in runs]
    both = [name for name in rows[0] if name in rows[1]]
    changed = [name for name in both if rows[0][name]["type"] != rows[1][name]["type"]]
    return {
        "title": f"{names[0]} and {names[1]}: what changed",
        "kind": "Two runs compared",
        "heading": f"{names[0]} → {names[1]}",
        "volumes": None,
        "names": names,
        "verdicts": [v["verdict"] for v in views],
        "limits": _limits(*(v["limits"] for v in views)),
        "figures": [row for row in _figures(*runs) if row["before"] or row["after"]],
        "nodes": [
            {
                "node": name,
                "op": rows[1][name]["op"],
                "before": rows[0][name]["type"],
                "after": rows[1][name]["type"],
                "why": rows[1][name]["why"],
            }
            for name in changed
        ],
        "same_nodes": len(both) - len(changed),
        "only": [[name for name in rows[i] if name not in rows[1 - i]] for i in (0, 1)],
        "options": _options(*runs),
        "models": _same_model(*runs),
    }


def _run(path: Path) -> Run:
    made = read(path)
    if isinstance(made, Run):
        return made
    raise InputError(f"{path} is a comparison of schemes: give two folders that `qdq deploy` wrote.")


def _limits(*sides: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first, second = ({row["option"]: row for row in side} for side in sides)
    return [
        {"limit": (first.get(o) or second[o])["limit"], "option": o, "before": first.get(o), "after": second.get(o)}
        for o in dict.fromkeys((*first, *second))
    ]


def _figures(before: Run, after: Run) -> Iterator[dict[str, Any]]:
    """Times, sizes and accuracy of both."""
    pairs = [run.report for run in (before, after)]
    tunings = [report.tuning for report in pairs]
    measured = [t.measured.shipped.measured_us if t and t.measured else None for t in tunings]
    yield _figure("Measured time", *measured, form=words.time, lower=True)
    yield _figure("Predicted time", *(_predicted(run) for run in (before, after)), form=words.time, lower=True)
    shares = [report.audit.int8_share if report.audit else None for report in pairs]
    yield _figure("Multiply-adds in INT8, as compiled", *shares, form=words.share, lower=None)
    yield _figure("Nodes quantized", *(r.quantized_nodes for r in pairs), form=lambda v: f"{v:.0f}", lower=None)
    yield _figure("Model file", *(r.int8_file_bytes for r in pairs), form=lambda v: size(int(v)), lower=True)
    for what, name in (("Weights in the engine", "weight_bytes"), ("Bytes moved per inference", "bytes_moved")):
        values = [getattr(r.audit, name) if r.audit else None for r in pairs]
        yield _figure(what, *values, form=lambda v: size(int(v)), lower=True)
    outputs = [{o.name: o for o in r.check.outputs} for r in pairs]
    for name in dict.fromkeys(n for side in outputs for n in side):
        for what, field, form in (
            ("SQNR", "sqnr_db", words.decibels),
            ("Argmax agrees", "top1", lambda v: f"{v:.2%}".replace("%", " %")),
        ):
            values = [getattr(side[name], field) if name in side else None for side in outputs]
            yield _figure(f"{what} of {name}", *values, form=form, lower=False)
        dice = [side[name].dice if name in side else {} for side in outputs]
        for k in sorted({k for side in dice for k in side}):
            values = [side.get(k) for side in dice]
            yield _figure(f"Dice of {name}, class {k}", *values, form="{:.4f}".format, lower=False)
    structures = [{s.name: s for s in r.check.volumes.to_float.structures} if r.check.volumes else {} for r in pairs]
    for name in dict.fromkeys(n for side in structures for n in side):
        means = [side[name].dice if name in side else None for side in structures]
        values = [m.mean if m else None for m in means]
        yield _figure(f"Dice of {name}, whole volumes, to float", *values, form="{:.4f}".format, lower=False)
        worst = [side[name].worst_hd95_mm if name in side else None for side in structures]
        yield _figure(f"Largest HD95 of {name}, to float", *worst, form=lambda v: f"{v:.2f} mm", lower=True)


def _predicted(run: Run) -> float | None:
    report = run.report
    if report.tuning:
        return report.tuning.predicted_us
    return sum(k.us for k in report.details.kernels) if report.details and report.details.kernels else None


def _figure(what: str, before: float | None, after: float | None, *, form: Any, lower: bool | None) -> dict[str, Any]:
    """One figure of both runs; `sense` is 'better', 'worse', 'same' or '' where that cannot be said."""
    texts = ["" if v is None else form(v) for v in (before, after)]
    sense, change = "", ""
    if before is not None and after is not None and not (math.isnan(before) or math.isnan(after)):
        same = before == after or (math.isfinite(before + after) and abs(after - before) <= SAME * abs(before))
        sense = "same" if same else "" if lower is None else "better" if (after < before) == lower else "worse"
        if not same and math.isfinite(before + after):
            change = _change(before, after, texts[1])
    return {"what": what, "before": texts[0], "after": texts[1], "change": change, "sense": sense}


def _change(before: float, after: float, text: str) -> str:
    """A difference in the unit of its figures; of what has none, a share, or a factor where it is large.

    >>> _change(40.0, 38.5, "38.5 dB"), _change(0.5, 0.75, "75 %"), _change(2.0, 1.0, "1 MiB"), _change(1.0, 9.0, "")
    ('-1.5 dB', '+25.0 points', '-50.0 %', '9 times')
    """
    if text.endswith("dB"):
        said = f"{after - before:+.1f} dB"
    elif text.endswith("%"):
        said = f"{(after - before) * 100:+.1f} points"
    elif not before:
        said = ""
    elif after > 3 * before:
        said = f"{after / before:.3g} times"
    else:
        said = f"{(after / before - 1) * 100:+.1f} %"
    return said


def _options(before: Run, after: Run) -> list[dict[str, str]]:
    """Options that differ."""
    sides = []
    for run in (before, after):
        report = run.report
        found = {"compiler": report.compiler, "targets": ", ".join(report.targets)}
        found |= {"compared on": f"{report.check.samples} {report.evaluated_on}"}
        if report.tuning:
            found["GPUs that times are predicted for"] = ", ".join(report.tuning.gpus)
        found |= dict(flat(run.plan.settings.to_mapping())) if run.plan else {}
        for key in ("options", "packages"):
            found |= dict(flat((run.provenance or {}).get(key) or {}, f"{key}.")) if _mapping(run, key) else {}
        if run.manifest and not run.provenance:
            found |= dict(flat(run.manifest.versions, "versions."))
        sides.append(found)
    keys = dict.fromkeys(key for side in sides for key in side)
    rows = [{"key": key, "before": sides[0].get(key, "none"), "after": sides[1].get(key, "none")} for key in keys]
    return [row for row in rows if row["before"] != row["after"]]


def _mapping(run: Run, key: str) -> bool:
    return isinstance((run.provenance or {}).get(key), dict)


def _same_model(before: Run, after: Run) -> bool | None:
    known = [run.plan.model_sha256 for run in (before, after) if run.plan]
    return known[0] == known[1] if len(known) == 2 else None
