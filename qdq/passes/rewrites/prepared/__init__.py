"""Exact rewrites that `prepare` always does: forms that TensorRT refuses, and products that no quantizer fits."""
