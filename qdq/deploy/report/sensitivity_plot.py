"""A picture of a sensitivity table: a row for each group, a dot for each candidate, by its SQNR at the outputs.

This module must not measure anything.
"""

from __future__ import annotations

import math
from pathlib import Path

from qdq.deploy.report.picture import figures, write
from qdq.tune.sensitivity.table import Sensitivity

MOST = 60  # groups that are drawn: the loudest
NAME = 48  # characters of a name


def draw(table: Sensitivity, path: Path) -> None:
    """Write the picture; its ending says the form, as .png or .svg.

    Raises:
        MissingRuntimeError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    figure_class = figures()
    rows = table.loudest_first[:MOST]
    figure = figure_class(figsize=(9, 1.4 + 0.24 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for number, text in enumerate(table.candidates):
        places = [
            (trial.sqnr_db, y)
            for y, row in enumerate(rows)
            for trial in row.trials
            if trial.candidate == text and trial.sqnr_db is not None and math.isfinite(trial.sqnr_db)
        ]
        size = max(3.0, 10.0 - 2.5 * number)  # later ones smaller, for equal points lie on one another
        marker, colour = "osD^vPX*"[number % 8], f"C{number % 10}"
        axes.plot([x for x, _ in places], [y for _, y in places], marker, label=text, color=colour, markersize=size)
    axes.set_yticks(range(len(rows)), [_short(row.name, len(row.nodes)) for row in rows], fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("SQNR of the outputs in dB, this group alone quantized")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    write(figure, path)


def _short(name: str, nodes: int) -> str:
    shown = name if len(name) <= NAME else f"…{name[1 - NAME :]}"
    return shown if nodes == 1 else f"{shown} +{nodes - 1}"
