"""MODEL arguments that are no ONNX file: `torch:package.module:factory`, `x.pt2`, `hf:FOLDER`.

text -> `origin_of` -> an `Origin`, or None for the path of an ONNX file -> `Origin.export` -> `Exported`.
A new kind is a line of `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from calib_data import Samples
from qdq.frontend.exported import TOLERANCE, Dynamic, Exported
from qdq.model.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How an origin is exported.

    Attributes:
        data: text of --data: its first sample is the example where the origin has none; None where there is none.
        volume: the recipe's `volume:` where data are images, else None.
        shapes: input name -> shape, of random values that are the example where there are no data.
        samples: opens the samples for the written file, on the first of which it is compared with the original; None
            for the example alone.
        dynamic, opset, tolerance: as of `export_torch`.
        task: of `hf:` only.
    """

    data: str | None = None
    volume: Any = None
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    samples: Callable[[Model], Samples] | None = None
    dynamic: Dynamic | bool | None = None
    opset: int | None = None
    tolerance: float = TOLERANCE
    task: str | None = None


class Origin(Protocol):
    """A model that is not an ONNX file yet; found, and not exported."""

    @property
    def stem(self) -> str:
        """Name of the ONNX file without its ending, and of what is made of it; names no folder."""

    def export(self, path: Path, wanted: Wanted) -> Exported:
        """Write the ONNX file and check it; what else it needs lies beside it.

        Raises:
            QdqError: it cannot be exported; names the cause.
        """


KINDS: Mapping[str, str] = {  # prefix or ending of the text -> "module:function" that gives the Origin of a text
    "torch:": "qdq.frontend.factory:factory_of",
    ".pt2": "qdq.frontend.factory:program_of",
}


def kind_of(text: str) -> str | None:
    """The key of `KINDS` that a text belongs to; None for an ONNX file."""
    return next((k for k in KINDS if (text.startswith(k) if k.endswith(":") else text.endswith(k))), None)


def origin_of(text: str | Path) -> Origin | None:
    """What a MODEL argument names; None for the path of an ONNX file, which is used as it is.

    Raises:
        InputError: there is no such module, factory, file or folder; or importing it fails.
        MissingRuntimeError: torch is not installed.
    """
    if (kind := kind_of(str(text))) is None:
        return None
    module, function = KINDS[kind].split(":")
    opened: Callable[[str], Origin] = getattr(import_module(module), function)
    return opened(str(text))
