"""What was asked of a run, what was got, and whether that is enough.

report -> a row for each limit. What fails is decided by the report itself: here it is only told apart by limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from engines.core.documents import replace
from engines.verify.report import Limits, Report
from qdq.deploy.page import words
from qdq.deploy.report.report import DeployReport, share_failures, size

NAMES = {
    "min_sqnr_db": "Signal to noise of every output (SQNR)",
    "min_sqnr_spread_db": "Error against the spread over samples, every output",
    "min_cosine": "Cosine similarity of every output",
    "min_dice": "Dice of every class, to the float model",
    "min_top1": "Agreement of the argmax of every output",
    "max_dice_drop": "Fall of each structure's mean Dice, whole volumes",
    "max_hd95_mm": "HD95 of each structure to the float model, every volume",
    "max_volume_diff_ml": "Volume difference of each structure, every volume",
}
SIZE = "Weights in the engine"
INT8_SHARE = "Multiply-adds that run in INT8, as compiled"


def limits(report: DeployReport) -> list[dict[str, Any]]:
    """A row for each limit that was set.

    Keys: `limit`, `option`, `needed`, `got` in words with units, `kept`.
    """
    check, rows = report.check, []
    unlimited = len(replace(check, limits=Limits()).failures)
    for name, words_ in NAMES.items():
        needed = getattr(check.limits, name)
        if needed is None:
            continue
        alone = replace(check, limits=Limits(**{name: needed}))
        kept = len(alone.failures) == unlimited
        sign = "at least" if name.startswith("min_") else "at most"
        rows.append(_row(words_, name, f"{sign} {_value(name, needed)}", _got(name, check), kept))
    if report.min_int8_share is not None:
        kept = not share_failures(report.audit, report.min_int8_share)
        got = "not known: no engine was built" if report.audit is None else words.share(report.audit.int8_share)
        needed_ = f"at least {words.share(report.min_int8_share)}"
        rows.append(_row(INT8_SHARE, "min_int8_share", needed_, got, kept))
    if report.max_size_mib is not None:
        kept = report.audit is not None and report.audit.weight_bytes <= report.max_size_mib * 2**20
        got = "not known: no engine was built" if report.audit is None else size(report.audit.weight_bytes)
        rows.append(_row(SIZE, "max_size_mib", f"at most {report.max_size_mib:g} MiB", got, kept))
    return rows


def _row(limit: str, name: str, needed: str, got: str, kept: bool) -> dict[str, Any]:
    option = f"--{name.replace('_', '-')}"
    return {"limit": limit, "option": option, "needed": needed, "got": got or "no value", "kept": kept}


def _got(name: str, check: Report) -> str:
    """The value that decides, in words."""
    found: list[float] = []
    if name == "max_dice_drop":
        found = [*check.volumes.dice_drops().values()] if check.volumes else []
    elif name in ("max_hd95_mm", "max_volume_diff_ml"):
        of: Callable[[Any], float | None] = (
            (lambda s: s.worst_hd95_mm) if name == "max_hd95_mm" else (lambda s: s.worst_difference_ml)
        )
        structures = check.volumes.to_float.structures if check.volumes else ()
        found = [abs(v) for v in map(of, structures) if v is not None]
    elif name == "min_dice":
        found = [v for output in check.outputs for v in output.dice.values()]
    else:
        metric = name.removeprefix("min_")
        found = [v for v in (getattr(output, metric) for output in check.outputs) if v is not None]
    if any(map(math.isnan, found)):
        return "not finite"
    return _value(name, (min if name.startswith("min_") else max)(found)) if found else ""


def _value(name: str, value: float) -> str:
    if name.endswith("_db"):
        return words.decibels(value) if not math.isfinite(value) else f"{value:.4g} dB"
    if name == "min_top1":
        return f"{value:.2%}".replace("%", " %")
    unit = {"_mm": " mm", "_ml": " ml"}.get(name[-3:], "") if name.startswith("max_") else ""
    return f"{value:.4g}{unit}" if unit or name == "max_dice_drop" else f"{value:.6g}"
