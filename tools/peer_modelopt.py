"""NVIDIA Model Optimizer's INT8, run in an environment of its own: MODEL.onnx DATA.npz OUT.onnx [METHOD [REST]].

Called by `bench_tune.py` and `bench_placement.py`. DATA.npz holds one array per input, samples along axis 0. METHOD is
"max" (unless given) or "entropy", Model Optimizer's own default; REST is the type of what is not quantized, "fp16"
unless given.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from modelopt.onnx.quantization import quantize


def main(model: str, data: str, out: str, method: str = "max", rest: str = "fp16") -> None:
    """Quantize a copy of the model: it writes beside its input."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.onnx"
        copy.write_bytes(Path(model).read_bytes())
        with np.load(data) as stored:
            arrays = dict(stored)
        quantize(
            str(copy),
            quantize_mode="int8",
            calibration_data=arrays,
            calibration_method=method,
            calibration_eps=["cpu"],
            high_precision_dtype=rest,
            output_path=out,
            log_level="ERROR",
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
