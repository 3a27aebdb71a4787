"""Diffusion models: samples for calibration from real sampling, and a sampler that knows what quantization adds.

`Schedule` + float model -> `Trajectory` -> samples; float and quantized model on them -> `NoiseCorrection` -> sampler.
Must not build or quantize a model, or need PyTorch.
"""
