"""Which tensors are quantized and how, without data. Must not run a model."""
