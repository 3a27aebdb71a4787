"""Histograms of quantized tensors with the range that was chosen.

table.json + the report's tensors -> a picture each, those with the largest error first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qdq.deploy.page import words
from qdq.deploy.page.folder import Run
from qdq.deploy.page.svg import histogram
from qdq.deploy.report.details import TensorRow
from qdq.measure.histogram import BINS, Histogram

BARS = 48
SHOWN = 12  # that are open; the others lie behind a heading


def ranges(run: Run) -> list[dict[str, Any]]:
    """A row for each tensor that is measured and quantized.

    Keys: `tensor`, `nodes` that read it, `format`, `db` in words, `values` seen, `range` of codes, `outside` (share of
    values beyond it, in words), `picture`.
    """
    details, table = run.report.details, run.table
    if details is None or table is None:
        return []
    rows = {t.tensor: t for t in details.tensors if t.role == "activation" and t.tensor in table.tensors}
    ordered = sorted(rows.values(), key=lambda t: math.inf if t.sqnr_db is None else t.sqnr_db)
    return [_row(t, table.tensors[t.tensor]) for t in ordered if table.tensors[t.tensor].samples]


def _row(tensor: TensorRow, hist: Histogram) -> dict[str, Any]:
    edges, counts = _bars(hist)
    fixed = tensor.low is not None and tensor.high is not None
    range_ = f"{tensor.low:.4g} to {tensor.high:.4g}" if fixed else "differs within the tensor"
    outside = _outside(hist, tensor)
    said = f"values from {hist.low:.4g} to {hist.high:.4g}; codes reach {range_}"
    return {
        "tensor": tensor.tensor,
        "nodes": tensor.nodes,
        "format": words.kind(tensor.format),
        "db": words.decibels(tensor.sqnr_db) or "not measured",
        "values": f"{hist.low:.4g} to {hist.high:.4g}",
        "range": range_,
        "outside": "" if outside is None else "none" if outside == 0 else words.share(outside),
        "picture": histogram(
            edges, counts, low=tensor.low, high=tensor.high, title=f"Histogram of {tensor.tensor}: {said}"
        ),
    }


def _bars(hist: Histogram) -> tuple[list[float], list[int]]:
    """Edges and counts of at most about `BARS` bars over the bins that hold values."""
    used = np.flatnonzero(hist.counts)
    first, last = int(used[0]), int(used[-1]) + 1
    step = max(1, math.ceil((last - first) / BARS))
    starts = np.arange(first, last, step)
    width = math.ldexp(1.0, hist.exponent or 0)
    edges = (np.append(starts, starts[-1] + step) - BINS) * width
    counts = np.add.reduceat(hist.counts[:last], starts)
    return [float(e) for e in edges], [int(c) for c in counts]


def _outside(hist: Histogram, tensor: TensorRow) -> float | None:
    """Share of the values that no code reaches, by more than half a step; None where ranges differ."""
    if tensor.low is None or tensor.high is None or tensor.scale is None:
        return None
    half = tensor.scale / 2
    beyond = (hist.centres < tensor.low - half) | (hist.centres > tensor.high + half)
    return float(hist.counts[beyond].sum() / hist.counts.sum())
