"""Where samples come from: one class per form of DATA, all with the same three members.

Flow: open_samples picks a source -> Source.read(indices) yields (where, arrays) for those samples only ->
Samples checks each. Source.shapes(indices) tells their shapes from file headers, where there are headers.
It must not check values against the model, nor hold more than one sample.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from calib_data.stored_arrays import StoredArray, stored_arrays
from calib_data.validation import Array, DataError, InputSpec, check_names, check_shape


class RawSample(NamedTuple):
    """One sample as read, not yet checked; ``where`` names it in messages."""

    where: str
    arrays: Mapping[str, Array]


class SampleShapes(NamedTuple):
    """The shape of each array of one sample."""

    where: str
    shapes: Mapping[str, tuple[int, ...]]


class Source(Protocol):
    """Samples in a fixed order; ``count`` is None where only reading tells. ``read`` starts afresh at each call."""

    @property
    def count(self) -> int | None:
        """Number of samples."""

    def read(self, indices: range) -> Iterator[RawSample]:
        """Yield the samples at these ascending indices; indices beyond the last sample are ignored."""

    def shapes(self, indices: range) -> Iterator[SampleShapes]:
        """Yield the shapes of the same samples, without reading values where the form allows."""


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
        files = sorted(p for p in folder.iterdir() if p.suffix in (".npz", ".npy") and not p.name.startswith("."))
        kinds = Counter(path.suffix for path in files)
        if not files:
            others = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise DataError(
                f"No samples in the folder {folder}: it holds {others}; one .npz (or .npy) file per sample is needed. "
                "Save each sample with numpy.savez(path, **inputs), or give a module.py:function that yields dicts."
            )
        if len(kinds) > 1:
            raise DataError(
                f"Cannot tell which files of the folder {folder} are the samples: got {kinds['.npz']} .npz and "
                f"{kinds['.npy']} .npy files, one kind is needed. Move the others away."
            )
        if ".npy" in kinds:
            _require_one_input(files[0], inputs)
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
            _require_one_input(path, inputs)
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
        count = next(iter(counts.values()))
        if count == 0:
            raise DataError(f"No samples in {path}: its arrays have a leading axis of size 0; at least one is needed.")
        return cls(path=path, arrays=arrays, blocks=blocks, count=count)

    def read(self, indices: range) -> Iterator[RawSample]:
        """Stream all arrays side by side, one sample at a time."""
        rows = [array.rows(indices, self.blocks[name]) for name, array in self.arrays.items()]
        for i, values in zip(indices, zip(*rows, strict=True), strict=True):
            yield RawSample(f"{self.path}, sample {i}", dict(zip(self.arrays, values, strict=True)))

    def shapes(self, indices: range) -> Iterator[SampleShapes]:
        """All samples have one shape."""
        shapes = {
            name: array.shape[1:] if (block := self.blocks[name]) is None else (block, *array.shape[1:])
            for name, array in self.arrays.items()
        }
        return (SampleShapes(f"{self.path}, sample {i}", shapes) for i in indices)


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonFunction:
    """A user's function, called afresh for each pass; it returns or yields dicts of arrays.

    What the function itself raises is not caught: its traceback points at the user's own code.
    """

    where: str
    function: Callable[[], object]
    count: int | None = None

    @classmethod
    def open(cls, path: Path, name: str) -> PythonFunction:
        """Import the file and find the function.

        Raises:
            DataError: the file is missing or cannot be imported, or has no such function.
        """
        if not path.is_file():
            raise DataError(f"No such file: {path}, in the data source {path}:{name}. Check the path.")
        module_name = f"calib_data_source_{path.stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None  # the caller has checked the suffix .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        sys.path.insert(0, str(path.resolve().parent))  # as for a script: modules beside the file can be imported
        try:
            spec.loader.exec_module(module)
        except (SyntaxError, ImportError) as error:
            raise DataError(
                f"Cannot import the data source {path}: {type(error).__name__}: {error}. Mend it."
            ) from error
        finally:
            sys.path.remove(str(path.resolve().parent))
        function = getattr(module, name, None)
        if not callable(function):
            there = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
            raise DataError(
                f"No function {name!r} in {path}: it has {there}; a function without arguments that yields dicts "
                "(input name -> array) is needed. Check the name after the colon."
            )
        return cls(where=f"{path}:{name}", function=function)

    def read(self, indices: range) -> Iterator[RawSample]:
        """Call the function and pick the samples asked for; the others are drawn and dropped."""
        result = self.function()
        items = [result] if isinstance(result, Mapping) else result
        if not isinstance(items, Iterable):
            raise DataError(
                f"{self.where} returned {type(result).__name__}; an iterable of dicts is needed. Yield one dict per "
                "sample."
            )
        picked = itertools.islice(enumerate(items), indices.start, indices.stop, indices.step)
        for i, item in picked:
            where = f"{self.where}, sample {i}"
            if not isinstance(item, Mapping):
                raise DataError(
                    f"{where} is a {type(item).__name__}; a dict of input name -> array is needed. Yield "
                    "one dict per sample."
                )
            yield RawSample(where, {str(name): _as_array(value, str(name), where) for name, value in item.items()})

    def shapes(self, indices: range) -> Iterator[SampleShapes]:
        """Call the function and look at its arrays: there is no header to read."""
        for where, arrays in self.read(indices):
            yield SampleShapes(where, {name: array.shape for name, array in arrays.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomNumbers:
    """Random samples, for an explicit ``--random-data`` only. Sample i depends on the seed and i alone."""

    inputs: Sequence[InputSpec]
    dims: Mapping[str, tuple[int, ...]]
    count: int
    seed: int

    def read(self, indices: range) -> Iterator[RawSample]:
        """Floats from the standard normal distribution, integers 0 to 7, bools by a fair coin."""
        for i in indices:
            rng = np.random.default_rng((self.seed, i))
            arrays: dict[str, Array] = {}
            for spec in self.inputs:
                dtype, shape = np.dtype(spec.dtype), self.dims[spec.name]
                high = 2 if dtype.kind == "b" else 8
                values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, high, shape)
                arrays[spec.name] = np.asarray(values, dtype)
            yield RawSample(f"random sample {i}", arrays)

    def shapes(self, indices: range) -> Iterator[SampleShapes]:
        """The shapes that were asked for."""
        return (SampleShapes(f"random sample {i}", self.dims) for i in indices)


def _as_array(value: object, name: str, where: str) -> Array:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise DataError(f"{name!r} in {where} is not an array: {error}. Yield a numpy array.") from error


def _require_one_input(path: Path, inputs: Sequence[InputSpec]) -> None:
    if len(inputs) != 1:
        names = ", ".join(repr(spec.name) for spec in inputs)
        raise DataError(
            f"Cannot tell which input {path} is for: a .npy file holds one array, the model has {len(inputs)} inputs "
            f"({names}). Save .npz files: numpy.savez(path, **{{name: array}})."
        )
