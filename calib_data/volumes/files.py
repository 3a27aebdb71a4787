"""Cases that are files: one file, a folder of them, or nnU-Net's layout.

A folder `imagesTr` beside `labelsTr`, or the folder that holds both; `CASE_0000`, `CASE_0001` are channels of one case.
It must not open a file.

Source: nnU-Net, documentation/dataset_format.md.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from calib_data.sources import ImageForm
from calib_data.validation import DataError
from calib_data.volume import Affine, Volume
from calib_data.volumes.case import Case, Cases, Origin, as_channels

ENDINGS = {
    "NIfTI": (".nii", ".nii.gz"),
    "NRRD": (".nrrd", ".nhdr"),
    "MetaImage": (".mha", ".mhd"),
    "picture": (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"),
}
_CHANNEL = re.compile(r"(.+)_(\d{4})")


def files_in(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The files of a folder with one of these endings in small or capital letters, but hidden ones, by name."""
    return sorted(p for p in folder.iterdir() if p.name.lower().endswith(tuple(endings)) and not p.name.startswith("."))


def holds(source: str, endings: Sequence[str]) -> bool:
    """Whether a text names a file with one of these endings, or a folder of such files and of no arrays."""
    path = Path(source)
    if path.is_file():
        return path.name.lower().endswith(tuple(endings))
    folder = _images(path)
    return folder.is_dir() and bool(files_in(folder, endings)) and not files_in(folder, (".npz", ".npy"))


def form_of_files(
    says: str, kind: Sequence[str], image: Callable[[Path], Volume], affine: Callable[[Path], Affine]
) -> ImageForm:
    """The form of images that are files of some kinds; `kind`, `image` and `affine` as of `cases_of`."""
    endings = [ending for name in kind for ending in ENDINGS[name]]
    return ImageForm(
        says=says,
        owns=partial(holds, endings=endings),
        cases=partial(cases_of, kind=kind, image=image, affine=affine),
    )


def cases_of(
    source: str, kind: Sequence[str], image: Callable[[Path], Volume], affine: Callable[[Path], Affine]
) -> Cases:
    """The cases of a text that `holds` files of some kinds in `ENDINGS`.

    Args:
        source: a file or a folder.
        kind: keys of `ENDINGS`.
        image: reads a file.
        affine: reads where its image lies.

    Raises:
        DataError: files of several kinds lie there, or the channels of a case are not numbered from 0 on.
    """
    path, endings = Path(source), tuple(ending for name in kind for ending in ENDINGS[name])
    if path.is_file():
        return Cases([_case(_stem(path, endings), [path], None, image, affine)])
    folder = _images(path)
    refuse_others(folder, *kind)
    channels: dict[str, list[Path]] = defaultdict(list)
    files = files_in(folder, endings)
    for file in files:
        stem = _stem(file, endings)
        match = _CHANNEL.fullmatch(stem)
        channels[match[1] if match else stem].append(file)
    labels = _labels(folder, endings)
    found = Cases()
    for name, some in channels.items():
        numbers = [int(match[2]) for file in some if (match := _CHANNEL.fullmatch(_stem(file, endings)))]
        if (numbers or len(some) > 1) and numbers != list(range(len(some))):
            raise DataError(
                f"The channels of one of the {len(channels)} cases are numbered {numbers}: CASE_0000, CASE_0001 and so "
                "on are needed, each once and without a gap."
            )
        found.append(_case(name, some, labels.get(name), image, affine))
    return found


def refuse_others(folder: Path, *kind: str) -> None:
    """Refuse a folder that holds images of other kinds too.

    Raises:
        DataError: it does.
    """
    for other, some in ENDINGS.items():
        if folder.is_dir() and other not in kind and files_in(folder, some):
            raise DataError(
                f"The folder of the samples holds {' and '.join(kind)} files and {other} files: one kind is needed. "
                "Move the others away, or list the images in a CSV file."
            )


def _case(
    name: str,
    files: Sequence[Path],
    label: Path | None,
    image: Callable[[Path], Volume],
    affine: Callable[[Path], Affine],
) -> Case:
    return Case(
        name=name,
        image=lambda: as_channels([image(file) for file in files]),
        affine=partial(affine, files[0]),
        label=None if label is None else partial(image, label),
        origins=tuple(Origin(files=(file,)) for file in files),
    )


def _images(path: Path) -> Path:
    """The folder of the images, below a data set of nnU-Net."""
    inside = path / "imagesTr"
    return inside if inside.is_dir() else path


def _labels(images: Path, endings: Sequence[str]) -> dict[str, Path]:
    """Case -> its label beside a folder imagesTr or imagesTs; none elsewhere."""
    folder = images.with_name(images.name.replace("images", "labels", 1))
    if not images.name.startswith("images") or not folder.is_dir():
        return {}
    return {_stem(path, endings): path for path in files_in(folder, endings)}


def _stem(path: Path, endings: Sequence[str]) -> str:
    """The name without its ending."""
    ending = max((e for e in endings if path.name.lower().endswith(e)), key=len, default="")
    return path.name[: len(path.name) - len(ending)]
