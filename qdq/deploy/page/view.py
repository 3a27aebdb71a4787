"""What the page of one run says, as plain values: the templates only lay it out.

`Run` -> `view` -> dict (keys below) -> run.html.j2. Figures that were not measured are called predicted.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from engines.verify.audit import Audit
from engines.verify.report import OutputReport
from qdq.build.measured.forms import TimedForm
from qdq.deploy.page import words
from qdq.deploy.page.folder import Run
from qdq.deploy.page.limits import limits
from qdq.deploy.page.network import asked_for, kernels, nodes
from qdq.deploy.page.ranges import SHOWN, ranges
from qdq.deploy.page.schemes import plans
from qdq.deploy.page.svg import bar
from qdq.deploy.page.volumes import volumes
from qdq.deploy.report.report import DeployReport, EngineSizes, audit_lines, shares, size, warning_lines

STEP = re.compile(r"(.*): ([\d.]+) -> ([\d.]+) us")
DEEPEST = 6  # levels of an unknown file's values that are told apart


def view(run: Run, *, pictures: bool = False) -> dict[str, Any]:
    """The page of a run.

    Keys:
        title, kind, heading: of the page.        verdict: `state` (passed, failed, open), `text`, `failures`.
        asked: rows of (what, value): model, compiler, targets, GPUs, samples.
        limits: see `limits.limits`.        facts: tiles of `label`, `value`, `note`.
        warnings, notes: sentences.
        sizes: `rows` of `what`, `now`, `fp16`, `fp32`, `of_fp16`, `of_fp32`.
        outputs: rows of accuracy.        label_dice: `classes`, `rows`.        costly: rows.
        nodes: see `network.nodes`; has_errors: whether one has an error.        kernels: see `network.kernels`.
        ranges: see `ranges.ranges`; `open_ranges` of them are shown at once.        measured_on, not_measured.
        tuning: `gain`, `steps`, `said`, ...; None without.        forms: of measured.jsonl.
        front: see `schemes.plans`.
        volumes: see `volumes.volumes`.        provenance: (heading, rows of (key, value)).        settings: rows.
    """
    report = run.report
    details = report.details
    rows = nodes(run)
    return {
        "title": f"{report.model_file}: report",
        "kind": "Report of a quantized network" if report.quantized_nodes else "Report of a network left in float",
        "heading": report.model_file,
        "verdict": _verdict(report),
        "asked": _asked(run),
        "limits": limits(report),
        "facts": list(_facts(run)),
        "warnings": [*warning_lines(report.check), *audit_lines(report.audit)],
        "notes": report.notes,
        "sizes": _sizes(report),
        "outputs": [_output(o, report) for o in report.check.outputs],
        "as_compiled": words.decibels(report.as_compiled.sqnr_db) if report.as_compiled else "",
        "label_dice": _label_dice(report),
        "costly": report.check.costly,
        "nodes": rows,
        "has_errors": any(row["data_db"] is not None or row["weight_db"] is not None for row in rows),
        "kernels": kernels(run),
        "ranges": ranges(run),
        "open_ranges": SHOWN,
        "measured_on": details.measured_on if details else 0,
        "not_measured": details.not_measured if details else "",
        "evaluated_on": report.evaluated_on,
        "tuning": _tuning(report),
        "front": plans(report.allocation),
        "forms": _forms(run),
        "volumes": volumes(report.check.volumes, run.slices, asked=pictures),
        "provenance": _provenance(run),
        "signed": run.provenance is not None,
        "settings": list(flat(run.plan.settings.to_mapping())) if run.plan else [],
        "lacks": [name for name, held in (("plan.json", run.plan), ("table.json", run.table)) if held is None],
    }


def _verdict(report: DeployReport) -> dict[str, Any]:
    rows, failures = limits(report), report.failures
    if failures:
        missed = sum(not row["kept"] for row in rows)
        text = f"{missed} of {words.plural(len(rows), 'limit')} missed" if missed else "Failed"
        return {"state": "failed", "word": "Failed", "text": text, "failures": failures}
    if not rows:
        text = "No limit was set, so there is nothing to pass; judge by the figures below."
        return {"state": "open", "word": "Not judged", "text": text, "failures": []}
    kept = "The limit is kept" if len(rows) == 1 else f"All {len(rows)} limits are kept"
    return {"state": "passed", "word": "Passed", "text": kept, "failures": []}


def _asked(run: Run) -> list[tuple[str, str]]:
    report, settings = run.report, run.plan.settings if run.plan else None
    rows = [("Model", report.model_file), ("Compiler", report.compiler)]
    if report.chosen_because:
        rows.append(("Why that compiler", report.chosen_because))
    rows.append(("GPU generation", ", ".join(report.targets)))
    if gpus := report.tuning.gpus if report.tuning else report.details.gpus if report.details else ():
        rows.append(("GPU that times are predicted for", ", ".join(gpus)))
    if settings:
        names = [row.name.upper() for row in settings.schemes]
        rows.append(("Scheme" if len(names) == 1 else "Schemes", ", ".join(names)))
    if report.details and (all_ := len(report.details.nodes)):
        rows.append(("Nodes quantized", f"{report.quantized_nodes} of {all_}"))
    rows.append(("Compared on", f"{report.check.samples} {report.evaluated_on}"))
    if report.overlap:
        rows.append(("Of these, calibration samples", str(report.overlap)))
    ran = f"{report.check.candidate} against {report.check.reference}"
    rows.append(("Compared", ran))
    if report.not_built:
        rows.append(("Engine", report.not_built))
    return rows


def _facts(run: Run) -> Iterator[dict[str, str]]:
    report, tuning = run.report, run.report.tuning
    if tuning and tuning.measured:
        form = tuning.measured.shipped
        on = f"on {form.gpu}, {form.compiler} {form.version}; predicted {words.time(form.predicted_us)}"
        yield _fact("Measured time", words.time(form.measured_us), on)
    us = tuning.predicted_us if tuning else None
    if us is None and report.details and report.details.kernels:
        us = sum(kernel.us for kernel in report.details.kernels)
    if us is not None:
        yield _fact("Predicted time", words.time(us), _against(report, us))
    else:
        yield _fact("Predicted time", "none", "the time of this form is not predicted")
    audit = report.audit
    if audit:
        yield _ran(audit)
    elif report.details:
        yield _planned(report)
    worst = report.check.worst
    several = f" of the worst output, {worst.name}," if len(report.check.outputs) > 1 else ""
    if worst.sqnr_db is not None:
        value = "identical" if worst.identical else words.decibels(worst.sqnr_db)
        error = "" if worst.identical or not math.isfinite(worst.sqnr_db) else f", an error of {_error(worst.sqnr_db)}"
        yield _fact("Signal to noise", value, f"SQNR{several} against the float model{error}")
    elif worst.top1 is not None:
        yield _fact("Equal labels", f"{worst.top1:.2%}".replace("%", " %"), "against the float model")
    if dices := [v for output in report.check.outputs for v in output.dice.values()]:
        yield _fact("Least Dice", f"{min(dices):.4f}", "of a class, against the float model, on samples")
    if volumes := report.check.volumes:
        means = [s.dice.mean for s in volumes.to_float.structures if s.dice]
        if means:
            cases = words.plural(volumes.cases, "whole volume")
            yield _fact("Least mean Dice", f"{min(means):.4f}", f"of a structure, against the float model, {cases}")
    ratio = words.fraction(report.int8_file_bytes, report.float_file_bytes)
    yield _fact("Model file", size(report.int8_file_bytes), f"{ratio} of FP32 ({size(report.float_file_bytes)})")


def _error(sqnr_db: float) -> str:
    """What a ratio in dB leaves of the signal's RMS."""
    return f"{10 ** (-sqnr_db / 20):.2%}".replace("%", " %")


