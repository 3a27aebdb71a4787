"""Slices of images where the two models disagree most: kept only where the user asks for pictures.

labels of both models + image, case by case -> `Keeper`, the slice with the most voxels that differ -> slices.npz
slices.npz -> `Slice` -> the page. These are pixels of the user's images: nothing else that a run keeps is.
"""

from __future__ import annotations

import io
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from calib_data.volume import Affine, Volume
from engines.core.files import read_file
from qdq.core.errors import InputError

Array = npt.NDArray[Any]
FORMAT = "qdq.slices/1"
MOST = 6  # slices on a page, of as many cases
LARGEST = 512  # pixels along a side: beyond that every second, third, ... pixel is kept
VIEW = "LPS"  # axes of a picture: the patient's right on its left, anterior on top, as radiologists look at it
WINDOW = (0.5, 99.5)  # percentiles of the slice that are black and white


class Images(Protocol):
    """A case as far as pictures need it; see `calib_data.volumes.case.Case`."""

    @property
    def key(self) -> str:
        """Of the case, no name."""

    def image(self) -> Volume:
        """Its image."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slice:
    """One axial slice.

    Attributes:
        case: key of the case.
        number: of the slice, from the feet on, from 1.
        of: how many slices there are.
        differing: voxels of it that the models label differently.
        pixel_mm: height and width of a pixel.
        image: (rows, columns) uint8.
        expected: labels of the float model, (rows, columns) whole numbers.
        found: labels of the other.
    """

    case: str
    number: int
    of: int
    differing: int
    pixel_mm: tuple[float, float]
    image: Array
    expected: Array
    found: Array


@dataclass(slots=True)
class Keeper:
    """Keeps the worst slice of each of the worst cases."""

    slices: list[Slice] = field(default_factory=list)

    def see(self, case: Images, affine: Affine, expected: Array, found: Array) -> None:
        """Look at the labels (i, j, k) of both models on the grid of the case's file."""
        ours, theirs = (Volume(array=a[None], affine=affine).oriented(VIEW).array[0] for a in (expected, found))
        differing = (ours != theirs).sum(axis=(0, 1))
        index = int(differing.argmax())
        count = int(differing[index])
        if not count or (len(self.slices) == MOST and count <= self.slices[-1].differing):
            return
        image = case.image().oriented(VIEW)
        step = -(-max(image.grid[:2]) // LARGEST)
        width, height, _ = image.spacing_mm

        def cut(values: Array) -> Array:
            return np.ascontiguousarray(values[::step, ::step, index].T)

        kept = Slice(
            case=case.key,
            number=index + 1,
            of=len(differing),
            differing=count,
            pixel_mm=(height * step, width * step),
            image=_grey(cut(image.array[0])),
            expected=cut(ours),
            found=cut(theirs),
        )
        self.slices = sorted([*self.slices, kept], key=lambda s: -s.differing)[:MOST]

    def save(self, path: Path) -> None:
        """Write them; of models that agree everywhere, a file without any."""
        heads = [
            {"case": s.case, "number": s.number, "of": s.of, "differing": s.differing, "pixel_mm": s.pixel_mm}
            for s in self.slices
        ]
        arrays = {
            f"{name}_{n}": getattr(s, name)
            for n, s in enumerate(self.slices)
            for name in ("image", "expected", "found")
        }
        text = json.dumps({"format": FORMAT, "slices": heads})
        np.savez_compressed(path, **{"about": np.asarray(text), **arrays})


def read_slices(path: Path) -> tuple[Slice, ...]:
    """The slices of a file.

    Raises:
        InputError: it is damaged, or another file.
    """
    try:
        with np.load(io.BytesIO(read_file(path)), allow_pickle=False) as held:
            about = json.loads(str(held["about"]))
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']!r}")
            found = [
                Slice(**_head(head), **{name: held[f"{name}_{n}"] for name in ("image", "expected", "found")})
                for n, head in enumerate(about["slices"])
            ]
        for each in found:
            shapes = {each.image.shape, each.expected.shape, each.found.shape}
            if len(shapes) > 1 or each.image.ndim != 2 or each.image.dtype != np.uint8 or not each.image.size:
                raise ValueError("its arrays do not fit each other")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error, BadZipFile) as error:
        raise InputError(f"Cannot use the pictures {path}: {error}. Deploy again with --with-images.") from None
    return tuple(found)


def _head(head: Any) -> dict[str, Any]:
    height, width = (float(v) for v in head["pixel_mm"])
    if not (0 < height < np.inf and 0 < width < np.inf):
        raise ValueError("a pixel of it has no size")
    counts = {name: int(head[name]) for name in ("number", "of", "differing")}
    return {"case": str(head["case"]), "pixel_mm": (height, width), **counts}


def _grey(values: Array) -> Array:
    """Values as grey levels."""
    low, high = np.percentile(values, WINDOW)
    return np.asarray(np.clip((values - low) / ((high - low) or 1) * 255, 0, 255), np.uint8)
