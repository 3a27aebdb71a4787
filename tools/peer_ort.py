"""ONNX Runtime's static INT8 with what TensorRT needs, run in an environment of its own: MODEL.onnx DATA.npz OUT.onnx.

Called by `bench_placement.py`. DATA.npz holds one array per input, samples along axis 0. Symmetric, per channel, bias
float, Q and DQ on weights; needs onnxruntime, onnx and sympy.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """The samples in turn."""

    def __init__(self, arrays: Mapping[str, np.ndarray], batch: int) -> None:
        """`batch` samples are fed at a time."""
        count = len(next(iter(arrays.values())))
        self.samples = iter([{k: v[i : i + batch] for k, v in arrays.items()} for i in range(0, count, batch)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next sample."""
        return next(self.samples, None)


def main(model: str, data: str, out: str) -> None:
    """Quantize a copy of the model that ONNX Runtime's own pre-processing made."""
    entry = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).get_inputs()[0].shape[0]
    with tempfile.TemporaryDirectory() as folder, np.load(data) as stored:
        prepared = str(Path(folder) / "model.onnx")
        quant_pre_process(model, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            out,
            Reader(dict(stored), entry if isinstance(entry, int) else 1),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "AddQDQPairToWeight": True,
            },
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
