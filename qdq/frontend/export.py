"""`export_torch`: a PyTorch module becomes an ONNX file that is checked against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qdq.frontend.exported import Dynamic, Exported


def export_torch(
    module: Any,
    example_inputs: Any,
    path: Path | str,
    *,
    dynamic: Dynamic | bool | None = None,
    opset: int | None = None,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    samples: Iterable[Mapping[str, Any]] = (),
    tolerance: float = 1e-3,
    source: str = "",
) -> Exported:
    """Write a module as an ONNX file, and check it in ONNX Runtime against PyTorch.

    The module is left as it was: it is exported in eval mode and put back after that, and its buffers stay.

    Args:
        module: a torch.nn.Module, a torch.jit.ScriptModule or a torch.export.ExportedProgram, on any device.
        example_inputs: a tensor, a tuple of what `forward` takes by position, or a dict by name. None and values that
            are no tensor are fixed in the file.
        path: of the ONNX file. Weights beyond 1.5 GB go to `<path>.data`.
        dynamic: sizes that stay open, as {"input": {0: "batch"}}; False: none; None: the batch, if the file is then
            right for other batches too.
        opset: of ONNX; None: one that the compilers take.
        input_names, output_names: in place of those of the signature of `forward`, and of the keys that it returns.
        samples: more inputs to compare on, input name -> array.
        tolerance: largest difference that an output may have, as a part of its largest magnitude.
        source: what messages, notes and records call the module; "": its class.

    Raises:
        InputError: the module cannot be exported, or the file computes something else; names the cause.
        MissingRuntimeError: torch or onnxscript is not installed.
    """
    raise NotImplementedError
