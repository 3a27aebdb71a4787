"""NVIDIA Model Optimizer's INT8, run in an environment of its own.

    python tools/peer_modelopt.py MODEL.onnx DATA.npz OUT.onnx [METHOD [REST [ATTENTION]]]

Called by `bench_tune.py` and `bench_placement.py`. DATA.npz holds one array per input, samples along axis 0. METHOD is
"max" (unless given) or "entropy", Model Optimizer's own default; REST is the type of what is not quantized, "fp16"
unless given; ATTENTION "float" leaves its products in that type, where "int8" leaves them to Model Optimizer's rules.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from modelopt.onnx.quantization import quantize


def main(model: str, data: str, out: str, method: str = "max", rest: str = "fp16", attention: str = "int8") -> None:
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
            disable_mha_qdq=attention == "float",
            output_path=out,
            log_level="ERROR",
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
