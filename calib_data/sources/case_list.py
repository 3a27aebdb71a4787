"""A CSV or JSON list of cases: `image[, image2...], label, case`, with paths relative to the list.

JSON is a list of mappings with these keys. The images of a case are its channels; each is a file or a folder that
another form reads.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from calib_data.sources import ImageForm, forms
from calib_data.validation import DataError
from calib_data.volumes.case import Case, Cases, as_channels, told

MOST_BYTES = 16 << 20
MOST_TOLD = 3  # rows of which is said what was left out
_IMAGE = re.compile(r"image([2-9]|[1-9]\d)?")
NEEDED = "columns image, image2 and so on (one for each channel), and where wanted label and case"


def owns(source: str) -> bool:
    """Whether a text names a list: a .csv file, or a .json file."""
    return Path(source).is_file() and Path(source).suffix.lower() in (".csv", ".json")


def cases(source: str) -> Cases:
    """The cases of a list.

    Raises:
        DataError: it is no such list, a case stands there twice, or a path is nothing that can be read.
    """
    found: dict[str, Case] = {}
    left: list[str] = []
    for number, row in enumerate(rows := _rows(Path(source)), 1):
        given = {key.strip(): value.strip() for key, value in row.items() if value and value.strip()}
        images = sorted((key for key in given if _IMAGE.fullmatch(key)), key=lambda key: int(key[5:] or 1))
        unknown = [key for key in given if not _IMAGE.fullmatch(key) and key not in ("label", "case")]
        whole = [f"image{n or ''}" if n != 1 else "image" for n in range(1, len(images) + 1)]
        if unknown or not images or images != whole:
            what = f"the images {', '.join(images) or 'none'}"
            if unknown:  # a list without headings has a path there
                near = get_close_matches(unknown[0], ("image", "image2", "label", "case"), n=1)
                what = "a column that is not known" + (f" (did you mean {near[0]!r}?)" if near else "")
            raise DataError(f"Row {number} of {len(rows)} of the list of cases has {what}; it must have {NEEDED}.")
        name = given.get("case", given["image"])
        if name in found:
            raise DataError(f"Row {number} of {len(rows)} of the list of cases names a case that is there before.")
        read = {
            key: _one(Path(source).parent / given[key], f"row {number} of {len(rows)} of the list of cases ({key})")
            for key in (*images, *(key for key in given if key == "label"))
        }
        parts = [read[key][0] for key in images]
        found[name] = Case(
            name=name,
            image=lambda parts=parts: as_channels([part.image() for part in parts]),  # type: ignore[misc]
            affine=parts[0].affine,
            label=read["label"][0].image if "label" in read else None,
            origins=tuple(origin for part in parts for origin in part.origins),
        )
        left += [f"Row {number} ({key}): {some.left_out}" for key, some in read.items() if some.left_out]
    if not found:
        raise DataError(f"The list of cases is empty; it needs {NEEDED}.")
    made = Cases(found.values())
    more = [f"So it is with {len(left) - MOST_TOLD} more."] if len(left) > MOST_TOLD else []
    made.left_out = " ".join([*left[:MOST_TOLD], *more])
    return made


def _one(path: Path, where: str) -> Cases:
    """The one image that a path names.

    Raises:
        DataError: no form of images reads it, or it holds several.
    """
    form = next((f for f in forms() if isinstance(f, ImageForm) and f is not FORM and f.owns(str(path))), None)
    with told(where):
        if form is None:
            what = "a file that no form of images reads" if path.exists() else "a path that does not exist"
            raise DataError(f"it names {what}. Paths count from the list's folder.")
        found = form.cases(str(path))
        if len(found) != 1:
            raise DataError(f"it names {len(found)} images; one is needed. Give each a row, or a folder of its own.")
        return found


def _rows(path: Path) -> Sequence[Mapping[str, str]]:
    """Rows as mappings of texts.

    Raises:
        DataError: it is no table.
    """
    data = path.read_bytes()[: MOST_BYTES + 1]
    if len(data) > MOST_BYTES:
        raise DataError(f"The list of cases has more than {MOST_BYTES} bytes.")
    try:
        text = data.decode("utf-8-sig")
        if path.suffix.lower() == ".csv":
            read = list(csv.DictReader(io.StringIO(text), restkey="a value without a column", strict=True))
        else:
            read = json.loads(text)
    except (ValueError, csv.Error, RecursionError):
        raise DataError(f"The list of cases is no {path.suffix[1:].upper()} in UTF-8; it needs {NEEDED}.") from None
    plain = isinstance(read, list) and all(
        isinstance(row, dict) and all(isinstance(v, str | None) for v in row.values()) for row in read
    )
    if not plain:
        raise DataError(f"The list of cases is no list of rows with texts; it needs {NEEDED}.")
    return read


FORM = ImageForm(says="a CSV or JSON list of images, labels and cases", owns=owns, cases=cases)
