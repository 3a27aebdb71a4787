"""A folder of files, one sample each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calib_data.sources import ArrayForm, Form, RawSample, SampleShapes
from calib_data.stored_arrays import StoredArray, stored_arrays
from calib_data.validation import DataError, InputSpec, check_names, check_shape, require_one_input


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFolder:
    """A folder: each ``.npz`` (or each ``.npy``, for a model of one input) is one sample, in order of name."""

    files: Sequence[Path]
    inputs: Sequence[InputSpec]

    @classmethod
    def open(cls, folder: Path, inputs: Sequence[InputSpec]) -> FileFolder:
        """List the samples of a folder; hidden and other files are ignored.

        Raises:
            DataError: no samples, both forms at once, or ``.npy`` files for a model of several inputs.
        """
        files = _files(folder)
        forms = Counter(path.suffix for path in files)
        if len(forms) > 1:
            raise DataError(
                f"Cannot tell which files of the folder {folder} are the samples: got {forms['.npz']} .npz and "
                f"{forms['.npy']} .npy files, one kind is needed. Move the others away."
            )
        if ".npy" in forms:
            require_one_input(files[0], inputs)
        return cls(files=files, inputs=inputs)

    @property
    def count(self) -> int:
        """Number of files."""
        return len(self.files)

    def read(self, indices: range) -> Iterator[RawSample]:
        """Read one file after the other."""
        for path, stored in self._stored(indices):
            yield RawSample(str(path), {name: array.read() for name, array in stored.items()})

    def shapes(self, indices: range) -> Iterator[SampleShapes]:
        """Read one file's headers after the other."""
        for path, stored in self._stored(indices):
            yield SampleShapes(str(path), {name: array.shape for name, array in stored.items()})

    def _stored(self, indices: range) -> Iterator[tuple[Path, dict[str, StoredArray]]]:
        for i in indices:
            path = self.files[i]
            stored = stored_arrays(path)
            if path.suffix == ".npy":
                stored = {self.inputs[0].name: stored[""]}
            check_names(stored, self.inputs, str(path))  # before values: a wrong file may be huge
            for spec in self.inputs:
                check_shape(stored[spec.name].shape, spec, str(path))
            yield path, stored


def _files(folder: Path) -> list[Path]:
    """The files that are samples, by name.

    Raises:
        DataError: none is.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix in (".npz", ".npy") and not p.name.startswith("."))
    if files:
        return files
    others = [p.suffix for p in folder.iterdir() if p.is_file()]  # no name, nor the folder's: both may be a patient's
    kinds = ", ".join(sorted({suffix or "without an ending" for suffix in others})[:5])
    held = f"{len(others)} file{'s' * (len(others) > 1)}, {kinds}" if others else "nothing"
    raise DataError(
        f"No samples in the folder that was given: it holds {held}. Needed are images (NIfTI, DICOM with its preamble, "
        "NRRD), or one .npz (or .npy) file per sample: save each with numpy.savez(path, **inputs), or give a "
        "module.py:function that yields dicts."
    )


def arrays(source: str) -> dict[str, ArrayForm]:
    """Those of the first .npz file.

    Raises:
        DataError: the folder holds no samples.
    """
    first = next((p for p in _files(Path(source)) if p.suffix == ".npz"), None)
    return {n: ArrayForm(a.shape, a.dtype) for n, a in (stored_arrays(first) if first else {}).items()}


FORM = Form(
    says="a folder of .npz or .npy files",
    owns=lambda source: Path(source).is_dir(),
    open=lambda source, inputs: FileFolder.open(Path(source), inputs),
    arrays=arrays,
    last=True,
)
