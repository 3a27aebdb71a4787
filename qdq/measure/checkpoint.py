"""A calibration that is killed at any moment goes on where it was.

tables so far -> checkpoint file (replaced whole, every few seconds) -> the same command reads it -> final table.
The file names what it belongs to; anything else is refused. A leftover temporary file has a fixed name and is replaced
by the next run. This module must not measure anything.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from engines.core.documents import Document
from engines.core.files import unfinished
from qdq.core.errors import InputError, StaleFileError
from qdq.core.files import read_document, write_text
from qdq.measure.table import CalibrationTable, TableFile

EVERY_S = 2.0
SHARE = 20  # writing takes at most one part in 20 of the time


class CheckpointFile(Document, frozen=True, kw_only=True):
    """What the file holds; `key` and `state` as in `Checkpoint`; the last of `parts` is perhaps incomplete."""

    FORMAT: ClassVar[str] = "qdq.checkpoint/2"
    MAKE: ClassVar[str] = "qdq calibrate"

    key: dict[str, Any]
    state: dict[str, Any]
    parts: tuple[TableFile, ...]


class Checkpoint:
    """The file beside the table that is being made.

    Attributes:
        path: of the file.
        key: what the calibration depends on: hashes of model and plan, and the settings, as plain values.
            The samples are in the tables, one by one.
        state: what `write` was given with the tables, after `load`.
    """

    def __init__(self, path: Path, key: Mapping[str, object], *, every_s: float = EVERY_S) -> None:
        """Name the file; nothing is read or written yet."""
        self.path, self.key = path, dict(key)
        self.state: dict[str, Any] = {}
        self._every_s = every_s
        self._due = time.monotonic() + every_s

    @classmethod
    def beside(cls, table: Path, key: Mapping[str, object]) -> Checkpoint:
        """The checkpoint of a table file: `.<name>.checkpoint` in the same folder."""
        return cls(table.with_name(f".{table.name}.checkpoint"), key)

    def load(self) -> tuple[CalibrationTable, ...]:
        """What an earlier run left, () if nothing: complete tables of some tensors, the last one perhaps incomplete.

        Raises:
            StaleFileError: the file belongs to another calibration; says in what they differ.
            InputError: the file is not a checkpoint.
        """
        if not self.path.exists():
            return ()
        try:
            file = read_document(self.path, CheckpointFile, "checkpoint")
            tables = tuple(CalibrationTable.from_file(part, str(self.path)) for part in file.parts)
        except InputError as error:
            raise InputError(f"{error} Delete it to begin anew.") from None
        key = file.key
        if odd := [name for name in {**key, **self.key} if key.get(name) != self.key.get(name)]:
            raise StaleFileError(
                f"An unfinished calibration lies in {self.path}, of another {', '.join(odd)}. Repeat the command that "
                "began it, delete that file to begin anew, or write the table elsewhere."
            )
        self.state = dict(file.state)
        return tables

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() >= self._due

    def write(self, parts: Sequence[CalibrationTable], state: Mapping[str, object] | None = None) -> None:
        """Keep these tables, of which the last one may be incomplete, and plain values that say more.

        Raises:
            InputError: the folder is not writable.
        """
        began = time.monotonic()
        head = json.dumps({"schema": CheckpointFile.FORMAT, "key": self.key, "state": dict(state or {})})[:-1]
        tables = ",\n".join(p.to_json() for p in parts)
        write_text(self.path, f'{head}, "parts": [\n{tables}]}}\n', resumed=True)
        ended = time.monotonic()
        self._due = ended + max(self._every_s, SHARE * (ended - began))

    def remove(self) -> None:
        """The calibration is complete and its table is written."""
        for path in (self.path, unfinished(self.path)):
            with suppress(FileNotFoundError):
                path.unlink()