def _fact(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _against(report: DeployReport, us: float) -> str:
    tuning = report.tuning
    gpus = tuning.gpus if tuning else report.details.gpus if report.details else ()
    parts = [f"one inference on {', '.join(gpus)}{', the mean' if len(gpus) > 1 else ''}"]
    if tuning:
        others = {"FP32": tuning.fp32_us}
        if tuning.quantized_nodes:
            others["the fastest float form"] = tuning.decision.unquantized_us
        parts += [f"{us / other:.2f} of {name} ({words.time(other)})" for name, other in others.items() if other]
        error = tuning.decision.time_error
        parts.append("error not known" if error is None else f"two of three predictions are within {error:.0%}")
    return "; ".join(parts)


def _ran(audit: Audit) -> dict[str, str]:
    """The share of the types below 16 bits that kernels multiply in; of weights alone the type that they become."""
    found = {words.kind(kind): share for kind, share in shares(audit).items()}
    kinds = [kind for kind in found if kind in words.LOW]
    if not kinds and found and any(node.requested.startswith("weight-only") for node in audit.nodes):
        kinds = [next(iter(found))]
    value = words.share(sum(found[kind] for kind in kinds))
    return _fact(f"Runs in {' or '.join(kinds) or 'INT8'}", value, "of the multiply-adds, as compiled")


def _planned(report: DeployReport) -> dict[str, str]:
    """The share of what Q/DQ nodes ask for, where nothing was compiled."""
    rows = report.details.nodes if report.details else ()
    asked: Counter[str] = Counter()
    for row in rows:
        if row.asked:
            asked[asked_for(row.asked)] += row.macs or 0
    total = sum(row.macs or 0 for row in rows)
    kinds = [kind for kind, _ in asked.most_common()]
    value = words.share(asked.total() / max(total, 1))
    return _fact(f"Asks for {' or '.join(kinds) or 'INT8'}", value, "of the multiply-adds, as planned; no engine yet")


def _sizes(report: DeployReport) -> list[dict[str, str]]:
    rows = [_size("Model file", report.int8_file_bytes, report.fp16_file_bytes, report.float_file_bytes)]
    if report.audit is None:
        return rows
    own, fp16, fp32 = report.audit, report.fp16_engine, report.float_engine
    for what, name in (
        ("Weights in the engine", "weight_bytes"),
        ("Bytes moved per inference", "bytes_moved"),
        ("Activation memory", "activation_bytes"),
        ("Engine file", "engine_bytes"),
    ):
        rows.append(_size(what, getattr(own, name), _of(fp16, name), _of(fp32, name)))
    counts = [str(v) if (v := _of(e, "kernels")) is not None else "not compiled" for e in (fp16, fp32)]
    rows.append(
        {
            "what": "Kernels",
            "now": str(own.kernels),
            "fp16": counts[0],
            "fp32": counts[1],
            "of_fp16": words.fraction(own.kernels, _of(fp16, "kernels")),
            "of_fp32": words.fraction(own.kernels, _of(fp32, "kernels")),
        }
    )
    return rows


def _of(engine: EngineSizes | None, name: str) -> int | None:
    found: int | None = getattr(engine, name) if engine else None
    return found


def _size(what: str, now: int | None, fp16: int | None, fp32: int | None) -> dict[str, str]:
    return {
        "what": what,
        "now": size(now),
        "fp16": size(fp16) if fp16 is not None else "not known",
        "fp32": size(fp32) if fp32 is not None else "not known",
        "of_fp16": words.fraction(now, fp16),
        "of_fp32": words.fraction(now, fp32),
    }


def _output(output: OutputReport, report: DeployReport) -> dict[str, Any]:
    """Keys: the figures of one output in words; '' where one means nothing."""

    def figure(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    kind = {"regression": "numbers", "none": "not compared"}.get(output.task, output.task)
    return {
        "name": output.name,
        "worst": output is report.check.worst and len(report.check.outputs) > 1,
        "kind": kind,
        "because": output.because,
        "sqnr": "identical" if output.identical else words.decibels(output.sqnr_db),
        "centred": words.decibels(output.sqnr_centred_db),
        "spread": words.decibels(output.sqnr_spread_db),
        "cosine": figure(output.cosine, "{:.6f}"),
        "rms": figure(output.rms_error, "{:.3g}"),
        "largest": figure(output.max_abs_error, "{:.3g}"),
        "top1": figure(output.top1, "{:.2%}").replace("%", " %"),
        "dice": [(k, f"{v:.4f}") for k, v in output.dice.items()],
        "not_compared": output.not_compared,
    }


def _label_dice(report: DeployReport) -> dict[str, Any] | None:
    if not report.label_dice:
        return None
    classes = sorted({k for dice in report.label_dice.values() for k in dice})
    names = {"float model": "Float model", "shipped model": report.model_file}
    rows = [
        (names.get(who, who), [f"{dice[k]:.4f}" if k in dice else "" for k in classes])
        for who, dice in report.label_dice.items()
    ]
    return {"classes": classes, "rows": rows}


def _tuning(report: DeployReport) -> dict[str, Any] | None:
    """Keys: `rows` of forms and their predicted times, `steps`, `said`, `variants`, `complete`, `elsewhere`."""
    tuning = report.tuning
    if tuning is None:
        return None
    known = {
        "FP32, nothing quantized": tuning.fp32_us,
        "The model's float type, nothing quantized": tuning.unquantized_us,
        "Fastest float form that was found": tuning.decision.unquantized_us,
        f"{tuning.operands} wherever it is possible": tuning.untuned_us,
        "What was chosen": tuning.predicted_us,
    }
    most = max((us for us in known.values() if us is not None), default=1.0)
    forms = [
        {
            "form": form,
            "time": words.time(us),
            "bar": bar((us or 0.0) / most, "low" if form.startswith(("What", tuning.operands)) else "float"),
        }
        for form, us in known.items()
        if us is not None
    ]
    steps = []
    for text in tuning.steps:
        match = STEP.fullmatch(text)
        what, *times = match.groups() if match else (text, "", "")
        steps.append(
            {
                "what": what,
                "before": f"{times[0]} µs" if times[0] else "",
                "after": f"{times[1]} µs" if times[1] else "",
            }
        )
    return {
        "gpus": tuning.gpus,
        "forms": forms,
        "steps": steps,
        "said": tuning.said,
        "variants": tuning.variants,
        "complete": tuning.complete,
        "rewrites": [(name, len(done)) for name, done in sorted(tuning.rewrites.items())],
        "refused": sorted(tuning.refused.items()),
        "elsewhere": tuning.elsewhere,
    }


def _forms(run: Run) -> list[dict[str, Any]]:
    """The forms that were timed on a GPU."""
    measured = run.report.tuning.measured if run.report.tuning else None
    forms: tuple[TimedForm, ...] = measured.forms if measured else run.forms
    taken = measured.shipped.name if measured else ""
    return [
        {
            "name": form.name,
            "taken": form.name == taken,
            "predicted": words.time(form.predicted_us) if form.predicted_us is not None else "does not compile",
            "measured": words.time(form.measured_us) if form.measured_us is not None else f"left out: {form.why}",
            "spread": "" if form.spread_us is None else f"{form.spread_us:.1f} µs",
            "on": f"{form.gpu}, {form.compiler} {form.version}",
            "kernels": [(k.kernel, words.time(k.predicted_us), words.time(k.measured_us)) for k in form.kernels],
        }
        for form in forms
    ]


def _provenance(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Provenance, else what the engine's manifest says: first what stands alone, then each part under its heading."""
    content = run.provenance or (run.manifest.to_mapping() if run.manifest else {})
    alone, parts = list[tuple[str, str]](), list[tuple[str, list[tuple[str, str]]]]()
    for key, value in content.items():
        if isinstance(value, Mapping | list) and value and key != "command" and not _plain(value):
            parts.append((key.replace("_", " ").capitalize(), list(flat(_named(value)))))
        else:
            alone += flat({key: value})
    return [("", alone), *parts] if alone else parts


def _plain(value: Any) -> bool:
    """Whether it is a list of texts and numbers."""
    return isinstance(value, list | tuple) and all(isinstance(v, str | int | float) for v in value)


def _named(value: Any) -> Any:
    """A list of mappings by their names, or by their numbers."""
    if not isinstance(value, list):
        return value
    found = {}
    for number, part in enumerate(value, 1):
        named = isinstance(part, Mapping) and isinstance(part.get("name"), str)
        rest = {k: v for k, v in part.items() if k != "name"} if named else part
        one = next(iter(rest.values())) if named and len(rest) == 1 else rest
        found[part["name"] if named else str(number)] = one
    return found


def flat(content: Mapping[str, Any], before: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Keys with dots between them, and values as text."""
    for key, value in content.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value and depth < DEEPEST:
            yield from flat(value, f"{name}.", depth + 1)
        elif isinstance(value, str):
            yield name, value
        elif _plain(value):
            yield name, (" " if key == "command" else ", ").join(map(str, value)) or "none"
        else:
            yield name, json.dumps(value, ensure_ascii=False)
