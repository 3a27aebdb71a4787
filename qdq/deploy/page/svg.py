"""Small charts as SVG text: bars, histograms, box plots, points. Colours are classes of the page's style sheet.

figures -> `Markup`, every text escaped. Each chart that says something of its own has role=img and a title. Must not
know what the figures are of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

SMALL = 11  # font size of texts in charts


def tag(name: str, *inside: str | Markup, **attributes: object) -> Markup:
    """One element; `class_` is class, and `_` in names stands for `-`.

    >>> str(tag("text", "a<b", x=1, text_anchor="end"))
    '<text x="1" text-anchor="end">a&lt;b</text>'
    """
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _number(value))
        for key, value in attributes.items()
        if value is not None
    )
    body = Markup("").join(escape(part) for part in inside)
    return Markup("<{}{}>{}</{}>").format(Markup(name), pairs, body, Markup(name))


def drawing(title: str, width: float, height: float, parts: Iterable[Markup], *, kind: str = "") -> Markup:
    """A chart that is as wide as its place, at most its own width, and its name for who does not see it."""
    box = tag("svg", tag("title", title), *parts, role="img", class_=f"chart {kind}".strip(), width=width)
    return Markup(str(box).replace("<svg ", f'<svg viewBox="0 0 {_number(width)} {_number(height)}" ', 1))


def bar(share: float, kind: str) -> Markup:
    """A bar in a table's cell, beside its number, which says the same: hidden from who hears the page."""
    width = max(0.0, min(share, 1.0)) * 100
    parts = tag("rect", x=0, y=0, width=width, height=10, class_=f"fill {kind}")
    text = f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" class="bar" aria-hidden="true">{parts}</svg>'
    return Markup(text)


def histogram(
    edges: Sequence[float], counts: Sequence[int], *, low: float | None, high: float | None, title: str
) -> Markup:
    """Bars on a logarithmic scale of counts, and the range that codes reach.

    Args:
        edges: of the bars, one more than counts, ascending.
        counts: of values in each.
        low, high: of the range; None draws none.
        title: what it says, in words.
    """
    width, height, base = 300.0, 120.0, 96.0
    first, last = edges[0], edges[-1]
    ends = [v for v in (low, high) if v is not None]
    left, right = min([first, *ends]), max([last, *ends])
    span = (right - left) or 1.0
    left, right = left - 0.02 * span, right + 0.02 * span
    most = math.log10(max(counts, default=1) + 1) or 1.0

    def x(value: float) -> float:
        return (value - left) / (right - left) * width

    path = [f"M{_number(x(first))} {_number(base)}"]
    for edge, count in zip(edges[1:], counts, strict=True):
        path.append(f"V{_number(base - math.log10(count + 1) / most * (base - 8))}H{_number(x(edge))}")
    parts = []
    if low is not None and high is not None:
        parts.append(tag("rect", x=x(low), y=2, width=x(high) - x(low), height=base - 2, class_="range"))
    parts.append(tag("path", d=f"{''.join(path)}V{_number(base)}Z", class_="fill data"))
    parts.append(tag("line", x1=0, y1=base, x2=width, y2=base, class_="axis"))
    if low is not None and high is not None:
        parts += [tag("line", x1=x(v), y1=2, x2=x(v), y2=base, class_="edge") for v in (low, high)]
    if left < 0 < right:
        parts.append(tag("line", x1=x(0), y1=base, x2=x(0), y2=base + 4, class_="axis"))
        if width * 0.15 < x(0) < width * 0.85:
            parts.append(tag("text", "0", x=x(0), y=base + 16, text_anchor="middle"))
    parts.append(tag("text", f"{first:.3g}", x=0, y=base + 16))
    parts.append(tag("text", f"{last:.3g}", x=width, y=base + 16, text_anchor="end"))
    return drawing(title, width, height, parts, kind="histogram")


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """The values of one row of a box plot; `kind` is its class."""

    label: str
    values: tuple[float, ...]
    kind: str


