"""What changed between the reports of two runs of `qdq deploy`, as a comment in Markdown.

report.json, and that of the last run -> a table of the figures that decide, and the notes that are new or gone.
Needs Python alone. On GitHub an error or a limit that failed is an annotation too.

Usage: python3 difference.py NEW.json [OLD.json] -o comment.md
       python3 difference.py --error ANSWER.json -o comment.md    of what `qdq deploy --json` printed when it failed
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SAME = 1e-9  # relative: less is the same figure
MOST_NOTES = 20

Value = float | str | None


def mark() -> str:
    """The first line of a comment, by which a later run of the same job finds it."""
    name = re.sub(r"[^A-Za-z0-9._]+", "-", os.environ.get("QDQ_NAME", "")).strip("-")
    return f"<!-- qdq {name} -->" if name else "<!-- qdq -->"


def plain(text: str) -> str:
    """A text, which may hold names out of a model, as Markdown that shows it: no mark-up, HTML, cell or mention."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(text.split())).replace("@", "@\u200b")


def _bytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def _times(us: float) -> str:
    return f"{us:.1f} us" if us < 1000 else f"{us / 1000:.3g} ms"


def _at(report: Any, *path: str) -> Any:
    for name in path:
        report = report.get(name) if isinstance(report, dict) else None
    return report


# what is shown: how it is called, where it stands in a report, how it is written, and whether more is better
ROWS: tuple[tuple[str, tuple[str, ...], Callable[[float], str], bool | None], ...] = (
    ("worst SQNR", ("check", "sqnr_db"), lambda v: f"{v:.1f} dB", True),
    ("argmax agrees", ("check", "top1"), lambda v: f"{v:.3%}", True),
    ("SQNR, rounded as compiled", ("as_compiled", "sqnr_db"), lambda v: f"{v:.1f} dB", True),
    ("INT8 share of multiply-adds", ("audit", "int8_share"), lambda v: f"{v:.1%}", True),
    ("predicted time", ("tuning", "predicted_us"), _times, False),
    ("the same in float", ("tuning", "unquantized_us"), _times, None),
    ("kernels", ("audit", "kernels"), lambda v: f"{v:.0f}", False),
    ("bytes moved per inference", ("audit", "bytes_moved"), _bytes, False),
    ("weights in the engine", ("audit", "weight_bytes"), _bytes, False),
    ("engine", ("audit", "engine_bytes"), _bytes, False),
    ("model file", ("int8_file_bytes",), _bytes, False),
    ("quantized nodes", ("quantized_nodes",), lambda v: f"{v:.0f}", None),
)


def rows(new: dict[str, Any], old: dict[str, Any] | None) -> Iterator[tuple[str, str, str, str]]:
    """Name, last run, this run and the change, of every figure that either has."""
    for name, path, written, more in ROWS:
        now, before = _number(_at(new, *path)), _number(_at(old, *path))
        if now is None and before is None:
            continue
        told = ["" if value is None else written(value) for value in (before, now)]
        yield name, told[0], told[1], _change(before, now, more)
    for name in sorted({*_outputs(new), *_outputs(old)}):
        now, before = _outputs(new).get(name), _outputs(old).get(name)
        if len({*_outputs(new), *_outputs(old)}) > 1:
            told = ["" if value is None else f"{value:.1f} dB" for value in (before, now)]
            yield f"SQNR of {plain(name)}", told[0], told[1], _change(before, now, True)


def _outputs(report: dict[str, Any] | None) -> dict[str, float]:
    held = {o["name"]: _number(o.get("sqnr_db")) for o in _at(report, "check", "outputs") or ()}
    return {name: value for name, value in held.items() if value is not None}


def _number(value: Any) -> float | None:
    """A figure of a report, where one that is not finite is a text."""
    return float(value) if isinstance(value, int | float) or value in ("inf", "-inf", "nan") else None


def _change(before: float | None, now: float | None, more: bool | None) -> str:
    if before is None or now is None or before == now or abs(now - before) <= SAME * abs(before):
        return ""
    word = "" if more is None else " better" if (now > before) == more else " **worse**"
    return (f"{now / before - 1:+.1%}" if before and abs(before) != float("inf") else "changed") + word


def comment(new: dict[str, Any], old: dict[str, Any] | None) -> str:
    """The comment."""
    failures = new.get("failures") or []
    head = "every limit kept" if not failures else f"{len(failures)} limit{'s' * (len(failures) > 1)} failed"
    lines = [mark(), f"### qdq: {plain(new['model_file'])} for {plain(', '.join(new['targets']))}, {head}", ""]
    lines += [f"- **failed**: {plain(failure)}" for failure in failures] + [""] * bool(failures)
    if old is None:
        lines += ["There is no report of an earlier run.", "", "| | this run |", "|---|---|"]
        lines += [f"| {name} | {now} |" for name, _, now, _ in rows(new, None)]
    else:
        lines += ["| | last run | this run | |", "|---|---|---|---|"]
        lines += [f"| {name} | {before} | {now} | {change} |" for name, before, now, change in rows(new, old)]
        said, before = ([note for note in r.get("notes") or ()] for r in (new, old))
        for word, notes in (
            ("new", [n for n in said if n not in before]),
            ("gone", [n for n in before if n not in said]),
        ):
            listed = (f"- {plain(note)}" for note in notes[:MOST_NOTES])
            lines += ["", f"Notes that are {word}:", *listed] if notes else []
    return "\n".join(lines) + "\n"


def read(path: Path) -> dict[str, Any]:
    """A report, of this or an earlier version of qdq.

    Raises:
        SystemExit: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.get("schema", content.get("format", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"Cannot read the report {path}: {error}.") from None
    if not str(found).startswith("qdq.report/"):
        raise SystemExit(f"{path} is no report of `qdq deploy`: its schema is {found!r}.")
    return dict(content)


def annotate(text: str) -> None:
    """Show an error beside the run on GitHub."""
    if os.environ.get("GITHUB_ACTIONS"):
        print("::error title=qdq::" + text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def main() -> None:
    """Write the comment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="*", type=Path, metavar="REPORT")
    parser.add_argument("--error", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    if asked.error:
        try:
            error = json.loads(asked.error.read_text(encoding="utf-8"))["error"]
            said = f"{error['kind']}, exit code {error['exit_code']}: {error['message']}"
        except (ValueError, KeyError, TypeError):
            said = "qdq ended without an answer"
        text = f"{mark()}\n### qdq: nothing was made\n\n{plain(said)}\n"
        annotate(said)
    elif not 1 <= len(asked.reports) <= 2:
        parser.error("give the report of this run, and that of the last one if there is one")
    else:
        new, *others = map(read, asked.reports)
        text = comment(new, others[0] if others else None)
        for failure in new.get("failures") or ():
            annotate(f"limit failed: {failure}")
    asked.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
