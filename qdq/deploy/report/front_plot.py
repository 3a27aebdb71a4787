"""A picture of a search: every plan that was looked at, error against size and against time, and the fronts.

This module must not measure anything.
"""

from __future__ import annotations

from pathlib import Path

from qdq.deploy.report.picture import figures, write
from qdq.tune.sensitivity.mixed.front import Allocation, front

AXES = {"size_mib": "weights in the engine, MiB", "time_us": "predicted time, µs"}


def draw(made: Allocation, path: Path) -> None:
    """Write the picture; its ending says the form, as .png or .svg.

    Raises:
        MissingRuntimeError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    figure_class = figures()
    known = [name for name in AXES if all(getattr(t, name) is not None for t in made.tried)]
    figure = figure_class(figsize=(5.6 * len(known), 4.4), layout="constrained")
    for axes, cost in zip(figure.subplots(1, len(known), squeeze=False)[0], known, strict=True):
        xs, ys = [getattr(t, cost) for t in made.tried], [t.drawn_db for t in made.tried]
        line = front(made.tried, cost)
        axes.plot([xs[i] for i in line], [ys[i] for i in line], "-", color="C0", linewidth=1, label="front")
        for keeps, mark, label in ((True, "o", "within the limits"), (False, "x", "beyond a limit")):
            some = [i for i, t in enumerate(made.tried) if t.keeps is keeps]
            if some:
                axes.plot([xs[i] for i in some], [ys[i] for i in some], mark, color="C7", label=label, markersize=5)
        axes.plot(xs[made.chosen], ys[made.chosen], "*", color="C3", markersize=15, label="chosen")
        for i in line:
            axes.annotate(str(i), (xs[i], ys[i]), textcoords="offset points", xytext=(5, -11), fontsize=8)
        axes.set_xlabel(AXES[cost])
        axes.set_ylabel("SQNR of the outputs in dB")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    write(figure, path)