def boxes(rows: Sequence[Box], *, title: str, unit: str) -> Markup:
    """One box plot a row: quartiles, median, whiskers to the extremes, and a point for each case."""
    values = [v for row in rows for v in row.values]
    low, high = min(values, default=0.0), max(values, default=1.0)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    left, width, step = 190.0, 640.0, 30.0
    height = step * len(rows) + 34

    def x(value: float) -> float:
        return left + (value - low) / ((high - low) or 1.0) * (width - left - 16)

    parts = []
    for value in ticks:
        parts.append(tag("line", x1=x(value), y1=4, x2=x(value), y2=height - 30, class_="grid"))
        parts.append(tag("text", f"{value:.6g}", x=x(value), y=height - 16, text_anchor="middle"))
    parts.append(tag("text", unit, x=width, y=height - 3, text_anchor="end"))
    for number, row in enumerate(rows):
        y = 4 + step * number + step / 2
        shown = row.label if len(row.label) <= 30 else f"{row.label[:29]}…"
        parts.append(tag("text", shown, x=left - 10, y=y + 4, text_anchor="end"))
        if not row.values:
            parts.append(tag("text", "no case has one", x=left, y=y + 4))
            continue
        least, q1, middle, q3, most = (float(v) for v in np.percentile(row.values, (0, 25, 50, 75, 100)))
        parts.append(tag("line", x1=x(least), y1=y, x2=x(most), y2=y, class_="axis"))
        if len(row.values) > 1:
            box = tag("rect", x=x(q1), y=y - 8, width=max(x(q3) - x(q1), 1), height=16, class_=f"box {row.kind}")
            parts += [box, tag("line", x1=x(middle), y1=y - 8, x2=x(middle), y2=y + 8, class_="median")]
        parts += [tag("circle", cx=x(v), cy=y, r=3, class_=f"dot {row.kind}") for v in row.values]
    return drawing(title, width, height, parts, kind="boxes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One point; its mark tells it from others without colour.

    Attributes:
        label: beside it; "" for none.
        x, y: where it is.
        kind: 'float' is a square, 'beyond' a cross, 'chosen' a diamond, anything else a circle.
        leads_to: the address that it is a link to; "" for none.
        said: of it, for who points at it or does not see it.
    """

    label: str
    x: float
    y: float
    kind: str
    leads_to: str = ""
    said: str = ""


def points(
    dots: Sequence[Dot],
    *,
    title: str,
    across: str,
    up: str,
    line: Sequence[tuple[float, float]] = (),
    from_zero: bool = True,
) -> Markup:
    """Points with their names, on linear scales; the vertical one need not begin at 0.

    Args:
        dots: the points.
        title: what the chart says, in words.
        across, up: the names of the scales.
        line: through these places, below the points.
        from_zero: the horizontal scale begins at 0.
    """
    width, height, left, base = 640.0, 340.0, 64.0, 292.0
    xs, ys = [*([0.0] if from_zero else []), *(d.x for d in dots)], [d.y for d in dots]
    across_ticks, up_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys, default=0.0), max(ys, default=1.0))
    x_low, x_high = min(*xs, across_ticks[0]), max(*xs, across_ticks[-1])
    y_low, y_high = min([*ys, up_ticks[0]]), max([*ys, up_ticks[-1]])

    def x(value: float) -> float:
        return left + (value - x_low) / ((x_high - x_low) or 1.0) * (width - left - 20)

    def y(value: float) -> float:
        return base - (value - y_low) / ((y_high - y_low) or 1.0) * (base - 24)

    parts = []
    for value in across_ticks:
        parts.append(tag("line", x1=x(value), y1=20, x2=x(value), y2=base, class_="grid"))
        parts.append(tag("text", f"{value:.6g}", x=x(value), y=base + 16, text_anchor="middle"))
    for value in up_ticks:
        parts.append(tag("line", x1=left, y1=y(value), x2=width - 20, y2=y(value), class_="grid"))
        parts.append(tag("text", f"{value:.6g}", x=left - 8, y=y(value) + 4, text_anchor="end"))
    parts.append(tag("text", across, x=width - 20, y=base + 36, text_anchor="end"))
    parts.append(tag("text", up, x=4, y=12))
    if line:
        path = " ".join(f"{_number(x(a))},{_number(y(b))}" for a, b in line)
        parts.append(tag("polyline", points=path, class_="front"))
    taken: list[tuple[float, float, float]] = []
    for dot in sorted(dots, key=lambda d: (d.y, d.x)):
        parts.append(_mark(dot, x(dot.x), y(dot.y)))
        if not dot.label:
            continue
        length = 6.4 * len(dot.label)
        after = x(dot.x) + 9 + length < width
        begin = x(dot.x) + 9 if after else x(dot.x) - 9 - length
        at = y(dot.y) + 4
        while any(begin < end and start < begin + length and abs(at - other) < 13 for start, end, other in taken):
            at -= 13
        taken.append((begin, begin + length, at))
        anchor, place = ("start", x(dot.x) + 9) if after else ("end", x(dot.x) - 9)
        parts.append(tag("text", dot.label, x=place, y=at, text_anchor=anchor, class_="name"))
    return drawing(title, width, height, parts, kind="points")


def _mark(dot: Dot, x: float, y: float) -> Markup:
    inside = [tag("title", dot.said)] if dot.said else []
    corners = {"beyond": "M-4 -4L4 4M-4 4L4 -4", "chosen": "M0 -8L8 0L0 8L-8 0Z"}
    if dot.kind == "float":
        mark = tag("rect", *inside, x=x - 4.5, y=y - 4.5, width=9, height=9, class_="dot float")
    elif dot.kind in corners:
        place = f"translate({_number(x)} {_number(y)})"
        mark = tag("path", *inside, d=corners[dot.kind], transform=place, class_=f"dot {dot.kind}")
    else:
        mark = tag("circle", *inside, cx=x, cy=y, r=5, class_=f"dot {dot.kind}")
    return tag("a", mark, href=dot.leads_to) if dot.leads_to else mark


def stack(parts: Mapping[str, tuple[float, str]], *, title: str) -> Markup:
    """One bar cut into shares: label -> (share, class)."""
    width, at, drawn = 640.0, 0.0, []
    for share, kind in parts.values():
        drawn.append(tag("rect", x=at * width, y=0, width=max(share * width - 1, 0), height=22, class_=f"fill {kind}"))
        at += share
    return drawing(title, width, 22, drawn, kind="stack")


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers around [low, high].

    >>> _ticks(0.0, 93.0)
    [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    >>> _ticks(0.0, 0.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        room = abs(high) * 0.01 or 1.0
        low, high = (low if low == 0 else low - room), high + room
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [round(step * k, 12) for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _number(value: object) -> object:
    """Coordinates to a tenth, without trailing zeros."""
    if isinstance(value, float):
        return f"{value:.1f}".rstrip("0").rstrip(".") or "0"
    return value
