"""One file with the samples along the leading axis of its arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calib_data.sources import ArrayForm, Form, RawSample, SampleShapes
from calib_data.stored_arrays import StoredArray, stored_arrays
from calib_data.validation import DataError, InputSpec, check_names, require_one_input


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedFile:
    """One ``.npz`` (or ``.npy``, for a model of one input): samples along the leading axis of every array.

    Case 1: the array has one axis more than the input: sample i is ``a[i]``.
    Case 2: the same rank: sample i is ``a[i : i + 1]``; where the model fixes n > 1, ``a[i * n : (i + 1) * n]``.
    """

    path: Path
    arrays: Mapping[str, StoredArray]
    blocks: Mapping[str, int | None]
    count: int

    @classmethod
    def open(cls, path: Path, inputs: Sequence[InputSpec]) -> StackedFile:
        """Read the headers and count the samples.

        Raises:
            DataError: unreadable; wrong names or rank; no samples; the arrays disagree on how many there are.
        """
        if path.suffix == ".npy":
            require_one_input(path, inputs)
            arrays = {inputs[0].name: stored_arrays(path)[""]}
        else:
            arrays = stored_arrays(path)
        check_names(arrays, inputs, str(path))
        blocks: dict[str, int | None] = {}
        counts: dict[str, int] = {}
        for spec in inputs:
            shape, rank, leading = arrays[spec.name].shape, len(spec.shape), spec.shape[:1]
            if len(shape) == rank + 1:  # case 1
                blocks[spec.name], counts[spec.name] = None, shape[0]
            elif len(shape) == rank > 0:  # case 2
                block = leading[0] if isinstance(leading[0], int) else 1
                if block < 1 or shape[0] % block:
                    raise DataError(
                        f"Cannot split {spec.name!r} in {path} into samples: its leading axis has {shape[0]} elements, "
                        f"the model takes {block} at a time. Give a multiple of {block}."
                    )
                blocks[spec.name], counts[spec.name] = block, shape[0] // block
            else:
                raise DataError(
                    f"Wrong rank of {spec.name!r} in {path}: got shape {shape} of rank {len(shape)}; the model's input "
                    f"has rank {rank}, so rank {rank + 1} with samples on the leading axis is needed, or rank {rank} "
                    "with the batch axis as samples. Stack the samples with numpy.stack."
                )
        if len(set(counts.values())) > 1:
            raise DataError(
                f"The arrays in {path} disagree on the number of samples: got {counts}, one number is needed. Save the "
                "same samples for every input."
            )
        if (count := next(iter(counts.values()))) == 0:
            raise DataError(f"No samples in {path}: its arrays have a leading axis of size 0; at least one is needed.")
        return cls(path=path, arrays=arrays, blocks=blocks, count=count)

    def read(self, indices: range) -> Iterator[RawSample]:
        """Stream all arrays side by side, one sample at a time."""
        rows = [array.rows(indices, self.blocks[name]) for name, array in self.arrays.items()]
        for i, values in zip(indices, zip(*rows, strict=True), strict=True):
            yield RawSample(f"{self.path}, sample {i}", dict(zip(self.arrays, values, strict=True)))

    def shapes(self, indices: range) -> Iterator[SampleShapes]:
        """All samples have one shape."""
        leading = {name: () if block is None else (block,) for name, block in self.blocks.items()}
        shapes = {name: (*leading[name], *array.shape[1:]) for name, array in self.arrays.items()}
        return (SampleShapes(f"{self.path}, sample {i}", shapes) for i in indices)


def arrays(source: str) -> dict[str, ArrayForm]:
    """Those of the file without their leading axis; the array of a .npy file has no name."""
    found = stored_arrays(Path(source)) if source.endswith(".npz") else {}
    return {name: ArrayForm(array.shape[1:], array.dtype) for name, array in found.items()}


FORM = Form(
    says="one .npz or .npy file with samples on the leading axis",
    owns=lambda source: Path(source).is_file() and Path(source).suffix in (".npz", ".npy"),
    open=lambda source, inputs: StackedFile.open(Path(source), inputs),
    arrays=arrays,
)
