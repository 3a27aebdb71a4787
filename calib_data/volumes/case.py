"""One case: an image and perhaps a label, read when asked, and called by a number and a key in all that is said.

files of a source -> Case with a private name -> `keyed` -> "case 3 of 12 (key 5f0c...)" in messages.
It must not let a name, a path or a text of a file reach a message: names of files often are those of patients.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from calib_data.validation import DataError
from calib_data.volume import Affine, Volume

KEY_DIGITS = 12  # hexadecimal, of 64: enough to tell cases apart
LEAST_KEY = 16  # bytes of a key file; fewer can be guessed
_OF_THIS_RUN = os.urandom(32)
_LOGGERS = ("pydicom", "highdicom", "nibabel.global", "PIL")  # they print values of headers


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an image comes from, which may identify a patient: told to who asks for it, in no message.

    Attributes:
        files: one, or those of a DICOM series.
        series: SeriesInstanceUID of a DICOM series, else "".
        slices: of a series: file and frame of each slice in the order of k, and their distance in mm.
    """

    files: tuple[Path, ...] = field(repr=False)
    series: str = field(repr=False, default="")
    slices: Callable[[], tuple[list[tuple[Path, int]], float]] = field(repr=False, default=lambda: ([], 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One image of a source.

    Attributes:
        name: tells the case from others and orders them; may identify a patient, so nobody is told.
        image: reads it, all channels on one grid.
        affine: its place, from headers alone.
        label: reads the label, one channel of whole numbers on the image's grid, its axes perhaps in another order or
            direction; None where there is none.
        origins: of each image that it is made of, in the order of channels.
        where: what messages call it.
        key: keyed hash of the name.
    """

    name: str = field(repr=False)
    image: Callable[[], Volume] = field(repr=False)
    affine: Callable[[], Affine] = field(repr=False)
    label: Callable[[], Volume] | None = field(repr=False, default=None)
    origins: tuple[Origin, ...] = field(repr=False, default=())
    where: str = "an image"
    key: str = ""


class Cases(list[Case]):
    """The images of a source.

    Attributes:
        left_out: what of its files is none of them and why, in words without a name; "" where all are taken.
    """

    left_out: str = ""


def keyed(cases: Sequence[Case], key: bytes | None = None) -> list[Case]:
    """The cases in the order of their names, each with its number and the HMAC-SHA256 of its name.

    Args:
        cases: of one source.
        key: the user's; None for one that is made for this run and kept nowhere.
    """
    ordered, found = sorted(cases, key=lambda case: case.name), []
    for number, case in enumerate(ordered, 1):
        code = hmac.new(key or _OF_THIS_RUN, case.name.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()
        where = f"case {number} of {len(ordered)} (key {code[:KEY_DIGITS]})"
        found.append(replace(case, where=where, key=code[:KEY_DIGITS]))
    return found


def read_case_key(path: Path | str) -> bytes:
    """The bytes of a key file, which stays with the user.

    Raises:
        DataError: it is no file, or too short to be a secret.
    """
    try:
        with Path(path).open("rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            key = file.read(4096) if regular else b""
    except OSError as error:
        raise DataError(f"Cannot read the key of cases {path}: {error.strerror}. Check the path.") from None
    if len(key) < LEAST_KEY:
        raise DataError(
            f"The key of cases {path} has {len(key)} bytes; at least {LEAST_KEY} are needed, else who knows a name can "
            "find its key. Make one: head -c 32 /dev/urandom > case.key"
        )
    return key


@contextmanager
def told(where: str) -> Iterator[None]:
    """Say of which case an error is. What libraries say is left out, as they quote what files hold.

    Raises:
        DataError: in place of any exception inside.
    """
    _QUIET.enter()
    try:
        yield
    except DataError as error:
        raise type(error)(f"Cannot use {where}: {error}") from None
    except (MemoryError, RecursionError) as error:
        raise DataError(f"Cannot use {where}: {type(error).__name__}; it may need more memory than there is.") from None
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or "its data end early or are damaged"
        raise DataError(f"Cannot use {where}: {why}. Write the file again, or remove it.") from None
    except Exception as error:
        raise DataError(
            f"Cannot use {where}: its header or data are damaged, or of a form that is not known "
            f"({type(error).__name__}). Write the file again, or remove it."
        ) from None
    finally:
        _QUIET.leave()


class _Quiet:
    """Libraries say nothing while any thread reads a header: their loggers and warnings are those of all threads."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._levels: dict[str, int] = {}
        self._caught = warnings.catch_warnings()

    def enter(self) -> None:
        """The first thread makes them quiet."""
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            self._levels = {name: logging.getLogger(name).level for name in _LOGGERS}
            for name in self._levels:
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)
            self._caught = warnings.catch_warnings()
            self._caught.__enter__()
            warnings.simplefilter("ignore")

    def leave(self) -> None:
        """The last thread lets them speak again."""
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            self._caught.__exit__(None, None, None)
            for name, level in self._levels.items():
                logging.getLogger(name).setLevel(level)


_QUIET = _Quiet()


def as_channels(volumes: Sequence[Volume]) -> Volume:
    """Images of one case as the channels of one, with the axes of the first.

    Raises:
        DataError: they do not lie on one grid.
    """
    volumes = [volume.oriented(volumes[0].orientation) for volume in volumes]
    for number, volume in enumerate(volumes[1:], 2):
        if not volume.same_grid(volumes[0]):
            raise DataError(
                f"image {number} of it lies on another grid than the first: {_apart(volume, volumes[0])}. Register and "
                "resample the channels to one grid."
            )
    if len(volumes) == 1:
        return volumes[0]
    return Volume(array=np.concatenate([volume.array for volume in volumes]), affine=volumes[0].affine)


def check_label(label: Volume, image: Volume) -> None:
    """Require a label on the image's grid, of one channel and whole numbers from 0 on.

    Raises:
        DataError: it is another one.
    """
    if not label.same_grid(image):
        raise DataError(
            f"its label lies on another grid than its image: {_apart(label, image)}. Give the label of this image, or "
            "resample it to the image's grid (nearest)."
        )
    array = label.array
    if len(array) != 1 or (array.dtype.kind == "f" and bool((array != array.round()).any())) or array.min() < 0:
        raise DataError("its label holds several channels, or values that are no whole numbers from 0 on.")


def _apart(one: Volume, other: Volume) -> str:
    """How two grids differ."""
    if one.grid != other.grid or _said(one) != _said(other):
        return f"{_said(one)} against {_said(other)}"
    return f"both {_said(one)}, but up to {one.apart_mm(other):.3g} mm apart"


def _said(volume: Volume) -> str:
    grid, spacing = "x".join(map(str, volume.grid)), " x ".join(f"{size:.4g}" for size in volume.spacing_mm)
    return f"{grid} voxels of {spacing} mm, {volume.orientation}"
