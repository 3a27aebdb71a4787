"""An ONNX file in ONNX Runtime against the model that it was exported from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.core.onnx_runtime import session
from qdq.frontend.exported import OutputError

Arrays = Mapping[str, np.ndarray]


def compared(
    path: Path, samples: Iterable[tuple[Arrays, Sequence[np.ndarray]]], outputs: Sequence[str]
) -> tuple[tuple[OutputError, ...], int]:
    """How far each output is from the original's, and over how many samples.

    Args:
        path: of the ONNX file.
        samples: of each, input name -> array, and what the original gives, in the order of `outputs`.
        outputs: their names.

    Raises:
        EngineError: ONNX Runtime refuses the file.
        Exception: it fails on a sample.
    """
    opened = session(path)
    taken = {info.name for info in opened.get_inputs()}
    largest, scale = np.zeros(len(outputs)), np.zeros(len(outputs))
    noise, signal = np.zeros(len(outputs)), np.zeros(len(outputs))
    count = 0
    for sample, original in samples:
        got = opened.run(list(outputs), {name: array for name, array in sample.items() if name in taken})
        for i, (wanted, found) in enumerate(zip(original, got, strict=True)):
            whole = wanted.dtype.kind in "biu"
            differs, size = _difference(np.asarray(wanted, np.float64), np.asarray(found, np.float64), whole)
            largest[i] = max(largest[i], differs.max(initial=0.0))
            scale[i] = max(scale[i], size.max(initial=0.0))
            noise[i] += np.sum(differs**2)
            signal[i] += np.sum(size**2)
        count += 1
    return tuple(
        OutputError(
            name=name,
            largest=float(largest[i]),
            relative=float(largest[i] / scale[i]) if scale[i] else float(largest[i] and np.inf),
            sqnr_db=float(10 * np.log10(signal[i] / noise[i])) if noise[i] and signal[i] else None,
        )
        for i, name in enumerate(outputs)
    ), count


def _difference(wanted: Any, found: Any, whole: bool) -> tuple[Any, Any]:
    """Of each element: how far it is, and its size. Of whole numbers, such as classes: the part that differs, and 1."""
    if wanted.shape != found.shape:
        return np.array([np.inf]), np.array([1.0])
    same = (wanted == found) | (np.isnan(wanted) & np.isnan(found))
    if whole:
        return np.array([1.0 - same.mean() if same.size else 0.0]), np.array([1.0])
    with np.errstate(invalid="ignore"):
        differs = np.where(same, 0.0, np.abs(wanted - found))
    differs[np.isnan(differs)] = np.inf
    return differs, np.where(np.isfinite(wanted), np.abs(wanted), 0.0)
