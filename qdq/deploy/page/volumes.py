"""Whole volumes on the page: a table for each comparison, box plots of the cases, and pictures where there are some."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from engines.verify.volumes import Mean, StructureReport, VolumeComparison, VolumeReport
from qdq.deploy.page.svg import Box, boxes, drawing, tag
from qdq.deploy.volumes.slices import Slice
from qdq.deploy.volumes.table import lines

Array = npt.NDArray[Any]
SHOWN = 24  # structures in a box plot, the poorest first; the table has all


def volumes(report: VolumeReport | None, slices: tuple[Slice, ...], *, asked: bool) -> dict[str, Any] | None:
    """What whole volumes say; None where none were run.

    Keys: `tables` (`title`, `rows`), `plots`, `said`, `slices`, `pictures` (whether they were asked for).
    """
    if report is None:
        return None
    compared = (report.to_float, *report.to_labels)
    return {
        "cases": report.cases,
        "tables": [_table(c) for c in compared],
        "plots": _plots(report),
        "said": lines(report),
        "pictures": asked,
        "slices": [_slice(piece) for piece in slices],
    }


def _table(compared: VolumeComparison) -> dict[str, Any]:
    """Keys: `title`, `rows` with cells of (text, value to sort by)."""
    ordered = sorted(compared.structures, key=lambda s: s.dice.mean if s.dice else 2.0)
    return {"title": f"{_first(compared.found)} against the {compared.true}", "rows": [_row(s) for s in ordered]}


def _row(s: StructureReport) -> dict[str, Any]:
    return {
        "name": s.name,
        "dice": _mean(s.dice, 4),
        "least": _one(s.worst_dice, 4),
        "hd95": _mean(s.hd95_mm, 2),
        "most": _one(s.worst_hd95_mm, 2),
        "surface": _mean(s.surface_mm, 3),
        "volume": _mean(s.difference_ml, 3, sign=True),
        "lesions": f"{s.lesions}; {s.missed} missed, {s.false} false",
        "cases": _cases(s),
    }


def _mean(mean: Mean | None, digits: int, *, sign: bool = False) -> dict[str, Any]:
    if mean is None:
        return {"text": "none", "between": "", "value": ""}
    form = f"{{:{'+' if sign else ''}.{digits}f}}".format
    between = f"{form(mean.low)} to {form(mean.high)}" if mean.low is not None and mean.high is not None else ""
    return {"text": form(mean.mean), "between": between, "value": mean.mean}


def _one(value: float | None, digits: int) -> dict[str, Any]:
    known = value is not None
    return {"text": f"{value:.{digits}f}" if known else "none", "between": "", "value": value if known else ""}


def _cases(s: StructureReport) -> str:
    counted = s.dice.cases if s.dice else 0
    without = [(s.empty, "empty in both"), (s.only_found, "found only here"), (s.only_true, "not found here")]
    return "; ".join([str(counted), *(f"{count} {what}" for count, what in without if count)])


def _plots(report: VolumeReport) -> list[dict[str, Any]]:
    """Box plots of the Dice and of the HD95 of every case: of the candidate to float, else of both to labels."""
    found = []
    for field, unit, what in (("dice", "Dice", "Dice"), ("hd95_mm", "mm", "HD95")):
        sides = report.to_labels or (report.to_float,)
        kinds = ("float", "low") if report.to_labels else ("low",)
        rows = []
        ordered = sorted(sides[-1].structures, key=lambda s: s.dice.mean if s.dice else 2.0)[:SHOWN]
        for structure in ordered:
            for side, kind in zip(sides, kinds, strict=True):
                masks = (case.structures[structure.name] for case in side.cases)
                values = tuple(v for v in (getattr(mask, field) for mask in masks) if v is not None)
                whose = f"{structure.name}, {'float' if kind == 'float' else 'quantized'}"
                rows.append(Box(label=whose if report.to_labels else structure.name, values=values, kind=kind))
        against = "labels" if report.to_labels else "the float model"
        title = f"{what} of each case against {against}, by structure"
        if rows:
            found.append({"title": title, "picture": boxes(rows, title=title, unit=unit)})
    return found


def _slice(piece: Slice) -> dict[str, Any]:
    return {
        "case": piece.case,
        "number": piece.number,
        "of": piece.of,
        "differing": piece.differing,
        "contours": contours(piece),
        "differences": differences(piece),
    }


def _first(text: str) -> str:
    return text[:1].upper() + text[1:]


def contours(piece: Slice) -> Markup:
    """The slice with the borders of both models' labels: solid those of float, dashed those of the other."""
    lines = [
        tag("path", d=_borders(piece.expected), class_="contour expected"),
        tag("path", d=_borders(piece.found), class_="contour found"),
    ]
    title = (
        f"Case {piece.case}, slice {piece.number} of {piece.of}: the image, with the labels of the float model as "
        "solid lines and those of the quantized model as dashed lines"
    )
    return _picture(piece, _png(piece.image), lines, title)


def differences(piece: Slice) -> Markup:
    """The slice, darker, with the voxels that the models label differently."""
    dark = np.repeat(piece.image[..., None] // 3, 3, axis=2)
    dark[piece.expected != piece.found] = (240, 228, 66)  # yellow of Okabe and Ito, far from any grey of the image
    title = (
        f"Case {piece.case}, slice {piece.number} of {piece.of}: the {piece.differing} voxels that the quantized model "
        "labels differently, bright on the darkened image"
    )
    return _picture(piece, _png(dark), [], title)


def _picture(piece: Slice, png: bytes, lines: list[Markup], title: str) -> Markup:
    rows, columns = piece.image.shape
    height, width = rows * piece.pixel_mm[0], columns * piece.pixel_mm[1]
    scale = 400 / max(height, width)
    size = {"width": float(columns), "height": float(rows)}
    href = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    image = tag("image", href=href, **size, class_="pixels")
    fit = f"scale({width * scale / columns:.5f} {height * scale / rows:.5f})"
    letters = [
        tag("text", letter, x=x, y=y, class_="letter", text_anchor="middle")
        for letter, x, y in (
            ("R", 9.0, height * scale / 2),
            ("L", width * scale - 9, height * scale / 2),
            ("A", width * scale / 2, 15.0),
            ("P", width * scale / 2, height * scale - 6),
        )
    ]
    group = tag("g", image, *lines, transform=fit)
    return drawing(title, width * scale, height * scale, [group, *letters], kind="slice")


def _borders(labels: Array) -> str:
    """SVG path of the edges between pixels of different labels."""
    path = []
    across = labels[:, 1:] != labels[:, :-1]
    for column in np.flatnonzero(across.any(axis=0)):
        path += [f"M{column + 1} {a}V{b}" for a, b in _runs(across[:, column])]
    down = labels[1:] != labels[:-1]
    for row in np.flatnonzero(down.any(axis=1)):
        path += [f"M{a} {row + 1}H{b}" for a, b in _runs(down[row])]
    return "".join(path)


def _runs(line: Array) -> list[tuple[int, int]]:
    """Begin and end of each run of true values."""
    ends = np.flatnonzero(np.diff(np.concatenate([[0], line.view(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in ends.reshape(-1, 2)]


def _png(values: Array) -> bytes:
    """(rows, columns) grey or (rows, columns, 3) RGB, uint8, as PNG (ISO/IEC 15948: no filter, one IDAT)."""
    rows, columns = values.shape[:2]
    kind = 0 if values.ndim == 2 else 2
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), values.reshape(rows, -1)], axis=1)
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    file.seek(0, io.SEEK_END)
    for name, body in (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    ):
        file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
    return file.getvalue()
