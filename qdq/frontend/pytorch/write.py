"""An ONNX file of a job, in one of the two ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from engines.core.files import write_atomic
from qdq.core.errors import InputError
from qdq.frontend.pytorch.axes import Axes, widened
from qdq.frontend.pytorch.capture import (
    program,
    require_fixed_file,
    require_fixed_values,
    write_program,
    write_traced,
)
from qdq.frontend.pytorch.job import Job, NotExportedError
from qdq.frontend.pytorch.libraries import held_back
from qdq.frontend.pytorch.refused import why
from qdq.frontend.pytorch.renamed import renamed

OPSET, TRACED_OPSETS = 20, (17, 20)  # that the compilers' parsers and the older exporter know


def write(job: Job, file: Path, axes: Axes, *, traced: bool) -> list[str]:
    """Write the file, with our names.

    Args:
        job: what is exported.
        file: in a folder of its own.
        axes: sizes that stay open.
        traced: by TorchScript.

    Returns:
        Notes.

    Raises:
        NotExportedError: this way does not work.
        InputError: no way does.
    """
    label, external = job.how.label, job.external
    tensors = widened(job.tensors, axes)
    try:
        with held_back():
            if traced:
                said = _traced(job, file, axes, tensors)
                require_fixed_file(file, label)
            else:
                said = []
                captured = job.captured or program(job.traceable, tensors, axes)
                require_fixed_values(captured, label)
                write_program(captured, file, job.call.names, job.outputs, job.how.opset or OPSET, external)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # whatever torch and onnxscript raise
        raise NotExportedError(why(error)) from error
    proto = onnx.load(str(file), load_external_data=False)
    renamed(proto, dict(zip(job.call.names, axes, strict=True)))
    write_atomic(file, proto.SerializeToString())
    return said


def _traced(job: Job, file: Path, axes: Axes, tensors: Sequence[Any]) -> list[str]:
    """Write the file as a trace, in the first opset that has all operators."""
    made = job.traceable
    opsets = (job.how.opset,) if job.how.opset else TRACED_OPSETS
    for opset in opsets:
        try:
            said = list(write_traced(made, tensors, file, job.call.names, job.outputs, axes, opset))
            break
        except Exception as error:
            if opset == opsets[-1] or "Unsupported" not in type(error).__name__:
                raise
    if job.external or any(p != file for p in file.parent.iterdir()):
        proto = onnx.load(str(file))
        for left in file.parent.iterdir():
            left.unlink()
        onnx.save(proto, str(file), save_as_external_data=True, location=f"{file.name}.data", size_threshold=1024)
    return said
