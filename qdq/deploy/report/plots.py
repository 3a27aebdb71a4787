"""Pictures of a calibration table: each tensor's histogram with the range that each calibrator would choose.

table + plan -> one PNG per tensor and index.html, sorted by quantization error, the worst first.
This module must not choose anything that ends up in a model.
"""

from __future__ import annotations

import html
import math
import re
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from qdq.core.errors import InputError
from qdq.core.files import write_text
from qdq.core.formats import FORMATS
from qdq.core.qtensor import QParams
from qdq.deploy.report.picture import figures
from qdq.measure.calibrators import CALIBRATORS
from qdq.measure.histogram import Histogram
from qdq.measure.ranges import squared_error
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.solve.activations import activation_params

STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
BARS = 256  # bins are joined to about so many bars

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Calibration</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ padding: .35em .8em; text-align: right; border-bottom: 1px solid #ddd; vertical-align: middle }}
th:first-child, td:first-child {{ text-align: left; overflow-wrap: anywhere }}
td.best {{ font-weight: 600 }} img {{ width: 16em; display: block }}
</style></head><body>
<h1>Calibration of {count} samples</h1>
<p>Signal to quantization noise of each tensor in dB, by calibrator, the worst first; the best of a row is bold. The
error at the model's outputs is another matter: <code>qdq check</code> measures it.</p>
<table><tr><th>tensor</th><th>low</th><th>high</th>{heads}<th>histogram</th></tr>
{rows}
</table></body></html>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """One tensor: its parameters and signal to noise ratio by calibrator."""

    tensor: str
    hist: Histogram
    params: dict[str, QParams]
    sqnr_db: dict[str, float]


def draw(model: Model, plan: Plan, table: CalibrationTable, folder: Path) -> Path:
    """Write the pictures of a prepared model's table, and their page, which is returned.

    The folder is made if need be, and files of the same names in it are replaced.

    Raises:
        MissingRuntimeError: matplotlib is not installed.
        InputError: the folder is not writable.
    """
    figure_class = figures()
    chosen = {m: activation_params(model, plan, table, dict.fromkeys(table.tensors, m)) for m in CALIBRATORS}
    drawn = []
    for tensor in dict.fromkeys(p.tensor for p in plan.activations):
        params = {m: chosen[m][tensor] for m in CALIBRATORS}
        hist = table.tensors[tensor]
        sqnr_db = {m: _sqnr_db(hist, p) for m, p in params.items()}
        drawn.append(_Drawn(tensor=tensor, hist=hist, params=params, sqnr_db=sqnr_db))
    drawn.sort(key=lambda d: (max(d.sqnr_db.values()), d.tensor))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for index, one in enumerate(drawn):
            picture = f"{index:03}-{re.sub(r'[^A-Za-z0-9._-]+', '_', one.tensor).strip('_')[:80]}.png"
            figure = figure_class(figsize=(8, 3.6), layout="constrained")
            _draw(figure, one)
            figure.savefig(folder / picture, dpi=110)
            rows.append(_row(one, picture))
    except OSError as error:
        raise InputError(f"Cannot write pictures to {folder}: {error.strerror}. Choose a writable folder.") from None
    heads = "".join(f"<th>{m}</th>" for m in CALIBRATORS)
    write_text(folder / "index.html", _PAGE.format(count=table.count, heads=heads, rows="\n".join(rows)))
    return folder / "index.html"


def _sqnr_db(hist: Histogram, params: QParams) -> float:
    """10 log10(sum x^2 / sum (x - x')^2), each value at its bin's centre."""
    noise = squared_error(hist, float(params.scale), params.zero_point, FORMATS[params.format])
    signal = float(np.sum(hist.centres**2 * hist.counts))
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def _text(sqnr_db: float, unit: str = "") -> str:
    """A ratio; one without noise is no number."""
    return "exact" if sqnr_db == math.inf else f"{sqnr_db:.1f}{unit}"


def _draw(figure: Any, one: _Drawn) -> None:
    axes = figure.add_subplot()
    used = np.flatnonzero(one.hist.counts)
    first, last = int(used[0]), int(used[-1]) + 1
    step = max(1, (last - first) // BARS)
    starts = np.arange(first, last, step)
    width = 2.0 ** (one.hist.exponent or 0)
    edges = (np.append(starts, starts[-1] + step) - one.hist.counts.size // 2) * width
    axes.stairs(np.add.reduceat(one.hist.counts[:last], starts), edges, fill=True, color="#9db4c8", label="values")
    for index, (method, params) in enumerate(one.params.items()):
        colour, style = hsv_to_rgb(index / len(one.params), 0.9, 0.8), STYLES[index % len(STYLES)]
        fmt = FORMATS[params.format]
        ends = [(code - params.zero_point) * float(params.scale) for code in (fmt.low, fmt.high)]
        label = f"{method}  {_text(one.sqnr_db[method], ' dB')}"
        for end, text in zip(ends, (label, None), strict=True):
            axes.axvline(end, color=colour, linestyle=style, linewidth=1.4, label=text)
    axes.set_yscale("log")
    axes.set_title(one.tensor if len(one.tensor) < 90 else f"…{one.tensor[-88:]}", fontsize=9, parse_math=False)
    axes.set_xlabel("value")
    axes.set_ylabel("count per bar")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _row(one: _Drawn, picture: str) -> str:
    best = max(one.sqnr_db.values())
    cells = "".join(
        f'<td class="best">{_text(v)}</td>' if v == best else f"<td>{_text(v)}</td>" for v in one.sqnr_db.values()
    )
    image = f'<a href="{quote(picture)}"><img src="{quote(picture)}" alt="histogram" loading="lazy"></a>'
    limits = f"<td>{one.hist.low:.4g}</td><td>{one.hist.high:.4g}</td>"
    return f"<tr><td>{html.escape(one.tensor)}</td>{limits}{cells}<td>{image}</td></tr>"
