"""Which image each label file is of: a table that only who asks for it gets, for it holds what identifies patients.

cases and the names of their label files -> CSV, a row for each image that a case is made of. Must not be written, nor
any of it said, unless a user names a file for it.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from calib_data.volumes.case import Case, Origin
from engines.core.files import new_files
from qdq.core.errors import InputError

COLUMNS = ("labels", "case", "key", "image", "source", "series")
WARNING = "It holds paths and series of images, which can identify patients: keep it where they are kept"


def case_map(cases: Sequence[Case], files: Sequence[str]) -> str:
    """The table as CSV: label file, number and key of the case; number, path and SeriesInstanceUID of each image.

    Args:
        cases: keyed.
        files: the label file of each.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for number, (case, file) in enumerate(zip(cases, files, strict=True), 1):
        for image, origin in enumerate(case.origins, 1):
            rows.writerow([file, number, case.key, image, _place(origin), origin.series])
    return text.getvalue()


def write_private(path: Path, text: str) -> None:
    """Write a file, whole or not at all, that its owner alone may read.

    Raises:
        InputError: the folder is missing or not writable.
    """
    try:
        with new_files(path) as (file,):
            os.fchmod(file.fileno(), 0o600)
            file.write(text.encode(errors="surrogateescape"))
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}. Choose a folder that is writable.") from None


def _place(origin: Origin) -> str:
    """The file of an image, or the folder that holds all files of its series."""
    if len(origin.files) == 1:
        return str(origin.files[0].absolute())
    return os.path.commonpath([file.absolute().parent for file in origin.files])
