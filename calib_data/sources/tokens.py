"""Token ids: a .jsonl file, a sample a line: a list of ids, or a mapping of input name to (nested) list.

A list for an input with a batch axis gets one. Ids in a .npy file are read as any .npy file is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calib_data.sources import ArrayForm, Form, RawSample, SampleShapes
from calib_data.validation import Array, DataError, InputSpec

_FIX = "Write a list of numbers a line, or a mapping of input name to list."


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLines:
    """The lines of a file that are not empty, each a sample; where it starts is known, what it holds is not kept."""

    path: Path
    inputs: Sequence[InputSpec]
    offsets: tuple[int, ...]

    @classmethod
    def open(cls, path: Path, inputs: Sequence[InputSpec]) -> TokenLines:
        """Find the lines.

        Raises:
            DataError: there is none.
        """
        offsets, at = [], 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    offsets.append(at)
                at += len(line)
        if not offsets:
            raise DataError(f"No samples in {path}: it has no line. {_FIX}")
        return cls(path=path, inputs=inputs, offsets=tuple(offsets))

    @property
    def count(self) -> int:
        """Number of lines."""
        return len(self.offsets)

    def read(self, indices: range) -> Iterator[RawSample]:
        """Parse one line after the other."""
        with self.path.open("rb") as file:
            for i in indices:
                where = f"{self.path}, line {i + 1}"
                file.seek(self.offsets[i])
                yield RawSample(where, self._arrays(file.readline(), where))

    def shapes(self, indices: range) -> Iterator[SampleShapes]:
        """By reading: a line tells nothing before."""
        return (SampleShapes(s.where, {n: a.shape for n, a in s.arrays.items()}) for s in self.read(indices))

    def _arrays(self, line: bytes, where: str) -> Mapping[str, Array]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"Cannot read {where}: it is not JSON. {_FIX}") from None
        if isinstance(found, list):
            if len(self.inputs) != 1:
                names = ", ".join(repr(spec.name) for spec in self.inputs)
                raise DataError(f"{where} is one list, and the model has the inputs {names}. Write a mapping a line.")
            found = {self.inputs[0].name: found}
        if not isinstance(found, dict):
            raise DataError(f"Cannot read {where}: it is neither a list nor a mapping. {_FIX}")
        return {name: self._array(name, values, where) for name, values in found.items()}

    def _array(self, name: str, values: object, where: str) -> Array:
        try:
            array = np.array(values)
        except ValueError:
            array = np.array(None)
        if array.dtype.kind not in "biuf":
            raise DataError(f"{name!r} in {where} is no list of numbers of one length. {_FIX}")
        rank = next((len(spec.shape) for spec in self.inputs if spec.name == name), array.ndim)
        return array[None] if array.ndim == rank - 1 else array


def arrays(source: str) -> dict[str, ArrayForm]:
    """Those of the first line, where it is a mapping."""
    lines = TokenLines.open(Path(source), ())
    with lines.path.open("rb") as file:
        file.seek(lines.offsets[0])
        line = file.readline()
    if line.lstrip().startswith(b"["):
        return {}
    return {name: ArrayForm(a.shape, a.dtype) for name, a in lines._arrays(line, f"{source}, line 1").items()}


FORM = Form(
    says="a .jsonl file of token ids",
    owns=lambda source: Path(source).is_file() and source.lower().endswith(".jsonl"),
    open=lambda source, inputs: TokenLines.open(Path(source), inputs),
    arrays=arrays,
)
